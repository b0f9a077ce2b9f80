"""`requirements.lock` and what must agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LINES = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
LOCKED = [Requirement(line) for line in LINES]


def _versions(name: str, python: str) -> list[str]:
    """Return the versions that this Python would be given on a Linux machine; one is what there should be."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    matching = [item for item in LOCKED if _canonical(item.name) == _canonical(name)]
    return [
        str(item.specifier).removeprefix("==")
        for item in matching
        if not item.marker or item.marker.evaluate(environment)
    ]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared() -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = [Requirement(text) for group in groups for text in group]
    return [item for item in declared if _canonical(item.name) != project["name"]]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_dependency_is_locked_once_to_a_version_in_its_range(python: str) -> None:
    for requirement in _declared():
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        versions = _versions(requirement.name, python)
        assert len(versions) == 1, (requirement.name, versions)
        assert requirement.specifier.contains(versions[0]), (str(requirement), versions)


def test_every_line_is_one_exact_version_from_the_index_that_the_user_has_set() -> None:
    for line, item in zip(LINES, LOCKED, strict=True):
        assert re.fullmatch(r"==[\w.]+", str(item.specifier)), line
        assert item.url is None, line
        assert "://" not in line


def test_cuda_libraries_are_left_to_the_build_of_torch_that_pip_finds() -> None:
    assert not [line for line in LINES if line.startswith(("nvidia-", "cuda-", "triton"))]
    assert _versions("torch", "3.11") == ["2.13.0"]


def test_setuptools_is_there_for_the_build_without_isolation() -> None:
    assert all(_versions("setuptools", python) for python in PYTHONS)


def test_pre_commit_runs_the_locked_ruff() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"rev: v(.*)", hooks) == _versions("ruff", "3.11")
