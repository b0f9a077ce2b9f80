"""Generators with every choice open, for the ablations: what won is in the package, what lost is only here.

A specification is a dictionary, in the words of the rows. :func:`variant_config` reads it; under "a" and "b" stand
fields that differ for one factor:

| field | meaning |
|---|---|
| R, alpha | rank, and numerator of s = alpha / √R |
| G, K, q | groups, centres, latents |
| kernel | a kernel of the package, or "linear": M[r, j] = Σ_q w[q, g(j), r] · z[q, j], no nonlinearity at all |
| width | initial width |
| grouping | "contiguous" or "strided" entries of a group |
| signs | each entry's direction has signs of its own, fixed: M[r, j] is multiplied by σ[q, j, r] = ±1; "layer": drawn \
for each layer anew, "shared": the same in all, "shifted": those of one table, read from another place in each layer |
| plain_latents, plain_rows | so many latents, or rows of M, come first and have no signs: a part that entries share |
| equal | the weights start at 1 instead of at random |
| blocks | row r of A is latent r mod q at the entries of group r // q, and zero at all others; each group of B starts \
with latent q taking all rows of A's latent q: LoRA of rank q, whose G × G blocks get weights of their own. R = G · q |
| a_scale | factor on the initial size of A (1: uniform in ±1/√n) |
| freeze | names of parameters that are not trained |
| dense | "train": a stored matrix, as in LoRA; "frozen": a random one that is not trained |
| start | what is stored from singular vectors of the "weight", or of its "mean gradient" over `BATCHES` batches \
before the first step |
| shorter | of each linear the shorter factor is trained, and the other one frozen |
| core | ΔW = s · U C V with frozen singular vectors U, V of the weight and a trained C (R, R), as LoRA-XS |
| share_a, share_b | one set of latents for all factors that read (write) the residual stream |
| lr_rbf, lr_a | factors on the rate: of weights, centres and widths; of all of A |

Of the first search's rows four are of forms that are no more: singular vectors of a "gradient", a "float32" base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning import inject_adapters
from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, Role
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule
from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.adapters.genlora.rbf import get_kernel
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.adapted import AdaptedLayer

from .factors import FormulaFactor

Spec = Mapping[str, Any]
Side = Literal["a", "b"]
# Linears of BERT's and Llama's blocks that read the residual stream; the others write into it.
READERS = ("query", "key", "value", "intermediate.dense", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_CENTERS = (0.5, 2.0)  # range of the centres' distances from zero
_LONG = {"G": "num_groups", "K": "num_centers", "q": "num_latents"}
BATCHES = 16  # of the mean gradient
_WHOLE = ("alpha", "core", "shorter")
_RATES = ("lr_rbf", "lr_a")
_AFTERWARDS = ("start", "share_a", "share_b")  # what is done when all layers are there


@dataclass(frozen=True, kw_only=True)
class FactorForm:
    """What one factor is; the module's table says of each field what it means."""

    num_groups: int = 8
    num_centers: int = 1
    num_latents: int = 1
    kernel: str = "gaussian"
    width: float = 1.0
    grouping: Literal["contiguous", "strided"] = "contiguous"
    signs: Literal["", "layer", "shared", "shifted"] = ""
    plain_latents: int = 0
    plain_rows: int = 0
    equal: bool = False
    blocks: bool = False
    a_scale: float = 1.0
    freeze: tuple[str, ...] = ()
    dense: Literal["", "train", "frozen"] = ""
    zero: bool | None = None  # whether it starts at zero; B does if nothing is said


