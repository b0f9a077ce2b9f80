"""Support Lightning's strategies: which of them run, FSDP1 for adapters, and one-file checkpoints under all."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from genlora_lightning.adapters.base import adapter_modules
from genlora_lightning.distributed.collectives import clip_gradient_norm, trained_parameters, transformer_blocks
from genlora_lightning.distributed.shards import (
    load_whole,
    load_whole_optimizer_state,
    mark_shards,
    whole_optimizer_state,
    whole_tensors,
)
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.overrides import note, noted, put_on
from genlora_lightning.training.lightning_internals import (
    move_torchmetrics_to_device,
    own_precision_plugin,
    set_up_activation_checkpointing,
    tensor_parallel_size,
)

FSDP_NAME = "genlora_fsdp"
# WeightAveraging (and EMAWeightAveraging on it) came with Lightning 2.6.
_WEIGHT_AVERAGING: tuple[type, ...] = tuple(
    getattr(lightning_callbacks, name) for name in ("WeightAveraging",) if hasattr(lightning_callbacks, name)
)
# On a module that FSDP1 was wrapped around: the wrapper, for the next run with the same module.
_WRAPPER = "FSDP1's root"


def check_strategy(trainer: Trainer) -> None:
    """Refuse what does not work, before anything is loaded or changed.

    Raises:
        ValueError: In one line, with what to use instead.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy):
        size = tensor_parallel_size(strategy)
        if size != 1:
            raise ValueError(
                f"GenLoRAFinetuning does not support tensor parallelism, and `tensor_parallel_size` is {size} "
                "('auto' stands for all devices of a node): set ModelParallelStrategy(data_parallel_size="
                f"{trainer.world_size}, tensor_parallel_size=1)."
            )
    elif isinstance(strategy, FSDPStrategy) and not isinstance(strategy, GenLoRAFSDPStrategy):
        raise ValueError(
            f'GenLoRAFinetuning does not support {name} as it is: set `strategy="{FSDP_NAME}"` (or '
            "GenLoRAFSDPStrategy with the same arguments), which keeps the adapters right, or ModelParallelStrategy."
        )
    elif "DeepSpeed" in name:
        raise ValueError(
            f'GenLoRAFinetuning does not support {name}: set `strategy="{FSDP_NAME}"` or ModelParallelStrategy, which '
            "shard the base as ZeRO-3 does."
        )
    elif "XLA" in name or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, GenLoRAFSDPStrategy)):
        raise ValueError(
            f'GenLoRAFinetuning does not support {name}: set `strategy` to "auto" (one device), "ddp", '
            f'"{FSDP_NAME}" or ModelParallelStrategy, on CPU or CUDA.'
        )
    if shards_base(strategy) and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f'GenLoRAFinetuning does not support `precision="16-mixed"` with {name}, whose ranks scale gradients each '
            'for itself: set `precision="bf16-mixed"`, or `strategy="ddp"`.'
        )


def averaging_callbacks(strategy: Strategy, callbacks: list[Callback]) -> list[Callback]:
    """Find the callbacks that average weights: ``WeightAveraging``, where each process has all that is trained.

    Raises:
        ValueError: One cannot work; with its name and what to use instead.
    """
    found = [callback for callback in callbacks if isinstance(callback, _WEIGHT_AVERAGING)]
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, lightning_callbacks.StochasticWeightAveraging):
            raise ValueError(
                f"GenLoRAFinetuning does not work with {name}: it copies the module before the adapters are in it. Use "
                "Lightning's WeightAveraging or EMAWeightAveraging (2.6 and newer)."
            )
        if isinstance(callback, lightning_callbacks.ModelPruning):
            raise ValueError(
                f"GenLoRAFinetuning does not work with {name}: it masks weights under other names (`weight_orig`), "
                "which no adapter folder holds. Prune the base before (`genlora prune`), and set `keep_zeros`."
            )
        if callback in found and (shards_base(strategy) or len(found) > 1):
            why = f"under {type(strategy).__name__}" if shards_base(strategy) else "together with another one"
            raise ValueError(
                f"GenLoRAFinetuning does not work with {name} {why}: it averages on one device and under DDP, once."
            )
    return found


def shards_base(strategy: Strategy) -> bool:
    """Whether a strategy shards the base: FSDP1 or FSDP2."""
    return isinstance(strategy, (GenLoRAFSDPStrategy, ModelParallelStrategy))


# -- files ------------------------------------------------------------------------------------------------------------


def use_whole_files(trainer: Trainer) -> None:
    """Let FSDP1 and FSDP2 save and load what one process would: one file, of what is trained, the base not gathered.

    The methods are put on the strategy, because ``ModelParallelStrategy`` is the user's own.
    """
    strategy: Any = trainer.strategy

    def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return whole_optimizer_state(optimizer)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if Path(filepath).is_dir():
            raise IsADirectoryError(f"The checkpoint path exists and is a directory: {filepath}")
        Strategy.save_checkpoint(strategy, checkpoint, filepath, storage_options)

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = strategy.broadcast(checkpoint_path)
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder: a distributed checkpoint, which was not written by a run with GenLoRAFinetuning. "
                "Its checkpoints are single files under every strategy."
            )
        return Strategy.load_checkpoint(strategy, path, weights_only)

    def load_model_state_dict(checkpoint: dict[str, Any], strict: bool = True) -> None:
        load_whole(strategy.lightning_module, checkpoint["state_dict"])
        # Here, because Lightning leaves it to these strategies to load the optimizers' state together with the file.
        if trainer.state.fn == "fit":
            for optimizer, state in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
                load_whole_optimizer_state(optimizer, state)

    put_on(
        strategy,
        lightning_module_state_dict=lambda: whole_tensors(strategy.lightning_module),
        optimizer_state=optimizer_state,
        save_checkpoint=save_checkpoint,
        load_checkpoint=load_checkpoint,
        load_model_state_dict=load_model_state_dict,
    )


