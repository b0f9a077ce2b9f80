"""The quickstart: prepare, evaluate the untrained model, fine-tune through the command line, evaluate again, report.

The training is exactly `python train.py fit --config configs/quickstart.yaml`, in a process of its own. What is
evaluated afterwards is not that process's model: the adapter folder it left is loaded into a fresh base.

The metric is the accuracy of choosing between the two answers by likelihood, on sentences that were never trained on.
It asks nothing of the untrained model's manners: it chats instead of answering, so to read its *generated* text would
count it as wrong every time. The loss is the mean cross entropy of the true answer's tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))  # prepare.py, which stands beside this file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: never ask a hub

CONFIG = Path("configs/quickstart.yaml")
OUTPUT = Path("runs/quickstart")
CHOICES = ("positive", "negative")
SHOWN = 4
EVALUATED = 8  # batches of the test split: half of it, of all lengths


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part of the run and note how long it takes."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


class Evaluation:
    """The held-out data, ready to be put to one model after another."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from genlora_lightning import CausalLMModule, InstructionDataModule
        from genlora_lightning.training.precision import AUTO, best_precision

        precision = settings["trainer"]["precision"]
        name = best_precision("cpu").name if precision == AUTO else precision
        self.is_bf16 = name.startswith("bf16")
        self.module = CausalLMModule(**settings["model"]["init_args"])
        self.module.configure_model()
        self.module.eval()
        data = {k: v for k, v in settings["data"]["init_args"].items() if k not in ("train_file", "val_file")}
        # A test needs no training data, but the data module insists on knowing them.
        self.data = InstructionDataModule(
            **{"tokenizer": settings["model"]["init_args"]["model"], **data},
            train_file=settings["data"]["init_args"]["train_file"],
        )
        self.data.setup("test")
        self.choices = self._choice_tokens()

    def _choice_tokens(self) -> list[int]:
        """The first token of each answer; they must differ there for one forward pass to tell them apart."""
        tokenizer = self.module.tokenizer
        tokens = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in CHOICES]
        if len(set(tokens)) != len(CHOICES):
            raise ValueError(f"The answers {CHOICES} start with the same token; choose others.")
        return tokens

    def measure(self) -> dict[str, float]:
        """Accuracy by likelihood, its standard error, and the loss per answer token, over half of the test split."""
        import torch
        from torch.nn import functional as F
        from tqdm import tqdm

        loss = tokens = right = examples = 0.0
        batches = islice(self.data.test_dataloader(), EVALUATED)
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16)
        with torch.inference_mode(), bf16:
            for batch in tqdm(batches, desc="evaluating", total=EVALUATED, disable=not sys.stderr.isatty()):
                logits, labels = self.module.answer_logits(batch)
                logits = logits.float()
                answer = labels != -100
                loss += float(F.cross_entropy(logits[answer], labels[answer], reduction="sum"))
                tokens += int(answer.sum())
                first = answer.int().argmax(dim=1)
                rows = torch.arange(len(labels))
                scores = logits[rows, first][:, self.choices]
                truth = labels[rows, first]
                chosen = torch.tensor(self.choices)[scores.argmax(dim=1)]
                right += int((chosen == truth).sum())
                examples += len(labels)
        metric = right / examples
        error = math.sqrt(metric * (1 - metric) / examples)
        return {"metric": metric, "standard_error": error, "loss": loss / tokens, "n": int(examples)}

    def generate(self) -> list[dict[str, str]]:
        """What the model writes for the first few test prompts."""
        import torch

        self.data.setup("predict")
        batch = next(iter(self.data.predict_dataloader()))
        few = {name: values[:SHOWN] for name, values in batch.items()}
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16)
        with torch.inference_mode(), bf16:
            return self.module.predict_step(few, 0)


def fit(config: Path) -> None:
    """Run the training; a failure ends the quickstart with the training's exit status."""
    command = [sys.executable, "train.py", "fit", "--config", str(config)]
    print("$ python " + " ".join(command[1:]), flush=True)
    try:
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status if status > 0 else 1)


def newest_run(root: Path) -> Path:
    """The folder of the run that logged last below a `default_root_dir`."""
    return max(root.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime).parent


