"""What `genlora plan` says is sent, against collectives counted on two gloo ranks, in plain torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genlora_lightning.distributed.collectives import shard_with_fsdp2
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning.traffic import Setup, model_sizes, plan_traffic
from tests.conftest import small_config
from tests.distributed.ranks import on_two_ranks
from tests.models import tiny_llama, tiny_t5

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]
ACCUMULATE = 2


def model(kind: str = "llama") -> nn.Module:
    if kind == "t5":
        made = tiny_t5()
        inject_adapters(made, small_config(rank=5, num_groups=3))
        return made
    # Odd sizes, so that FSDP2 pads, and three blocks, so that there is one which is neither first nor last.
    made = tiny_llama(num_hidden_layers=3, intermediate_size=27, vocab_size=63)
    inject_adapters(made, small_config(rank=5, num_groups=3))
    return made


def steps(module: nn.Module, set_sync: Any) -> None:
    """One optimizer step's worth of forward and backward passes."""
    for index in range(ACCUMULATE):
        set_sync(index == ACCUMULATE - 1)
        ids = torch.randint(2, 63, (2, 7))
        ids[:, -1] = 1  # T5 classifies by the token that ends a text
        labels = torch.zeros(2, dtype=torch.long) if hasattr(module, "classification_head") else ids
        module(input_ids=ids, labels=labels).loss.backward()


class Collectives(TorchDispatchMode):
    """Counts the values in collectives: what an all-gather results in, what a reduce-scatter starts from."""

    NAMES: ClassVar = {
        "allreduce_": "all_reduced",
        "_allgather_base_": "gathered",
        "_reduce_scatter_base_": "scattered",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            tensors = args[1] if name == "_reduce_scatter_base_" else args[0]
            self.counted[self.NAMES.get(name, name)] += sum(t.numel() for t in tree_leaves(tensors))
        return func(*args, **(kwargs or {}))


def ddp(rank: int) -> dict[str, int]:
    wrapped = nn.parallel.DistributedDataParallel(model())
    with Collectives() as collectives:
        steps(wrapped, lambda last: setattr(wrapped, "require_backward_grad_sync", last))
    return dict(collectives.counted)


def fsdp2(sharding: str, kind: str = "llama") -> Callable[[int], dict[str, int]]:
    def work(rank: int) -> dict[str, int]:
        module = nn.Module()  # as a LightningModule that holds the model
        module.model = model(kind)
        mesh = init_device_mesh("cpu", (2,))
        shard_with_fsdp2(module, module.model, mesh, shards_adapters=sharding == "shard")
        with Collectives() as collectives:
            steps(module.model, lambda last: None)
        return {**collectives.counted, "units": sum(isinstance(part, FSDPModule) for part in module.modules())}

    return work


def planned(strategy: str, sharding: str, kind: str = "llama") -> Any:
    setup = Setup(strategy=strategy, adapter_sharding=sharding, gpus=2, accumulate=ACCUMULATE)
    return plan_traffic(model_sizes(model(kind)), setup)


def test_ddp_sends_the_planned_values(tmp_path):
    plan = planned("ddp", "replicate")
    for counted in on_two_ranks(ddp, tmp_path):
        del counted["broadcast_"]  # DDP's order of buckets, once in a run
        assert counted == {"all_reduced": plan.all_reduced}
    assert plan.base_gathered == plan.gathered == plan.reduce_scattered == 0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_fsdp2_with_replicated_adapters_gathers_the_planned_values_and_reduces_nothing(tmp_path, kind):
    plan = planned("fsdp2", "replicate", kind)
    units = len(model_sizes(model(kind)).base)
    for counted in on_two_ranks(fsdp2("replicate", kind), tmp_path):
        assert counted == {"gathered": plan.base_gathered, "units": units}
    assert plan.all_reduced == sum(p.numel() for p in model(kind).parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_fsdp2_with_sharded_adapters_gathers_and_reduces_the_planned_values(tmp_path, kind):
    plan = planned("fsdp2", "shard", kind)
    for counted in on_two_ranks(fsdp2("shard", kind), tmp_path):
        assert counted == {
            "gathered": plan.base_gathered + plan.gathered,
            "scattered": plan.reduce_scattered,
            "units": len(model_sizes(model(kind)).base),
        }
    assert plan.all_reduced == 0
