from __future__ import annotations

import pytest

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.compacter import CompacterConfig
from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.adapters.polar import PoLARConfig
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters, inject_adapters
from genlora_lightning.planning.budget import ALLOWANCE, count, fit_budget, genlora_ladder
from tests.models import tiny_llama

_BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SMOLLM2 = [MatrixShape(*sizes) for sizes in _BLOCK] * 30


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16])
def test_budget_of_a_lora_rank_is_met_within_five_percent(rank):
    lora = rank * sum(map(sum, SMOLLM2))
    found = fit_budget(GenLoRAConfig(), SMOLLM2, lora)
    assert 0.95 * lora <= found.parameters <= ALLOWANCE * lora
    assert found.parameters == count(found.config, SMOLLM2)
    assert found.lora_rank == pytest.approx(found.parameters / lora * rank)


def test_ranks_by_name_leave_no_rank_to_a_budget():
    with pytest.raises(ValueError, match="one rank for all linears: leave out `rank_pattern` and `alpha_pattern`"):
        fit_budget(LoRAConfig(rank_pattern={"q": 2}, alpha_pattern={"q": 2}), SMOLLM2, 500_000)


@pytest.mark.parametrize("wanted", [340_000, 500_000, 1_000_000, 3_000_000])
def test_no_other_step_of_the_ladder_is_closer(wanted):
    found = fit_budget(GenLoRAConfig(), SMOLLM2, wanted)
    sizes = [count(config, SMOLLM2) for config in genlora_ladder(GenLoRAConfig(), SMOLLM2, wanted)]
    allowed = [size for size in sizes if size <= ALLOWANCE * wanted]
    assert abs(found.parameters - wanted) == min(abs(size - wanted) for size in allowed)


@pytest.mark.parametrize("wanted", [50, 400, 5_000])
def test_every_step_of_the_ladder_is_larger_than_the_one_before_and_fits_the_linears(wanted):
    shapes = [MatrixShape(10, 6), MatrixShape(7, 8)]
    steps = list(genlora_ladder(GenLoRAConfig(), shapes, wanted))
    sizes = [count(config, shapes) for config in steps]
    assert sizes == sorted(set(sizes))
    assert all(config.num_groups_a == 1 and config.num_groups_b <= 7 for config in steps)


def test_latents_come_as_soon_as_they_fit_and_b_gets_them_first():
    unit = sum(map(sum, SMOLLM2))
    found = [fit_budget(GenLoRAConfig(), SMOLLM2, rank * unit).config for rank in (1, 1.5, 2, 2.5, 3)]  # LoRA ranks
    assert [(c.num_latents_a, c.num_latents_b) for c in found] == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 3)]
    assert [config.rank >= 64 for config in found] == [False, True, True, True, True]


def test_what_is_not_searched_is_kept():
    config = GenLoRAConfig(kernel="inverse_quadratic", learn_widths=True, alpha=3.0)
    found = fit_budget(config, SMOLLM2, 600_000).config
    assert (found.kernel, found.learn_widths, found.alpha) == ("inverse_quadratic", True, 3.0)


def test_model_with_the_configuration_found_has_the_parameters_said():
    model = tiny_llama()
    sizes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)] * 2
    shapes = [MatrixShape(*size) for size in sizes]
    found = fit_budget(GenLoRAConfig(), shapes, 1000)
    inject_adapters(model, found.config)
    assert [layer.shape for layer in adapter_layers(model).values()] == shapes
    assert sum(p.numel() for p in adapter_parameters(model).values() if p.requires_grad) == found.parameters


def test_budget_below_the_smallest_adapter_is_an_error():
    with pytest.raises(ValueError, match=r"smallest GenLoRA adapter on these 2 linears has 44 .*more than 30\. Ad"):
        fit_budget(GenLoRAConfig(), [MatrixShape(10, 10)] * 2, 30)
    with pytest.raises(ValueError, match="no linears"):
        fit_budget(GenLoRAConfig(), [], 30)


@pytest.mark.parametrize(("scaling", "alpha"), [("rank", 10.0), ("sqrt_rank", 32.0)])
def test_budget_of_lora_is_the_nearest_rank_with_the_same_scaling(scaling, alpha):
    unit = sum(map(sum, SMOLLM2))
    found = fit_budget(LoRAConfig(rank=16, alpha=32.0, scaling=scaling), SMOLLM2, round(5.1 * unit))
    assert (found.config.rank, found.config.alpha, found.parameters) == (5, alpha, 5 * unit)


@pytest.mark.parametrize(
    ("config", "rank", "parameters"),
    [
        (PoLARConfig(rank=16), 5, 5 * sum(sum(shape) + 5 for shape in SMOLLM2)),
        (CompacterConfig(rank=16), 80, 5 * sum(map(sum, SMOLLM2)) + 4**3),
    ],
)
def test_budget_of_other_kinds_is_the_nearest_of_their_ranks(config, rank, parameters):
    found = fit_budget(config, SMOLLM2, round(5.1 * sum(map(sum, SMOLLM2))))
    assert (found.config.rank, found.parameters) == (rank, parameters)
    assert found.config.scaling_factor == config.scaling_factor


def test_polar_grows_no_further_than_the_narrowest_matrix():
    shapes = [MatrixShape(8, 30), MatrixShape(40, 30)]
    assert fit_budget(PoLARConfig(), shapes, 10_000).config.rank == 8


def test_kind_without_sizes_to_choose_from_is_an_error():
    class Other(LoRAConfig):
        pass

    with pytest.raises(
        ValueError, match=r"decides the sizes of GenLoRAConfig, LoRAConfig, .*, and knows none for Other"
    ):
        fit_budget(Other(), SMOLLM2, 1000)
