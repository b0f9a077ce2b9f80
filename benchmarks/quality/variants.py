"""Generators with every choice open, for the ablations; what won is in the package, what lost is only here."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genlora_lightning.generator import anchored_rbf, slope_at_zero


class Factor(nn.Module):
    """M (R, n) from q latents; see `VARIANT_FIELDS`."""

    def __init__(self, n, R, G, K, q, *, kernel, width, zero, scale, grouping, cmin, cmax, ortho, freeze, one_direction, gen):
        super().__init__()
        G = min(G, n)
        self.kernel, self.n, self.G = kernel, n, G
        self.latent = nn.Parameter(torch.empty(q, n))
        self.weight = nn.Parameter(torch.empty(q, G, R, K))
        self.centers = nn.Parameter(torch.empty(q, R, K))
        self.log_widths = nn.Parameter(torch.full((q, R, K), math.log(width)))
        with torch.no_grad():
            self.latent.uniform_(-scale / math.sqrt(n), scale / math.sqrt(n), generator=gen)
            self.centers.uniform_(cmin, cmax, generator=gen)
            self.centers.mul_(torch.empty_like(self.centers).bernoulli_(0.5, generator=gen).mul_(2).sub_(1))
            self.weight.normal_(generator=gen)
            if one_direction:
                self.weight.copy_(self.weight[:, :1].expand_as(self.weight))
            if kernel == "linear":
                slopes = self.weight
            else:
                slopes = self.weight * slope_at_zero(self.centers, kernel).unsqueeze(1) / width
            if ortho and K == 1:
                # directions of the groups (and latents) orthogonal as far as R allows
                flat = torch.randn(max(R, 1), q * G, generator=gen)
                blocks = [torch.linalg.qr(b)[0] for b in flat.split(R, dim=1)]
                u = torch.cat(blocks, 1).T.reshape(q, G, R) * math.sqrt(R)
                base = slope_at_zero(self.centers, kernel).unsqueeze(1) / width if kernel != "linear" else torch.ones(1)
                self.weight.copy_(u.unsqueeze(-1) / base)
            else:
                self.weight.div_(slopes.square().sum(3, keepdim=True).mean(2, keepdim=True).sqrt())
            if zero == "latent":
                self.latent.zero_()
            elif zero == "weight":
                self.weight.zero_()
        index = torch.arange(n)
        group = index * G // n if grouping == "contiguous" else index % G
        self.register_buffer("group", group, persistent=False)
        for name in freeze:
            getattr(self, name).requires_grad_(False)

    def forward(self) -> Tensor:
        w = self.weight[:, self.group]  # (q, n, R, K)
        z = self.latent
        if self.kernel == "linear":
            return torch.einsum("qnrk,qn->rn", w, z)
        t = z[:, None, None, :] * torch.exp(-self.log_widths).unsqueeze(-1)
        psi = anchored_rbf(t, self.centers.unsqueeze(-1), self.kernel)  # (q,R,K,n)
        return (psi * w.permute(0, 2, 3, 1)).sum((0, 2))


class Dense(nn.Module):
    """A stored factor (R, n), as in LoRA; frozen it costs no trainable parameter."""

    def __init__(self, n, R, *, zero, scale, trainable, gen):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(R, n), requires_grad=trainable)
        with torch.no_grad():
            self.matrix.uniform_(-scale / math.sqrt(n), scale / math.sqrt(n), generator=gen)
            if zero:
                self.matrix.zero_()

    def forward(self) -> Tensor:
        return self.matrix


DEFAULTS = dict(
    R=16, G=8, K=1, q=1, kernel="gaussian", width=1.0, grouping="contiguous", cmin=0.5, cmax=2.0, ortho=False,
    alpha=2.0, a_scale=1.0, freeze=(), one_direction=False, a={}, b={}, lr_latent=1.0, lr_rbf=1.0, lr_a=1.0,
    scaling="sqrt",
)


class VariantLinear(nn.Module):
    """A frozen linear plus s · B · A, each factor a `Factor` or a `Dense`."""

    def __init__(self, base: nn.Linear, spec: dict, gen) -> None:
        super().__init__()
        spec = {**DEFAULTS, **spec}
        self.base_layer = base

        def factor(n: int, side: str) -> nn.Module:
            s = {**spec, **spec[side]}
            if s.get("dense"):
                return Dense(n, s["R"], zero=side == "b", scale=s["a_scale"], trainable=s["dense"] != "frozen", gen=gen)
            return Factor(
                n, s["R"], s["G"], s["K"], s["q"], kernel=s["kernel"], width=s["width"],
                zero=s.get("zero", "latent") if side == "b" else None, scale=s["a_scale"], grouping=s["grouping"],
                cmin=s["cmin"], cmax=s["cmax"], ortho=s["ortho"], freeze=s["freeze"], one_direction=s["one_direction"], gen=gen,
            )

        self.A = factor(base.in_features, "a")
        self.B = factor(base.out_features, "b")
        R = spec["R"]
        self.s = spec["alpha"] / (math.sqrt(R) if spec["scaling"] == "sqrt" else R)
        self.core = None
        start = spec.get("start")
        if start:
            W = base.weight.detach().float()
            if start == "gradient":
                W = base.gradient
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            with torch.no_grad():
                if isinstance(self.A, Dense):
                    self.A.matrix.copy_(Vh[:R] * spec["a_scale"] / math.sqrt(3))
                else:
                    for g in range(self.A.G):
                        mask = self.A.group == g
                        v = torch.linalg.svd(W[:, mask], full_matrices=False)[2][0]
                        self.A.latent[0, mask] = v * spec["a_scale"] * math.sqrt(int(mask.sum()) / W.shape[1] / 3)
                if spec.get("core"):
                    self.B.matrix.copy_(U[:, :R].T)
        if spec.get("core"):
            self.core = nn.Parameter(torch.zeros(R, R))

    def left(self) -> Tensor:
        return self.B() if self.core is None else self.core @ self.B()

    def delta(self) -> Tensor:
        return self.s * self.left().T @ self.A()

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A().to(x.dtype), (self.s * self.left()).to(x.dtype)
        return self.base_layer(x) + F.linear(F.linear(x, A), B.T)


def inject_variant(base: nn.Module, spec: dict, seed: int) -> list[dict]:
    """Adapt every linear; returns parameter groups with learning-rate factors."""
    gen = torch.Generator().manual_seed(seed + 1000)
    full = {**DEFAULTS, **spec}
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear:
            parent = base.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], VariantLinear(module, spec, gen))
    readers = ("query", "key", "value", "intermediate.dense")
    for side, chosen in (("A", lambda n: n.endswith(readers)), ("B", lambda n: not n.endswith(readers))):
        if full.get(f"share_{side.lower()}"):
            first = None
            for name, module in base.named_modules():
                if isinstance(module, VariantLinear) and chosen(name):
                    factor = getattr(module, side)
                    if first is None:
                        first = factor.latent
                    factor.latent = first
    groups: dict[float, list] = {}
    for name, p in base.named_parameters():
        if p.requires_grad:
            factor = full["lr_rbf"] if name.rsplit(".", 1)[1] in ("weight", "centers", "log_widths") else full["lr_latent"]
            if ".A." in name:
                factor *= full["lr_a"]
            groups.setdefault(factor, []).append(p)
    return [{"params": ps, "factor": f} for f, ps in groups.items()]
