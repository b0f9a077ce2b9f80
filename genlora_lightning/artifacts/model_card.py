"""Write the model card of an adapter folder from the facts of its manifest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.identity import describe_base

CARD_FILE = "README.md"


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
    licence = _licence_of(name, base["revision"]) if name else None
    if licence:
        front.insert(0, f"license: {json.dumps(licence)}")
    if hub_id:
        front[:0] = [f"base_model: {json.dumps(hub_id)}", "base_model_relation: adapter"]
    where = json.dumps(name) if name else "…"
    make_base = (
        [f"from transformers import {base['class']}", f"model = {base['class']}.from_pretrained({where})"]
        if base_is_transformers
        else [f"model = …  # the base it was trained on: {base['class']}"]
    )
    known = f": {licence}" if licence else ", and is unknown to this card"
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
            f"A low-rank adapter: {counted_values(num_trained, num_fixed)} for {num_layers} layers.",
            "",
            f"- **Base**: {describe_base(dict(base))}",
            f"- **Licence**: not stated by who trained it; that of the base applies{known}.",
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


def _licence_of(name: str, revision: str | None) -> str | None:
    """The licence that a base's model card states, if its folder or the Hub's cache has one."""
    path: Any = Path(name) / CARD_FILE
    if not os.path.isdir(name):
        import huggingface_hub

        try:
            path = huggingface_hub.try_to_load_from_cache(name, CARD_FILE, revision=revision)
        except ValueError:  # no name that the Hub could have
            return None
    try:
        text = Path(path).read_text(encoding="utf-8") if isinstance(path, (str, Path)) else ""
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    found = re.search(r"^license: *[\"']?([\w.-]+)[\"']? *$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in values.items()]
    return ["| | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
