"""What is measured: cells, each a setting in which all arms are compared, and the experiments made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["step", "memory", "counts", "forward", "generate"]
PRECISIONS = ("fp32", "bf16-mixed")
EXPERIMENTS = ("steps", "ranks", "size", "tokens", "checkpointing", "accumulation", "memory", "counts", "inference")

# The names of arms in the results, and what they are.
ARMS = {
    "floor": "floor",
    "genlora": "GenLoRA",
    "genlora-once": "GenLoRA, generated once per optimizer step",
    "genlora-bf16": "GenLoRA on a bf16 base",
    "our-lora": "LoRA by us",
    "lora": "PEFT LoRA",
    "lora-bf16": "PEFT LoRA of bf16 on a bf16 base",
    "vera": "PEFT VeRA",
    "generator": "generator alone",
    "base": "frozen base",
    "genlora-merged": "GenLoRA, merged",
}
_SIZED = "sized-"  # GenLoRA of a rank, with as many parameters as LoRA of the cell's rank
_INFERENCE = ("base", "genlora", "genlora-merged", "lora", "vera")


def title_of(arm: str) -> str:
    """What an arm is, in words."""
    rank = rank_if_sized(arm)
    return ARMS[arm] if rank is None else f"GenLoRA of that LoRA's size, R {rank}"


def rank_if_sized(arm: str) -> int | None:
    """GenLoRA's own rank, where the cell's is that of the LoRA whose size it has."""
    return int(arm.removeprefix(_SIZED)) if arm.startswith(_SIZED) else None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting, with the arms that are compared in it.

    Args:
        kind: What is measured.
        model: A key of :data:`benchmarks.speed.models.MODELS`.
        precision: ``"fp32"``; ``"bf16-mixed"``: float32 weights under autocast to bfloat16; ``"bf16"``: a base in
            bfloat16, under autocast too.
        rank: Of all adapters.
        batch: Sequences in a micro-batch.
        tokens: In each sequence; of kind "generate": in the prompt.
        arms: Keys of :data:`ARMS`, or "sized-64": GenLoRA of rank 64 with as many parameters as LoRA of `rank`.
        checkpointing: Whether blocks are computed again in the backward.
        accumulation: Micro-batches in an optimizer step.
        new_tokens: Of kind "generate": how many are generated.
    """

    kind: Kind
    model: str
    precision: str
    rank: int
    batch: int
    tokens: int
    arms: tuple[str, ...]
    checkpointing: bool = False
    accumulation: int = 1
    new_tokens: int = 0

    @property
    def label(self) -> str:
        """The setting in words, without what is measured."""
        words = f"{self.model} {self.precision} rank {self.rank} {self.batch}x{self.tokens}"
        words += f"+{self.new_tokens}" if self.new_tokens else ""
        words += " checkpointing" if self.checkpointing else ""
        words += " of one size" if any(rank_if_sized(arm) for arm in self.arms) else ""
        return words + (f" accumulation {self.accumulation}" if self.accumulation > 1 else "")

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.kind}: {self.label}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "arms": list(self.arms)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that experiments take; the defaults are the benchmark, :data:`QUICK` is for trying it out.

    Args:
        language: The causal language model, for which the bars are.
        encoder: The other model.
        wide: Models of the widths of larger ones.
        ranks: All ranks, ascending.
        main_ranks: The two of them at which most is measured.
        sizes: Ranks of LoRA whose size GenLoRA has, and GenLoRA's ranks then; the first one on all models.
        batch: Sequences, where their length is not what is varied; else one.
        tokens: Lengths of sequences, ascending; the first is the usual one.
        longest: Most tokens that the encoder takes.
        accumulation: Micro-batches, where they are accumulated.
        new_tokens: How many are generated.
        memory: Precisions, ranks, and whether activations are checkpointed, where memory is measured.
        memory_arms: Of which memory is measured; of all if ``None``.
    """

    language: str = "smollm2"
    encoder: str = "minilm"
    wide: tuple[str, ...] = ("random-1b-blocks",)
    ranks: tuple[int, ...] = (8, 16, 64, 256)
    main_ranks: tuple[int, int] = (16, 64)
    sizes: tuple[tuple[int, tuple[int, ...]], ...] = ((2, (64, 32, 16)), (8, (64, 32, 16)))
    batch: int = 4
    tokens: tuple[int, ...] = (128, 256, 512, 1024)
    longest: int = 512
    accumulation: int = 8
    new_tokens: int = 32
    memory: tuple[tuple[str, int, bool], ...] = tuple(
        (precision, rank, on) for precision in PRECISIONS for rank, on in ((16, False), (64, False), (16, True))
    )
    memory_arms: tuple[str, ...] | None = None

    def cell(
        self,
        kind: Kind,
        precision: str,
        rank: int,
        *,
        model: str | None = None,
        batch: int | None = None,
        tokens: int | None = None,
        checkpointing: bool = False,
        accumulation: int = 1,
    ) -> Cell:
        """A cell with its arms; of the language model, and of the usual batch, unless others are given."""
        generates = kind == "generate"
        arms = _INFERENCE if kind in ("forward", "generate") else _training_arms(kind, precision, accumulation)
        if kind == "memory" and self.memory_arms is not None:
            arms = self.memory_arms
        return Cell(
            kind=kind,
            model=model or self.language,
            precision=precision,
            rank=rank,
            batch=batch or (1 if generates else self.batch),
            tokens=tokens or self.tokens[0],
            arms=arms,
            checkpointing=checkpointing,
            accumulation=accumulation,
            new_tokens=self.new_tokens if generates else 0,
        )

    def size_cell(self, model: str, number: int = 0) -> Cell:
        """Steps at the size of a small LoRA, whatever the rank that GenLoRA has then."""
        rank, ours = self.sizes[number]
        arms = ("floor", "lora", "our-lora", *(f"{_SIZED}{own}" for own in ours))
        return replace(self.cell("step", "fp32", rank, model=model), arms=arms)

    def cells(self, experiment: str) -> list[Cell]:
        """The cells of an experiment; different experiments share some.

        Args:
            experiment: One of :data:`EXPERIMENTS`.
        """
        if experiment == "memory":
            return [self.cell("memory", precision, rank, checkpointing=on) for precision, rank, on in self.memory]
        if experiment == "size":
            others = [self.size_cell(self.language, number) for number in range(1, len(self.sizes))]
            return [*(self.size_cell(model) for model in (self.language, *self.wide)), *others]
        models = (self.language, self.encoder)
        return [cell for model in models for cell in self._cells(experiment, model)]

    def _cells(self, experiment: str, model: str) -> Iterator[Cell]:
        low = self.main_ranks[0]
        for precision in PRECISIONS:
            if experiment in ("steps", "ranks"):
                for rank in self.main_ranks if experiment == "steps" else self.ranks:
                    yield self.cell("step", precision, rank, model=model)
            elif experiment == "tokens":
                for tokens in self.tokens:
                    if model == self.language or tokens <= self.longest:
                        yield self.cell("step", precision, low, model=model, batch=1, tokens=tokens)
            elif experiment == "checkpointing":
                for on in (False, True):
                    yield self.cell("step", precision, low, model=model, checkpointing=on)
            elif experiment == "accumulation":
                for number in (1, self.accumulation):
                    yield self.cell("step", precision, low, model=model, batch=1, accumulation=number)
            elif experiment == "counts":
                for rank in self.ranks:
                    yield self.cell("counts", precision, rank, model=model)
            elif experiment == "inference":
                for rank in self.main_ranks:
                    yield self.cell("forward", precision, rank, model=model)
                if model == self.language:
                    yield self.cell("generate", precision, low)


def _training_arms(kind: Kind, precision: str, accumulation: int) -> tuple[str, ...]:
    once = ("genlora-once",) if accumulation > 1 else ()
    ours = () if kind == "memory" else ("our-lora",)  # each arm is some processes there
    narrow = ("genlora-bf16", "lora-bf16") if precision == "bf16-mixed" else ()
    return ("floor", "genlora", *once, *ours, "lora", "vera", *narrow)


FULL = Grid()
QUICK = Grid(
    language="tiny",
    encoder="tiny-encoder",
    wide=(),
    ranks=(2, 4),
    main_ranks=(2, 4),
    sizes=((2, (4, 3)),),
    batch=2,
    tokens=(8, 16),
    longest=8,
    accumulation=2,
    new_tokens=3,
    memory=(("fp32", 2, False),),
    memory_arms=("genlora", "lora"),
)
