"""Show what a configuration's data become: `genlora data`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from genlora_lightning.text import text_table

_LEARNED, _PLAIN = "\033[32m", "\033[0m"
_SHOWN_DUPLICATES, _WIDTH = 3, 100
_FIRST = 1000  # records of a stream that are looked at
_SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", action="append", required=True, help="as for `fit`; later ones win")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="default: %(default)s")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="how many to show (default: %(default)s)")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="default: %(default)s")


def run_data(options: argparse.Namespace) -> None:
    """Print the numbers of a split, the lengths, and some examples as the model sees them.

    Raises:
        ValueError: The configuration has no data module of this package, or the data cannot be used.
    """
    from genlora_lightning.cli.train import DataCLI
    from genlora_lightning.data import FileDataModule, ImageClassificationDataModule, InstructionDataModule

    data = DataCLI([word for config in options.config for word in ("--config", config)]).datamodule
    if not isinstance(data, (FileDataModule, ImageClassificationDataModule)):
        raise ValueError(f"The configuration's data module is {type(data).__name__}; only the package's own are shown.")
    data.prepare_data()
    data.setup("test" if options.split == "test" else "fit")
    if isinstance(data, InstructionDataModule) and data.streaming and options.split == "train":
        data.load_first(_FIRST)
        print(f"The training data are streamed; this is of their first {len(data.rows('train')):,} rows.")
    rows = data.rows(options.split)
    if isinstance(data, ImageClassificationDataModule):
        print(f"\n{_pictures(rows, data.label_names)}\n\n{_equal(data.duplicates(options.split), 'pictures')}")
        for number, row in enumerate(rows[: options.examples], 1):
            size = f"{row['width']} × {row['height']} {row['mode']}"
            print(f"\n--- example {number} of {len(rows):,}: {row['where']}, {size}")
            print(f"=> {data.label_names[row['labels']]}")
        return
    lengths = sorted(rows["length"])
    places = [lengths[round(share * (len(lengths) - 1))] for share in _SHARES]
    names = ["shortest", "median", "90 %", "99 %", "longest"]
    print("\n" + text_table(["tokens of an example", *names], [[options.split, *(f"{place:,}" for place in places)]]))
    print(f"\n{_left_out(data.summary()[options.split])}\n{_equal(data.duplicates(options.split))}")
    colored = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    for number in range(min(options.examples, len(rows))):
        row = rows[number]
        print(f"\n--- example {number + 1} of {len(rows):,}: {row['length']} tokens{_answers(row)}")
        print(shown(row, data.tokenizer, colored))
    if options.examples and isinstance(rows[0].get("labels"), list):
        print(f"\nLearned is what is {'green' if colored else 'between ⟦ and ⟧'}.")


def shown(row: dict[str, Any], tokenizer: Any, colored: bool) -> str:
    """Returns an example as text, its learned tokens marked; a class or numbers as a last line."""
    ids, labels = row["input_ids"], row.get("labels", row.get("label"))
    if not isinstance(labels, list) or len(labels) != len(ids):
        return f"{tokenizer.decode(ids)}\n=> {labels}"
    start, end = (_LEARNED, _PLAIN) if colored else ("⟦", "⟧")
    parts = []
    at = 0
    while at < len(ids):
        learned = labels[at] != -100
        stop = next((i for i in range(at, len(ids)) if (labels[i] != -100) != learned), len(ids))
        text = tokenizer.decode(ids[at:stop])
        parts.append(f"{start}{text}{end}" if learned else text)
        at = stop
    return "".join(parts)


def _pictures(rows: list[dict[str, Any]], names: list[str]) -> str:
    """How many pictures each class has, which sizes, and in which of Pillow's modes they are."""
    classes = Counter(names[row["labels"]] for row in rows)
    counts = [[name, f"{classes[name]:,}", f"{classes[name] / len(rows):.1%}"] for name in names]
    by_area = sorted(rows, key=lambda row: row["width"] * row["height"])
    places = [by_area[round(share * (len(rows) - 1))] for share in _SHARES]
    sizes = ["width × height", *(f"{row['width']} × {row['height']}" for row in places)]
    modes = Counter(row["mode"] for row in rows)
    return (
        f"{text_table(['class', 'pictures', 'share'], counts)}\n\n"
        f"{text_table(['pixels', 'smallest', 'median', '90 %', '99 %', 'largest'], [sizes])}\n\n"
        f"Stored as {', '.join(f'{mode}: {count:,}' for mode, count in modes.most_common())}; the model sees RGB."
    )


def _left_out(counts: dict[str, int]) -> str:
    """What `max_length` took away."""
    names = ("cut_examples", "cut_tokens", "lost_answers", "dropped_examples")
    parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts.get(name)]
    return f"Left out by max_length: {', '.join(parts)}" if parts else "Nothing is cut or dropped."


def _equal(duplicates: list[tuple[str, int]], what: str = "inputs") -> str:
    """How many examples ask what another one asks, and the most frequent of these inputs."""
    if not duplicates:
        return f"All {what} are different."
    more = sum(count - 1 for _, count in duplicates)
    often = "".join(f"\n  {count:,} × {_shortened(key)}" for key, count in duplicates[:_SHOWN_DUPLICATES])
    one = "input" if what == "inputs" else "picture"
    return f"{more:,} examples have the {one} of another one; the most frequent {what}:{often}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _answers(row: dict[str, Any]) -> str:
    notes = [f"{row['answer_tokens']} learned"] if "answer_tokens" in row else []
    notes += [f"{row['cut_tokens']} cut"] if row.get("cut_tokens") else []
    return "".join(f", {note}" for note in notes)
