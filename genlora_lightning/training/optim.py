"""Build AdamW and its learning-rate schedule, with rates of their own for an adapter's parts and for heads."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from genlora_lightning.adapters.base import Role, trained_by_role
from genlora_lightning.adapters.steps import hook_steps
from genlora_lightning.fields import check_choice, check_fields, check_integer, check_number, shown
from genlora_lightning.injection.places import adapter_places

Schedule = Literal["cosine", "linear", "constant"]

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and a schedule per optimizer step.

    The rate of a parameter at optimizer step ``t`` (counted from 0) is ``lr · factor · schedule(t)``, with the factor
    of the parameter's group and a schedule that rises during the ``w`` warm-up steps as ``(t + 1) / (w + 1)`` and then
    falls from 1 to ``min_lr_ratio`` over the rest of the run.

    Args:
        lr: Learning rate.
        weight_decay: AdamW's decoupled weight decay. Not of biases, norms, and an adapter's centres and widths.
        betas: AdamW's decay rates of the two moments, each in [0, 1).
        eps: AdamW's term for numerical stability.
        lr_factors: Factors on ``lr`` for groups of the adapter's parameters, by name; 1 for those that are not named.
            GenLoRA has ``latents``, ``rbf_weights`` and ``rbf_shapes`` (centres and widths), LoRA ``lora_a`` and
            ``lora_b`` (``{"lora_b": 16}`` is LoRA+), PoLAR ``polar_directions`` and ``polar_core``, Compacter
            ``compacter_factors`` and ``compacter_shared``; rows of tokens are ``token_rows``.
        head_lr_factor: Factor on ``lr`` for all else that is trained: the modules in ``modules_to_train``.
        schedule: Shape of the decay: ``"cosine"``, ``"linear"``, or ``"constant"`` for none.
        warmup_steps: Length of the warm-up in optimizer steps.
        warmup_ratio: Length of the warm-up as a share of all optimizer steps; give this or ``warmup_steps``.
        min_lr_ratio: Where the decay ends, as a share of ``lr``.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    lr: float = 2e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lr_factors: dict[str, float] = field(default_factory=dict)
    head_lr_factor: float = 1.0
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, above=0.0)
        check_number("eps", self.eps, above=0.0)
        for name in ("weight_decay", "head_lr_factor"):
            check_number(name, getattr(self, name), least=0.0)
        if not isinstance(self.lr_factors, Mapping):
            raise TypeError(f"`lr_factors` must be a dictionary of factors by group, got {shown(self.lr_factors)}.")
        for group, factor in self.lr_factors.items():
            check_number(f"lr_factors.{group}", factor, least=0.0)
        self.betas = _checked_betas(self.betas)
        check_choice("schedule", self.schedule, get_args(Schedule))
        if isinstance(self.warmup_steps, float):
            raise TypeError(
                f"`warmup_steps` must be an integer, got {self.warmup_steps!r}. For a share of the run set "
                "`warmup_ratio`."
            )
        check_integer("warmup_steps", self.warmup_steps, least=0)
        check_number("warmup_ratio", self.warmup_ratio, least=0.0, below=1.0)
        check_number("min_lr_ratio", self.min_lr_ratio, least=0.0, most=1.0)
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"Give `warmup_steps` ({self.warmup_steps}) or `warmup_ratio` ({self.warmup_ratio}), not both."
            )

    @property
    def needs_total_steps(self) -> bool:
        """Whether the schedule depends on how many optimizer steps the run will take."""
        return self.schedule != "constant" or self.warmup_ratio > 0

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain numbers, strings and lists, fit for JSON, YAML and safe checkpoint loading."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OptimizerConfig:
        """Make a configuration from :meth:`to_dict`'s values; fields that are left out take their defaults.

        Raises:
            ValueError: A key is no field; the message lists the fields.
        """
        check_fields(cls, values)
        return cls(**values)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into named groups with a learning rate and a weight decay each.

    First the groups of the adapter's parameters (of GenLoRA ``latents``, ``rbf_weights`` and ``rbf_shapes``, of LoRA
    ``lora_a`` and ``lora_b``, of PEFT's kinds ``adapter`` and, for vectors, ``adapter_no_decay``), at the rate ``lr ·
    lr_factors[name]``; then ``head``, the matrices of everything else that is trained, and ``head_no_decay``, its
    vectors (biases, norms), at the rate ``lr · head_lr_factor``. Groups that would be empty are left out.

    Args:
        model: A model with adapters, or anything that has trainable parameters.
        config: The rates.

    Returns:
        Groups for a torch optimizer. Every trainable parameter is in exactly one; the order is that of the modules.

    Raises:
        ValueError: Nothing is trainable, or ``lr_factors`` names a group that there is not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"This {type(model).__name__} has no trainable parameter, so there is nothing to optimize. Adapters must "
            "be injected before the optimizer is made: call `inject_adapters(model, config)`, or give the Trainer the "
            "GenLoRAFinetuning callback."
        )
    by_role = {**trained_by_role(model), **_roles_of_others(model)}
    unknown = sorted(set(config.lr_factors) - set(by_role))
    if unknown:
        raise ValueError(
            f"`lr_factors` names {unknown}, but the groups of the adapter's parameters that are trained here are "
            f"{sorted(by_role)}."
        )
    groups = [
        {
            "name": name,
            "params": members,
            "lr": config.lr * config.lr_factors.get(name, 1.0),
            "weight_decay": config.weight_decay if role.decayed else 0.0,
        }
        for name, (role, members) in by_role.items()
    ]
    placed = {id(parameter) for _, members in by_role.values() for parameter in members}
    others = [parameter for parameter in trainable if id(parameter) not in placed]
    for name, decay, members in (
        ("head", config.weight_decay, [p for p in others if p.ndim > 1]),
        ("head_no_decay", 0.0, [p for p in others if p.ndim <= 1]),
    ):
        groups.append({"name": name, "params": members, "lr": config.lr * config.head_lr_factor, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def _roles_of_others(model: nn.Module) -> dict[str, tuple[Role, list[nn.Parameter]]]:
    """Groups for adapters of another library, which does not say what decays: matrices, as elsewhere."""
    found: dict[int, nn.Parameter] = {}
    for place in adapter_places(model).values():
        if not place.is_ours and not place.is_copy:
            found |= {id(p): p for p in place.adapter_parameters().values() if p.requires_grad}
    matrices = [p for p in found.values() if p.ndim > 1]
    vectors = [p for p in found.values() if p.ndim <= 1]
    groups = {"adapter": (True, matrices), "adapter_no_decay": (False, vectors)}
    return {name: (Role(name, decayed), members) for name, (decayed, members) in groups.items() if members}


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """Make AdamW over :func:`parameter_groups`.

    Args:
        model: A model with adapters.
        config: Rates and AdamW's constants.
        fused: Use torch's fused kernel. ``None``: wherever it applies, on plain floating-point parameters on CPU or
            CUDA. Give ``False`` with an fp16 gradient scaler: the fused kernel unscales gradients by itself, too late
            for clipping and for checks of the gradients.

    Raises:
        ValueError: Nothing is trainable.
    """
    groups = parameter_groups(model, config)
    if fused is None and _fused_applies(parameter for group in groups for parameter in group["params"]):
        fused = True
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused
    )
    hook_steps(model, optimizer)
    return optimizer


def schedule_factor(step: int, config: OptimizerConfig, total_steps: int | float | None = None) -> float:
    """The factor on the learning rate at an optimizer step.

    Args:
        step: Number of optimizer steps that were already taken.
        config: Shape of the schedule.
        total_steps: Optimizer steps of the whole run; not needed if :attr:`OptimizerConfig.needs_total_steps` is false.
            After the last of them the factor stays at ``min_lr_ratio``.

    Returns:
        A number from ``min_lr_ratio`` (0 < during warm-up) to 1.
    """
    warmup = config.warmup_steps
    if config.warmup_ratio:
        assert total_steps is not None
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    assert total_steps is not None
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int | float | None
) -> LambdaLR:
    """Make the schedule, to be advanced after each optimizer step.

    Args:
        optimizer: The optimizer whose groups' rates are scheduled.
        config: Shape of the schedule.
        total_steps: Optimizer steps of the whole run; ``None``, infinite or negative if unknown.

    Raises:
        ValueError: The schedule needs the number of steps, and it is unknown.
    """
    if config.needs_total_steps:
        if total_steps is None or not math.isfinite(total_steps) or total_steps < 0:
            wanted = (
                f"`schedule: {config.schedule}`"
                if config.schedule != "constant"
                else f"warmup_ratio {config.warmup_ratio}"
            )
            raise ValueError(
                f"{wanted} needs to know how many optimizer steps the run takes, but that is {total_steps}. Set the "
                "Trainer's `max_steps`, or `max_epochs` with a dataset of known length, or use `schedule: constant` "
                "with `warmup_steps`."
            )
        if config.warmup_steps and config.warmup_steps >= total_steps:
            warnings.warn(
                f"The warm-up of {config.warmup_steps} steps does not end within the run's {int(total_steps)} "
                f"optimizer steps: the learning rate never reaches {config.lr}.",
                stacklevel=2,
            )

    def factor(step: int) -> float:
        return schedule_factor(step, config, total_steps)

    return LambdaLR(optimizer, factor)


def _fused_applies(parameters: Iterable[Tensor]) -> bool:
    """Whether torch's fused AdamW takes these parameters; sharded ones (DTensor) are left to torch's own choice."""
    return all(
        type(parameter) in (Tensor, nn.Parameter)
        and parameter.is_floating_point()
        and parameter.device.type in _FUSED_DEVICES
        for parameter in parameters
    )


def _checked_betas(betas: Any) -> tuple[float, float]:
    if isinstance(betas, str) or not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"`betas` must be two numbers, got {shown(betas)}.")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, least=0.0, below=1.0)
    return float(betas[0]), float(betas[1])
