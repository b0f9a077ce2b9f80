"""The experiments: which methods, sizes and learning rates run on which tasks, and in which order.

Fair by construction: on a task every arm has the same steps, the same batches for a seed, the same head, and the same
number of trials of the learning rate, a factor of 2 apart, judged by validation loss, at as many seeds as the task asks
for. Then fresh seeds at the best rate, and only there the test data are looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .methods import METHODS, Shapes, linear_shapes
from .rows import Row
from .runs import Spec, get_task

TRIALS = 4
TUNING_SEED = 100
SENTIMENT_TASKS = ("movies", "tweets")
LANGUAGE_TASKS = ("siqa", "asdiv")
CAPACITY_TASKS = ("french", "lisp", "subjects", "asdiv")  # where LoRA's rank should matter
TAIL_TASKS = ("french-tail", "lisp-tail", "subjects-tail")
VISION_TASKS = ("fashion",)


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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms on tasks.

    Args:
        arms: In the order in which they run.
        tasks: Names of tasks.
        trials: Rates per arm and task, each twice the one before.
        tuning_seeds: Seeds of the trials; as many as the task asks for, from `TUNING_SEED` on, if ``None``.
        final: Whether fresh seeds run at the best rate.
        trace: Points of training at which the final runs measure the effective rank.
        most_seeds: At most so many final seeds; as many as the task asks for if ``None``.
        steps: Optimizer steps of a run; the task's if ``None``.
    """

    arms: Sequence[Arm]
    tasks: Sequence[str] = SENTIMENT_TASKS
    trials: int = TRIALS
    tuning_seeds: Sequence[int] | None = None
    final: bool = True
    trace: int = 0
    most_seeds: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Planned:
    """A run that is still to be made."""

    arm: str
    spec: Spec


def lora(rank: int, lr: float) -> Arm:
    """LoRA of a rank, from a lowest rate on."""
    return Arm(name=f"LoRA r{rank}", method="lora", budget=rank, lr=lr)


def _genlora(name: str, budget: float, rank: int = 64, latents: tuple[int, int] = (1, 1), **fixed: Any) -> Arm:
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1]}
    return Arm(name=name, method="genlora", budget=budget, fixed=sizes | fixed, lr=1e-3)


def groups_only(name: str, groups: int, latents: tuple[int, int] = (1, 1)) -> Arm:
    """GenLoRA without signs: the entries of a group share a direction."""
    return _genlora(name, 0, 16, latents, **_unsigned(groups))


def _unsigned(groups: int) -> dict[str, Any]:
    learned = {"learn_centers": True, "learn_widths": True}
    return {"num_groups_a": groups, "num_groups_b": groups, "entry_signs": False, "weight_gain": 1.0, **learned}


LORAS = (lora(1, 1e-3), lora(2, 1e-3), lora(4, 5e-4), lora(8, 5e-4), lora(16, 2.5e-4))
# Names say the budget: b2 has as many parameters as LoRA of rank 2.
GENLORAS = (
    _genlora("GenLoRA b1", 1.05, rank=28),  # one latent for each factor is as much as LoRA of rank 1 already
    _genlora("GenLoRA b1.5", 1.5),
    _genlora("GenLoRA b2", 2.0, latents=(1, 2)),
    _genlora("GenLoRA b4", 4.0, rank=128, latents=(2, 2)),
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
# The leaders of PEFT's own comparison, at that size.
LEADERS = (
    Arm(name="MiSS b2", method="miss", lr=5e-4),
    Arm(name="SHiRA r2", method="shira", lr=2e-3),
    Arm(name="HiRA r2", method="hira", lr=2e-3),
    Arm(name="GraLoRA r2", method="gralora", lr=1e-3),
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


def _blocks(groups: int, latents: int) -> Arm:
    """LoRA whose blocks, of groups of outputs by groups of inputs, have weights of their own."""
    rank = groups * latents
    frozen = ["centers", "log_widths"]
    fixed = {"R": rank, "alpha": 2 * math.sqrt(rank), "G": groups, "q": latents, "kernel": "linear", "blocks": True}
    fixed |= {"freeze": frozen, "a": {"freeze": [*frozen, "weight"]}, "lr_rbf": 1.0}
    return Arm(name=f"blocks {groups} × {groups} of rank {latents}", method="variant", fixed=fixed, lr=4e-3)


def _sized(rank: int, groups: int, latents: tuple[int, int] = (1, 1), **fixed: Any) -> Arm:
    """GenLoRA with everything given, for the searches."""
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1], **_unsigned(groups)}
    name = f"R{rank} G{groups} Q{latents[0]}/{latents[1]}" + "".join(f" {key}={value}" for key, value in fixed.items())
    return Arm(name=name, method="genlora", fixed={**sizes, **fixed}, lr=4e-3)


