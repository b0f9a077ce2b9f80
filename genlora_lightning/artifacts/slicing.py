"""Cut an elastic adapter's folder to a lower rank: a folder of the first rows, without its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from genlora_lightning.adapters.base import Factor
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_folder import StoredLayers, read_adapter
from genlora_lightning.artifacts.adapter_io import AdapterRecord, write_adapter
from genlora_lightning.injection.elastic import not_elastic, ranks_by_name


def slice_adapter(folder: str | os.PathLike[str], out: str | os.PathLike[str], rank: int | Mapping[str, int]) -> Path:
    """Write the first rows of an elastic adapter as an adapter folder of its own, of a lower rank.

    It computes what the whole one does after :func:`~genlora_lightning.injection.elastic.set_active_rank` with the same
    ranks. Nothing is approximated: rows are copied, and ``alpha`` is set so that the scaling stays. Modules trained in
    full come along as they are. What was measured of the whole adapter (``metrics``) is left out of the new facts.

    Args:
        folder: An adapter folder, or its name on the Hugging Face Hub.
        out: Where to write; replaced if it is another adapter folder already.
        rank: For all layers that have more rows; or by names of layers, as in ``rank_pattern``, all others staying
            whole.

    Returns:
        The new folder.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        TypeError: A rank is no integer.
        ValueError: The folder is damaged, a layer to be cut is not elastic, a name matches nothing, a rank is less
            than 1 or more than there are rows, or ``out`` is ``folder`` itself. Nothing is written then.
        OSError: It cannot be written; then nothing is left behind.
    """
    stored = read_adapter(folder)
    if os.path.exists(out) and os.path.samefile(stored.folder, out):
        raise ValueError(f"{out} is the adapter that is cut, and its other rows would be lost. Give another folder.")
    own = {name: config.rank for name, config in stored.configs.items() if not config.is_derived}
    wanted = {name: r for name, r in ranks_by_name(own, rank).items() if r < own[name]}
    made: dict[tuple[int, int], AdapterConfig] = {}  # layers of one configuration share one again
    configs, tensors = dict(stored.configs), dict(stored.tensors)
    layers = StoredLayers(stored.configs, stored.tensors)
    for name, r in wanted.items():
        config = stored.configs[name]
        if config.elastic is None:
            raise ValueError(not_elastic(name, r, own[name]))
        configs[name] = made.setdefault((id(config), r), config.of_first_rows(r))
        update = layers.without_values(name, stored.layers[name]).update
        for place, factor in update.named_modules():
            if isinstance(factor, Factor):
                for key, dim in factor.ROWS_ALONG.items():
                    tensor = f"{name}.update.{place}.{key}"
                    tensors[tensor] = _first(tensors[tensor], dim, r)
    facts = {key: value for key, value in stored.training.items() if key != "metrics"}
    return write_adapter(
        AdapterRecord(
            state=tensors,
            configs=configs,
            base=stored.base,
            layers={name: shape.sizes for name, shape in stored.layers.items()},
            sites=stored.sites,
            trained_modules=stored.trained_modules,
            base_is_transformers="transformers" in stored.versions and _is_of_transformers(stored.base["class"]),
            label_names=stored.label_names or None,
        ),
        out,
        training={**facts, "sliced_from_rank": max(own.values())},
    )


def _is_of_transformers(name: str) -> bool:
    import transformers

    return hasattr(transformers, name)


def _first(tensor: Tensor, dim: int, rank: int) -> Tensor:
    return tensor.narrow(dim, 0, rank).contiguous()
