"""Synchronize the adapters of several processes: broadcast, shard, reduce, compare and gather."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from genlora_lightning.adapters.base import adapter_modules
from genlora_lightning.artifacts.adapter_io import AdapterRecord, adapter_record
from genlora_lightning.artifacts.checkpoint import adapter_root, base_of, prefix_of
from genlora_lightning.artifacts.other_state import warn_of_changed_buffers
from genlora_lightning.artifacts.peft_folder import PeftRecord
from genlora_lightning.distributed.collectives import (
    any_rank,
    broadcast_from_first,
    check_ranks_agree,
    reduce_gradients,
    shard_with_fsdp2,
)
from genlora_lightning.distributed.shards import (
    is_dtensor,
    is_fsdp2_unit,
    is_sharded,
    plain_name,
    trained_tensors,
    whole_tensors,
)
from genlora_lightning.injection.places import adapter_parameters
from genlora_lightning.overrides import note, noted
from genlora_lightning.storage.digests import sha256
from genlora_lightning.training.checks import warn_of_trained_outside
from genlora_lightning.training.named_adapters import adapter_names, adapters_of
from genlora_lightning.training.strategies import FSDP_NAME, GenLoRAFSDPStrategy, shards_base, use_whole_files

# On a module with a sharded base: what an adapter folder says of it, because later no rank has it whole.
_CONTENT = "adapter content"

AdapterSharding = Literal["replicate", "shard"]


class AdapterSync:
    """Keeps the trained tensors right on all ranks of a run.

    Args:
        trainer: Its strategy is one that :func:`~genlora_lightning.training.strategies.check_strategy` accepts.
        policy: ``"replicate"``: what is trained lies whole on each rank, outside of the sharded groups, and its
            gradients are averaged in one message per optimizer step; ``"shard"``: it is sharded with the base. Without
            a sharded base (one device, DDP) it means nothing.
    """

    def __init__(self, trainer: Trainer, policy: AdapterSharding) -> None:
        self.trainer = trainer
        self.policy = policy
        self.base_is_sharded = shards_base(trainer.strategy)
        self._trainable: set[str] = set()
        self.shards_adapters = self.base_is_sharded and policy == "shard"
        if self.base_is_sharded:
            use_whole_files(trainer)
        if isinstance(trainer.strategy, GenLoRAFSDPStrategy):
            _check_sharding(trainer.strategy, self.shards_adapters)

    # -- before the optimizer is made -------------------------------------------------------------------------------

    def equalize_and_shard(self, module: LightningModule) -> None:
        """After the adapters are injected: make them equal on all ranks, and shard what is to be sharded.

        Raises:
            ValueError: Adapters sharded by FSDP1 are to be optimized manually, or what is to be sharded must lie whole;
                or the base is quantized or differs between the ranks, or the module is sharded already, by its own code
                or by an earlier run, in a way that does not fit.
        """
        self._trainable = _trainable(module)
        if not self.base_is_sharded:
            return  # DDP broadcasts all of the module by itself
        strategy: Any = self.trainer.strategy
        manual = self.trainer.state.fn == "fit" and not module.automatic_optimization
        if manual and self.shards_adapters and isinstance(strategy, GenLoRAFSDPStrategy):
            # The backward pass is inside of the forward pass of FSDP1's outermost unit then, which would finish it.
            raise ValueError(
                f"{type(module).__name__} optimizes manually, with which FSDP1 leaves gradients of sharded adapters "
                'unfinished: set `adapter_sharding="replicate"`, or use ModelParallelStrategy.'
            )
        if self.shards_adapters:
            _check_shardable(module)
        _check_unquantized(module, type(strategy).__name__)
        earlier = _policy_of(module)
        if earlier is not None and earlier != self.policy:
            raise ValueError(
                f'This {type(module).__name__} is sharded already, with `adapter_sharding="{earlier}"`: by an earlier '
                f'run, or by its own `configure_model`. `adapter_sharding="{self.policy}"` needs one that is not.'
            )
        if noted(module, _CONTENT) is None:
            note(module, _CONTENT, self._describe(module))
        if earlier != "shard":
            trained = trained_tensors(module).values()
            if any(is_sharded(tensor) for tensor in trained):
                raise ValueError(
                    "Modules of `modules_to_train` are sharded by `fully_shard` in this "
                    f"{type(module).__name__}'s own `configure_model`. Leave the sharding to GenLoRAFinetuning."
                )
            broadcast_from_first(trained, strategy.root_device)
        if isinstance(strategy, GenLoRAFSDPStrategy):
            strategy.shards_adapters = self.shards_adapters
        elif earlier is None:
            mesh = strategy.device_mesh["data_parallel"]
            shard_with_fsdp2(module, adapter_root(module), mesh, shards_adapters=self.shards_adapters)

    def check_trainable(self, module: LightningModule) -> None:
        """Before the first step: check that nothing became trainable after the strategy was told what is.

        Raises:
            ValueError: It did; the message names the first parameter.
        """
        added = sorted(_trainable(module) - self._trainable)
        if added and (self.base_is_sharded or self.trainer.world_size > 1):
            raise ValueError(
                f"{len(added)} parameters, {added[0]} among them, became trainable after the adapters were injected "
                f"(in `configure_optimizers`?): too late for {type(self.trainer.strategy).__name__} to average their "
                "gradients. Name their modules in `modules_to_train`."
            )

    def _describe(self, module: LightningModule) -> AdapterRecord | PeftRecord:
        """What an adapter folder says of the module, taken while it is whole; the tensors' values are left out."""
        content = adapter_record(adapter_root(module), base_of(module))
        digests: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(digests, sha256(json.dumps(content.base, sort_keys=True).encode()))
        if len(set(digests)) > 1:
            raise ValueError(
                f"The ranks have built different base models in {type(module).__name__}, of which each would keep a "
                "part. Load the base from files, or call `seed_everything` before it is made."
            )
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in content.state.items()}
        return dataclasses.replace(content, state=state)

    # -- while training -----------------------------------------------------------------------------------------------

    def reduce(self, optimizer: Optimizer) -> None:
        """Before clipping and the optimizer step: average the gradients that nobody else does; collective.

        Gradients that are averaged already, and to which a rank's own were added since, come out right, too.
        """
        if self.base_is_sharded and not self.shards_adapters:
            reduce_gradients(p for group in optimizer.param_groups for p in group["params"])

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """For each flag whether it is set on any rank, where each sees its own pieces only; collective there."""
        return any_rank(flags, self.trainer.strategy.root_device) if self.shards_adapters else flags

    def set_on_any_rank(self, flag: Tensor) -> None:
        """:meth:`any_rank` for one flag on the device, in place and without reading it; collective."""
        if self.shards_adapters:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)

    def compare(self, module: LightningModule, when: str) -> None:
        """Compare the trained parameters between the ranks, in every bit; sharded pieces have nothing to compare with.

        Buffers, such as a batch norm's running statistics, are each rank's own everywhere; rank 0's are saved.

        Raises:
            RanksDifferError: They differ.
        """
        if self.trainer.world_size > 1 and not self.shards_adapters:
            parameters = {plain_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
            trained = trained_tensors(module)
            check_ranks_agree({name: tensor for name, tensor in trained.items() if name in parameters}, when)

    # -- saving -------------------------------------------------------------------------------------------------------

    def records(self, module: LightningModule) -> dict[str, AdapterRecord | PeftRecord]:
        """What adapter folders are to hold, by the adapters' names; collective if the adapters are sharded."""
        root = adapter_root(module)
        names = adapter_names(module)
        if self.trainer.is_global_zero:
            warn_of_trained_outside(module, at_the_end=True)
            warn_of_changed_buffers(module)
        if names != [""]:
            return {name: adapters_of(module).record(name) for name in names}
        if not self.base_is_sharded:
            return {"": adapter_record(root)}
        recorded: AdapterRecord | PeftRecord = noted(module, _CONTENT)
        prefix, whole = prefix_of(root, module), whole_tensors(module)
        return {"": dataclasses.replace(recorded, state={name: whole[prefix + name] for name in recorded.state})}


def describe_timeout(trainer: Trainer, error: BaseException) -> str | None:
    """What to say if an error is that of waiting in vain for another rank; ``None`` if it is another one."""
    text = str(error).lower()
    if trainer.world_size == 1 or not ("timed out" in text or "timeout" in text or "connection closed" in text):
        return None
    return (
        f"Rank {trainer.global_rank} waited in vain for another one after step {trainer.global_step}: a rank hangs or "
        "has died. Look at the end of each rank's output. How long to wait is the strategy's `timeout`."
    )


def _check_sharding(strategy: GenLoRAFSDPStrategy, inside: bool) -> None:
    kind = strategy.sharding_strategy.name
    if inside and kind not in ("FULL_SHARD", "SHARD_GRAD_OP"):
        raise ValueError(
            f'`adapter_sharding="shard"` needs `sharding_strategy` FULL_SHARD or SHARD_GRAD_OP, got {kind}: set '
            '`adapter_sharding="replicate"`.'
        )


def _check_shardable(module: nn.Module) -> None:
    for own in adapter_modules(module):
        if own.must_be_whole is not None:
            raise ValueError(
                f"The adapters of this {type(module).__name__} cannot be sharded: {own.must_be_whole}. Set "
                '`adapter_sharding="replicate"`.'
            )


def _check_unquantized(module: nn.Module, strategy: str) -> None:
    quantized = [
        name
        for name, parameter in module.named_parameters()
        if not parameter.is_floating_point()
        or parameter.dtype.itemsize < 2
        or not (type(parameter) is nn.Parameter or is_dtensor(parameter))
        or not (type(parameter.data) is Tensor or is_dtensor(parameter))
    ]
    if quantized:
        raise ValueError(
            f"{len(quantized)} parameters of the base are quantized or packed, {quantized[0]} among them, and "
            f'{strategy} cannot shard them: load the base in bfloat16, or set `strategy="ddp"`.'
        )


def _trainable(module: nn.Module) -> set[str]:
    return {plain_name(name) for name, parameter in module.named_parameters() if parameter.requires_grad}


def _policy_of(module: nn.Module) -> AdapterSharding | None:
    """How a module's adapters lie if it is sharded already; ``None`` if it is not.

    Raises:
        ValueError: It has units of FSDP1 that are not ours.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel  # here: builds without torch.distributed lack it

    fsdp1 = [type(part.module).__name__ for part in module.modules() if isinstance(part, FullyShardedDataParallel)]
    if fsdp1 and noted(module, _CONTENT) is None:
        raise ValueError(
            f"{type(module).__name__} wraps parts of itself ({fsdp1[0]}) in FullyShardedDataParallel, before there are "
            f'adapters. Leave that to `strategy="{FSDP_NAME}"`; its `auto_wrap_policy` says which parts.'
        )
    if not fsdp1 and not any(is_fsdp2_unit(part) for part in module.modules()):
        return None
    return "shard" if any(is_sharded(parameter) for parameter in adapter_parameters(module).values()) else "replicate"
