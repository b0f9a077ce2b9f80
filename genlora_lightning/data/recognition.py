"""Look at data: are they for a classifier of texts or of pictures, and of which labels, or for a language model."""

from __future__ import annotations

import os
from typing import NamedTuple

from genlora_lightning.data._files import iterate_records
from genlora_lightning.data._formats import SUFFIXES
from genlora_lightning.data._forms import FORMS, parse_conversation
from genlora_lightning.data._pictures import picture_records, split_folders
from genlora_lightning.errors import DataFileError


class Recognized(NamedTuple):
    """What data are: of texts or pictures, with their labels, sorted, or ``None`` for what a language model learns."""

    of_images: bool
    labels: list[str] | None


def recognize(path: str, argument: str) -> Recognized:
    """Returns what data are for.

    Args:
        path: A file, a folder of pictures, or a name on the Hub, as the data modules take them.
        argument: The argument it was given as, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        DataFileError: It cannot be read, is empty, or its first record has no form that is known; of texts with
            labels, any record.
    """
    if os.path.isdir(path):
        _check_no_folder_of_tables(path, argument)
        return Recognized(True, _labels_of_pictures(split_folders(path).get("train", path), argument))
    labels: set[str] = set()
    for record in iterate_records(path, argument):
        if not labels and {"image", "label"} <= set(record.fields):
            return Recognized(True, _labels_of_pictures(path, argument))
        if {"text", "label"} <= set(record.fields) and not {form.field for form in FORMS[:-1]} & set(record.fields):
            labels.add(str(record.fields["label"]))
        elif labels:
            raise DataFileError(record.where, "has no 'text' and 'label', as the records before it have")
        else:
            parse_conversation(record, plain=False, system_prompt=None, needs_answer=True)
            return Recognized(False, None)
    if not labels:
        raise DataFileError(path, f"{argument} holds no records")
    return Recognized(False, sorted(labels))


def _check_no_folder_of_tables(path: str, argument: str) -> None:
    with os.scandir(path) as inside:
        entries = sorted(inside, key=lambda entry: entry.name)
    tables = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    if tables and not any(entry.is_dir() for entry in entries):
        raise DataFileError(
            path, f"{argument} is a folder, as pictures have it; give a file in it, such as {tables[0]}"
        )


def has_validation(path: str) -> bool:
    """Returns whether a folder of pictures brings its own ones for validation."""
    return "val" in split_folders(path)


def _labels_of_pictures(path: str, argument: str) -> list[str]:
    labels = set()
    for record in picture_records(path, argument, "image", "label"):
        if "label" not in record.fields:
            raise DataFileError(record.where, "has no label; give a folder per class, or a field 'label'")
        labels.add(str(record.fields["label"]))
    if not labels:
        raise DataFileError(path, f"{argument} holds no pictures")
    return sorted(labels)
