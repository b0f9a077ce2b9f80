"""The experiments: which arms run on which tasks, with how many rates and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .arms import (
    GENLORAS,
    GRALORA,
    GROUPS_ONLY,
    LEADERS,
    LORAS,
    ONE_FACTOR,
    OTHERS,
    RELATIVES,
    SHARED_DIRECTION,
    Arm,
    blocks,
    genlora,
    groups_only,
    lora,
    packaged,
    shared_parts,
    signed,
    sized,
)

TRIALS = 4
TUNING_SEED = 100
SENTIMENT_TASKS = ("movies", "tweets")
LANGUAGE_TASKS = ("siqa", "asdiv")
CAPACITY_TASKS = ("new-french", "new-lisp", "messages", "subjects", "asdiv")  # where LoRA's rank should matter
NEW_TAIL_TASKS = ("new-french-tail", "new-lisp-tail", "messages-tail")
TAIL_TASKS = ("french-tail", "lisp-tail", "subjects-tail")
VISION_TASKS = ("fashion",)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms on tasks.

    Args:
        arms: In the order in which they run.
        tasks: Names of tasks.
        trials: Rates per arm and task, each twice the one before; with one of them the final runs have it untried.
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


EXPERIMENTS: dict[str, Experiment] = {
    # Searches, on validation data alone: a row a run, no final runs.
    "groups": Experiment(
        arms=(
            *(sized(16, groups) for groups in (24, 12, 48)),
            *(sized(16, groups, (1, 2)) for groups in (12, 24)),
            sized(16, 8),
            sized(16, 8, (1, 2)),
            sized(32, 24),
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
            sized(16, 8),
            *(sized(16, 8, width=width) for width in (0.3, 0.1, 0.03)),
            *(sized(64, 1, width=width) for width in (1.0, 0.1, 0.03)),
            sized(64, 1, num_centers=4, width=0.1),
            sized(16, 10, (1, 2), width=0.1),
            sized(16, 8, num_centers=4),
            sized(16, 8, kernel="inverse_multiquadric"),
            sized(16, 8, init="zero_weight"),
            sized(16, 8, learn_centers=False, learn_widths=False),
            sized(4, 8),
            sized(64, 8),
            Arm(name="R16 G8 strided groups", method="variant", fixed={"grouping": "strided"}, lr=4e-3),
            Arm(name="R16 G8 weights' rate × 0.1", method="variant", fixed={"lr_rbf": 0.1}, lr=4e-3),
            replace(sized(16, 8), name="R16 G8 weight decay 0.1", weight_decay=0.1),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(0, 1),
        final=False,
    ),
    # Entries with directions of their own, fixed at random: VeRA's idea, of which only signs and amplitudes are left.
    "signs": Experiment(
        arms=(
            signed(64, 4e-3, rbf=8.0),
            signed(64, 8e-3, rbf=8.0),
            signed(64, 4e-3, rbf=32.0),
            signed(64, 8e-3, rbf=32.0),
            signed(64, 8e-3, rbf=1.0),
            signed(64, 8e-3, rbf=1.0, G=8),
            signed(64, 8e-3, rbf=8.0, G=8),
            signed(256, 8e-3, rbf=8.0),
            signed(64, 4e-3, rbf=8.0, G=8),
            signed(256, 4e-3, rbf=8.0),
            signed(64, 4e-3, rbf=16.0),
            signed(64, 2e-3, rbf=16.0),
            signed(64, 4e-3, rbf=8.0, b={"q": 2}),
            signed(64, 4e-3, rbf=8.0, kernel="gaussian"),
            signed(64, 4e-3, rbf=8.0, a={"freeze": ("weight",)}),
            signed(64, 4e-3, rbf=8.0, a={"freeze": ("latent",)}),
            signed(16, 4e-3, rbf=8.0),
            signed(256, 4e-3, rbf=8.0, G=2),
            signed(64, 4e-3, rbf=4.0, G=8),
            signed(64, 4e-3, rbf=8.0, signs="shared"),
            signed(256, 4e-3, rbf=4.0),
            signed(256, 4e-3, rbf=4.0, b={"q": 2}),
            signed(64, 4e-3, rbf=8.0, equal=True),
            signed(64, 4e-3, rbf=8.0, kernel="gaussian", freeze=("centers", "log_widths")),
            signed(64, 4e-3, rbf=8.0, b={"G": 8}),
            signed(64, 2e-3, rbf=8.0),
            signed(64, 4e-3, rbf=4.0),
            signed(128, 4e-3, rbf=6.0),
            signed(64, 4e-3, rbf=8.0, a_scale=0.5),
            signed(64, 4e-3, rbf=8.0, a_scale=2.0),
            signed(64, 4e-3, rbf=4.0, q=2),
        ),
        tasks=("movies",),
        trials=1,
        final=False,
    ),
    # The same with amplitudes of their own for the groups of B alone, whose rates fall with the root of the rank.
    "sign-groups": Experiment(
        arms=(
            signed(64, 4e-3, rbf=8.0, equal=True, b={"G": 8}),
            signed(128, 4e-3, rbf=5.6, equal=True, b={"G": 8}),
            signed(64, 4e-3, rbf=8.0, equal=True, b={"G": 17}),
            signed(64, 4e-3, rbf=8.0, equal=True, signs="shared", b={"G": 8}),
            signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
            signed(64, 4e-3, rbf=4.0, equal=True, a={"G": 8}),
            signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8, "grouping": "strided"}),
            signed(16, 4e-3, rbf=8.0, equal=True, b={"G": 8}),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(100, 101),
        final=False,
    ),
    # What the package's form of it costs: one table of signs for all layers, functions that bend.
    "sign-forms": Experiment(
        arms=(
            packaged(64, 8, width=4.0, weight_gain=32.0),
            signed(64, 4e-3, rbf=4.0, equal=True, signs="shared", b={"G": 8}),
            signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
            packaged(64, 8),
            signed(64, 4e-3, rbf=4.0, equal=True, signs="shifted", b={"G": 8}),
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
            signed(64, 4e-3, rbf=4.0, equal=True, signs="shared", b={"G": 8}),
            signed(64, 4e-3, rbf=4.0, equal=True, b={"G": 8}),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=tuple(range(TUNING_SEED, TUNING_SEED + 8)),
        final=False,
    ),
    # What a budget of 2, 3 or 4 is best spent on.
    "sign-sizes": Experiment(
        arms=(
            packaged(64, 8),
            packaged(128, 8),
            packaged(64, 4, (1, 2)),
            packaged(64, 4, (2, 4)),
            packaged(128, 8, (2, 2)),
            packaged(64, 1, (1, 2)),
        ),
        tasks=("movies",),
        trials=1,
        tuning_seeds=(100, 101),
        final=False,
    ),
    # A part that all outputs share, beside the directions of their own.
    "shared-parts": Experiment(arms=shared_parts(4e-3), tasks=("siqa", *SENTIMENT_TASKS), trials=1, final=False),
    "shared-parts-slow": Experiment(arms=shared_parts(2e-3), tasks=("siqa",), trials=1, final=False),
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
                blocks(4, 2),
                blocks(8, 2),
                SHARED_DIRECTION[0],
                GENLORAS[1],
                *(genlora(f"GenLoRA R{rank} b2", 2.0, rank, (1, 2)) for rank in (16, 32, 128)),
                genlora("GenLoRA R28, latents 2 and 2", 0, 28, (2, 2), num_groups_b=1),
                genlora("GenLoRA b2, latents 2 and 1", 2.0, 64, (2, 1)),
                *(
                    genlora(f"GenLoRA b2, weight_gain {gain}", 2.0, 64, (1, 2), weight_gain=float(gain))
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
                )
            ),
        ),
        tasks=TAIL_TASKS,
        trials=3,
    ),
    # The same where no text to test or validate stands in the training data, and on translations.
    "new-tail": Experiment(
        arms=(
            *(replace(arm, lr=8e-3, most_seeds=5) for arm in (LORAS[1], GENLORAS[2])),
            *(replace(arm, lr=4e-3, most_seeds=3) for arm in (LORAS[3], genlora("GenLoRA b8", 8.0, 64, (4, 8)))),
        ),
        tasks=NEW_TAIL_TASKS,
        trials=3,
    ),
    # The method that was level with GenLoRA in a first look at the others, of LoRA rank 2's and 8's size.
    "new-tail-gralora": Experiment(
        arms=(
            replace(GRALORA, lr=8e-3, most_seeds=5),
            replace(GRALORA, name="GraLoRA r8", budget=8.0, lr=4e-3, most_seeds=3),
        ),
        tasks=NEW_TAIL_TASKS,
        trials=3,
    ),
    # There, what GenLoRA of LoRA rank 8's size is best made of; …
    "new-tail-sizes": Experiment(
        arms=tuple(
            replace(genlora(f"GenLoRA b8 R{rank}, latents {q_a} and {q_b}", 8.0, rank, (q_a, q_b)), lr=8e-3)
            # 64, 7 and 7 is what `genlora budget` gives; less R takes less time.
            for rank, q_a, q_b in ((64, 4, 8), (256, 4, 8), (64, 7, 7), (32, 7, 7), (16, 7, 7))
        ),
        tasks=(NEW_TAIL_TASKS[0], NEW_TAIL_TASKS[2]),
        trials=2,
        final=False,
    ),
    # … the forms of LoRA rank 2's size again, which repeated text may have ranked wrongly, …
    "new-tail-search": Experiment(
        arms=tuple(
            replace(arm, lr=1.6e-2)
            for arm in (
                blocks(2, 2),
                blocks(4, 2),
                SHARED_DIRECTION[0],
                genlora("GenLoRA b2, latents 2 and 1", 2.0, 64, (2, 1)),
                ONE_FACTOR[3],
                *(genlora(f"GenLoRA R{rank} b2", 2.0, rank, (1, 2)) for rank in (16, 32, 128)),
                blocks(8, 2),
                replace(GENLORAS[2], name="GenLoRA b2 from gradients", method="started genlora"),
            )
        ),
        tasks=NEW_TAIL_TASKS[:1],
        trials=1,
        final=False,
    ),
    # … and the other small methods, of LoRA rank 2's size.
    "new-tail-others": Experiment(
        arms=(
            *(replace(arm, lr=lr) for arm, lr in zip(RELATIVES, (8e-3, 1.6e-2), strict=True)),
            # Sixteen times their lowest rate was far too high for two of them.
            *(replace(leader, lr=(2 if leader.method in ("c3a", "waveft") else 8) * leader.lr) for leader in LEADERS),
        ),
        tasks=NEW_TAIL_TASKS[:1],
        trials=3,
        final=False,
    ),
    # What a decay of the weights keeps of English, at the rate that is the best without it.
    "tail-decay": Experiment(
        arms=tuple(
            replace(arm, name=f"{arm.name}, decay 0.2", weight_decay=0.2, lr=1.6e-2) for arm in (LORAS[1], GENLORAS[2])
        ),
        tasks=TAIL_TASKS[:2],
        trials=1,
        most_seeds=3,
    ),
    # All blocks, at rates as high as theirs. LoRA of four times the size tells what size is worth there.
    "whole": Experiment(
        arms=(
            replace(LORAS[1], lr=4e-3),
            replace(GENLORAS[2], lr=8e-3),
            replace(LORAS[3], lr=2e-3),
        ),
        tasks=("french",),
        trials=3,
        most_seeds=3,
        steps=100,
    ),
    # The same of LoRA rank 8's size, in the form that `genlora budget` gives, on text that training does not repeat.
    "new-whole": Experiment(
        arms=(
            replace(LORAS[3], lr=2e-3),
            replace(genlora("GenLoRA b8, latents 7 and 7", 8.0, 64, (7, 7)), lr=4e-3),
        ),
        tasks=("new-french",),
        trials=3,
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
        arms=tuple(genlora(f"GenLoRA R{rank}", 1.0, rank, num_groups_b=1) for rank in (4, 16, 64, 256)),
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
