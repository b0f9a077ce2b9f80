"""Wrap a transformers model as a LightningModule: loading, optimizer, and losses weighted by tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import Self, override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.loading import load_module
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing
from genlora_lightning.backbone.pretrained import load_pretrained, load_tokenizer
from genlora_lightning.backbone.quantization import QUANTIZATIONS, Quantization, quantization_config
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.callbacks.reading import is_for_bar
from genlora_lightning.fields import check_choice
from genlora_lightning.injection.peft_adapters import AnyConfig, PeftAdapter, PeftConfigLike, read_any_config
from genlora_lightning.layers.quantized import keep_layout
from genlora_lightning.modules.apart import scale_gradients
from genlora_lightning.modules.limits import InputCheck
from genlora_lightning.training.callback import AdapterFinetuning
from genlora_lightning.training.lightning_internals import trainer_or_none
from genlora_lightning.training.named_adapters import adapters_of
from genlora_lightning.training.optim import OptimizerConfig, build_optimizer, build_scheduler
from genlora_lightning.training.precision import cpu_multiplies_bfloat16
from genlora_lightning.training.strategies import shards_base

_log = rank_zero_logger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Losses are divided by this before the backward pass where the right divisor is known only after it. A power of two, so
# that the division is exact and nothing depends on it but the range of float16 gradients.
_LOSS_UNIT = 256.0


class GenLoRAModule(LightningModule):
    r"""Base of the modules for fine-tuning a transformers model with generated adapters.

    A subclass says how its model is loaded (:meth:`load_backbone`) and what its steps do. The model is loaded in
    ``configure_model``, when the trainer runs, so that making the module costs nothing. The adapters are injected by a
    :class:`~genlora_lightning.GenLoRAFinetuning` callback: the trainer's, or else one that the module brings along.

    A training step returns ``self.training_loss(loss_sum, count)``. The gradient of an optimizer step is then that of

    .. math:: L = \sum_b \ell_b \,/\, \sum_b n_b

    over all micro-batches b of the accumulation window and all ranks, with the sum ℓ of the losses of b's n tokens (or
    examples): the mean over tokens, however they are spread over micro-batches. (A mean of the means of micro-batches,
    which is what accumulation gives by itself, weighs a token of a short answer more than one of a long answer.)

    Args:
        model: Local folder or name on the Hugging Face Hub.
        adapter: What to adapt, and how; as a dictionary with ``kind`` for another kind than GenLoRA; also a
            configuration of PEFT. GenLoRA's defaults if ``None``. Leave it out if the trainer has an AdapterFinetuning
            callback.
        optimizer: AdamW and its schedule; the defaults if ``None``.
        dtype: Dtype of the frozen base's weights; ``"auto"``: the one they are stored in, or float32 on a CPU without
            bfloat16 arithmetic. Adapters are always float32.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: transformers' attention, such as ``"sdpa"`` or ``"eager"``; its choice if ``None``.
        trust_remote_code: Run the Python code that comes with the model.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        low_memory: Build the model without weights; each process reads from the safetensors files what it keeps once
            the strategy has sharded the model, so that no process ever holds all of it. For FSDP; with other
            strategies each process reads all, once. Without a trainer the model is loaded as always.
        quantization: Quantize the frozen base while it is loaded: ``"nf4"`` or ``"int8"`` by bitsandbytes,
            ``"int8-weight-only"`` or ``"float8"`` by torchao (extra ``quant``).
        model_kwargs: More arguments for ``from_pretrained``; plain values, because checkpoints hold them.

    Raises:
        TypeError: An argument holds something else than plain values.
        ValueError: An argument is out of its range.

    Note:
        Between the backward pass and the module's ``on_before_optimizer_step`` gradients have a scale of their own
        where micro-batches are accumulated or ranks are several. They are the true ones when they are clipped.
    """

    #: Fields of a batch that hold token numbers.
    token_fields: tuple[str, ...] = ("input_ids",)

    def __init__(
        self,
        model: str,
        *,
        adapter: dict[str, Any] | AdapterConfig | PeftConfigLike | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        low_memory: bool = False,
        quantization: Quantization | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, str) or not model:
            raise TypeError(f"`model` must be a folder or a name on the Hugging Face Hub, got {model!r}.")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
        check_plain("model_kwargs", model_kwargs)
        if quantization is not None:
            check_choice("quantization", quantization, QUANTIZATIONS)
            if low_memory:
                raise ValueError(
                    f"`quantization` is {quantization!r}, and `low_memory` reads weights as they are. Leave one out."
                )
            if "quantization_config" in (model_kwargs or {}):
                raise ValueError("`quantization` and `model_kwargs.quantization_config` say the same thing: give one.")
        self.quantization = quantization
        self.source = model
        self.adapter: AnyConfig | None = None if adapter is None else read_any_config(adapter)
        if isinstance(optimizer, dict):
            optimizer = OptimizerConfig.from_dict(optimizer)
        self.optimizer_config = optimizer if optimizer is not None else OptimizerConfig()
        self.gradient_checkpointing = gradient_checkpointing
        self.low_memory = low_memory
        self.tokenizer_options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading_options: dict[str, Any] = {
            **self.tokenizer_options,
            "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
            "attn_implementation": attn_implementation,
            **(model_kwargs or {}),
        }
        self.model: Any = None
        self._tokenizer: Any = None
        self._own_callback: AdapterFinetuning | None = None
        self._window_loss: Tensor | None = None
        self._window_count: Tensor | None = None
        self._lr_is_set = False
        self._known_labels: tuple[Tensor, int, Any] | None = None  # of the batch that was moved last
        self._check_inputs = InputCheck()

        # First everything, subclasses' arguments included, as Lightning collects it; then dictionaries in place of
        # dataclasses, which torch refuses to load from a checkpoint under its safe default.
        self.save_hyperparameters()
        self.save_hyperparameters(
            {
                name: value.to_dict()
                for name, value in self.hparams.items()
                if isinstance(value, (AdapterConfig, OptimizerConfig))
            }
        )
        if isinstance(self.adapter, PeftAdapter):
            self.save_hyperparameters({"adapter": self.adapter.to_dict()})

    # -- the model --------------------------------------------------------------------------------------------------

    def load_backbone(self) -> nn.Module:
        """Load the transformers model; called once."""
        raise NotImplementedError(f"{type(self).__name__} must define `load_backbone`.")

    def kept_whole(self) -> list[str] | None:
        """Names of the modules that ``quantization`` leaves as they are; transformers' choice if ``None``."""
        return None

    def load_with(self, auto_class: str, **options: Any) -> tuple[Any, list[str]]:
        """Load the model with a class of transformers and the module's options.

        Returns:
            The model, and the names of parameters that its checkpoint lacks.
        """
        # Without a trainer there is no callback either, which has the weights read.
        low_memory = self.low_memory and self._trainer_or_none() is not None
        given = {**self.loading_options, **options}
        if self.quantization is not None:
            self._check_unsharded()
            given["quantization_config"] = quantization_config(self.quantization, self.kept_whole())
            if given["dtype"] == "auto" and self._is_slow_in_bfloat16():
                given["dtype"] = torch.float32
        model, missing = load_pretrained(auto_class, self.source, low_memory=low_memory, **given)
        keep_layout(model)
        is_quantized = getattr(model.config, "quantization_config", None) is not None
        is_free = given["dtype"] == "auto" and not low_memory and not is_quantized
        has_16_bits = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        if is_free and has_16_bits and self._is_slow_in_bfloat16():
            model.float()
            _log.info("The base is float32 here: this CPU has no 16-bit arithmetic. Set `dtype` to choose.")
        return model, missing

    def _check_unsharded(self) -> None:
        trainer = self._trainer_or_none()
        if trainer is not None and shards_base(trainer.strategy):
            raise ValueError(
                f"`quantization` is {self.quantization!r}, and {type(trainer.strategy).__name__} cannot shard a "
                'quantized base: leave it out, or set `strategy="ddp"`, with which each process has the whole base.'
            )

    def _is_slow_in_bfloat16(self) -> bool:
        """Whether the model would compute in bfloat16 on a CPU that has no arithmetic for it, unasked."""
        trainer = self._trainer_or_none()
        if trainer is None:
            return not torch.cuda.is_available() and not cpu_multiplies_bfloat16()
        is_cpu = trainer.strategy.root_device.type == "cpu"
        return is_cpu and str(trainer.precision).startswith("32") and not cpu_multiplies_bfloat16()

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = self.load_backbone()
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        self.model = model

    def adapter_root(self) -> nn.Module:
        """The module that adapters are injected into: the transformers model, so that names are the model's own."""
        if self.model is None:
            raise RuntimeError(
                f"The model of this {type(self).__name__} is not loaded yet. The trainer loads it; without a trainer "
                "call `configure_model()`."
            )
        model: nn.Module = self.model
        return model

    def resolve_adapter_config(self, config: AnyConfig) -> AnyConfig:
        """Complete an adapter configuration with what is known once the model is loaded: the ids of tokens.

        Raises:
            ValueError: A token of ``tokens_to_train`` is none of the tokenizer's.
        """
        if isinstance(config, PeftAdapter) or not config.tokens_to_train:
            return config
        given = config.tokens_to_train
        if isinstance(given, dict):
            ids: Any = {name: self._token_ids(tokens) for name, tokens in given.items()}
        else:
            ids = self._token_ids(given)
        return replace(config, tokens_to_train=ids)

    def _token_ids(self, tokens: list[int | str]) -> list[int]:
        known = self.tokenizer.get_vocab() if any(isinstance(token, str) for token in tokens) else {}
        absent = [token for token in tokens if isinstance(token, str) and token not in known]
        if absent:
            raise ValueError(
                f"`tokens_to_train` names {absent[0]!r}, which is no token of {self.source!r}. Add it to the base "
                f"first: `tokenizer.add_tokens([{absent[0]!r}])`, `model.resize_token_embeddings(len(tokenizer))`, and "
                "save both to a folder that is the module's `model`."
            )
        return [known[token] if isinstance(token, str) else token for token in tokens]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source, **self.tokenizer_options)
        return self._tokenizer

    @override
    def forward(self, **inputs: Any) -> Any:
        return self.adapter_root()(**inputs)

    @override
    def configure_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        given = [callback for callback in callbacks if isinstance(callback, AdapterFinetuning)]
        for callback in given:
            if callback is self._own_callback or self.adapter is None:
                continue
            differences = callback.config.differences(self.adapter, run_only=True)
            if differences:
                listed = ", ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in differences.items())
                raise ValueError(
                    "The trainer's GenLoRAFinetuning callback and the module's `adapter` differ "
                    f"({listed}). Give the configuration once, to one of them."
                )
        if given:
            return []
        self._own_callback = AdapterFinetuning(self.adapter)
        return [self._own_callback]

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = None, **arguments: Any
    ) -> Self:
        """The module with its trained adapters, from a checkpoint or an adapter folder.

        Args:
            checkpoint_path: The file or folder.
            map_location: The device to move the module to.
            arguments: Arguments of the class that replace those of the checkpoint; an adapter folder holds none.

        Raises:
            ValueError: See :func:`~genlora_lightning.load_module`, which this calls.
        """
        module = load_module(cls, checkpoint_path, **arguments)
        return module if map_location is None else module.to(map_location)

    # -- the optimizer ----------------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """The learning rate of ``optimizer_config``, as Lightning's ``LearningRateFinder`` reads and sets it.

        A rate that is set while a run is set up applies to its optimizer, with the factors of the groups and the
        schedule.
        """
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        before, self.optimizer_config = self.optimizer_config, replace(self.optimizer_config, lr=value)
        self.hparams["optimizer"] = self.optimizer_config.to_dict()
        for scheduler in self._schedulers():
            scheduler.base_lrs = [base * (value / before.lr) for base in scheduler.base_lrs]
            self._lr_is_set = True

    @override
    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = build_optimizer(self, config, fused=False if has_scaler else None)
        # Lightning refuses to clip what a fused optimizer might unscale by itself, also under bfloat16, where nothing
        # is scaled. Only a gradient scaler reads this mark.
        optimizer._step_supports_amp_scaling = False
        # Counting the steps loads the data, so it is left out where nothing depends on it.
        total_steps = self.trainer.estimated_stepping_batches if config.needs_total_steps else None
        scheduler = build_scheduler(optimizer, config, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedulers(self) -> list[LambdaLR]:
        trainer = self._trainer_or_none()
        found = () if trainer is None else (config.scheduler for config in trainer.lr_scheduler_configs)
        return [scheduler for scheduler in found if isinstance(scheduler, LambdaLR)]

    # -- batches ----------------------------------------------------------------------------------------------------

    @override
    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """When a batch is moved, check it, and remember what :meth:`look_at_labels` finds, while it is on the CPU."""
        # Not in `transfer_batch_to_device`: it may be the data module's, and Lightning warns where both might have one.
        if hook_name != "transfer_batch_to_device":
            return super()._call_batch_hook(hook_name, *args)
        batch, device, dataloader_idx = args
        self._check_inputs(self, batch)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        found = None
        # Under inference mode tensors do not say whether they were changed.
        if isinstance(labels, Tensor) and labels.device.type == "cpu" and not torch.is_inference_mode_enabled():
            found = self.look_at_labels(labels)
        moved = super()._call_batch_hook(hook_name, *args)
        self._known_labels = None
        if found is not None and isinstance(moved, Mapping) and isinstance(moved.get("labels"), Tensor):
            found = super().transfer_batch_to_device(found, device, dataloader_idx)
            self._known_labels = (moved["labels"], moved["labels"]._version, found)
        return moved

    def look_at_labels(self, labels: Tensor) -> Any:
        """Find out about labels on the CPU what the step would have to ask the device for; ``None`` for nothing.

        A step finds it with :meth:`known_of`.
        """
        return None

    def known_of(self, labels: Tensor) -> Any:
        """What :meth:`look_at_labels` has found of these labels; ``None`` if they are others, or were changed since."""
        if self._known_labels is None:
            return None
        known, version, found = self._known_labels
        return found if labels is known and not labels.is_inference() and labels._version == version else None

    # -- losses -----------------------------------------------------------------------------------------------------

    def count_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Tokens of a batch that are not padding; a scalar that stays where the batch is."""
        mask: Tensor = batch["attention_mask"]
        return mask.sum()

    def training_loss(self, loss_sum: Tensor, count: Tensor) -> Tensor:
        """What a training step returns, so that each token counts the same; logs ``train_loss``.

        Args:
            loss_sum: Sum of the losses of the micro-batch's tokens (or examples); a scalar with a graph. Or one for
                each named adapter (:func:`~genlora_lightning.modules.apart.sums_by_adapter`), which is then trained on
                the mean over its own tokens.
            count: How many they are; of the same shape.

        Returns:
            A scalar to be back-propagated. The logged ``train_loss`` is the mean per token of the optimizer step so far
            on this rank; ``train_loss_<name>`` that of a named adapter.
        """
        trainer = self._trainer_or_none()
        if trainer is None:
            return _mean(loss_sum, count)
        self._window_loss = loss_sum.detach() + (0 if self._window_loss is None else self._window_loss)
        self._window_count = count + (0 if self._window_count is None else self._window_count)
        # What is returned may be a sum.
        self.watched_loss = self._window_loss.sum() / self._window_count.sum()
        self.log("train_loss", self.watched_loss, prog_bar=is_for_bar(trainer), batch_size=1)
        if loss_sum.ndim:
            self._log_by_adapter(loss_sum.detach() / count)
        return loss_sum.sum() / _LOSS_UNIT if _is_divided(trainer) else _mean(loss_sum, count)

    def _log_by_adapter(self, losses: Tensor) -> None:
        adapters = adapters_of(self)
        acting = set(adapters.active or ())
        for name, loss in zip(adapters.trained_names, losses, strict=True):
            if name in acting:
                self.log(f"train_loss_{name}", loss, batch_size=1)

    def window_state(self) -> dict[str, Tensor]:
        """The loss sum and count of the accumulation window so far, for a checkpoint in its middle."""
        if self._window_loss is None or self._window_count is None:
            return {}
        return {"loss": self._window_loss, "count": self._window_count}

    def load_window_state(self, state: dict[str, Tensor]) -> None:
        """Go on with an accumulation window of :meth:`window_state`."""
        self._window_loss, self._window_count = state["loss"], state["count"]

    @override
    def on_train_start(self) -> None:
        self._window_loss = self._window_count = None
        if self._lr_is_set:  # the finder has given all groups the same rate
            for scheduler in self._schedulers():
                groups = scheduler.optimizer.param_groups
                for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                    group["lr"] = base * factor(scheduler.last_epoch)
            self._lr_is_set = False

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn gradients of loss sums into those of the mean over the window's tokens on all ranks."""
        count = self._window_count
        self._window_loss = self._window_count = None
        if count is None or not _is_divided(self.trainer):
            return
        total = count.float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)  # the strategy's `reduce` has a barrier, which waits for the device
        # Lightning has divided each loss by the window's nominal length (also in a shorter one at an epoch's end), and
        # the strategy the sum of the ranks' gradients by their number.
        scale = _LOSS_UNIT * self.trainer.accumulate_grad_batches * self.trainer.world_size / total.clamp(min=1)
        if scale.ndim:
            scale_gradients(adapters_of(self), scale)
            return
        by_kind: dict[tuple[type, torch.device], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = (type(parameter.grad), parameter.grad.device)
                    by_kind.setdefault(kind, []).append(parameter.grad)
        for (_, device), gradients in by_kind.items():
            torch._foreach_mul_(gradients, scale.to(device))

    def _trainer_or_none(self) -> Trainer | None:
        """The trainer, or ``None`` if a step is called without one."""
        return trainer_or_none(self)


def check_plain(name: str, value: Any) -> None:
    """Check that a value is made of numbers, strings, lists and dictionaries, as YAML and checkpoints hold them.

    Raises:
        TypeError: It is not; the message names the entry.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"The keys of `{name}` must be strings, got {key!r}.")
            check_plain(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(f"{name}[{index}]", item)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise TypeError(
            f"`{name}` must be a plain value (number, string, list, dictionary), because checkpoints hold it; got a "
            f"{type(value).__name__}. transformers takes most of its objects as dictionaries, and dtypes by name."
        )


def _mean(loss_sum: Tensor, count: Tensor) -> Tensor:
    """The mean; of several ones their sum, without those of nothing."""
    return (loss_sum / count.clamp(min=1)).sum() if loss_sum.ndim else loss_sum / count


def _is_divided(trainer: Trainer) -> bool:
    """Whether one optimizer step sums gradients of several losses."""
    return trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
