"""Offer the fields of every kind of adapter as one flat set of options, of which ``kind`` says which apply.

A union of the kinds' own classes would not do: with ``--config`` and a flag, or two flags, jsonargparse takes the first
class that fits the last of them, and silently trains another kind than the file names.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, Optional, get_type_hints

from docstring_parser import parse

from genlora_lightning.adapters.config import KINDS, AdapterConfig
from genlora_lightning.adapters.kinds import DEFAULT_KIND, read_config
from genlora_lightning.injection.peft_adapters import KIND as PEFT_KIND
from genlora_lightning.injection.peft_adapters import AnyConfig, read_any_config


def _texts(cls: type) -> dict[str, str]:
    """What a docstring says of each field, with the mere names of what it refers to."""
    params = parse(cls.__doc__ or "").params
    return {item.arg_name: re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"``\1``", item.description or "") for item in params}


def _make_options() -> type:
    types: dict[str, Any] = {}
    texts: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for field in dataclasses.fields(AdapterConfig):  # a kind says the same in words of its own
        texts[field.name] = _texts(AdapterConfig)[field.name]
        if field.default is field.default_factory is dataclasses.MISSING:
            texts[field.name] += " The kind's default if not given."
    for cls in KINDS.values():
        hints, described = get_type_hints(cls), _texts(cls)
        for field in dataclasses.fields(cls):
            types.setdefault(field.name, hints[field.name])
            if field.name not in texts:
                texts[field.name] = described[field.name]
            owners.setdefault(field.name, []).append(cls.title)
    owners["elastic"] = [cls.title for cls in KINDS.values() if cls.can_be_elastic]
    lines = [f"    kind: The kind of adapter; {DEFAULT_KIND.kind} if not given."]
    texts[PEFT_KIND] = "(kind peft) PEFT's `peft_type` and the fields of its configuration, instead of all the others."
    for name, text in texts.items():
        only = "" if name not in owners or len(owners[name]) == len(KINDS) else f"({', '.join(owners[name])}) "
        lines.append(f"    {name}: {only}{' '.join(text.split())}")
    kinds: Any = Literal[(*KINDS, PEFT_KIND)]
    types[PEFT_KIND] = dict[str, Any]
    made = dataclasses.make_dataclass(
        "AdapterOptions",
        [(name, Optional[kind], None) for name, kind in {"kind": kinds, **types}.items()],  # noqa: UP045
        kw_only=True,
    )
    made.__doc__ = "\n".join(["Configure the adapter.", "", "Args:", *lines])
    made.__module__ = __name__  # jsonargparse imports it by its name
    return made


# A dataclass with the fields of all kinds, each ``None`` where it is not given.
AdapterOptions: Any = _make_options()


def config_of(options: Any) -> AnyConfig:
    """Make the configuration that options ask for: an instance of ``AdapterOptions``, or a namespace like one.

    Raises:
        ValueError: A field that is given is not one of the kind's, or out of its range.
    """
    values = {name: value for name, value in vars(options).items() if value is not None}
    if PEFT_KIND in values or values.get("kind") == PEFT_KIND:
        others = sorted(set(values) - {"kind", PEFT_KIND})
        if others or values.get("kind") != PEFT_KIND or PEFT_KIND not in values:
            raise ValueError(
                "PEFT's adapters are `kind: peft` and `peft: {peft_type: LORA, r: 16, …}`"
                + (f"; {', '.join(others)} are fields of this library's kinds." if others else ", both of them.")
            )
        return read_any_config({"kind": PEFT_KIND, **values[PEFT_KIND]})
    return read_config(values)
