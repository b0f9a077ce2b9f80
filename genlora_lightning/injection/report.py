"""Report which modules an injection has adapted, trained in full, or left alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from genlora_lightning.injection.heads import NEW_HEAD, NEW_LINEAR, TIED_TO_ADAPTED, UNTIED, UNTIED_HEAD
from genlora_lightning.injection.targets import STACK
from genlora_lightning.text import text_table

# Why modules were left alone, where the summary says it.
BESIDE_PARTS = "adapters were put into a part of the model before, and not here"
TRAINED_IN_FULL = "trained in full"
_IN_SUMMARY = (NEW_HEAD, NEW_LINEAR, UNTIED, UNTIED_HEAD, TIED_TO_ADAPTED, STACK, BESIDE_PARTS)


@dataclass(frozen=True, kw_only=True)
class InjectionRow:
    """One line of a :class:`InjectionReport`: an adapted layer, a stack of matrices or a module trained in full."""

    module: str
    kind: str
    shape: str
    trainable_parameters: int
    lora_parameters: int
    rank: int | None = None
    is_linear: bool = True
    matrices: int = 1


@dataclass(frozen=True, kw_only=True)
class InjectionReport:
    """What :func:`inject_adapters` did; ``print`` it for a table.

    Args:
        title: The name of the kind of adapter.
        adapted: The adapted linears.
        trained: The modules that are trained in full.
        skipped: Linears that were left alone, with the reason.
        trainable_parameters: Number of trainable values in the whole model.
        total_parameters: Number of all values in the model, adapters included; tied weights count once.
        lora_parameters: What LoRA of the same rank would train in place of the adapters.
        possible_head: The name of the last linear, if it is adapted and its values are those it was made with.
        kept_zeros: Share of zeros in the adapted weights, which stay so (``keep_zeros``); ``None`` if they need not, or
            the weights are not there yet.
        read: Adapted layers whose weight a module computes with beside calling them, with the module's class: the
            update does not act there, and would once it is merged.
        trained_outside: Trainable values outside of the model that was adapted, in the module that it is a part of.
    """

    title: str
    adapted: tuple[InjectionRow, ...]
    trained: tuple[InjectionRow, ...]
    skipped: dict[str, str]
    trainable_parameters: int
    total_parameters: int
    lora_parameters: int
    possible_head: str | None = None
    kept_zeros: float | None = None
    read: dict[str, str] = field(default_factory=dict)
    trained_outside: int = 0

    @property
    def adapter_parameters(self) -> int:
        """Trainable values of the adapters alone, without modules trained in full."""
        return sum(row.trainable_parameters for row in self.adapted)

    @property
    def noun(self) -> str:
        """What the adapted layers are, but for stacks of matrices."""
        return "linears" if all(row.is_linear for row in self.adapted if row.matrices == 1) else "layers"

    @property
    def _ranks(self) -> list[int]:
        return sorted({row.rank for row in self.adapted if row.rank is not None})

    def summary(self) -> str:
        """The report in one or two lines."""
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        stacks = [row.matrices for row in self.adapted if row.matrices > 1]
        text = f"{self.title} adapts {len(self.adapted) - len(stacks)} {self.noun}"
        text += f" and {len(stacks)} stacks of {sum(stacks):,} matrices" if stacks else ""
        text += f" with {self.adapter_parameters:,} parameters"
        if len(self._ranks) > 1:
            text += f", of ranks {', '.join(map(str, self._ranks))}"
        if self.adapter_parameters != self.lora_parameters:
            text += f" (LoRA of the same rank: {self.lora_parameters:,})"
        text += ". "
        if self.trained:
            names = ", ".join(
                row.module if row.shape == TRAINED_IN_FULL else f"{row.shape} of {row.module}" for row in self.trained
            )
            text += f"Trained in full: {names} ({sum(r.trainable_parameters for r in self.trained):,}). "
        for reason in _IN_SUMMARY:
            names = _some([name for name, given in self.skipped.items() if given == reason])
            text += f"Left alone: {names} ({reason}). " if names else ""
        if self.possible_head is not None:
            text += (
                f"The last linear, {self.possible_head}, is adapted and has the values it was made with: if it is a "
                "new head, name it in `modules_to_train`. "
            )
        for cls in dict.fromkeys(self.read.values()):
            names = _some([name for name, given in self.read.items() if given == cls])
            text += f"{cls} reads the weight of {names}, too, where the update acts only once it is merged. "
        if self.kept_zeros is not None and self.kept_zeros > 0:
            text += f"{self.kept_zeros:.1%} of the adapted weights are 0 and stay so. "
        elif self.kept_zeros is not None:
            text += "`keep_zeros` has no effect: none of the adapted weights is 0 (`genlora prune` makes zeros). "
        text += f"Trainable: {self.trainable_parameters:,} of {self.total_parameters:,} ({share:.3f} %)"
        if self.trained_outside:
            text += f", and outside of the adapted model {self.trained_outside:,}, which no adapter folder holds"
        return text + "."

    def table(self, *, collapse: bool = True) -> str:
        """The report as a table.

        Args:
            collapse: Put modules that differ only in numbers (the layers of a transformer) into one line.
        """
        groups: dict[tuple[str, str, str, int | None], list[InjectionRow]] = {}
        for row in (*self.adapted, *self.trained):
            name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$|^\d+$", "*", row.module) if collapse else row.module
            groups.setdefault((name, row.kind, row.shape, row.rank), []).append(row)
        lines = []
        is_ranked = len(self._ranks) > 1
        for (name, kind, shape, rank), rows in groups.items():
            own, lora = sum(r.trainable_parameters for r in rows), sum(r.lora_parameters for r in rows)
            ranked = (str(rank or "-"),) if is_ranked else ()
            lines.append((name, kind, str(len(rows)), shape, *ranked, f"{own:,}", f"{lora:,}" if lora else "-"))
        ranked = ("rank",) if is_ranked else ()
        header = ("module", "kind", "count", "shape (out, in)", *ranked, "parameters", "LoRA would have")
        text = [text_table(header, lines, left=2)]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            if reason not in _IN_SUMMARY:  # which the summary tells
                text.append(f"left alone: {_some(names)} ({reason})")
        return "\n".join([*text, self.summary()])

    def __str__(self) -> str:
        return self.table()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