def training_rate(run: Path) -> float:
    """Tokens per second of the whole training, from a run's metrics."""
    with (run / "metrics.csv").open(newline="") as file:
        rates = [row.get("fit_tokens_per_second") for row in csv.DictReader(file)]
    return float([rate for rate in rates if rate][-1])


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    before, after, seconds = report["before"], report["after"], report["seconds"]
    gain = after["metric"] - before["metric"]
    error = math.hypot(before["standard_error"], after["standard_error"]) or math.nan
    lora = report["lora_parameters_same_rank"]
    share = report["trainable_parameters"] / lora
    lines = [
        f"{'':34}{'before':>12}{'after':>12}",
        f"{report['metric_name'] + ' (n = ' + str(report['n_eval']) + ')':34}"
        f"{before['metric']:>11.1%} {after['metric']:>11.1%}   {gain:+.1%}, {gain / error:.1f} standard errors",
        f"{'loss per answer token':34}{before['loss']:>12.4f}{after['loss']:>12.4f}",
        "",
        f"trainable parameters   {report['trainable_parameters']:,} of {report['total_parameters']:,}; "
        f"LoRA of the same rank has {lora:,} (this is {share:.1%} of it)",
        f"effective rank         {report['effective_rank_mean']:.1f}, mean of {report['adapted_linears']} linears",
        f"adapter on disk        {report['adapter_bytes']:,} bytes in {report['adapter_dir']}",
        f"speed                  {report['tokens_per_second']:.0f} tokens per second",
        "seconds                " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        "",
    ]
    for sample in report["generations"]:
        text = sample["prompt"].splitlines()[-1]
        lines += [
            f"> {text[:100]}{'…' if len(text) > 100 else ''}",
            f"    before: {sample['before']!r}",
            f"    after:  {sample['after']!r}   (people say: {sample['reference']})",
        ]
    return "\n".join(lines)


def run(config: Path) -> dict[str, Any]:
    """Do it all and return the report."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with phase("setup", seconds):
        import prepare

        if status := prepare.main([]):
            sys.exit(status)
        import yaml

        settings = yaml.safe_load((ROOT / config).read_text())
    with phase("evaluation", seconds):
        print("before training", flush=True)
        evaluation = Evaluation(settings)
        before, said_before = evaluation.measure(), evaluation.generate()
        print(f"accuracy {before['metric']:.1%}, loss {before['loss']:.4f} on {before['n']} sentences", flush=True)
    with phase("train", seconds):
        fit(config)
    with phase("evaluation", seconds):
        print("after training", flush=True)
        from genlora_lightning import effective_ranks, load_adapter
        from genlora_lightning.artifacts.adapter_io import adapter_bytes

        newest = newest_run(Path(settings["trainer"]["default_root_dir"]))
        adapter_dir = newest / "adapter"
        coverage = load_adapter(evaluation.module.adapter_root(), adapter_dir)
        evaluation.module.eval()
        after, said_after = evaluation.measure(), evaluation.generate()
        ranks = effective_ranks(evaluation.module.adapter_root())
    return {
        "metric_name": "accuracy",
        "n_eval": before.pop("n"),
        "before": before,
        "after": {name: value for name, value in after.items() if name != "n"},
        "trainable_parameters": coverage.trainable_parameters,
        "lora_parameters_same_rank": coverage.lora_parameters,
        "total_parameters": coverage.total_parameters,
        "adapted_linears": len(coverage.adapted),
        "effective_rank_mean": sum(ranks.values()) / len(ranks),
        "adapter_bytes": adapter_bytes(adapter_dir),
        "adapter_dir": str(adapter_dir),
        "tokens_per_second": training_rate(newest),
        "seconds": {**seconds, "total": time.perf_counter() - start},
        "generations": [
            {
                "prompt": first["prompt"],
                "reference": first.get("completion", ""),
                "before": first["generated"],
                "after": second["generated"],
            }
            for first, second in zip(said_before, said_after, strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="configuration of the run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where report.json goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)  # the configuration's paths are relative to it
    report = run(options.config)
    path = options.output / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(report)}\n\nThis report: {path}")


if __name__ == "__main__":
    main()
