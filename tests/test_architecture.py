"""How packages may import each other, what importing them costs, and the list of them in docs."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import genlora_lightning

PACKAGE = Path(genlora_lightning.__file__).parent
ROOT = PACKAGE.parent

# Each package (or module beside them) may import itself and those before it.
ORDER = [
    "_version",
    "lazy",
    "errors",
    "overrides",
    "fields",
    "text",
    "storage",
    "adapters",
    "layers",
    "injection",
    "backbone",
    "distributed",
    "artifacts",
    "interop",
    "planning",
    "reports",
    "callbacks",
    "training",
    "data",
    "modules",
    "cli",
    "__main__",
]
WITH_LIGHTNING = {"callbacks", "training", "data", "modules", "cli"}

FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
FOLDERS = [path.parent for path in sorted(PACKAGE.rglob("*/__init__.py"))]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def place(module: str) -> str:
    """The package (or module) directly under ``genlora_lightning``."""
    return module.split(".")[1]


def imports(path: Path) -> list[tuple[str, str]]:
    """What a file imports anywhere, in functions too: modules, and names taken from them ("" for a module itself)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (node.module or "", alias.name))
    return found


def own_imports(path: Path) -> list[tuple[str, str]]:
    return [(module, name) for module, name in imports(path) if module.split(".")[0] == "genlora_lightning"]


def test_order_names_what_there_is():
    assert sorted(ORDER) == sorted({place(module) for module in MODULES})


@each_file
def test_module_imports_only_what_stands_before_it(path):
    own = place(dotted(path))
    for module, name in own_imports(path):
        assert module != "genlora_lightning", f"{own} must not import {name!r} from the package's face"
        assert ORDER.index(place(module)) <= ORDER.index(own), f"{own} must not import {module}"


@each_file
def test_lightning_begins_at_the_callbacks(path):
    if place(dotted(path)) not in WITH_LIGHTNING | {"__main__"}:
        outer = {module.split(".")[0] for module, _ in imports(path)}
        assert not outer & {"lightning", "lightning_fabric", "pytorch_lightning"}


def test_no_modules_import_each_other():
    graph = {module: {name for name, _ in own_imports(path)} - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@each_file
def test_private_names_stay_in_their_module(path):
    own, bound = dotted(path), set()
    for module, name in own_imports(path):
        assert not name.startswith("_") or name.startswith("__"), f"{own} imports {name} of {module}"
        package, _, last = module.rpartition(".")
        assert not last.startswith("_") or f"{own}.".startswith(f"{package}."), f"{own} imports {module}"
        bound |= {last} if not name else set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            assert not node.attr.startswith("_"), f"{own} uses {node.value.id}.{node.attr}"


@each_file
def test_private_names_of_lightning_are_in_one_file(path):
    own = path.relative_to(PACKAGE)
    if own.parts[0] not in WITH_LIGHTNING or own.name == "lightning_internals.py":
        return
    code = ast.parse(path.read_text())
    mine = {n.name for n in ast.walk(code) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    mine |= {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    mine |= {n.id for n in ast.walk(code) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
    foreign = {name for name in used if not name.endswith("__")} - mine - OTHER_INTERNALS
    assert not foreign, f"{own} uses {sorted(foreign)}: if it is Lightning's, it belongs into lightning_internals.py"


# Parts of torch, fsspec and argparse that have no public name.
OTHER_INTERNALS = {
    "_actions",
    "_foreach_mul_",
    "_foreach_norm",
    "_fsdp_wrapped_module",
    "_modules",
    "_parameters",
    "_run_policy",
    "_strip_protocol",
    "_version",
}
# Where an object of somebody else gets an attribute that is a parameter of its own, or that is our own object.
SETS_ATTRIBUTES = {
    "overrides.py",
    "injection/full_training.py",
    "layers/adapted.py",
    "layers/sharing.py",
    "layers/swapped.py",
    "lazy.py",
}


@each_file
def test_only_overrides_sets_attributes_on_what_is_not_ours(path):
    if str(path.relative_to(PACKAGE)) in SETS_ATTRIBUTES:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("setattr", "delattr"), f"line {node.lineno}"
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            inner = node.value
            is_vars = isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "vars"
            assert not is_vars, f"line {node.lineno}"


# What each may know beyond the package of kinds: sizes for a budget and their flags, and what is LoRA's by its format.
KNOWS_A_KIND = {
    "planning/budget.py",
    "cli/plan.py",
    "cli/adapter.py",
    "interop/lora_import.py",
    "interop/peft_folders.py",
    "interop/peft/config.py",
    "artifacts/format1.py",
}
GENLORA_PARTS = re.compile(
    r"\b(latents?|rbf\w*|RBFGenerator|num_(groups|latents|centers)\w*|entry_signs|weight_gain|log_widths|centers|generator_[AB])\b"
)


@each_file
def test_only_named_files_know_a_kind(path):
    own = str(path.relative_to(PACKAGE))
    if own.startswith("adapters/") or own in KNOWS_A_KIND:
        return
    kinds = tuple(f"genlora_lightning.adapters.{kind}" for kind in ("genlora", "lora", "polar", "compacter"))
    assert not [module for module, _ in own_imports(path) if module.startswith(kinds)]
    # Of the code itself; a docstring may give an example.
    code = ast.parse(path.read_text())
    for node in ast.walk(code):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    found = [match[0] for match in GENLORA_PARTS.finditer(ast.unparse(code))]
    assert not found or own == "cli/main.py", f"{own} names GenLoRA's {sorted(set(found))}"


def test_every_public_name_can_be_imported_and_is_documented():
    assert len(genlora_lightning.__all__) <= 32  # what most users need; the rest is in its package
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
        ("from genlora_lightning import inject_adapters, save_adapter, LoRAConfig", {"lightning", "transformers"}),
        ("from genlora_lightning.data.recognition import recognize", {"torch", "lightning"}),  # `genlora init` waits
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


@each_file
def test_parts_of_torch_distributed_are_imported_where_they_are_used(path):
    # Builds of torch without it have the package and nothing in it; one device needs none of it.
    for node in ast.parse(path.read_text()).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("torch.distributed.") for name in names), names


def test_docs_list_each_package_with_its_docstring():
    listed = re.search(
        r"^genlora_lightning/\n(.*?)^\S", (ROOT / "docs/design.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert listed, "docs/design.md has no list of the packages"
    shown = dict(line.split(maxsplit=1) for line in listed[1].splitlines())
    docstrings = {folder: ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) for folder in FOLDERS}
    assert shown == {f"{f.relative_to(PACKAGE)}/": (text or "").splitlines()[0] for f, text in docstrings.items()}


def test_version_is_that_of_pyproject():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated
    assert stated[1] == genlora_lightning.__version__


def test_docs_list_each_field_of_the_configuration():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    fields = {field.name for field in dataclasses.fields(genlora_lightning.GenLoRAConfig)}
    assert fields <= listed, f"docs/configuration.md leaves out {sorted(fields - listed)}"
