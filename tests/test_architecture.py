"""The direction in which the modules may import each other, and what importing them may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genlora_lightning

PACKAGE = Path(genlora_lightning.__file__).parent

# Each module may import those of rows above its own, and of its own row. Lightning begins at the row of the callback.
ROWS = [
    ["budget", "config", "tables", "atomic", "digests", "random_state", "resumable", "shapes"],
    ["basis", "signs"],
    ["generator", "fused"],
    ["factors"],
    ["layers"],
    ["generation"],
    ["accumulation"],
    ["coverage", "targets", "full_training", "widening"],
    ["sharded_loading"],
    ["injection"],
    ["pieces", "state", "analysis", "optim", "base_identity", "restoring"],
    [
        "parallel",
        "adapter_io",
        "architectures",
        "checks",
        "finite",
        "bases",
        "checkpoint_files",
        "folders",
        "manifest",
        "model_card",
        "tensor_file",
    ],
    ["checkpoint", "merging", "lora_export", "lora_files", "lora_fit", "lora_import"],
    ["loading"],
    ["activations", "planning", "traffic"],
    ["inspection", "last_checkpoint", "tool", "tool_plan", "__main__"],
    ["resume", "checkpoint_io", "strategies"],
    ["ranks", "step_generation", "reading"],
    ["callback", "data", "throughput"],
    ["modules", "progress", "predictions", "cli_errors"],
    ["cli"],
]
WITHOUT_LIGHTNING = {name for row in ROWS[:15] for name in row}


def top_module(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module or "")
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_what_stands_above_it(path):
    row_of = {name: i for i, row in enumerate(ROWS) for name in row}
    own = top_module(path)
    assert own in row_of, f"{own} has no place in ROWS yet"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "genlora_lightning" and len(parts) > 1 and parts[1] != own:
            assert row_of[parts[1]] <= row_of[own], f"{own} must not import {parts[1]}"
        if own in WITHOUT_LIGHTNING:
            assert parts[0] not in {"lightning", "pytorch_lightning"}, f"{own} must not import Lightning"


def test_every_public_name_can_be_imported_and_is_documented():
    for name in genlora_lightning.__all__:
        value = getattr(genlora_lightning, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(genlora_lightning.__all__) <= set(dir(genlora_lightning))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        genlora_lightning.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import genlora_lightning", {"lightning", "transformers", "datasets"}),
        ("from genlora_lightning import inject_adapters, save_adapter, RBFGenerator", {"lightning", "transformers"}),
        (
            "from genlora_lightning import GenLoRAFinetuning, CausalLMModule, InstructionDataModule",
            {"datasets", "peft"},
        ),
    ],
)
def test_import_does_not_pull_in_what_is_not_needed(statement, absent):
    code = f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_parts_of_torch_distributed_are_imported_where_they_are_used(path):
    # Builds of torch without it have the package and nothing in it; one device needs none of it.
    for node in ast.parse(path.read_text()).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("torch.distributed.") for name in names), names
