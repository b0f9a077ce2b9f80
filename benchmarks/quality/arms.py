"""The arms: a method at a size, and the rates that are tried."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from .methods import METHODS, Shapes


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method at a size.

    Args:
        name: In tables and on the command line.
        method: Key of `METHODS`.
        budget: Adapter parameters in units of LoRA rank 1, from which the method makes its settings.
        fixed: Settings that are given; for a "variant" all of them.
        lr: Lowest rate that is tried, on the encoder tasks.
        weight_decay: AdamW's.
        most_seeds: At most so many final seeds; as many as the experiment has if ``None``.
    """

    name: str
    method: str
    lr: float
    budget: float = 2.0
    fixed: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    most_seeds: int | None = None

    def settings(self, shapes: Shapes) -> dict[str, Any]:
        """The method's settings for the linears of a model."""
        return METHODS[self.method].size(shapes, self.budget, **self.fixed)


def lora(rank: int, lr: float) -> Arm:
    """LoRA of a rank, from a lowest rate on."""
    return Arm(name=f"LoRA r{rank}", method="lora", budget=rank, lr=lr)


def genlora(name: str, budget: float, rank: int = 64, latents: tuple[int, int] = (1, 1), **fixed: Any) -> Arm:
    """GenLoRA of a rank, with as many groups of B as a budget allows."""
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1]}
    return Arm(name=name, method="genlora", budget=budget, fixed=sizes | fixed, lr=1e-3)


def groups_only(name: str, groups: int, latents: tuple[int, int] = (1, 1)) -> Arm:
    """GenLoRA without signs: the entries of a group share a direction."""
    return genlora(name, 0, 16, latents, **_unsigned(groups))


def _unsigned(groups: int) -> dict[str, Any]:
    learned = {"learn_centers": True, "learn_widths": True}
    return {"num_groups_a": groups, "num_groups_b": groups, "entry_signs": False, "weight_gain": 1.0, **learned}


LORAS = (lora(1, 1e-3), lora(2, 1e-3), lora(4, 5e-4), lora(8, 5e-4), lora(16, 2.5e-4))
# Names say the budget: b2 has as many parameters as LoRA of rank 2.
GENLORAS = (
    genlora("GenLoRA b1", 1.05, rank=28),  # one latent for each factor is as much as LoRA of rank 1 already
    genlora("GenLoRA b1.5", 1.5),
    genlora("GenLoRA b2", 2.0, latents=(1, 2)),
    genlora("GenLoRA b4", 4.0, rank=128, latents=(2, 2)),
)
GROUPS_ONLY = (groups_only("groups only b1.28", 8), groups_only("groups only b2", 10, (1, 2)))
# Rates: LoRA's are where it is known to live. The others' were placed so that ΔW after seven steps at the middle of the
# range is about as long as that of LoRA r2 at the middle of its own.
OTHERS = (
    Arm(name="frozen + head", method="frozen", lr=1e-3, budget=0),
    Arm(name="full", method="full", lr=2.5e-5, budget=0),
    Arm(name="rsLoRA r2", method="rslora", lr=1e-3),
    Arm(name="LoRA+ r2", method="lora+", lr=6.25e-5),
    Arm(name="DoRA b2", method="dora", lr=1e-3),
    Arm(name="VeRA r256", method="vera", lr=1e-2),
    Arm(name="RandLoRA b2", method="randlora", lr=2e-4),
    Arm(name="FourierFT b2", method="fourierft", lr=5e-3),
    Arm(name="VB-LoRA b2", method="vblora", lr=2e-3),
    Arm(name="LoKr b2", method="lokr", lr=1e-3),
    Arm(name="Stiefel retraction r2", method="stiefel", lr=1e-3),
    Arm(name="sine LoRA r2", method="sine", lr=1e-3),
)

# The package's other kinds, at LoRA rank 2's size.
RELATIVES = (
    Arm(name="PoLAR r2", method="polar", lr=2e-3),
    Arm(name="Compacter b2", method="compacter", lr=5e-4),
)
GRALORA = Arm(name="GraLoRA r2", method="gralora", lr=1e-3)
# The leaders of PEFT's own comparison, at that size.
LEADERS = (
    Arm(name="MiSS b2", method="miss", lr=5e-4),
    Arm(name="SHiRA r2", method="shira", lr=2e-3),
    Arm(name="HiRA r2", method="hira", lr=2e-3),
    GRALORA,
    Arm(name="C3A b2", method="c3a", lr=5e-3),
    Arm(name="WaveFT b2", method="waveft", lr=5e-3),
    Arm(name="PSOFT b2", method="psoft", lr=1e-3),
    Arm(name="PEANuT b2", method="peanut", lr=5e-4),
    Arm(name="Lily b2", method="lily", lr=1e-3),
    Arm(name="UniLoRA b2", method="unilora", lr=5e-3),
)