def _packaged(rank: int, groups: int, latents: tuple[int, int] = (1, 1), lr: float = 4e-3, **fixed: Any) -> Arm:
    """GenLoRA as the package has it, for the searches: groups of B."""
    sizes = {"rank": rank, "num_latents_a": latents[0], "num_latents_b": latents[1], "num_groups_b": groups}
    name = f"R{rank} B{groups} Q{latents[0]}/{latents[1]}" + "".join(f" {key}={value}" for key, value in fixed.items())
    name += "" if lr == 4e-3 else f" lr {lr:g}"
    return Arm(name=name, method="genlora", fixed={**sizes, **fixed}, lr=lr)


def _signed(rank: int, lr: float, *, rbf: float, **fixed: Any) -> Arm:
    """A variant whose entries have signs of their own."""
    given = {"R": rank, "G": 1, "kernel": "linear", "signs": "layer", "lr_rbf": rbf, **fixed}
    name = f"signs R{rank}" + "".join(f" {key}={value}" for key, value in fixed.items()) + f" rbf × {rbf:g}, lr {lr:g}"
    return Arm(name=name, method="variant", fixed=given, lr=lr)


def _shared(lr: float) -> tuple[Arm, ...]:
    """Straight functions, equal weights, one table of signs, as the package but for the curvature; B's signs differ."""
    of_b: tuple[dict[str, Any], ...] = (
        {"G": 5, "q": 2, "plain_latents": 1},
        {"G": 8, "plain_rows": 32},
        {"G": 5, "q": 2, "plain_rows": 32},
        {"G": 8, "signs": ""},
        {"G": 8},
    )
    arms = (_signed(64, lr, rbf=4.0, equal=True, signs="shared", b=b) for b in of_b)
    return tuple(replace(arm, name=f"B's {b}") for arm, b in zip(arms, of_b, strict=True))


