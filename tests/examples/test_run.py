"""The quickstart's report, without its training."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "run.py"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("quickstart_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path  # the script adds its own folder
    return module


def report(before: float, after: float, error: float = 0.02) -> dict[str, Any]:
    return {
        "metric_name": "accuracy",
        "n_eval": 500,
        "before": {"metric": before, "standard_error": error, "loss": 2.5},
        "after": {"metric": after, "standard_error": error, "loss": 0.25},
        "trainable_parameters": 1000,
        "lora_parameters_same_rank": 8000,
        "total_parameters": 100_000,
        "adapted_linears": 7,
        "effective_rank_mean": 5.88,
        "adapter_bytes": 12_345,
        "adapter_dir": "runs/x/adapter",
        "tokens_per_second": 320.4,
        "seconds": {"setup": 1.0, "train": 99.6, "total": 120.0},
        "generations": [
            {"prompt": "Rate.\nGood film.", "reference": "positive", "before": "It is", "after": "positive"}
        ],
    }


def test_table_gives_the_gain_in_standard_errors_of_the_difference(run: ModuleType) -> None:
    text = run.table(report(0.70, 0.90))
    assert "accuracy (n = 500)" in text
    assert "+20.0%, 7.1 standard errors" in text  # 0.2 / sqrt(2 * 0.02²)
    assert "LoRA of the same rank has 8,000 (this is 12.5% of it)" in text
    assert "> Good film." in text
    assert "people say: positive" in text


def test_table_shows_a_loss_as_a_loss_and_survives_figures_without_an_error(run: ModuleType) -> None:
    assert "-10.0%, -3.5 standard errors" in run.table(report(0.80, 0.70))
    assert "nan standard errors" in run.table(report(1.0, 1.0, error=0.0))


def test_rate_is_that_of_the_newest_run(run: ModuleType, tmp_path: Path) -> None:
    for version, rate, age in ((0, 111.0, 50), (1, 222.0, 0)):
        file = tmp_path / "logs" / f"version_{version}" / "metrics.csv"
        file.parent.mkdir(parents=True)
        file.write_text(f"step,tokens_per_second,fit_tokens_per_second\n5,99.0,\n10,,{rate}\n")
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    assert run.newest_run(tmp_path) == tmp_path / "logs" / "version_1"
    assert run.training_rate(run.newest_run(tmp_path)) == 222.0
