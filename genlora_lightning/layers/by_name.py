"""Adapt what is no linear: layers that are adapted only where a configuration names them."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from genlora_lightning.layers.adapted import AdaptedLayer


class AdaptedByName(AdaptedLayer):
    """A site outside of ``"all-linear"``.

    Other attributes than its own are those of the base layer (``num_embeddings``, ``kernel_size``, …), for code that
    asks a model's parts for their sizes.
    """

    named_only: ClassVar[bool] = True

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):  # marks that other libraries leave are of one module alone
                raise
            return getattr(base, name)