# -- FSDP1 ------------------------------------------------------------------------------------------------------------


class GenLoRAFSDPStrategy(FSDPStrategy):
    """FSDP1 for adapters: ``strategy="genlora_fsdp"``.

    What Lightning's own lacks for them: it runs on CPUs, too; clips by norm; leaves the adapters outside of the sharded
    units, or puts them into units of their own; computes in the precision that one device would compute in (a base that
    is to be communicated in 16 bits is loaded in 16 bits); and goes on with a module that it has wrapped before.
    Without an ``auto_wrap_policy`` the members of the module lists that hold adapters are units: transformer blocks.

    Args:
        kwargs: Those of :class:`lightning.pytorch.strategies.FSDPStrategy`.

    Raises:
        ValueError: From ``use_orig_params=False`` (adapters cannot be told from the base then) and from
            ``state_dict_type="sharded"`` (checkpoints hold adapters only, in one file).
    """

    strategy_name = FSDP_NAME
    _registered_strategies: list[str] = []  # noqa: RUF012 - not shared with the base class

    def __init__(self, **kwargs: Any) -> None:
        if not kwargs.get("use_orig_params", True):
            raise ValueError(
                "`use_orig_params=False` hides the adapters in flat parameters together with the base; leave it out."
            )
        if kwargs.get("state_dict_type", "full") != "full":
            raise ValueError(
                f"`state_dict_type` {kwargs['state_dict_type']!r} is not supported: checkpoints hold adapters only, in "
                "one file; leave it out."
            )
        super().__init__(**kwargs)
        self.shards_adapters: bool | None = None

    @property
    @override
    def mixed_precision_config(self) -> Any:
        # Lightning's would cast the base's float32 parameters, and its buffers, such as rotary frequencies, to 16 bits.
        return self.mixed_precision

    @property
    @override
    def precision_plugin(self) -> FSDPPrecision:
        plugin = own_precision_plugin(self)
        return plugin if isinstance(plugin, FSDPPrecision) else _Precision("32-true", self)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is FSDPPrecision:
            plugin = _Precision(plugin.precision, self)
        FSDPStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        # FSDP's `no_sync` would spare nothing of the frozen base, and leaves gradients whole in the middle of a window.
        yield

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapper: nn.Module | None = noted(model, _WRAPPER)
        if wrapper is not None:
            return wrapper
        if self.shards_adapters is None:
            raise ValueError(
                f"GenLoRAFSDPStrategy is for training with GenLoRAFinetuning, which this trainer of a "
                f'{type(model).__name__} does not have. Add the callback, or set `strategy="fsdp"`.'
            )
        trained = trained_parameters(model)
        shapes = [parameter.shape for parameter in trained]
        options: dict[str, Any] = {**self.kwargs, "auto_wrap_policy": self._wrap_policy(model)}
        if not self.shards_adapters:
            for parameter in trained:  # FSDP moves only what it takes
                parameter.data = parameter.data.to(self.root_device)
            options["ignored_states"] = [*options.get("ignored_states", ()), *trained]
        wrapper = FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **options,
        )
        if self.shards_adapters:
            mark_shards(trained, shapes)
        note(model, _WRAPPER, wrapper)
        move_torchmetrics_to_device(wrapper, self.root_device)
        set_up_activation_checkpointing(self, wrapper)
        return wrapper

    def _wrap_policy(self, model: nn.Module) -> Any:
        """Which modules are units: the user's choice or the blocks; and, if they are sharded, what is trained.

        Units of their own, because a unit reduces the gradients of all that is in it, those of the frozen base too.
        """
        from torch.distributed.fsdp.wrap import CustomPolicy

        given = self.kwargs.get("auto_wrap_policy")
        if not self.shards_adapters and given is not None:
            return given
        if given is not None and not hasattr(given, "_run_policy"):
            raise ValueError(
                '`adapter_sharding="shard"` needs an `auto_wrap_policy` that is a set of classes or a policy object of '
                f"torch.distributed.fsdp.wrap, got {given!r}."
            )
        chosen = transformer_blocks(model) if given is None else given._run_policy(model, set(), {})
        units = {id(module) for module in chosen}
        own: set[int] = set()
        if self.shards_adapters:
            own = {id(module) for module in adapter_modules(model)}
            own |= {id(module) for module in trained_modules(model).values()}

        def choose(module: nn.Module) -> bool | dict[str, Any]:
            # What is trained is computed in float32 under every precision.
            return {"mixed_precision": None} if id(module) in own else id(module) in units

        return CustomPolicy(choose)


class _Precision(FSDPPrecision):
    """FSDP's precision on any device, and with clipping by norm."""

    def __init__(self, precision: Any, strategy: GenLoRAFSDPStrategy) -> None:
        super().__init__(precision)
        self._strategy = strategy

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        if "mixed" in self.precision:
            dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
            return torch.autocast(self._strategy.root_device.type, dtype=dtype)
        return super().forward_context()

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        clip_gradient_norm(self.main_params(optimizer), float(clip_val))


if torch.distributed.is_available():
    StrategyRegistry.register(
        FSDP_NAME, GenLoRAFSDPStrategy, description="FSDP1 for GenLoRA adapters, on CPU and CUDA", override=True
    )
