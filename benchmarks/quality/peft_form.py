"""Rows in the form of PEFT's method comparison: one JSON file a run, with `run_info`, `train_info` and `meta_info`.

Fields that a row does not know, such as reserved memory, are null.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rows import Row


def write(rows: Iterable[Row], folder: Path) -> int:
    """Write the final runs; returns how many there were."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for row in rows:
        if row["stage"] == "final":
            number += 1
            (folder / f"{row['key']}.json").write_text(json.dumps(as_peft(row), indent=2) + "\n")
    return number


def as_peft(row: Row) -> dict[str, Any]:
    """A row in PEFT's words."""
    packages = row["versions"].split(" ")
    settings = json.loads(row["settings"])
    return {
        "run_info": {
            "created_at": None,
            "total_time": _number(row["seconds"]),
            "experiment_name": f"{row['method']}/{row['arm']}/{row['task']}-seed{row['seed']}",
            "peft_branch": None,
            "train_config": {
                "task": row["task"],
                "dtype": row["dtype"],
                "seed": int(row["seed"]),
                "batch_size": int(row["batch_size"]),
                "max_steps": int(row["steps"]),
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": _number(row["lr"]), "weight_decay": settings.pop("weight_decay", 0.0)},
                "lr_scheduler": "linear, warm-up of 6 %",
            },
            "peft_config": {"method": row["method"], **settings},
            "error_msg": "" if row["status"] == "ok" else row["status"],
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_reserved_99th": None,
            "accelerator_memory_max": _number(row["peak_bytes"]),
            "train_time": _number(row["train_seconds"]),
            "file_size": _number(row["saved_bytes"]),
            "num_trainable_params": int(row["adapter_parameters"]) + int(row["head_parameters"]),
            "num_total_params": None,
            "status": "success" if row["status"] == "ok" else "failed",
            "metrics": [
                {
                    "step": int(row["steps"]),
                    "train loss": _number(row["train_loss"]),
                    "valid loss": _number(row["val_loss"]),
                    "valid accuracy": _number(row["val_accuracy"]),
                    "test loss": _number(row["test_loss"]),
                    "test accuracy": _number(row["test_accuracy"]),
                    "forgetting": _number(row["general_rise"]),
                }
            ],
        },
        "meta_info": {
            "package_info": dict(zip(packages[::2], packages[1::2], strict=False)),
            "system_info": {"system": platform.system()},
            "accelerator": " ".join(packages[10:]) or "cpu",
        },
    }


def _number(text: str) -> float | None:
    return float(text) if text else None
