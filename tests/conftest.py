"""Helpers that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Tests run small models, where more threads cost more than they bring; multi-process tests need a core per rank.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.injection.inject import adapter_parameters
from tests.hub import hub  # noqa: F401 - a fixture

# What takes longest, begun first, or all wait for one of them at the end; files that start ranks, which wait for each
# other, take turns with those that do not.
LONGEST = (
    "test_support_matrix.py",
    "benchmarks/test_speed.py",
    "distributed/test_sharded_files.py",
    "docs/test_blocks.py",
    "distributed/test_sharded.py",
    "benchmarks/test_gpu.py",
    "test_mixtures.py",
    "planning/test_plan.py",
    "distributed/test_torchrun.py",
    "test_kinds_and_sites.py",
    "cli/test_train.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # newer releases of pytest-xdist begin with the files that have most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of all garbage collections: there are some 400,000 objects of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """Leave no process group: ranks that a later test forks would take it for theirs, and wait for ever."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed() -> None:
    # Left by a test that called `seed_everything`: multi-process strategies would seed by it, single ones would not.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def small_config(**changes: object) -> GenLoRAConfig:
    """A configuration for models of a few dozen features, in which all that can be trained is.

    ``num_groups`` is short for that of A and B alike.
    """
    groups = changes.pop("num_groups", 2)
    fields = {
        "rank": 4,
        "num_groups_a": groups,
        "num_groups_b": groups,
        "weight_gain": 1.5,  # that of the defaults is made for Adam
        "learn_centers": True,
        "learn_widths": True,
    }
    return GenLoRAConfig(**{**fields, **changes})  # type: ignore[arg-type]


def perturb(model: nn.Module, scale: float = 0.3) -> None:
    """Move every adapter parameter off its initial value, so that the update is not zero."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(scale * torch.randn_like(parameter))