EXPERIMENTS: dict[str, Experiment] = {
    # Searches, on validation data alone: a row a run, no final runs.
    "groups": Experiment(
        arms=(
            *(_sized(16, groups) for groups in (24, 12, 48)),
            *(_sized(16, groups, (1, 2)) for groups in (12, 24)),
            _sized(16, 8),
            _sized(16, 8, (1, 2)),
            _sized(32, 24),
            replace(lora(2, 0), lr=2e-3),
            replace(lora(4, 0), lr=2e-3),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(0, 1, 2),
        final=False,
    ),
    # One choice at a time, at the rate that suits the default: curvature first (narrow functions bend where wide ones
    # are straight), then the rest.
    "ablations": Experiment(
        arms=(
            _sized(16, 8),
            *(_sized(16, 8, width=width) for width in (0.3, 0.1, 0.03)),
            *(_sized(64, 1, width=width) for width in (1.0, 0.1, 0.03)),
            _sized(64, 1, num_centers=4, width=0.1),
            _sized(16, 10, (1, 2), width=0.1),
            _sized(16, 8, num_centers=4),
            _sized(16, 8, kernel="inverse_multiquadric"),
            _sized(16, 8, init="zero_weight"),
            _sized(16, 8, learn_centers=False, learn_widths=False),
            _sized(4, 8),
            _sized(64, 8),
            Arm(name="R16 G8 strided groups", method="variant", fixed={"grouping": "strided"}, lr=4e-3),
            Arm(name="R16 G8 weights' rate × 0.1", method="variant", fixed={"lr_rbf": 0.1}, lr=4e-3),
            replace(_sized(16, 8), name="R16 G8 weight decay 0.1", weight_decay=0.1),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(0, 1),
        final=False,
    ),
    # Entries with directions of their own, fixed at random: VeRA's idea, of which only signs and amplitudes are left.
    "signs": Experiment(
        arms=(
            _signed(64, 4e-3, rbf=8.0),
            _signed(64, 8e-3, rbf=8.0),
            _signed(64, 4e-3, rbf=32.0),
            _signed(64, 8e-3, rbf=32.0),
            _signed(64, 8e-3, rbf=1.0),
            _signed(64, 8e-3, rbf=1.0, G=8),
            _signed(64, 8e-3, rbf=8.0, G=8),
            _signed(256, 8e-3, rbf=8.0),
            _signed(64, 4e-3, rbf=8.0, G=8),
            _signed(256, 4e-3, rbf=8.0),
            _signed(64, 4e-3, rbf=16.0),
            _signed(64, 2e-3, rbf=16.0),
            _signed(64, 4e-3, rbf=8.0, b={"q": 2}),
            _signed(64, 4e-3, rbf=8.0, kernel="gaussian"),
            _signed(64, 4e-3, rbf=8.0, a={"freeze": ("weight",)}),
            _signed(64, 4e-3, rbf=8.0, a={"freeze": ("latent",)}),
            _signed(16, 4e-3, rbf=8.0),
            _signed(256, 4e-3, rbf=8.0, G=2),
            _signed(64, 4e-3, rbf=4.0, G=8),
            _signed(64, 4e-3, rbf=8.0, signs="shared"),
            _signed(256, 4e-3, rbf=4.0),
            _signed(256, 4e-3, rbf=4.0, b={"q": 2}),
            _signed(64, 4e-3, rbf=8.0, equal=True),
            _signed(64, 4e-3, rbf=8.0, kernel="gaussian", freeze=("centers", "log_widths")),
            _signed(64, 4e-3, rbf=8.0, b={"G": 8}),
            _signed(64, 2e-3, rbf=8.0),
            _signed(64, 4e-3, rbf=4.0),
            _signed(128, 4e-3, rbf=6.0),
            _signed(64, 4e-3, rbf=8.0, a_scale=0.5),
            _signed(64, 4e-3, rbf=8.0, a_scale=2.0),
            _signed(64, 4e-3, rbf=4.0, q=2),
        ),
        tasks=("movies",),
        trials=1,
        final=False,
    ),
    # The same with amplitudes of their own for the groups of B alone, whose rates fall with the root of the rank.
    "sign-groups": Experiment(
        arms=(
            _signed(64, 4e-3, rbf=8.0, equal=True, b={"G": 8}),
            _signed(128, 4e-3, rbf=5.6, equal=True, b={"G": 8}),
            _signed(64, 4e-3, rbf=8.0, equal=True, b={"G": 17}),
            _signed(64, 4e-3, rbf=8.0, equal=True, signs="shared", b={"G": 8}),
            _signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
            _signed(64, 4e-3, rbf=4.0, equal=True, a={"G": 8}),
            _signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8, "grouping": "strided"}),
            _signed(16, 4e-3, rbf=8.0, equal=True, b={"G": 8}),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(100, 101),
        final=False,
    ),
    # What the package's form of it costs: one table of signs for all layers, functions that bend.
    "sign-forms": Experiment(
        arms=(
            _packaged(64, 8, width=4.0, weight_gain=32.0),
            _signed(64, 4e-3, rbf=4.0, equal=True, signs="shared", b={"G": 8}),
            _signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
            _packaged(64, 8),
            _signed(64, 4e-3, rbf=4.0, equal=True, signs="shifted", b={"G": 8}),
            replace(lora(2, 0), lr=2e-3),
            replace(lora(8, 0), lr=2e-3),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(100, 101, 102),
        final=False,
    ),
    # More seeds for what three of them suggested: signs of each layer's own.
    "layer-signs": Experiment(
        arms=(
            _signed(64, 4e-3, rbf=4.0, equal=True, signs="shared", b={"G": 8}),
            _signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=tuple(range(TUNING_SEED, TUNING_SEED + 8)),
        final=False,
    ),
    # What a budget of 2, 3 or 4 is best spent on.
    "sign-sizes": Experiment(
        arms=(
            _packaged(64, 8),
            _packaged(128, 8),
            _packaged(64, 4, (1, 2)),
            _packaged(64, 4, (2, 4)),
            _packaged(128, 8, (2, 2)),
            _packaged(64, 1, (1, 2)),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(100, 101),
        final=False,
    ),
    # A part that all outputs share, beside the directions of their own.
    "shared-parts": Experiment(arms=_shared(4e-3), tasks=("siqa", *SENTIMENT_TASKS), trials=1, final=False),
    "shared-parts-slow": Experiment(arms=_shared(2e-3), tasks=("siqa",), trials=1, final=False),
    # The main table and the Pareto picture.
    "main": Experiment(arms=(*LORAS, *GENLORAS, *GROUPS_ONLY, *OTHERS, *RELATIVES)),
    # The same for the small language model and for pictures; their rows stand in the main table too.
    "llm": Experiment(arms=(*LORAS, *GENLORAS, *GROUPS_ONLY, *OTHERS), tasks=LANGUAGE_TASKS),
    # Longer runs on tasks of which a larger adapter learns more, with what training made the model forget.
    "capacity": Experiment(
        arms=(
            *(
                replace(lora(rank, lr), lr=lr)
                for rank, lr in ((1, 2e-3), (2, 2e-3), (8, 1e-3), (32, 5e-4), (64, 2.5e-4))
            ),
            *(replace(arm, lr=2e-3) for arm in (GENLORAS[1], GENLORAS[2], GENLORAS[0], GENLORAS[3])),
            replace(groups_only("the paper's form", 8, (1, 2)), lr=1e-3),
            *SHARED_DIRECTION,
            Arm(name="frozen + head", method="frozen", lr=1e-3, budget=0),
            *(arm for arm in OTHERS if arm.method in ("rslora", "vera", "randlora", "lokr")),
            *RELATIVES,
            *LEADERS,
        ),
        tasks=CAPACITY_TASKS,
    ),
    # The last blocks of a language model: a search of forms, each at the rate that was the best for LoRA rank 2; …
    "tail-search": Experiment(
        arms=tuple(
            replace(arm, lr=1.6e-2)
            for arm in (
                *ONE_FACTOR,
                _blocks(4, 2),
                _blocks(8, 2),
                SHARED_DIRECTION[0],
                GENLORAS[1],
                *(_genlora(f"GenLoRA R{rank} b2", 2.0, rank, (1, 2)) for rank in (16, 32, 128)),
                _genlora("GenLoRA R28, latents 2 and 2", 0, 28, (2, 2), num_groups_b=1),
                _genlora("GenLoRA b2, latents 2 and 1", 2.0, 64, (2, 1)),
                *(
                    _genlora(f"GenLoRA b2, weight_gain {gain}", 2.0, 64, (1, 2), weight_gain=float(gain))
                    for gain in (4, 16)
                ),
                replace(GENLORAS[2], name="GenLoRA b2 from gradients", method="started genlora"),
            )
        ),
        tasks=TAIL_TASKS[:1],
        trials=1,
        final=False,
    ),
    # … and then what is worth it, beside the package's other kinds.
    "tail": Experiment(
        arms=(
            *(replace(arm, lr=8e-3) for arm in (LORAS[1], GENLORAS[2])),
            *(
                replace(arm, lr=lr, most_seeds=3)
                for arm, lr in (
                    (lora(1, 0), 8e-3),
                    (lora(8, 0), 4e-3),
                    (lora(32, 0), 4e-3),
                    (RELATIVES[0], 8e-3),
                    (RELATIVES[1], 1.6e-2),
                    *((leader, 8 * leader.lr) for leader in LEADERS),
                )
            ),
        ),
        tasks=TAIL_TASKS,
        trials=3,
    ),
    # All blocks, at rates as high as theirs: a few runs, because each takes eleven minutes of a core.
    "whole": Experiment(
        arms=tuple(replace(arm, lr=8e-3) for arm in (LORAS[1], GENLORAS[2])),
        tasks=("french",),
        trials=2,
        most_seeds=3,
        steps=100,
    ),
    "vision": Experiment(arms=(*LORAS, *GENLORAS, *OTHERS), tasks=VISION_TASKS),
    # Effective rank over training, at the rates that were found for the main table.
    "ranks": Experiment(
        arms=(
            *LORAS[:4],
            *GENLORAS,
            *(arm for arm in OTHERS if arm.name in ("full", "VeRA r256", "Stiefel retraction r2")),
        ),
        tasks=("movies",),
        trace=12,
        most_seeds=1,
    ),
    # The paper's picture: R grows at a nearly fixed budget; one group each, since groups would make up for rank.
    "rank-scaling": Experiment(
        arms=tuple(_genlora(f"GenLoRA R{rank}", 1.0, rank, num_groups_b=1) for rank in (4, 16, 64, 256)),
        tasks=("movies",),
    ),
    # How wide the range of good rates is.
    "rates": Experiment(
        arms=(
            *(replace(arm, lr=1.25e-4) for arm in (lora(1, 0), lora(2, 0), lora(8, 0))),
            *(replace(arm, lr=1.25e-4) for arm in GENLORAS),
        ),
        tasks=("movies",),
        trials=9,
        tuning_seeds=(TUNING_SEED, TUNING_SEED + 1),
        final=False,
    ),
}


def rates(arm: Arm, experiment: Experiment, task: str) -> list[float]:
    """The rates that are tried, in ascending order."""
    lowest = arm.lr * get_task(task).lr_factor
    return [float(f"{lowest * 2**i:.6g}") for i in range(experiment.trials)]


def tuning_specs(experiment: Experiment, arm: Arm, task: str) -> list[Spec]:
    """One run per rate and tuning seed."""
    settings = arm.settings(_shapes(task))
    return [
        _spec(arm, task, settings, lr, seed, "tuning", experiment.steps)
        for seed in _tuning_seeds(experiment, task)
        for lr in rates(arm, experiment, task)
    ]


def final_specs(experiment: Experiment, arm: Arm, task: str, done: dict[str, Row]) -> list[Spec] | None:
    """Fresh seeds at the best rate; ``None`` while the trials are not complete or all have diverged."""
    if not experiment.final:
        return []
    trials = tuning_specs(experiment, arm, task)
    if any(spec.key not in done for spec in trials):
        return None
    losses: dict[float, float] = defaultdict(float)  # over the tuning seeds, of which all rates have the same
    for spec in trials:
        losses[spec.lr] += _score(done[spec.key])
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        return []
    return [
        replace(trials[0], lr=best, seed=seed, stage="final", trace=experiment.trace)
        for seed in range(_num_seeds(experiment, arm, task))
    ]


def pending(experiment: Experiment, done: dict[str, Row], skip: Iterable[str] = ()) -> list[Planned]:
    """The runs that can start now: all trials first, then the final runs, in the order of the arms.

    Args:
        experiment: The experiment, its arms and tasks narrowed down as wanted.
        done: Rows by key, of all experiments: a run that another one made is not made again.
        skip: Keys of runs that are under way, or have failed.
    """
    out = {*done, *skip}
    cells = [(arm, task) for arm in experiment.arms for task in experiment.tasks]
    trials = [Planned(arm.name, spec) for arm, task in cells for spec in tuning_specs(experiment, arm, task)]
    finals = [Planned(arm.name, spec) for arm, task in cells for spec in final_specs(experiment, arm, task, done) or ()]
    return [planned for planned in (*trials, *finals) if planned.spec.key not in out]


def total_runs(experiment: Experiment) -> int:
    """How many runs the experiment has."""
    trials = experiment.trials * sum(len(_tuning_seeds(experiment, task)) for task in experiment.tasks)
    cells = [(arm, task) for arm in experiment.arms for task in experiment.tasks] if experiment.final else []
    return len(experiment.arms) * trials + sum(_num_seeds(experiment, arm, task) for arm, task in cells)


def narrowed(experiment: Experiment, tasks: Sequence[str], arms: Sequence[str]) -> Experiment:
    """The experiment with the named tasks and arms only; all where nothing is named.

    Raises:
        ValueError: A name is not known; the message lists those that are.
    """
    known_arms = [arm.name for arm in experiment.arms]
    for wanted, known, what in ((tasks, list(experiment.tasks), "tasks"), (arms, known_arms, "methods")):
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(f"Unknown {what} {unknown}; the experiment has {known}.")
    return replace(
        experiment,
        tasks=[task for task in experiment.tasks if not tasks or task in tasks],
        arms=[arm for arm in experiment.arms if not arms or arm.name in arms],
    )


def _tuning_seeds(experiment: Experiment, task: str) -> Sequence[int]:
    if experiment.tuning_seeds is not None:
        return experiment.tuning_seeds
    return range(TUNING_SEED, TUNING_SEED + get_task(task).num_tuning_seeds)


def _num_seeds(experiment: Experiment, arm: Arm, task: str) -> int:
    wanted: int = get_task(task).num_seeds
    return min([wanted, *(most for most in (experiment.most_seeds, arm.most_seeds) if most is not None)])


_SHAPES: dict[str, Shapes] = {}


def _shapes(task: str) -> Shapes:
    if task not in _SHAPES:
        _SHAPES[task] = linear_shapes(get_task(task).skeleton())
    return _SHAPES[task]


def _spec(
    arm: Arm, task: str, settings: dict[str, Any], lr: float, seed: int, stage: str, steps: int | None = None
) -> Spec:
    return Spec(
        task=task,
        method=arm.method,
        settings=settings,
        lr=lr,
        seed=seed,
        steps=steps or get_task(task).steps,
        stage=stage,
        weight_decay=arm.weight_decay,
    )


def _score(row: Row) -> float:
    return float(row["val_loss"]) if row["status"] == "ok" else math.inf