@dataclass(frozen=True, kw_only=True)
class VariantConfig(AdapterConfig):
    """``ΔW = s · Bᵀ A``, each factor generated or stored.

    Args:
        a: Form of A.
        b: Form of B.
        core: Whether B is ``C · M`` with a trained ``C (R, R)``, which starts at zero, of a stored M.
        shorter: Whether the shorter factor is stored and trained, and the other one stored and frozen.
    """

    kind: ClassVar[str] = "variant"
    title: ClassVar[str] = "Variant"

    rank: int = 16
    alpha: float = 2.0
    scaling: ScalingRule = "sqrt_rank"
    a: FactorForm = field(default_factory=FactorForm)
    b: FactorForm = field(default_factory=FactorForm)
    core: bool = False
    shorter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("a", "b"):
            form = getattr(self, side)
            if isinstance(form, Mapping):  # out of `to_dict` and JSON
                object.__setattr__(self, side, FactorForm(**{**form, "freeze": tuple(form.get("freeze", ()))}))

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        def factor(num_entries: int, form: FactorForm, side: Side) -> Factor:
            if form.dense:
                core = self.core and side == "b"
                return DenseFactor(num_entries, self.rank, form, side, core=core, device=device, generator=generator)
            return VariantFactor(num_entries, self.rank, form, side, device=device, generator=generator)

        a, b = self.a, self.b
        if self.shorter:
            trained, frozen = (replace(self.b, dense=how, zero=how == "train") for how in ("train", "frozen"))
            a, b = (frozen, trained) if shape.out_features <= shape.in_features else (trained, frozen)
        A = factor(shape.in_features, a, "a")
        return FactorPair(A, factor(shape.out_features, b, "b"), self.scaling_factor)

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        made = self.make(shape, device=torch.device("meta"))
        return sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)


