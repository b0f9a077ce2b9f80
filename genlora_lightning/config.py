"""The adapter's configuration: one flat, validated, frozen, YAML-friendly dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

ScalingRule = Literal["sqrt_rank", "rank"]
Init = Literal["zero_latent", "zero_weight"]
Kernel = Literal["gaussian", "inverse_multiquadric", "inverse_quadratic"]

ALL_LINEAR = "all-linear"
# γ·√R of `entry_signs`: found by search (docs/method.md), at a rate that suits the latents.
SIGNED_GAIN = 64.0


@dataclass(frozen=True, kw_only=True)
class GenLoRAConfig:
    """What is adapted, and how the low-rank matrices are generated.

    The update of a weight ``W (out, in)`` is ``ΔW = s · B · A`` with ``A (rank, in)`` and ``B (out, rank)``. Each of
    the two matrices is generated from one latent vector, or a few, by radial basis functions; see
    :class:`~genlora_lightning.RBFGenerator` for the formula. One adapted linear has ``Q_A · in + Q_B · out`` entries of
    latents (Q_A, Q_B: the numbers of latents) and ``rank · num_centers · (Q_A · G_A + Q_B · G_B)`` RBF weights (G_A,
    G_B: the numbers of groups), against LoRA's ``rank · (in + out)``. Learned centres or widths are ``rank ·
    num_centers · (Q_A + Q_B)`` more each.

    A configuration is frozen: what was validated stays so. ``dataclasses.replace(config, rank=32)`` gives another one.
    Lists are copied, here and by ``replace``, so that no two configurations share one.

    Args:
        rank: Number R of generated basis vectors of each matrix, the highest rank ΔW can have. It may be generous:
            one more costs ``num_centers · (Q_A · G_A + Q_B · G_B)`` parameters per linear, whatever its size.
        alpha: Numerator of the scaling ``s``. With ``scaling="sqrt_rank"`` one value suits every rank: the basis
            functions start with slopes of root-mean-square 1, so that a block of ΔW starts as ``alpha`` times a rank-1
            matrix of the latents times a number of variance 1.
        scaling: ``"sqrt_rank"``: ``s = alpha / √rank``; ``"rank"``: ``s = alpha / rank``, as in LoRA.
        num_latents_a: Number Q_A of latent vectors of A. 1 is the paper's form.
        num_latents_b: Number Q_B of latent vectors of B. 1 is the paper's form.
        num_groups_a: Number G_A of groups of consecutive entries of A's latents. Each group has RBF weights of its own,
            ``rank · num_centers`` for each latent. At most the number of entries.
        num_groups_b: Number G_B of groups of B's latents.
        entry_signs: Multiply every generated number by a fixed pseudo-random sign of its own. Then each entry of a
            latent has a direction of its own in the space of the basis vectors, and ΔW a high rank with one group
            already. The signs are a formula and stored nowhere. Without them the entries of a group share a direction.
        weight_gain: A constant factor γ on the RBF weights, which are stored divided by it. It decides nothing but how
            fast they learn: with Adam γ times as fast as without (with SGD γ² times: set 1 there). ``None``:
            ``64 / √rank`` with ``entry_signs``, since a weight that entries with random signs share needs larger steps
            than an entry of a latent, the smaller the more weights there are; 1 without.
        num_centers: Number K of radial basis functions that are summed to one basis vector.
        width: Initial width h of the radial basis functions, in units of the latent's entries.
        learn_centers: Train the centres.
        learn_widths: Train the widths (their logarithms).
        init: What makes a new adapter change nothing. ``"zero_latent"``: B's latent is zero, and every basis function
            is zero at zero. ``"zero_weight"``: B's RBF weights are zero.
        kernel: Shape φ(u) of the radial basis functions, ``u = x/h − c``: ``"gaussian"``: ``exp(−u²/2)``;
            ``"inverse_multiquadric"``: ``1/√(1+u²)``; ``"inverse_quadratic"``: ``1/(1+u²)``.
        dropout: Probability of dropping an entry of the adapter's input while training.
        target_modules: Linear layers to adapt: ``"all-linear"`` (each but the output head), a list of module names or
            their last parts (``["q_proj", "v_proj"]``), or a regular expression that must match the whole module name.
        exclude_modules: Names, or last parts of names, of linears not to adapt; all in a named module are left out.
        modules_to_train: Names, or last parts of names, of modules trained in full beside the adapters and saved
            with them, such as a classification head.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    rank: int = 64
    alpha: float = 2.0
    scaling: ScalingRule = "sqrt_rank"
    num_latents_a: int = 1
    num_latents_b: int = 1
    num_groups_a: int = 1
    num_groups_b: int = 8
    entry_signs: bool = True
    weight_gain: float | None = None
    num_centers: int = 1
    width: float = 1.0
    learn_centers: bool = False
    learn_widths: bool = False
    init: Init = "zero_latent"
    kernel: Kernel = "gaussian"
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: list[str] = field(default_factory=list)
    modules_to_train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("rank", "num_latents_a", "num_latents_b", "num_groups_a", "num_groups_b", "num_centers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("alpha", "width", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}.")
        if not (math.isfinite(self.alpha) and self.alpha != 0):
            raise ValueError(f"`alpha` must be finite and not zero, got {self.alpha}: the update would always be zero.")
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"`width` must be finite and greater than 0, got {self.width}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and less than 1, got {self.dropout}.")
        if self.weight_gain is not None:
            value = self.weight_gain
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"`weight_gain` must be a number or null, got {value!r} of type {type(value).__name__}."
                )
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`weight_gain` must be finite and greater than 0, got {value}.")
        for name in ("entry_signs", "learn_centers", "learn_widths"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be true or false, got {value!r}.")
        for name, choices in (("scaling", ScalingRule), ("init", Init), ("kernel", Kernel)):
            value = getattr(self, name)
            if value not in get_args(choices):
                allowed = ", ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
        self._check_module_names()

    def _check_module_names(self) -> None:
        if isinstance(self.target_modules, str):
            if not self.target_modules:
                raise ValueError(
                    f"`target_modules` is empty. Give {ALL_LINEAR!r}, a list of module names, or a regular expression."
                )
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"`target_modules` is {self.target_modules!r}, which is neither {ALL_LINEAR!r} nor a valid regular "
                    f"expression ({error}). For several module names give a list."
                ) from error
        for name in ("target_modules", "exclude_modules", "modules_to_train"):
            value = getattr(self, name)
            if name == "target_modules" and isinstance(value, str):
                continue
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise TypeError(f"`{name}` must be a list of module names, got {value!r}.")
            for item in value:
                if not isinstance(item, str) or not item:
                    raise TypeError(f"`{name}` must hold non-empty module names, got {item!r} in {list(value)!r}.")
            # A list and not a tuple, which YAML and JSON give back as a list; a copy, because the caller may go on to
            # change theirs.
            object.__setattr__(self, name, list(value))
        if self.target_modules == []:
            raise ValueError(f"`target_modules` is an empty list. Give module names, or {ALL_LINEAR!r}.")
        both = sorted(set(self.exclude_modules) & set(self.target_modules if self.target_modules != ALL_LINEAR else ()))
        if isinstance(self.target_modules, list) and both:
            raise ValueError(f"{both} stand both in `target_modules` and in `exclude_modules`.")

    @property
    def scaling_factor(self) -> float:
        """The factor ``s`` of ``ΔW = s · B · A``."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "sqrt_rank" else self.rank)

    @property
    def gain(self) -> float:
        """The factor γ on the RBF weights, decided."""
        if self.weight_gain is not None:
            return self.weight_gain
        return SIGNED_GAIN / math.sqrt(self.rank) if self.entry_signs else 1.0

    def count_parameters(self, in_features: int, out_features: int) -> int:
        """Trainable parameters of one adapter.

        ``Q_A·in + Q_B·out + R·K·(Q_A·(G_A + [centres] + [widths]) + Q_B·(G_B + [centres] + [widths]))``, the brackets 1
        for what is learned.
        """
        learned = int(self.learn_centers) + int(self.learn_widths)
        functions = self.num_latents_a * (self.num_groups_a + learned) + self.num_latents_b * (
            self.num_groups_b + learned
        )
        latents = self.num_latents_a * in_features + self.num_latents_b * out_features
        return latents + self.rank * self.num_centers * functions

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain numbers, strings and lists, fit for JSON, YAML and safe checkpoint loading.

        The gain is written down as decided: weights in a file mean nothing without it.
        """
        return {**dataclasses.asdict(self), "weight_gain": self.gain}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenLoRAConfig:
        """Make a configuration from :meth:`to_dict`'s values; fields that are left out take their defaults.

        Raises:
            ValueError: A key is no field; the message lists the fields.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            renamed = " `num_groups` is now `num_groups_a` and `num_groups_b`." if "num_groups" in unknown else ""
            raise ValueError(f"Unknown GenLoRAConfig fields {unknown}.{renamed} The fields are {fields}.")
        return cls(**values)