def _shared_direction(name: str, b: dict[str, Any]) -> Arm:
    """Straight functions with a first latent on each side whose entries share a direction, as LoRA of rank 1's do."""
    fixed = {"R": 64, "G": 1, "kernel": "linear", "signs": "shared", "equal": True, "lr_rbf": 4.0, "q": 2}
    return Arm(name=name, method="variant", fixed={**fixed, "a": {"plain_latents": 1}, "b": b}, lr=1e-3)


# What a language model might need and the signs do not give: a direction that all outputs share.
SHARED_DIRECTION = (
    _shared_direction("shared and own", {"plain_latents": 1}),
    _shared_direction("shared and own, 4 groups", {"plain_latents": 1, "G": 4}),
)


def _stored(name: str, rank: int, a: dict[str, Any], **fixed: Any) -> Arm:
    """A stored B, of twice LoRA rank 2's rank, beside an A that costs little."""
    settings = {"R": rank, "alpha": 2 * math.sqrt(rank), "a": a, "b": {"dense": "train"}, **fixed}  # s = 2, as LoRA's
    return Arm(name=name, method="variant", fixed=settings, lr=4e-3)


# Other ways to spend LoRA rank 2's parameters: on one factor, the other one fixed at random or by gradients; LoRA with
# such a start.
ONE_FACTOR = (
    _stored("stored B r4, random A", 4, {"dense": "frozen"}),
    _stored("stored B r4, A of gradients", 4, {"dense": "frozen"}, start="mean gradient"),
    _stored("shorter factor r6, other of gradients", 6, {}, shorter=True, start="mean gradient"),
    _stored("LoRA r2 from gradients", 2, {"dense": "train"}, start="mean gradient"),
    Arm(
        name="signs, 4 latents of B, random A",
        method="variant",
        fixed={"R": 64, "G": 1, "kernel": "linear", "signs": "shared", "equal": True, "lr_rbf": 4.0}
        | {"a": {"freeze": ("latent", "weight")}, "b": {"q": 4}},
        lr=4e-3,
    ),
)


def blocks(groups: int, latents: int) -> Arm:
    """LoRA whose blocks, of groups of outputs by groups of inputs, have weights of their own."""
    rank = groups * latents
    frozen = ["centers", "log_widths"]
    fixed = {"R": rank, "alpha": 2 * math.sqrt(rank), "G": groups, "q": latents, "kernel": "linear", "blocks": True}
    fixed |= {"freeze": frozen, "a": {"freeze": [*frozen, "weight"]}, "lr_rbf": 1.0}
    return Arm(name=f"blocks {groups} × {groups} of rank {latents}", method="variant", fixed=fixed, lr=4e-3)


def sized(rank: int, groups: int, latents: tuple[int, int] = (1, 1), **fixed: Any) -> Arm:
    """GenLoRA with everything given, for the searches."""
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1], **_unsigned(groups)}
    name = f"R{rank} G{groups} Q{latents[0]}/{latents[1]}" + "".join(f" {key}={value}" for key, value in fixed.items())
    return Arm(name=name, method="genlora", fixed={**sizes, **fixed}, lr=4e-3)


def packaged(rank: int, groups: int, latents: tuple[int, int] = (1, 1), lr: float = 4e-3, **fixed: Any) -> Arm:
    """GenLoRA as the package has it, for the searches: groups of B."""
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1], "num_groups_b": groups}
    name = f"R{rank} B{groups} Q{latents[0]}/{latents[1]}" + "".join(f" {key}={value}" for key, value in fixed.items())
    name += "" if lr == 4e-3 else f" lr {lr:g}"
    return Arm(name=name, method="genlora", fixed={**sizes, **fixed}, lr=lr)


def signed(rank: int, lr: float, *, rbf: float, **fixed: Any) -> Arm:
    """A variant whose entries have signs of their own."""
    given = {"R": rank, "G": 1, "kernel": "linear", "signs": "layer", "lr_rbf": rbf, **fixed}
    name = f"signs R{rank}" + "".join(f" {key}={value}" for key, value in fixed.items()) + f" rbf × {rbf:g}, lr {lr:g}"
    return Arm(name=name, method="variant", fixed=given, lr=lr)


def shared_parts(lr: float) -> tuple[Arm, ...]:
    """Straight functions, equal weights, one table of signs, as the package but for the curvature; B's signs differ."""
    of_b: tuple[dict[str, Any], ...] = (
        {"G": 5, "q": 2, "plain_latents": 1},
        {"G": 8, "plain_rows": 32},
        {"G": 5, "q": 2, "plain_rows": 32},
        {"G": 8, "signs": ""},
        {"G": 8},
    )
    arms = (signed(64, lr, rbf=4.0, equal=True, signs="shared", b=b) for b in of_b)
    return tuple(replace(arm, name=f"B's {b}") for arm, b in zip(arms, of_b, strict=True))
