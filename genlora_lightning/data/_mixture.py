"""Mix several files: how often the examples of each are seen in an epoch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from genlora_lightning.fields import check_number, shown

#: A file, several, or several with a weight for each.
Sources = str | list[str] | dict[str, float]

_MOST_COPIES = 1000


class Share(NamedTuple):
    """A file of a mixture, its weight, its examples, and how many are seen in an epoch."""

    path: str
    weight: float
    records: int
    seen: int


def weights_of(sources: Any, argument: str) -> dict[str, float]:
    """Returns the weight of each file, 1 where none is given; nothing for None.

    Args:
        sources: See `Sources`, or None.
        argument: The argument it was given as, for messages.

    Raises:
        TypeError: It is something else.
        ValueError: There is no file, one is there twice, or a weight is not above 0 and at most 1000.
    """
    if sources is None:
        return {}
    if isinstance(sources, str):
        return {sources: 1.0}
    if not isinstance(sources, (list, tuple, Mapping)) or not all(isinstance(path, str) for path in sources):
        kinds = "a file, a list of files, or a mapping of files to weights"
        raise TypeError(f"{argument} must be {kinds}, got {shown(sources)}")
    if not sources:
        raise ValueError(f"{argument} must name at least one file, got {shown(sources)}")
    if isinstance(sources, Mapping):
        for path, weight in sources.items():
            check_number(f"{argument}: {path}", weight, above=0, most=_MOST_COPIES)
        return {path: float(weight) for path, weight in sources.items()}
    twice = next((path for number, path in enumerate(sources) if path in sources[:number]), None)
    if twice is not None:
        raise ValueError(f"{argument} names {twice!r} twice; to see a file more often give weights: {{{twice}: 2.0}}")
    return dict.fromkeys(sources, 1.0)


def mixed(
    examples: list[dict[str, Any]], weights: dict[str, float], seed: int
) -> tuple[list[dict[str, Any]], list[Share]]:
    """Repeats the examples of each file by its weight w: ⌊w⌋ times all, and once more a part w − ⌊w⌋ drawn by seed.

    Args:
        examples: The examples; `where` begins with the file's name.
        weights: Each file's weight.
        seed: Decides what is drawn; at least one example of each file is.

    Returns:
        The examples, and what became of each file.
    """
    of_file: dict[str, list[dict[str, Any]]] = {path: [] for path in weights}
    for example in examples:
        of_file[example["where"].rpartition(":")[0]].append(example)
    result: list[dict[str, Any]] = []
    shares = []
    for number, (path, weight) in enumerate(weights.items()):
        own = of_file[path]
        copies = int(weight)
        more = round((weight - copies) * len(own)) if copies else max(1, round(weight * len(own)))
        drawn = sorted(random.Random(f"{seed} {number}").sample(range(len(own)), min(more, len(own))))
        result += own * copies + [own[index] for index in drawn]
        shares.append(Share(path, weight, len(own), len(own) * copies + len(drawn)))
    return result, shares
