"""The fit of generators to given low-rank updates, without ever forming an update.

Shapes: L linears of one shape, R rank of the generators, r rank of the updates, Q latents, G groups, K centres, n
entries (I in_features for A, O out_features for B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from genlora_lightning.basis import generate, slope_at_zero
from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.generator import PARTS, RBFGenerator

_POWER_STEPS = 40
_LEARNING_RATE = 0.03
_CURVED = 2.0  # size of the latents, in widths, of the start from curved functions


class GeneratorFit:
    """Fits the generators of L linears of one shape; the scaling of the LoRA is in its B."""

    def __init__(self, A: Tensor, B: Tensor, config: GenLoRAConfig, random: torch.Generator) -> None:
        self.config = config
        self.scaling = config.scaling_factor
        self.A, self.B = A, B  # (L, r, I), (L, O, r)
        self.squared_norm = ((A @ A.mT).double() * (B.mT @ B).double()).sum((1, 2))
        z_a, z_b, coefficients = _block_vectors(A, B, config.num_groups_a, config.num_groups_b)
        left, s, right = torch.linalg.svd(coefficients)
        k = min(s.shape[1], config.rank)
        # s·U_B·U_Aᵀ are the blocks' coefficients. A common rotation spreads them over all R basis functions; one that
        # were zero in both A and B would have no gradient.
        rotation = torch.linalg.qr(torch.randn(A.shape[0], config.rank, k, generator=random))[0].mT.to(A.device)
        root = (s[:, :k] / abs(self.scaling)).sqrt().unsqueeze(1)
        sign = 1 if self.scaling > 0 else -1
        of_a, of_b = (right.mT[:, :, :k] * root) @ rotation, sign * (left[:, :, :k] * root) @ rotation
        self.of_a = _initial(z_a, of_a, config.num_latents_a, config, random)
        self.of_b = _initial(z_b, of_b, config.num_latents_b, config, random)
        self._restart_where_zero(random)

    @torch.no_grad()
    def _restart_where_zero(self, random: torch.Generator) -> None:
        """Where the LoRA's update is zero, start as an adapter does: B zero, and nothing else."""
        for i in (self.squared_norm == 0).nonzero().flatten().tolist():
            config = self.config
            for group, entries, num_latents, num_groups, start in (
                (self.of_a, self.A.shape[2], config.num_latents_a, config.num_groups_a, None),
                (self.of_b, self.B.shape[1], config.num_latents_b, config.num_groups_b, config.init),
            ):
                fresh = RBFGenerator(
                    entries,
                    rank=config.rank,
                    num_latents=num_latents,
                    num_groups=num_groups,
                    num_centers=config.num_centers,
                    width=config.width,
                    kernel=config.kernel,
                    zero_start=start,
                    generator=random,
                )
                for name, parameter in fresh.named_parameters():
                    group[name][i] = parameter.to(group[name].device)

    def parameters(self) -> dict[str, Tensor]:
        """The generators' parameters by their names in a layer, each with a leading L."""
        return {
            f"generator_{letter}.{name}": tensor.detach()
            for letter, group in (("A", self.of_a), ("B", self.of_b))
            for name, tensor in group.items()
        }

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Generated A ``(L, R, I)`` and B ``(L, O, R)``, the generators' scaling multiplied into B."""

        def make(latent: Tensor, weight: Tensor, centers: Tensor, log_widths: Tensor) -> Tensor:
            return self.config.gain * generate(latent, weight, centers, log_widths, self.config.kernel)

        batched: Callable[..., Tensor] = torch.vmap(make)
        A = batched(*(self.of_a[name].to(dtype) for name in PARTS))
        B = batched(*(self.of_b[name].to(dtype) for name in PARTS))
        return A, self.scaling * B.mT

    def squared_errors(self, dtype: torch.dtype) -> Tensor:
        """Squared relative error of each linear, by traces of products of small Gram matrices: ``(L)``."""
        A, B = self.factors(dtype)
        own_a, own_b = self.A.to(dtype), self.B.to(dtype)
        generated = ((A @ A.mT) * (B.mT @ B)).sum((1, 2))
        cross = ((own_a @ A.mT) * (own_b.mT @ B)).sum((1, 2))
        squared = ((own_a @ own_a.mT) * (own_b.mT @ own_b)).sum((1, 2))
        is_zero = self.squared_norm == 0
        total = (generated - 2 * cross + squared) / torch.where(is_zero, 1.0, self.squared_norm).to(dtype)
        return torch.where(is_zero, torch.zeros_like(total), total)

    @torch.no_grad()
    def errors(self) -> tuple[Tensor, Tensor]:
        """Relative error and norm of each linear's update, computed in float64."""
        return self.squared_errors(torch.float64).clamp_min(0).sqrt(), self.squared_norm.sqrt()

    def run(self, steps: int, bar: Any) -> None:
        """Improve the guess; of each linear the best of the guess and of two descents is kept.

        One descent starts where the functions are straight. The other starts with latents as large as the widths, where
        they are curved: a generator with several groups and centres can reach more rank there, others only lose.
        """
        best = {key: tensor.clone() for key, tensor in self.parameters().items()}
        guess = {key: tensor.clone() for key, tensor in best.items()}
        lowest = self.errors()[0]
        for size, part in ((None, steps // 3), (_CURVED, steps - steps // 3)) if steps else ():
            self._set(guess)
            if size is not None:
                self._resize_latents(size * self.config.width)
            self._descend(part, bar)
            errors = self.errors()[0]
            better = errors < lowest
            lowest = torch.where(better, errors, lowest)
            for key, tensor in self.parameters().items():
                best[key][better] = tensor[better]
        self._set(best)

    def _descend(self, steps: int, bar: Any) -> None:
        groups = []
        for group in (self.of_a, self.of_b):
            for name in self._trained_names():
                # A step is a share of the latents' size, which differs between layers by less than a factor of ten.
                sizes = {
                    "latent": float(group["latent"].detach().square().mean().sqrt()),
                    "weight": 1 / self.config.gain,
                }
                size = sizes.get(name, 1.0)
                groups.append({"params": [group[name].requires_grad_()], "lr": _LEARNING_RATE * size})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        )
        for _ in range(steps):
            optimizer.zero_grad()
            errors = self.squared_errors(torch.float32)
            errors.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.set_postfix(error=f"{float(errors.detach().mean().clamp_min(0).sqrt()):.4f}", refresh=False)
            bar.update()

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for letter, group in (("A", self.of_a), ("B", self.of_b)):
            for name in PARTS:
                group[name] = values[f"generator_{letter}.{name}"].clone()

    def _resize_latents(self, size: float) -> None:
        """Give the latents another root-mean-square, and the weights the inverse."""
        for group in (self.of_a, self.of_b):
            now = group["latent"].square().mean((1, 2)).sqrt()
            factor = torch.where((now > 0) & (self.squared_norm > 0).to(now.device), size / now, torch.ones_like(now))
            group["latent"] *= factor[:, None, None]
            group["weight"] /= factor[:, None, None, None, None]

    def _trained_names(self) -> list[str]:
        fixed = {"centers": self.config.learn_centers, "log_widths": self.config.learn_widths}
        return [name for name in PARTS if fixed.get(name, True)]


def _groups(num_entries: int, num_groups: int, device: torch.device) -> Tensor:
    return torch.arange(num_entries, device=device) * num_groups // num_entries


def _sum_groups(values: Tensor, num_groups: int) -> Tensor:
    """Sum over the entries of each group: ``(..., n)`` → ``(..., G)``."""
    index = _groups(values.shape[-1], num_groups, values.device).expand(values.shape)
    return torch.zeros(*values.shape[:-1], num_groups, device=values.device).scatter_add(-1, index, values)


def _unit_in_groups(z: Tensor, num_groups: int) -> Tensor:
    norms = _sum_groups(z.square(), num_groups).sqrt().clamp_min(1e-20)
    return z / norms[:, _groups(z.shape[1], num_groups, z.device)]


def _block_vectors(A: Tensor, B: Tensor, groups_a: int, groups_b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate each block of ``B @ A`` (group of outputs × group of inputs) by ``c · z_B z_Aᵀ``.

    This is what the generators can do where their functions are straight: one vector per group of inputs, one per group
    of outputs, and a coefficient per pair of groups. The sum of the c² is maximised by power steps in turn, from the
    leading singular vectors of the groups' strips.

    Args:
        A: ``(L, r, I)``.
        B: ``(L, O, r)``.
        groups_a: G_A.
        groups_b: G_B.

    Returns:
        z_A ``(L, I)`` and z_B ``(L, O)``, of norm 1 in each group, and c ``(L, G_B, G_A)``.
    """
    group_a = _groups(A.shape[2], groups_a, A.device)
    group_b = _groups(B.shape[1], groups_b, A.device)

    def strip_vectors(own: Tensor, other_gram: Tensor, group: Tensor, num_groups: int) -> Tensor:
        # own (L, r, n); the strip of group g is other @ own[:, :, g].
        z = _unit_in_groups(
            (own * torch.linalg.eigh(other_gram @ (own @ own.mT) @ other_gram)[1][:, :, -1:]).sum(1), num_groups
        )
        for _ in range(_POWER_STEPS):
            v = other_gram @ _sum_groups(own * z.unsqueeze(1), num_groups)  # (L, r, G)
            z = _unit_in_groups((own * v[:, :, group]).sum(1), num_groups)
        return z

    def project(own: Tensor, z: Tensor, num_groups: int) -> Tensor:
        return _sum_groups(own * z.unsqueeze(1), num_groups)  # (L, r, G)

    z_a = strip_vectors(A, B.mT @ B, group_a, groups_a)
    z_b = strip_vectors(B.mT, A @ A.mT, group_b, groups_b)
    for _ in range(_POWER_STEPS):
        p, q = project(A, z_a, groups_a), project(B.mT, z_b, groups_b)
        c = q.mT @ p  # (L, G_B, G_A)
        z_a = _unit_in_groups(((q @ c)[:, :, group_a] * A).sum(1), groups_a)
        p = project(A, z_a, groups_a)
        c = q.mT @ p
        z_b = _unit_in_groups(((p @ c.mT)[:, :, group_b] * B.mT).sum(1), groups_b)
    return z_a, z_b, project(B.mT, z_b, groups_b).mT @ project(A, z_a, groups_a)


def _initial(
    z: Tensor, slopes: Tensor, num_latents: int, config: GenLoRAConfig, random: torch.Generator
) -> dict[str, Tensor]:
    """Parameters of generators that make, where their functions are straight, ``slopes[g] · z_g`` in each group.

    The first latent does it alone; more latents start at zero, from where the descent finds what they can add.

    Args:
        z: ``(L, n)``, of norm 1 in each group.
        slopes: ``(L, G, R)``.
        num_latents: Q.
        config: The generators.
        random: For the centres, and for the directions of further latents.
    """
    num, entries = z.shape
    shape = (num, config.rank, num_latents, config.num_centers)
    centers = torch.empty(shape).uniform_(0.5, 2.0, generator=random)
    centers *= torch.empty(shape).bernoulli_(0.5, generator=random) * 2 - 1
    centers = centers.to(z.device)
    # As at the start of training: slopes of root-mean-square 1, the size in the latents.
    size = slopes.square().mean(2).sqrt().clamp_min(1e-8)  # (L, G)
    further = torch.randn(num, num_latents - 1, *slopes.shape[1:], generator=random).to(z.device)
    unit = torch.cat([(slopes / size.unsqueeze(2)).unsqueeze(1), further], 1)  # (L, Q, G, R)
    latent = z.new_zeros(num, entries, num_latents)
    latent[:, :, 0] = z * size[:, _groups(entries, slopes.shape[1], z.device)]
    own = slope_at_zero(centers, config.kernel) / config.width  # (L, R, Q, K)
    weight = unit.permute(0, 2, 3, 1).unsqueeze(4) * (own / own.square().sum(3, keepdim=True)).unsqueeze(1)
    weight /= config.gain
    return {
        "latent": latent,
        "weight": weight,
        "centers": centers,
        "log_widths": torch.full(shape, config.width, device=z.device).log(),
    }
