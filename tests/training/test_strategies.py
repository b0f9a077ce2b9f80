from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.training.strategies import GenLoRAFSDPStrategy, check_strategy
from genlora_lightning.training.sync import AdapterSync, _check_unquantized
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")


class DeepSpeedStrategy(DDPStrategy):
    pass


class OtherStrategy(SingleDeviceStrategy):
    pass


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    pass


def given(strategy: Strategy, scaler: object = None, world_size: int = 8) -> SimpleNamespace:
    return SimpleNamespace(
        strategy=strategy, precision_plugin=SimpleNamespace(scaler=scaler), world_size=world_size, lightning_module=None
    )


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), r'does not support FSDPStrategy as it is: set `strategy="genlora_fsdp"`'),
        (DeepSpeedStrategy(), r'does not support DeepSpeedStrategy: set `strategy="genlora_fsdp"` or ModelParallel'),
        (ModelParallelStrategy(), r"`tensor_parallel_size` is auto .*\(data_parallel_size=8, tensor_parallel_size=1\)"),
        (ModelParallelStrategy(2, 4), r"`tensor_parallel_size` is 4"),
        (SingleDeviceXLAStrategy(), r'does not support SingleDeviceXLAStrategy: set `strategy` to "auto"'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Strategy) else "",
)
def test_what_is_not_supported_is_refused_in_one_line_with_what_to_use_instead(strategy, message):
    with pytest.raises(ValueError, match=message) as error:
        check_strategy(given(strategy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "strategy",
    [SingleDeviceStrategy(), OtherStrategy(), DDPStrategy(), GenLoRAFSDPStrategy(), ModelParallelStrategy(8, 1)],
)
def test_what_is_supported_is_accepted(strategy):
    check_strategy(given(strategy))


@pytest.mark.parametrize("strategy", [GenLoRAFSDPStrategy(), ModelParallelStrategy(8, 1)])
def test_a_gradient_scaler_is_refused_where_the_base_is_sharded(strategy):
    with pytest.raises(
        ValueError, match=r'does not support `precision="16-mixed"` with .*set `precision="bf16-mixed"`'
    ):
        check_strategy(given(strategy, scaler=object()))
    check_strategy(given(DDPStrategy(), scaler=object()))


def test_fsdp_is_known_by_its_name():
    assert isinstance(StrategyRegistry.get("genlora_fsdp"), GenLoRAFSDPStrategy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_orig_params": False}, "`use_orig_params=False` hides the adapters"),
        ({"state_dict_type": "sharded"}, "one file"),
    ],
)
def test_fsdp_refuses_flat_parameters_and_sharded_files(arguments, message):
    with pytest.raises(ValueError, match=message):
        GenLoRAFSDPStrategy(**arguments)


def test_sharding_adapters_is_refused_where_they_would_not_be_cut_by_rank():
    with pytest.raises(ValueError, match=r'got NO_SHARD: set `adapter_sharding="replicate"`'):
        AdapterSync(given(GenLoRAFSDPStrategy(sharding_strategy="NO_SHARD")), "shard")
    AdapterSync(given(GenLoRAFSDPStrategy(sharding_strategy="NO_SHARD")), "replicate")


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"`adapter_sharding` must be one of \('replicate', 'shard'\), got 'both'"):
        GenLoRAFinetuning(small_config(), adapter_sharding="both")


def test_quantized_bases_are_not_sharded():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _check_unquantized(model, "GenLoRAFSDPStrategy")
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"1\.weight among them, and GenLoRAFSDPStrategy cannot shard .*`strategy=\"ddp\"`"
    ):
        _check_unquantized(model, "GenLoRAFSDPStrategy")


def test_fsdp_without_the_callback_says_what_is_missing(tmp_path):
    def run() -> str:
        with pytest.raises(ValueError, match="is for training with GenLoRAFinetuning") as error:
            trainer(tmp_path, strategy=GenLoRAFSDPStrategy(), devices=2).fit(PlainMLP(), mlp_loader())
        return str(error.value)

    assert "PlainMLP" in on_ranks(run)[0]
