"""Models with GenLoRA adapters of PEFT, where PEFT's release is one that is known."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import nn

from tests.models import tiny_llama

try:
    IS_KNOWN = metadata.version("peft").startswith("0.21.")
except metadata.PackageNotFoundError:
    IS_KNOWN = False
collect_ignore_glob = [] if IS_KNOWN else ["test_*.py"]


@pytest.fixture
def llama():
    return tiny_llama().eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (2, 9))


@torch.no_grad()
def move(model: nn.Module, name: str = "default", scale: float = 0.3) -> None:
    """Move an adapter's parameters off their initial values, so that it acts."""
    for own, parameter in model.named_parameters():
        if ".genlora_" in own and f".{name}." in own:
            parameter.add_(scale * torch.randn_like(parameter))


def small(**changes: object):
    from genlora_lightning.interop.peft import GenLoraConfig

    return GenLoraConfig(**{"target_modules": "all-linear", "r": 4, "num_groups_b": 2, "weight_gain": 1.5, **changes})
