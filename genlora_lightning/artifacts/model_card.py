"""Write the model card of an adapter folder from the facts of its manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.identity import describe_base


def model_card(
    *,
    configs: Sequence[AdapterConfig],
    base: Mapping[str, Any],
    training: Mapping[str, Any],
    versions: Mapping[str, str],
    num_layers: int,
    num_trained: int,
    num_fixed: int,
    base_is_transformers: bool,
) -> str:
    """A Markdown text with the base, how to load the adapter, what it was made with, and the facts of its training."""
    name = base["name"]
    # A path says nothing on a Hub, and its own field there takes a Hub id only.
    hub_id = name if name and not os.path.isabs(name) and not os.path.isdir(name) and name.count("/") < 2 else None
    tags = dict.fromkeys(("genlora-lightning", configs[0].kind, "lora"))
    front = ["library_name: genlora-lightning", "tags:", *(f"- {tag}" for tag in tags)]
    if hub_id:
        front.insert(0, f"base_model: {json.dumps(hub_id)}")
    where = json.dumps(name) if name else "…"
    make_base = (
        [f"from transformers import {base['class']}", f"model = {base['class']}.from_pretrained({where})"]
        if base_is_transformers
        else [f"model = …  # the base it was trained on: {base['class']}"]
    )
    facts = {key: value for key, value in training.items() if key != "metrics"}
    metrics = training.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {configs[0].title} adapter",
            "",
            f"A low-rank adapter: {counted_values(num_trained, num_fixed)} for {num_layers} linear layers.",
            "",
            f"- **Base**: {describe_base(dict(base))}",
            "- **Licence**: not stated by who trained it; that of the base applies, and is unknown to this card.",
            "",
            "## Load it",
            "",
            "```python",
            "from genlora_lightning import load_adapter",
            *make_base,
            'load_adapter(model, "this folder")  # verifies every tensor and that the base is the right one',
            "```",
            "",
            "## Configuration",
            "",
            *(line for one in configs for line in (*_table(one.to_dict()), "")),
            "## Training",
            "",
            *(_table({**facts, **metrics}) if facts or metrics else ["Nothing was recorded."]),
            "",
            f"Written with {', '.join(f'{library} {version}' for library, version in versions.items())}. "
            "`manifest.json` holds these facts, too, and the SHA-256 of each file.",
            "",
        ]
    )


def counted_values(trained: int, fixed: int) -> str:
    """Say how many values were trained, which is the number that plans and summaries have, and how many were not."""
    return f"{trained:,} trained values" + (f" and {fixed:,} fixed ones" if fixed else "")


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in values.items()]
    return ["| | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
