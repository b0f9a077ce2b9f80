"""Look at a data file: is it for a classifier, and of which labels, or for a language model."""

from __future__ import annotations

from genlora_lightning.data._files import iterate_records
from genlora_lightning.data._forms import FORMS, parse_conversation
from genlora_lightning.errors import DataFileError


def labels_of(path: str, argument: str) -> list[str] | None:
    """Returns the labels of a file of texts for a classifier, sorted, or None for what a language model learns.

    Args:
        path: A file, or a name on the Hub, as the data modules take them.
        argument: The argument it was given as, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        DataFileError: It cannot be read, is empty, or its first record has no form that is known; of texts with
            labels, any record.
    """
    labels: set[str] = set()
    for record in iterate_records(path, argument):
        if {"text", "label"} <= set(record.fields) and not {form.field for form in FORMS[:-1]} & set(record.fields):
            labels.add(str(record.fields["label"]))
        elif labels:
            raise DataFileError(record.where, "has no 'text' and 'label', as the records before it have")
        else:
            parse_conversation(record, plain=False, system_prompt=None, needs_answer=True)
            return None
    if not labels:
        raise DataFileError(path, f"{argument} holds no records")
    return sorted(labels)
