from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning.layers.swapped import call_with


@pytest.mark.parametrize("is_view", [False, True])
def test_module_computes_with_another_tensor_and_has_its_own_again(is_view):
    linear = nn.Linear(3, 2, bias=False)
    if is_view:  # as FSDP1 leaves it during a forward
        vars(linear)["weight"] = linear._parameters.pop("weight").detach().view(2, 3)
    own, x, other = linear.weight, torch.ones(1, 3), torch.full((4, 3), 2.0)
    assert torch.equal(call_with(linear, "weight", other, linear, (x,), {}), torch.full((1, 4), 6.0))
    assert linear.weight is own
    assert ("weight" in vars(linear)) == is_view
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_with(linear, "weight", other.T, linear.forward, (), {"input": x})
    assert linear.weight is own
