"""Say how sure a metric is, and the difference of two on the same examples: by resampling the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: A metric as a function of the sums (…, statistics) of what is known of each example.
Metric = Callable[[Tensor], Tensor]

_CHUNK = 2**24  # numbers of a block of resamples


@dataclass(frozen=True)
class Scores:
    """What is known of each example, and the metrics that are functions of its sums.

    Args:
        statistics: (examples, statistics).
        metrics: By name.
    """

    statistics: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds between which it lies with some confidence."""

    value: float
    low: float
    high: float


def ratio(over: int, under: int) -> Metric:
    """Make the metric ``Σ statistic over / Σ statistic under``; NaN where the latter is 0."""
    return lambda sums: sums[..., over] / sums[..., under]


def macro_f1(first: int, classes: int) -> Metric:
    """Make the mean of the classes' F1, ``2·TP / (predicted + true)``, over classes that occur or are predicted.

    Args:
        first: The first of 3·classes statistics: whether an example is of a class and found so, is predicted as it, and
            is of it.
        classes: Number of classes.
    """

    def compute(sums: Tensor) -> Tensor:
        found, predicted, true = sums[..., first : first + 3 * classes].chunk(3, dim=-1)
        f1: Tensor = 2 * found / (predicted + true)  # NaN for a class that does not occur
        return f1.nanmean(-1)

    return compute


def intervals(
    scores: Scores, reference: Scores | None = None, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Compute the bootstrap's percentile interval of each metric, and of its difference to another model's.

    Args:
        scores: Of a model.
        reference: Of another model on the same examples in the same order; each resample takes the same of both.
        resamples: How many sets of as many examples are drawn, with replacement.
        confidence: Share of the resamples that the interval holds.
        seed: Of the draws.

    Returns:
        For each metric its interval, and that of ``model - reference``; the latter is empty without a reference.

    Raises:
        ValueError: The two are not of as many examples.
    """
    count = len(scores.statistics)
    if reference is not None and len(reference.statistics) != count:
        raise ValueError(
            f"A paired difference needs the same examples of both models, got {count} and {len(reference.statistics)}."
        )
    parts = [scores.statistics, *([] if reference is None else [reference.statistics])]
    both = torch.cat([part.double().cpu() for part in parts], dim=1)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in range(0, resamples, block := max(1, _CHUNK // max(count, 1))):
        rows = [
            torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
            for _ in range(min(block, resamples - start))
        ]
        drawn.append(torch.stack(rows).double() @ both)
    sums = torch.cat([both.sum(0, keepdim=True), *drawn])
    width = scores.statistics.shape[1]
    own, differences = {}, {}
    for name, metric in scores.metrics.items():
        values = metric(sums[:, :width])
        own[name] = _interval(values, confidence)
        if reference is not None:
            differences[name] = _interval(values - metric(sums[:, width:]), confidence)
    return own, differences


def _interval(values: Tensor, confidence: float) -> Interval:
    """The first value, and the bounds of the others; resamples in which a metric is undefined are left out."""
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=values.dtype)
    low, high = values[1:].nanquantile(tails).tolist()
    return Interval(float(values[0]), low, high)
