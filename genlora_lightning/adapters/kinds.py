"""List the kinds of adapters that the library brings, and make a configuration of whatever kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genlora_lightning.adapters.compacter import CompacterConfig
from genlora_lightning.adapters.config import KINDS, AdapterConfig
from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.adapters.polar import PoLARConfig
from genlora_lightning.adapters.token_rows import TokenRowsConfig
from genlora_lightning.fields import shown

# Importing them has put them into KINDS, too.
BUILT_IN = (GenLoRAConfig, LoRAConfig, PoLARConfig, CompacterConfig)
DEFAULT_KIND = GenLoRAConfig


def read_config(values: AdapterConfig | Mapping[str, Any] | None) -> AdapterConfig:
    """Make a configuration from a dictionary of its fields, in which ``kind`` says of which kind it is.

    Args:
        values: The fields; without ``kind`` they are GenLoRA's. ``None``: GenLoRA's defaults. A configuration is
            returned as it is.

    Raises:
        TypeError: It is something else.
        ValueError: There is no such kind, a key is no field of it, or a value is out of its range.
    """
    if isinstance(values, AdapterConfig):
        return values
    if values is None:
        return DEFAULT_KIND()
    if not isinstance(values, Mapping):
        raise TypeError(
            "An adapter's configuration must be a GenLoRAConfig, a configuration of another kind, or a dictionary of "
            f"its fields, got {shown(values)}."
        )
    kind = values.get("kind", DEFAULT_KIND.kind)
    if kind == TokenRowsConfig.kind:  # of a layer, in a file
        return TokenRowsConfig.from_dict(values)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"There is no kind of adapter {shown(kind)}. The kinds are {', '.join(map(repr, KINDS))}; one of your own "
            "is known once the module that defines it is imported."
        )
    return KINDS[kind].from_dict(values)
