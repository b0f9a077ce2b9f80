"""Generators with every choice open, for the ablations: what won is in the package, what lost is only here.

A specification is a dictionary; `DEFAULTS` has the fields. Under "a" and "b" stand fields that differ for one factor:

| field | meaning |
|---|---|
| R, G, K, q | rank, groups, centres, latents |
| kernel | a kernel of the package, or "linear": M[r, j] = Σ_q w[q, g(j), r] · z[q, j], no nonlinearity at all |
| width, cmin, cmax | initial width; range of the centres' distances from zero |
| grouping | "contiguous" or "strided" entries of a group |
| signs | each entry's direction has signs of its own, fixed: M[r, j] is multiplied by σ[q, j, r] = ±1; "layer": drawn \
for each layer anew, "shared": the same in all, "shifted": those of one table, read from another place in each layer |
| plain_latents, plain_rows | so many latents, or rows of M, come first and have no signs: a part that entries share |
| equal | the weights start at 1 instead of at random |
| ortho | directions of the groups orthogonal, as far as R allows |
| one_direction | all groups start in one direction |
| a_scale | factor on the initial size of A (1: uniform in ±1/√n) |
| freeze | names of parameters that are not trained |
| dense | "train": a stored matrix, as in LoRA; "frozen": a random one that is not trained |
| start | A from singular vectors: of the "weight", or of the "gradient" of a few batches |
| core | ΔW = s · U C V with frozen singular vectors U, V of the weight and a trained C (R, R), as LoRA-XS |
| share_a, share_b | one set of latents for all factors that read (write) the residual stream |
| lr_latent, lr_rbf, lr_a | factors on the rate: latents and stored matrices; weights, centres, widths; all of A |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genlora_lightning.adapters.genlora.rbf import anchored_rbf, slope_at_zero

Spec = dict[str, Any]
DEFAULTS: Spec = {
    "R": 16,
    "G": 8,
    "K": 1,
    "q": 1,
    "kernel": "gaussian",
    "width": 1.0,
    "grouping": "contiguous",
    "cmin": 0.5,
    "cmax": 2.0,
    "ortho": False,
    "signs": "",
    "plain_latents": 0,
    "plain_rows": 0,
    "equal": False,
    "alpha": 2.0,
    "a_scale": 1.0,
    "freeze": (),
    "one_direction": False,
    "a": {},
    "b": {},
    "lr_latent": 1.0,
    "lr_rbf": 1.0,
    "lr_a": 1.0,
    "scaling": "sqrt",
}
# Linears of a BERT block that read the residual stream; the others write into it.
READERS = ("query", "key", "value", "intermediate.dense")


class Factor(nn.Module):
    """M (R, n) from q latents."""

    def __init__(self, n: int, spec: Spec, random: torch.Generator, *, zero: bool) -> None:
        super().__init__()
        rank, groups, latents = spec["R"], min(spec["G"], n), spec["q"]
        self.kernel = spec["kernel"]
        shape = (latents, rank, spec["K"])
        self.latent = nn.Parameter(torch.empty(latents, n).uniform_(-1, 1, generator=random))
        self.latent.data *= spec["a_scale"] / math.sqrt(n)
        sign = torch.empty(shape).bernoulli_(0.5, generator=random) * 2 - 1
        self.centers = nn.Parameter(torch.empty(shape).uniform_(spec["cmin"], spec["cmax"], generator=random) * sign)
        self.log_widths = nn.Parameter(torch.full(shape, math.log(spec["width"])))
        self.weight = nn.Parameter(self._weights(groups, spec, random))
        if zero:
            self.latent.data.zero_()
        index = torch.arange(n)
        group = index * groups // n if spec["grouping"] == "contiguous" else index % groups
        self.register_buffer("group", group, persistent=False)
        signs = torch.ones(())
        if spec["signs"]:
            source = random if spec["signs"] == "layer" else torch.Generator().manual_seed(17 + zero)
            shift = int(torch.randint(512, (1,), generator=random)) if spec["signs"] == "shifted" else 0
            signs = torch.empty(latents, n + shift, rank, 1).bernoulli_(0.5, generator=source)[:, shift:] * 2 - 1
            own = slice(spec["plain_latents"], None)
            signs[: spec["plain_latents"]] = 1
            signs[:, :, : spec["plain_rows"]] = 1
            self.weight.data[own].abs_()  # they say how much of a direction there is
            if spec["equal"]:
                self.weight.data[own] = 1.0
        self.register_buffer("signs", signs, persistent=False)
        for name in spec["freeze"]:
            getattr(self, name).requires_grad_(False)

    def _weights(self, groups: int, spec: Spec, random: torch.Generator) -> Tensor:
        """Weights (q, G, R, K) whose slopes at zero have a root mean square of 1."""
        latents, rank, centers = self.centers.shape
        own = torch.ones(latents, 1, rank, centers)
        if self.kernel != "linear":
            own = slope_at_zero(self.centers.detach(), self.kernel).unsqueeze(1) / spec["width"]
        if spec["ortho"]:
            flat = torch.randn(rank, latents * groups, generator=random)
            directions = torch.cat([torch.linalg.qr(block)[0] for block in flat.split(rank, dim=1)], 1)
            return directions.T.reshape(latents, groups, rank, 1) * math.sqrt(rank) / own
        weight = torch.randn(latents, groups, rank, centers, generator=random)
        if spec["one_direction"]:
            weight = weight[:, :1].expand_as(weight).clone()
        return weight / (weight * own).square().sum(3, keepdim=True).mean(2, keepdim=True).sqrt()

    def forward(self) -> Tensor:
        """The matrix (R, n)."""
        weight = self.weight[:, self.group] * self.signs  # (q, n, R, K)
        if self.kernel == "linear":
            return torch.einsum("qnrk,qn->rn", weight, self.latent)
        t = self.latent[:, None, None, :] * torch.exp(-self.log_widths).unsqueeze(-1)
        psi = anchored_rbf(t, self.centers.unsqueeze(-1), self.kernel)  # (q, R, K, n)
        return (psi * weight.permute(0, 2, 3, 1)).sum((0, 2))


class Dense(nn.Module):
    """A stored factor (R, n), as in LoRA; frozen it costs no trainable parameter."""

    def __init__(self, n: int, spec: Spec, random: torch.Generator, *, zero: bool) -> None:
        super().__init__()
        matrix = torch.empty(spec["R"], n).uniform_(-1, 1, generator=random) * (spec["a_scale"] / math.sqrt(n))
        self.matrix = nn.Parameter(matrix * (not zero), requires_grad=spec["dense"] != "frozen")

    def forward(self) -> Tensor:
        """The matrix (R, n)."""
        return self.matrix


class VariantLinear(nn.Module):
    """A frozen linear plus s · B · A, each factor a `Factor` or a `Dense`."""

    def __init__(self, base: nn.Linear, spec: Spec, random: torch.Generator) -> None:
        super().__init__()
        spec = {**DEFAULTS, **spec}
        self.base_layer = base
        self.A = _factor(base.in_features, {**spec, **spec["a"]}, random, zero=False)
        self.B = _factor(base.out_features, {**spec, **spec["b"]}, random, zero=True)
        rank = spec["R"]
        self.scaling = spec["alpha"] / (math.sqrt(rank) if spec["scaling"] == "sqrt" else rank)
        self.core = nn.Parameter(torch.zeros(rank, rank)) if spec.get("core") else None
        if spec.get("start"):
            self._start(spec)

    @torch.no_grad()
    def _start(self, spec: Spec) -> None:
        """Set A, and B under a core, to leading singular vectors of the weight or of its gradient."""
        source = self.base_layer.weight.float() if spec["start"] == "weight" else self.base_layer.gradient
        size = spec["a_scale"] / math.sqrt(3)  # the norm of a row of A that starts uniform in ±1/√n
        left, _, right = torch.linalg.svd(source, full_matrices=False)
        if isinstance(self.A, Dense):
            self.A.matrix.copy_(right[: spec["R"]] * size)
        else:
            for group in self.A.group.unique():
                own = self.A.group == group
                vector = torch.linalg.svd(source[:, own], full_matrices=False)[2][0]
                self.A.latent[0, own] = vector * size * math.sqrt(int(own.sum()) / source.shape[1])
        if self.core is not None:
            self.B.matrix.copy_(left[:, : spec["R"]].T)

    def left(self) -> Tensor:
        """What stands left of A, transposed: (R, out)."""
        return self.B() if self.core is None else self.core @ self.B()

    def delta(self) -> Tensor:
        """ΔW (out, in)."""
        return self.scaling * self.left().T @ self.A()

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus update."""
        A, B = self.A().to(x.dtype), (self.scaling * self.left()).to(x.dtype)
        return self.base_layer(x) + F.linear(F.linear(x, A), B.T)


def _factor(n: int, spec: Spec, random: torch.Generator, *, zero: bool) -> nn.Module:
    return (Dense if spec.get("dense") else Factor)(n, spec, random, zero=zero)


def inject_variant(base: nn.Module, spec: Spec, seed: int) -> list[dict[str, Any]]:
    """Adapt every linear; returns parameter groups with learning-rate factors."""
    random = torch.Generator().manual_seed(seed + 1000)
    full = {**DEFAULTS, **spec}
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, VariantLinear(module, spec, random))
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, VariantLinear)}
    for side, is_reader in (("A", True), ("B", False)):
        if full.get(f"share_{side.lower()}"):
            factors = [getattr(m, side) for name, m in adapted.items() if name.endswith(READERS) == is_reader]
            for factor in factors[1:]:
                factor.latent = factors[0].latent
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            is_rbf = name.rsplit(".", 1)[1] in ("weight", "centers", "log_widths")
            rate = full["lr_rbf"] if is_rbf else full["lr_latent"]
            rate *= full["lr_a"] if ".A." in name else 1.0
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "factor": rate} for rate, parameters in groups.items()]
