"""Configure GenLoRA: one flat, validated, YAML-friendly dataclass."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from typing_extensions import Self, override

from genlora_lightning.adapters.base import FactorPair, MatrixShape
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule, explain_arguments
from genlora_lightning.adapters.genlora.generator import Init, RBFGenerator
from genlora_lightning.adapters.genlora.rbf import get_kernel
from genlora_lightning.fields import check_choice, check_flag, check_integer, check_number

# γ·√R of `entry_signs`: found by search (docs/method.md), at a rate that suits the latents.
SIGNED_GAIN = 64.0
Sharing = Literal["generator", "a"]
_GENERATOR = ("weight", "centers", "log_widths")


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class GenLoRAConfig(AdapterConfig):
    """Configure GenLoRA: what is adapted, and how the low-rank matrices are generated.

    The update of a weight ``W (out, in)`` is ``ΔW = s · B · A`` with ``A (rank, in)`` and ``B (out, rank)``. Each of
    the two matrices is generated from one latent vector, or a few, by radial basis functions; see
    :class:`RBFGenerator` for the formula. One adapted linear has ``Q_A · in + Q_B · out`` entries of
    latents (Q_A, Q_B: the numbers of latents) and ``rank · num_centers · (Q_A · G_A + Q_B · G_B)`` RBF weights (G_A,
    G_B: the numbers of groups), against LoRA's ``rank · (in + out)``. Learned centres or widths are ``rank ·
    num_centers · (Q_A + Q_B)`` more each.

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
            ``"inverse_multiquadric"``: ``1/√(1+u²)``; ``"inverse_quadratic"``: ``1/(1+u²)``; or one that
            :func:`~genlora_lightning.adapters.genlora.rbf.register_kernel` knows.
        dropout: Probability of dropping an entry of the adapter's input while training.
        target_modules: Linear layers to adapt: ``"all-linear"`` (each but the output head), a list of module names or
            their last parts (``["q_proj", "v_proj"]``), or a regular expression that must match the whole module name.
        target_parameters: Parameters to adapt that hold a stack of matrices, such as a mixture's experts
            (``["experts.gate_up_proj"]``): names, their last parts, or regular expressions of either.
        exclude_modules: Names, or last parts of names, of linears not to adapt; all in a named module are left out.
        modules_to_train: Names, or last parts of names, of modules trained in full beside the adapters and saved
            with them, such as a classification head.
        tokens_to_train: Tokens whose rows of the input embedding, and of a head tied to it, are trained in full: ids,
            or strings that a text module's tokenizer looks up; or such lists by names of embeddings and linears.
        layers_to_transform: Numbers of the layers to adapt: the first number in a linear's name. All if ``None``.
        rank_pattern: Ranks other than ``rank``, by a name, its last part, or a regular expression of either; the first
            that matches counts.
        alpha_pattern: Likewise for ``alpha``.
        target_rows: Ranges of outputs ``[[start, end], …]`` to adapt of linears that are adapted in part, by names as
            in ``rank_pattern``: the queries and values of a fused projection.
        elastic: Ranks to train for, rising, the last of them ``rank``; each step draws one for each layer. Afterwards
            the adapter may be used at any of them, and cut to it (``genlora slice``).
        keep_zeros: Update the weights alone that are not 0 in the base, ``W + ΔW ⊙ (W ≠ 0)``: a pruned base stays as
            sparse when the adapter is merged.
        share_over_experts: What the experts of a stack (``target_parameters``) have together, each stack its own.
            ``None``: nothing; ``"generator"``: RBF weights, centres and widths, so that each expert has latents of its
            own alone; ``"a"``: A's latents, too, and with them A: each expert has latents of B of its own alone.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    kind: ClassVar[str] = "genlora"
    title: ClassVar[str] = "GenLoRA"
    can_be_elastic: ClassVar[bool] = True
    usual_rates: ClassVar[tuple[float, float] | None] = (1e-3, 8e-3)  # docs/method.md

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
    kernel: str = "gaussian"
    share_over_experts: Sharing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_latents_a", "num_latents_b", "num_groups_a", "num_groups_b", "num_centers"):
            check_integer(name, getattr(self, name), least=1)
        check_number("width", self.width, above=0.0)
        if self.weight_gain is not None:
            check_number("weight_gain", self.weight_gain, above=0.0)
        for name in ("entry_signs", "learn_centers", "learn_widths"):
            check_flag(name, getattr(self, name))
        check_choice("init", self.init, get_args(Init))
        get_kernel(self.kernel)
        self._check_shared(self.share_over_experts, get_args(Sharing))

    @property
    def gain(self) -> float:
        """The factor γ on the RBF weights as decided."""
        if self.weight_gain is not None:
            return self.weight_gain
        return SIGNED_GAIN / math.sqrt(self.rank) if self.entry_signs else 1.0

    @override
    def of_first_rows(self, rank: int) -> Self:
        # The rows' weights are divided by the gain of all of them.
        return self if rank == self.rank else replace(super().of_first_rows(rank), weight_gain=self.gain)

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        def make(num_entries: int, num_latents: int, num_groups: int, table: int, zero_start: bool) -> RBFGenerator:
            return RBFGenerator(
                num_entries,
                rank=self.rank,
                num_latents=num_latents,
                num_groups=num_groups,
                num_centers=self.num_centers,
                width=self.width,
                kernel=self.kernel,
                learn_centers=self.learn_centers,
                learn_widths=self.learn_widths,
                sign_table=table if self.entry_signs else None,
                weight_gain=self.gain,
                zero_start=self.init if zero_start else None,
                device=device,
                generator=generator,
            )

        return FactorPair(
            make(shape.in_features, self.num_latents_a, self.num_groups_a, 0, zero_start=False),
            make(shape.out_features, self.num_latents_b, self.num_groups_b, 1, zero_start=True),
            self.scaling_factor,
        )

    @override
    def check_shape(self, shape: MatrixShape, name: str) -> None:
        for field, groups, entries, what in (
            ("num_groups_a", self.num_groups_a, shape.in_features, "inputs"),
            ("num_groups_b", self.num_groups_b, shape.out_features, "outputs"),
        ):
            if groups > entries:
                raise ValueError(
                    f"`{field}` is {groups}, but {name} has only {entries} {what} to divide into groups. Lower "
                    f"`{field}` to {entries} or add {name!r} to `exclude_modules`."
                )

    @property
    @override
    def shared_over_experts(self) -> tuple[Collection[str], Collection[str]]:
        if self.share_over_experts is None:
            return (), ()
        return (_GENERATOR if self.share_over_experts == "generator" else ("latent", *_GENERATOR)), _GENERATOR

    @override
    def count_shared_over_experts(self, shape: MatrixShape) -> int:
        if self.share_over_experts is None:
            return 0
        latents_of_a = self.num_latents_a * shape.in_features
        own = self.num_latents_b * shape.out_features
        own += latents_of_a if self.share_over_experts == "generator" else 0
        return self.count_parameters(shape) - own

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one adapted matrix.

        ``Q_A·in + Q_B·out + R·K·(Q_A·(G_A + [centres] + [widths]) + Q_B·(G_B + [centres] + [widths]))``, the brackets 1
        for what is learned.
        """
        learned = int(self.learn_centers) + int(self.learn_widths)
        functions = self.num_latents_a * (self.num_groups_a + learned) + self.num_latents_b * (
            self.num_groups_b + learned
        )
        latents = self.num_latents_a * shape.in_features + self.num_latents_b * shape.out_features
        return latents + self.rank * self.num_centers * functions

    @override
    def to_dict(self) -> dict[str, Any]:
        """The kind and the fields as plain numbers, strings and lists, fit for JSON, YAML and safe loading.

        The gain is written down as decided: weights in a file mean nothing without it. Ranks of several linears have
        several, which their own configurations (:meth:`of`) say.
        """
        return {**super().to_dict(), "weight_gain": self.weight_gain if self.rank_pattern else self.gain}

    @classmethod
    @override
    def field_hints(cls) -> dict[str, str]:
        return {**super().field_hints(), "num_groups": "`num_groups` is now `num_groups_a` and `num_groups_b`."}
