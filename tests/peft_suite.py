"""Run PEFT's own tests of its methods on GenLoRA: `make peft-tests`.

The tests come from PEFT's source distribution, of one release, whose digest is checked. Rows for GenLoRA are put into
their tables beside those of VeRA, PEFT's own method that is most like it, and these rows are run: every configuration
of linears and Conv1D that LoRA and VeRA have there. GenLoRA has no embeddings, convolutions, attention modules or bare
parameters. Nothing may fail, and nothing may be skipped but what is skipped for VeRA, too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import peft

ROOT = Path(__file__).parents[1]
VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
FILES = ("test_custom_models.py", "test_config.py")
# They ask the Hub for a folder of LoRA, whatever kind they are given.
WITH_HUB = ("test_from_pretrained[", "test_from_pretrained_cache_dir[", "test_save_pretrained_with_runtime_config[")
# Of one kind of PEFT's own, or refused for all: rows of VeRA are skipped there as well.
SKIPPED_FOR_VERA = ("test_disable_adapter_with_bias_warns[", "test_active_adapter[Vanilla MLP 5 ")

# lin0 of the tests' MLP has 10 inputs and 20 outputs, lin1 20 and 2: no more groups than outputs.
# The Conv1D has one.
SMALL = '"r": 8, "num_groups_b": 2'
CASES = f"""
    ("Vanilla MLP 1 GenLoRA", "MLP", GenLoraConfig, {{"target_modules": "lin0", {SMALL}}}),
    ("Vanilla MLP 2 GenLoRA", "MLP", GenLoraConfig, {{"target_modules": ["lin0"]}}),
    ("Vanilla MLP 3 GenLoRA", "MLP", GenLoraConfig, {{"target_modules": ["lin1"], {SMALL}}}),
    ("Vanilla MLP 4 GenLoRA", "MLP", GenLoraConfig, {{"target_modules": ["lin0", "lin1"], {SMALL}}}),
    ("Vanilla MLP 5 GenLoRA", "MLP", GenLoraConfig, {{"target_modules": ["lin0"], "modules_to_save": ["lin1"]}}),
    (
        "Vanilla MLP 6 GenLoRA",
        "MLP",
        GenLoraConfig,
        {{"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1, {SMALL}}},
    ),
    ("Vanilla MLP 7 GenLoRA, rank", "MLP", GenLoraConfig, {{"target_modules": ["lin0"], "r": 3, "use_rslora": False}}),
    (
        "Vanilla MLP 8 GenLoRA, learned shapes",
        "MLP",
        GenLoraConfig,
        {{"target_modules": ["lin0"], "num_centers": 2, "learn_centers": True, "learn_widths": True}},
    ),
    (
        "Embedding + transformers Conv1D 1 GenLoRA",
        "EmbConv1D",
        GenLoraConfig,
        {{"target_modules": ["conv1d"], "num_groups_b": 1}},
    ),
"""
SEVERAL = f"""
    (
        "GenLoRA Same",
        "genlora",
        GenLoraConfig,
        {{"target_modules": ["lin0"], "init_weights": False}},
        {{"target_modules": ["lin0"], "init_weights": False}},
    ),
    (
        "GenLoRA Different",
        "genlora",
        GenLoraConfig,
        {{"target_modules": ["lin0"], "init_weights": False}},
        {{"target_modules": ["lin1"], "init_weights": False, {SMALL}}},
    ),
"""
IMPORT = "from genlora_lightning.interop.peft import GenLoraConfig\n"
ONLY = "{0} = [row for row in {0} if GenLoraConfig in row]\n"
# File, a line that is there once, and what is put before it.
INSERTIONS = (
    ("test_custom_models.py", "# MLP is a vanilla FF network with only linear layers\n", IMPORT),
    ("test_custom_models.py", '    ("Vanilla MLP 1 VeRA",', CASES.lstrip("\n")),
    ("test_custom_models.py", '    (\n        "VeRA Same",', SEVERAL.lstrip("\n")),
    # Of other kinds there are thousands; those are PEFT's own matter.
    ("test_custom_models.py", "ALL_PEFT_CONFIG_CLASSES = ", ONLY.format("TEST_CASES")),
    ("test_custom_models.py", "class MLP(nn.Module):\n", ONLY.format("MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES")),
    ("test_config.py", "# Config classes and their mandatory parameters\n", IMPORT),
    ("test_config.py", "    (VeraConfig, {}),\n", "    (GenLoraConfig, {}),\n"),
)


def main() -> int:
    """Fetch the tests, put the rows in, and run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".peft-tests", help="where the distribution is kept")
    parser.add_argument("pytest_args", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    if peft.__version__ != VERSION:
        sys.exit(f"peft {peft.__version__} is installed; its tests are taken from {VERSION}.")
    tests = unpacked(fetched(options.folder), options.folder)
    report = options.folder / "report.xml"
    # One process for all: each takes seconds to import, and the rows themselves take none.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests.parent]
    command += ["-c", os.devnull, f"--junitxml={report}", "-k", "GenLora or GenLoRA"]
    for name in WITH_HUB:
        command += ["--deselect", f"tests/test_config.py::TestPeftConfig::{name}"]
    command += [*options.pytest_args, *(tests / name for name in FILES)]
    paths = [str(ROOT), str(tests.parent / "stubs"), os.environ.get("PYTHONPATH", "")]
    # One thread: some tests ask for equality to 1e-5 of log-probabilities near zero, where the order of a sum shows.
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(list(map(str, command)), cwd=tests.parent, env=environment, check=False)
    outcomes = read_outcomes(report)
    skipped = [name for name, outcome in outcomes.items() if outcome == "skipped"]
    lacking = [name for name in skipped if not name.startswith(SKIPPED_FOR_VERA)]
    for name in lacking:
        print(f"skipped, but run for VeRA: {name}")
    return 1 if done.returncode or lacking or "passed" not in outcomes.values() else 0


def fetched(folder: Path) -> Path:
    """The distribution, from the folder or from the package index that pip is set to."""
    path = folder / f"peft-{VERSION}.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", folder, f"peft=={VERSION}"]
        subprocess.run(list(map(str, command)), check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        path.unlink()
        sys.exit(f"{path} has SHA-256 {found}, not {SHA256}: it is another file than the one that was read.")
    return path


def unpacked(archive: Path, folder: Path) -> Path:
    """Unpack the tests, and put the rows into them."""
    with tarfile.open(archive) as file:
        members = [m for m in file.getmembers() if m.name.startswith(f"peft-{VERSION}/tests/")]
        if hasattr(tarfile, "data_filter"):
            file.extractall(folder, members, filter="data")
        else:
            file.extractall(folder, members)
    place = folder / f"peft-{VERSION}"
    (place / "tests" / "__init__.py").touch()
    # All that the tests take of diffusers, for tests that are not run here.
    (place / "stubs").mkdir(exist_ok=True)
    (place / "stubs" / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")
    for name, line, inserted in INSERTIONS:
        path = place / "tests" / name
        text = path.read_text(encoding="utf-8")
        if text.count(line) != 1:
            sys.exit(f"{path} has {line!r} {text.count(line)} times, not once.")
        path.write_text(text.replace(line, inserted + line), encoding="utf-8")
    return place / "tests"


def read_outcomes(report: Path) -> dict[str, str]:
    """Each test's outcome by its name."""
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        outcomes[str(case.get("name"))] = outcome
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
