from __future__ import annotations

import pytest

from genlora_lightning import CompacterConfig, GenLoRAConfig, LoRAConfig, PoLARConfig
from genlora_lightning.adapters.base import FactorPair, StackShape
from genlora_lightning.adapters.stacked import StackedUpdate, make_stack

SHAPE = StackShape(3, 8, 12)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GenLoRAConfig(rank=4), FactorPair),
        (LoRAConfig(rank=4), FactorPair),
        # What acts on its factors by their class, or is shared between them, is left as it is.
        (PoLARConfig(rank=4), StackedUpdate),
        (CompacterConfig(rank=4, num_products=2), StackedUpdate),
    ],
)
def test_parameters_are_stacked_where_factors_are_nothing_else(config, kind):
    update = make_stack(config, SHAPE)
    assert type(update) is kind
    assert update.delta_weight().shape == (3, 8, 12)
    assert not update.delta_weight().any()
    A, B = update.factors()
    assert (A.shape[-1], B.shape[-2]) == (12, 8)
