from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from genlora_lightning.training.random_state import random_state, set_random_state


def draw() -> list[float]:
    numbers = [random.gauss(0, 1), random.random(), np.random.normal(), np.random.random()]
    return [*map(float, numbers), *torch.randn(3).tolist()]


@pytest.mark.parametrize("drawn_before", [0, 1, 3])  # odd ones leave a second gaussian number behind
def test_every_generator_goes_on_where_it_was_after_a_safe_save(tmp_path, drawn_before):
    for _ in range(drawn_before):
        random.gauss(0, 1), np.random.normal(), np.random.normal(), np.random.normal()
    torch.save(random_state(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 16 * 1024
    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generator_of_the_device_is_restored_too():
    device = torch.device("cuda", 0)
    state = random_state(device)
    first = torch.rand(3, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device), first)