class VariantFactor(FormulaFactor):
    """M (R, n) from q latents; B's start at zero.

    Args:
        num_entries: n.
        rank: R.
        form: What it is.
        side: Which factor it is.
        device: Where the parameters are made.
        generator: Random number generator for the initial values.
    """

    group: Tensor
    signs: Tensor

    def __init__(
        self,
        num_entries: int,
        rank: int,
        form: FactorForm,
        side: Side,
        *,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, num_entries)
        self.form = form
        self.side = side
        self.roles = {
            "latent": Role(f"latents_{side}"),
            **dict.fromkeys(("weight", "centers", "log_widths"), Role(f"rbf_{side}")),
        }

        def parameter(name: str, *shape: int) -> nn.Parameter:
            empty = torch.empty(*shape, dtype=torch.float32, device=device)
            return nn.Parameter(empty, requires_grad=name not in form.freeze)

        groups, functions = min(form.num_groups, num_entries), (form.num_latents, rank, form.num_centers)
        self.latent = parameter("latent", form.num_latents, num_entries)
        self.weight = parameter("weight", form.num_latents, groups, rank, form.num_centers)
        self.centers = parameter("centers", *functions)
        self.log_widths = parameter("log_widths", *functions)
        index = torch.arange(num_entries, device=device)
        group = index * groups // num_entries if form.grouping == "contiguous" else index % groups
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("signs", torch.ones((), device=device), persistent=False)
        self.reset_parameters(generator)

    @override
    def is_trained(self, name: str) -> bool:
        return name not in self.form.freeze

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.form.num_latents, self.num_entries

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.is_meta:
            return
        form, is_b = self.form, self.side == "b"
        self.latent.uniform_(-1, 1, generator=generator).mul_(form.a_scale / math.sqrt(self.num_entries))
        sign = torch.empty_like(self.centers).bernoulli_(0.5, generator=generator) * 2 - 1
        self.centers.uniform_(*_CENTERS, generator=generator).mul_(sign)
        self.log_widths.fill_(math.log(form.width))
        # Weights whose slopes at zero have a root mean square of 1.
        own = torch.ones_like(self.weight[:, :1])
        if form.kernel != "linear":
            own = get_kernel(form.kernel).slope_at_zero(self.centers).unsqueeze(1) / form.width
        self.weight.normal_(generator=generator)
        self.weight.div_((self.weight * own).square().sum(3, keepdim=True).mean(2, keepdim=True).sqrt())
        if is_b:
            self.latent.zero_()
        if form.blocks:
            self._set_blocks()
        if form.signs:
            self.signs = self._draw_signs(generator)
            signed = self.weight[form.plain_latents :]
            signed.abs_()  # they say how much of a direction there is
            if form.equal:
                signed.fill_(1.0)

    def _set_blocks(self) -> None:
        """Weights of A that are 1 for a group's own rows, and of B that are 1 for a latent's own."""
        form, row = self.form, torch.arange(self.rank, device=self.weight.device)
        latent = torch.arange(form.num_latents, device=row.device)[:, None, None]
        own = row % form.num_latents == latent
        if self.side == "a":
            own = own & (row // form.num_latents == torch.arange(self.weight.shape[1], device=row.device)[:, None])
        self.weight.copy_(own.expand(self.weight.shape[:3]).unsqueeze(-1))

    def _draw_signs(self, generator: torch.Generator | None) -> Tensor:
        """Signs (q, n, R, 1)."""
        form, device = self.form, self.latent.device
        source = generator
        if form.signs != "layer":  # one table for each side
            source = torch.Generator(device).manual_seed(18 if self.side == "b" else 17)
        shift = int(torch.randint(512, (1,), generator=generator)) if form.signs == "shifted" else 0
        table = torch.empty(form.num_latents, self.num_entries + shift, self.rank, 1, device=device)
        signs = table.bernoulli_(0.5, generator=source)[:, shift:] * 2 - 1
        signs[: form.plain_latents] = 1
        signs[:, :, : form.plain_rows] = 1
        return signs

    @override
    def matrix(self) -> Tensor:
        weight = self.weight[:, self.group] * self.signs  # (q, n, R, K)
        if self.form.kernel == "linear":
            return torch.einsum("qnrk,qn->rn", weight, self.latent)
        t = self.latent[:, None, None, :] * torch.exp(-self.log_widths).unsqueeze(-1)
        psi = get_kernel(self.form.kernel).anchored(t, self.centers.unsqueeze(-1))  # (q, R, K, n)
        return (psi * weight.permute(0, 2, 3, 1)).sum((0, 2))


class DenseFactor(FormulaFactor):
    """A stored M (R, n), as in LoRA, or C · M; a frozen M costs no trainable parameter. B's start at zero.

    Args:
        num_entries: n.
        rank: R.
        form: What it is.
        side: Which factor it is.
        core: Whether there is a C (R, R).
        device: Where the parameters are made.
        generator: Random number generator for the initial values.
    """

    def __init__(
        self,
        num_entries: int,
        rank: int,
        form: FactorForm,
        side: Side,
        *,
        core: bool = False,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, num_entries)
        self.form = form
        self.side = side
        self.roles = {"stored": Role(f"latents_{side}")}
        stored = torch.empty(rank, num_entries, dtype=torch.float32, device=device)
        self.stored = nn.Parameter(stored, requires_grad=form.dense != "frozen")
        self.core: nn.Parameter | None = None
        if core:
            self.roles = {**self.roles, "core": Role("core")}
            self.core = nn.Parameter(torch.empty(rank, rank, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @override
    def is_trained(self, name: str) -> bool:
        return name == "core" or self.form.dense != "frozen"

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.rank, self.num_entries

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.is_meta:
            return
        self.stored.uniform_(-1, 1, generator=generator).mul_(self.form.a_scale / math.sqrt(self.num_entries))
        if self.core is not None:
            self.core.zero_()
        elif self.side == "b" if self.form.zero is None else self.form.zero:
            self.stored.zero_()

    @override
    def matrix(self) -> Tensor:
        return self.stored if self.core is None else self.core @ self.stored


def variant_config(spec: Spec) -> VariantConfig:
    """Read a specification; what is done after the injection, and the rates, are left out.

    Raises:
        ValueError: It has a field that there is not.
    """
    shared = {key: value for key, value in spec.items() if key not in (*_WHOLE, "R", "a", "b")}
    shared = {key: value for key, value in shared.items() if key not in (*_RATES, *_AFTERWARDS)}
    forms = {side: {_LONG.get(k, k): v for k, v in {**shared, **spec.get(side, {})}.items()} for side in ("a", "b")}
    known = {one.name for one in fields(FactorForm)}
    if unknown := sorted({name for form in forms.values() for name in form} - known):
        raise ValueError(f"A specification has no fields {unknown}; those of a factor are {sorted(known)}.")
    whole = {key: spec[key] for key in _WHOLE if key in spec}
    return VariantConfig.from_dict({"rank": spec.get("R", 16), **whole, **forms})


def inject_variant(base: nn.Module, spec: Spec, seed: int) -> dict[str, float]:
    """Adapt every linear as a specification says.

    Returns:
        Factors on the learning rate, by the group of the parameters; 1 for the others.
    """
    inject_adapters(base, variant_config(spec), generator=torch.Generator().manual_seed(seed + 1000))
    layers = adapter_layers(base)
    if spec.get("start") == "weight":
        start_at({name: layer.base_weight for name, layer in layers.items()}, layers)
    for side, is_reader in (("A", True), ("B", False)):
        if spec.get(f"share_{side.lower()}"):
            factors = [getattr(li.update, side) for name, li in layers.items() if name.endswith(READERS) == is_reader]
            for factor in factors[1:]:
                factor.latent = factors[0].latent
    rbf, of_a = spec.get("lr_rbf", 1.0), spec.get("lr_a", 1.0)
    return {"rbf_a": rbf * of_a, "rbf_b": rbf, "latents_a": of_a}


@torch.no_grad()
def start_at(sources: Mapping[str, Tensor], layers: Mapping[str, AdaptedLayer]) -> None:
    """Set what the factors store to leading singular vectors of a matrix for each layer, but for what is zero."""
    for name, layer in layers.items():
        assert layer.pair is not None
        A, B = layer.pair
        if isinstance(A, RBFGenerator) and isinstance(B, RBFGenerator):
            _start_latent_at(sources[name].float(), A, B)
            continue
        left, _, right = torch.linalg.svd(sources[name].float(), full_matrices=False)
        for factor, vectors in zip(layer.pair, (right, left.T), strict=True):
            form = cast(VariantFactor | DenseFactor, factor).form
            size = form.a_scale / math.sqrt(3)  # norm of a row that is uniform in ±1/√n
            if isinstance(factor, DenseFactor) and factor.core is not None:
                factor.stored.copy_(vectors[: factor.rank])
            elif isinstance(factor, DenseFactor) and factor.stored.any():
                factor.stored.copy_(vectors[: factor.rank] * size)
            elif isinstance(factor, VariantFactor) and factor.side == "a":
                for group in factor.group.unique():
                    own = factor.group == group
                    vector = torch.linalg.svd(sources[name][:, own].float(), full_matrices=False)[2][0]
                    factor.latent[0, own] = vector * size * math.sqrt(int(own.sum()) / factor.num_entries)


def _start_latent_at(source: Tensor, A: RBFGenerator, B: RBFGenerator) -> None:
    """Set the package's one latent of A to the direction that B's first step follows farthest, at the length it has.

    Entry j of B's latent q moves by what ``source`` has along its signed direction: ``(G ∘ Sq) z`` with ``Sq = B̂qᵀ Â``,
    of the slopes at zero. The z of a length that makes it largest is the leading right singular vector.
    """

    def slopes(factor: RBFGenerator, latent: int) -> Tensor:
        before, small = factor.latent.clone(), 1e-3
        factor.latent.zero_()[:, latent] = small
        made = factor(plain=True) / small
        factor.latent.copy_(before)
        return made

    of_a = slopes(A, 0)
    seen = torch.cat([source * (slopes(B, latent).T @ of_a) for latent in range(B.num_latents)])
    direction = torch.linalg.svd(seen, full_matrices=False)[2][:1].T
    A.latent.copy_(direction * A.latent.norm())


def mean_gradients(base: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean gradient of each linear's weight ``(out, in)``, over losses; the model is left as it was."""
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    for loss in losses:
        loss().backward()
    found = {name: cast(Tensor, linear.weight.grad) / len(losses) for name, linear in linears.items()}
    for linear in linears.values():
        linear.weight.grad = None
        linear.weight.requires_grad_(False)
    return found
