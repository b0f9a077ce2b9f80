from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning.adapters.combined import SummedUpdate
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.routed import RoutedLinear, Routing, with_update
from tests.conftest import small_config

CONFIGS = {"a": small_config(), "b": small_config(), "c": LoRAConfig(rank=3, alpha=5.0)}


def layers_on(base: nn.Module, configs: dict[str, object]) -> dict[str, AdaptedLinear]:
    layers = {name: AdaptedLinear(base, config) for name, config in configs.items()}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layers


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (12, 2, 3, 5)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", ["abcabc", "aab--c", "dbad-a", "------", "aaaaaa"])
def test_each_row_gets_its_adapters_update(shape, grad, rows):
    base = nn.Linear(5, 7).double()
    layers = layers_on(base, CONFIGS)
    layers["d"] = with_update(layers["a"], SummedUpdate([layers["b"].update], [2.0]))  # is no product
    routing = Routing()
    routing.rows = [None if name == "-" else name for name in rows]
    routed = RoutedLinear(layers, routing)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        given = routed(x)
    each = shape[0] // 6
    for row in range(shape[0]):
        name = routing.rows[row // each]
        expected = (base if name is None else layers[name])(x[row : row + 1])
        assert torch.allclose(given[row : row + 1], expected, rtol=0, atol=1e-6)


def test_groups_of_one_size_and_rank_are_computed_at_once():
    routed = RoutedLinear(layers_on(nn.Linear(5, 7), CONFIGS), routing := Routing())
    x = torch.randn(6, 5)
    signature = routing.signature(routing.members(0))
    for rows, groups in (("abcabc", [2, 1]), ("abaccb", [2, 1]), ("aabccc", [1, 1, 1]), ("a-a-a-", [1])):
        routing.rows = [None if name == "-" else name for name in rows]
        assert [step.groups for step in routing.steps(signature, x)] == groups
    routing.rows = list("aabbcc")
    assert torch.is_tensor(routing.steps(signature, x)[0].rows)
    routing.rows = list("aaabbb")
    assert routing.steps(signature, x)[0].rows is None  # all of them, as they are
    assert routed(x).shape == (6, 7)


def test_input_of_other_rows_is_refused():
    routing = Routing()
    routed = RoutedLinear(layers_on(nn.Linear(5, 7), CONFIGS), routing)
    routing.rows = ["a", "b"]
    with pytest.raises(ValueError, match="names 2 adapters, and the batch has 3 rows"):
        routed(torch.randn(3, 5))
    routing.batch_size = 2
    with pytest.raises(ValueError, match=r"input of shape \(4, 5\) in a batch of 2 rows"):
        routed(torch.randn(4, 5))


def test_dropout_is_each_adapters_own():
    layers = layers_on(nn.Linear(5, 7), {"a": LoRAConfig(rank=3), "b": LoRAConfig(rank=3, dropout=0.5)})
    routing = Routing()
    routed = RoutedLinear(layers, routing)
    routing.rows = ["a", "b"]
    x = torch.ones(2, 200, 5)

    def spread(row: torch.Tensor) -> float:
        """How far apart the outputs of a row's tokens are, whose inputs are equal."""
        return float((row - row[0]).detach().abs().max())

    given = routed(x)
    assert spread(given[0]) < 1e-4
    assert spread(given[1]) > 0.1
    assert spread(routed.eval()(x)[1]) < 1e-4


def test_its_parameters_are_not_its_own_and_there_is_no_one_update():
    layers = layers_on(base := nn.Linear(5, 7), CONFIGS)
    routed = RoutedLinear(layers, Routing())
    assert {id(p) for p in routed.parameters()} == {id(p) for p in base.parameters()}
    with pytest.raises(ValueError, match="no one update of a weight"):
        routed.merge()
    assert "adapters=['a', 'b', 'c']" in repr(routed)


def test_layer_with_another_update_leaves_the_first_as_it_is():
    first, second = layers_on(nn.Linear(5, 7), {"a": small_config(), "b": small_config()}).values()
    other = with_update(first, second.update)
    x = torch.randn(2, 5)
    before = first(x)
    assert torch.equal(other(x), second(x))
    assert torch.equal(first(x), before)
    other.enabled = False
    assert torch.equal(first(x), before)
