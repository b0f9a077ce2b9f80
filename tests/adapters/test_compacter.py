from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genlora_lightning import (
    CompacterConfig,
    OptimizerConfig,
    describe_adapter,
    inject_adapters,
    load_adapter,
    save_adapter,
    verify_adapter,
)
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.training.optim import parameter_groups
from tests.conftest import perturb

CONFIG = CompacterConfig(rank=8, alpha=3.0, num_products=2)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    parts = [nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)) for _ in range(2)]
    return nn.Sequential(*parts)


def shared(found: nn.Module) -> list[str]:
    return [name for name in adapter_parameters(found) if "matrices" in name]


def test_update_is_the_sum_of_kronecker_products_and_has_no_smaller_factors():
    layer = AdaptedLinear(nn.Linear(24, 16, bias=False), CONFIG).double()
    assert not layer.delta_weight().any()
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_()
    C, s, t = layer.update.B.matrices.matrices, layer.update.B.vectors, layer.update.A.vectors
    assert (C.shape, s.shape, t.shape) == ((2, 2, 2), (2, 2, 8), (2, 2, 12))
    wanted = 3.0 / 8 * sum(torch.kron(C[i], s[i].T @ t[i]) for i in range(2))
    torch.testing.assert_close(layer.delta_weight(), wanted, rtol=0, atol=1e-12)
    assert int(torch.linalg.matrix_rank(wanted)) == layer.update.rank == CONFIG.rank
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (layer.weight + wanted).T, rtol=0, atol=1e-10)


def test_all_layers_have_one_set_of_matrices_which_is_counted_optimized_and_saved_once(tmp_path):
    found = model()
    report = inject_adapters(found, CONFIG)
    owners = {id(layer.update.B.matrices) for layer in adapter_layers(found).values()}
    assert len(owners) == 1
    assert shared(found) == ["0.0.update.B.matrices.matrices"]
    assert (
        report.adapter_parameters
        == 4 * 2 * (12 + 16) + 2**3
        == CONFIG.count_shared() + sum(CONFIG.count_parameters(layer.shape) for layer in adapter_layers(found).values())
    )
    groups = {group["name"]: len(group["params"]) for group in parameter_groups(found, OptimizerConfig())}
    assert groups == {"compacter_factors": 8, "compacter_shared": 1}
    perturb(found)
    duplicate = copy.deepcopy(found)
    assert len({id(layer.update.B.matrices) for layer in adapter_layers(duplicate).values()}) == 1
    folder = save_adapter(found, tmp_path / "adapter")
    assert len(load_file(folder / "adapter_model.safetensors")) == 9
    assert "232 trained values" in (folder / "README.md").read_text()


def test_layers_that_share_nothing_have_matrices_of_their_own(tmp_path):
    config = CompacterConfig(rank=8, num_products=2, shared=False)
    found = model()
    report = inject_adapters(found, config)
    assert len(shared(found)) == 4
    assert report.adapter_parameters == sum(
        config.count_parameters(layer.shape) for layer in adapter_layers(found).values()
    )
    assert (config.count_shared(), CONFIG.count_shared()) == (0, 8)


def test_layers_of_other_ranks_share_the_matrices_too():
    found = model()
    inject_adapters(found, CompacterConfig(rank=8, num_products=2, rank_pattern={"1.2": 4}))
    assert [layer.update.rank for layer in adapter_layers(found).values()] == [8, 8, 8, 4]
    assert len(shared(found)) == 1


def test_parts_that_were_adapted_one_by_one_keep_their_own_matrices_in_a_folder(tmp_path):
    found, x = model(), torch.randn(3, 12)
    for part in found:
        inject_adapters(part, CONFIG)
    perturb(found)
    assert shared(found) == ["0.0.update.B.matrices.matrices", "1.0.update.B.matrices.matrices"]
    wanted: Tensor = found(x)
    folder = save_adapter(found, tmp_path / "adapter")
    verify_adapter(folder)
    described = describe_adapter(folder)
    assert [layer.parameters for layer in described.layers] == [64, 56, 64, 56]  # 8 more with the first of each part
    again = model()
    load_adapter(again, folder)
    assert shared(again) == shared(found)
    assert torch.equal(again(x), wanted)


def test_sizes_that_the_products_do_not_divide_are_refused_by_name():
    found = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 18))
    what = "`num_products` is 4, which does not divide both the 18 outputs and the 16 inputs of 1. "
    with pytest.raises(ValueError, match=re.escape(what + "Set `num_products` to 2, or add '1' to `exclude_modules`")):
        inject_adapters(found, CompacterConfig())
    assert not adapter_layers(found)
    with pytest.raises(ValueError, match=r"the 7 outputs and the 5 inputs of the matrix\. No other number does: add"):
        CompacterConfig().make(MatrixShape(7, 5))
    with pytest.raises(ValueError, match=r"`rank` is 8, and 4 Kronecker products .*4² = 16: give 16, 32"):
        CompacterConfig(rank=8)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q_proj'\]` is 6"):
        CompacterConfig(num_products=2, rank_pattern={"q_proj": 6})
