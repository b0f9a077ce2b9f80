"""Run ``genlora evaluate``: score a base and what was trained on it on the same examples, one beside the other."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from genlora_lightning.cli.trained import Trained, attach
from genlora_lightning.fields import check_integer, check_number
from genlora_lightning.text import text_table

# torch and transformers take seconds to import: only what loads a model does.
if TYPE_CHECKING:
    from genlora_lightning.modules.intervals import Interval, Scores

_TASKS = ("causal-lm", "sequence-classification", "image-classification")
_SHOWN = {  # the columns of the table, of each task; a metric is followed by its difference where that says more
    "causal-lm": ("loss", "perplexity", "token_accuracy", "exact_match"),
    "sequence-classification": ("accuracy", "f1", "loss"),
    "image-classification": ("accuracy", "f1", "loss"),
}
_WITHOUT_DIFFERENCE = ("perplexity",)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora evaluate``; the one for the base check is common to more commands."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="adapter folder (also one of PEFT), checkpoint, merged folder or base; or a name on the Hugging Face Hub",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="examples with answers or labels, as for `fit`")
    parser.add_argument("--task", choices=_TASKS, help="what the models are for (default: as they say)")
    parser.add_argument("--base", help="the adapters' base (default: the one that each names)")
    parser.add_argument("--no-base", action="store_true", help="do not score the base; compare with the first MODEL")
    parser.add_argument(
        "--generate", action="store_true", help="also write answers, and count those equal to the data's"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most of such an answer (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, help="most tokens of an example (default: 1024; a text to classify: 256)"
    )
    parser.add_argument("--chat-template", help="in place of the tokenizer's; `none`: plain text")
    parser.add_argument("--label-names", nargs="+", metavar="NAME", help="a classifier's labels, in order of number")
    parser.add_argument("--batch-size", type=int, default=8, help="examples at a time (default: %(default)s)")
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that read pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="confidence level of the intervals (default: %(default)g)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="number of bootstrap resamples (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--revision", help="the base's branch, tag or commit on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the base")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the base's weights (default: as stored; float32 on a CPU without 16-bit arithmetic)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run_evaluate(options: argparse.Namespace) -> None:
    """Score all models, one at a time, and print a table.

    Raises:
        ValueError: Something that was given cannot be used, or does not belong together.
        OSError: A file or a base is not there.
    """
    for name in ("batch_size", "resamples", "max_new_tokens", *(["max_length"] if options.max_length else [])):
        check_integer(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    check_number("--confidence", options.confidence, above=0, below=1)
    if len(set(options.models)) < len(options.models):
        raise ValueError(f"A model is named twice: {' '.join(options.models)}.")
    import transformers

    from genlora_lightning.modules.intervals import intervals

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = _Evaluation(options)
    results = dict(run.results())
    order = [name for name in (*run.bases, *options.models) if name in results]
    reference = order[0]
    report: dict[str, Any] = {
        "data": options.data,
        "task": run.task,
        "reference": reference,
        "confidence": options.confidence,
        "models": {},
    }
    how = {"resamples": options.resamples, "confidence": options.confidence, "seed": options.seed}
    for name in order:
        own: dict[str, Interval] = {}
        differences: dict[str, Interval] = {}
        for part, scores in results[name].items():
            beside = None if name == reference else results[reference][part]
            found, apart = intervals(scores, beside, **how)
            own, differences = {**own, **found}, {**differences, **apart}
        entry: dict[str, Any] = {"examples": len(results[name]["scores"].statistics)}
        if run.task == "causal-lm":
            entry["tokens"] = int(results[name]["scores"].statistics[:, 1].sum())
        entry["metrics"] = {metric: asdict(interval) for metric, interval in own.items()}
        entry["minus_reference"] = {metric: asdict(interval) for metric, interval in differences.items()}
        report["models"][name] = entry
    print(_table(report))
    if options.json:
        from genlora_lightning.storage.atomic import atomic_file

        with atomic_file(options.json) as file:
            file.write((json.dumps(_without_nan(report), indent=2, ensure_ascii=False) + "\n").encode())
        print(f"All numbers are in {options.json}.")


class _Evaluation:
    """Loads one model after another and scores it; a base that several adapters share is loaded once.

    Args:
        options: The arguments of :func:`add_evaluate`.

    Raises:
        ValueError: An adapter does not say its base, or models are for different tasks or labels.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        found = [Trained(name) for name in options.models]
        self.groups: dict[tuple[Any, ...], list[Trained]] = {}
        for one in found:
            name = options.base if options.base and one.kind != "model" else one.base
            if name is None:
                raise ValueError(f"{one.name} does not say which base it was trained on. Give it with --base.")
            revision = options.revision or (None if options.base else one.revision)
            self.groups.setdefault((name, revision, one.quantization), []).append(one)
        if options.base and all(one.kind == "model" for one in found):
            raise ValueError("--base is for adapters, and all that is given are models by themselves.")
        self.task = options.task or self._task_of(found)
        if options.generate and self.task != "causal-lm":
            raise ValueError(f"--generate is for language models; these are for {self.task}.")
        self.label_names = options.label_names or self._label_names(found)
        self.bases: list[str] = []
        self._data: dict[str, Any] = {}

    def results(self) -> Iterator[tuple[str, dict[str, Scores]]]:
        """Yield each model's name with its scores: ``scores``, and ``answers`` of what it has written."""
        import torch

        from genlora_lightning.injection.inject import adapter_layers, remove_adapters

        device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for (name, revision, quantization), members in self.groups.items():
            module = self._module(name, revision, quantization)
            module.configure_model()
            try:
                module.to(device).eval()
            except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
                raise ValueError(
                    f"The model cannot be put on --device {device}: {str(error).splitlines()[0]}"
                ) from error
            adapters = [one for one in members if one.kind != "model"]
            itself = [one.name for one in members if one.kind == "model"]
            # A head at random says nothing of a base.
            has_head = self.task == "causal-lm" or not module.starts_at_random
            if adapters and not itself and not self.options.no_base and has_head:
                itself = [name]
                self.bases.append(name)
            for shown in itself:
                yield shown, self._scored(module)
            for number, one in enumerate(adapters):
                if number and adapter_layers(module):
                    remove_adapters(module.adapter_root())
                attach(module, one, self.options.base_check)
                yield one.name, self._scored(module)
            del module

    def _module(self, name: str, revision: str | None, quantization: Any) -> Any:
        from genlora_lightning import modules

        options = self.options
        how = {"revision": revision, "trust_remote_code": options.trust_remote_code, "dtype": options.dtype}
        if self.task == "causal-lm":
            return modules.CausalLMModule(name, quantization=quantization, **how)
        of_texts = self.task == "sequence-classification"
        kind = modules.SequenceClassificationModule if of_texts else modules.ImageClassificationModule
        return kind(name, label_names=self.label_names, quantization=quantization, **how)

    def _scored(self, module: Any) -> dict[str, Scores]:
        import torch

        from genlora_lightning.modules.intervals import Scores, ratio

        device = next(module.parameters()).device
        data = self._data_of(module)

        def moved(batches: Any) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                batch = data.on_before_batch_transfer(batch, number)
                yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

        parts = [module.example_scores(batch) for batch in moved(data.test_dataloader())]
        found = {"scores": Scores(torch.cat([part.statistics.cpu() for part in parts]), parts[0].metrics)}
        if self.options.generate:
            module.generation = {
                "max_new_tokens": self.options.max_new_tokens,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
            }
            rows = [row for batch in moved(data.predict_dataloader()) for row in module.predict_step(batch, 0)]
            right = [[float(row["generated"].strip() == row["completion"].strip()), 1.0] for row in rows]
            found["answers"] = Scores(torch.tensor(right), {"exact_match": ratio(0, 1)})
        return found

    def _data_of(self, module: Any) -> Any:
        """The examples as this model reads them; tokenized once for all that have the same tokenizer's source."""
        from genlora_lightning import data

        if module.source in self._data:
            return self._data[module.source]
        options = self.options
        beside = {"trust_remote_code": options.trust_remote_code, "revision": module.tokenizer_options["revision"]}
        common: dict[str, Any] = {"test_file": options.data, "eval_batch_size": options.batch_size, **beside}
        if self.task != "image-classification":
            common["max_length"] = options.max_length or (1024 if self.task == "causal-lm" else 256)
        made: Any
        if self.task == "causal-lm":
            made = data.InstructionDataModule(
                module.source, options.data, chat_template=options.chat_template, truncation="left", **common
            )
        elif self.task == "sequence-classification":
            made = data.TextClassificationDataModule(
                module.source, options.data, label_names=self.label_names, **common
            )
        else:
            made = data.ImageClassificationDataModule(
                module.source, options.data, label_names=self.label_names, num_workers=options.num_workers, **common
            )
        made.prepare_data()
        for stage in ("test", "predict") if options.generate else ("test",):
            made.setup(stage)
        self._data[module.source] = made
        return made

    def _task_of(self, found: list[Trained]) -> str:
        from genlora_lightning.backbone.architectures import read_config
        from genlora_lightning.backbone.tasks import evaluated_task

        tasks: dict[str, str] = {}
        for one in found:
            name = one.class_name
            if name is None and (one.kind == "model" or one.base):
                source = {"trust_remote_code": self.options.trust_remote_code, "revision": self.options.revision}
                config = read_config(one.name if one.kind == "model" else str(self.options.base or one.base), **source)
                name = next(iter(getattr(config, "architectures", None) or []), None)
            task = evaluated_task(name) if name else None
            if task is None:
                raise ValueError(f"{one.name} does not say what it is for. Give --task {' or --task '.join(_TASKS)}.")
            tasks.setdefault(task, one.name)
        if len(tasks) > 1:
            listed = ", ".join(f"{name} is for {task}" for task, name in tasks.items())
            raise ValueError(f"Models for one task are compared with each other; {listed}.")
        return next(iter(tasks))

    def _label_names(self, found: list[Trained]) -> list[str]:
        if self.task == "causal-lm":
            return []
        from genlora_lightning.backbone.architectures import read_config

        sets: dict[tuple[str, ...], str] = {}
        for one in found:
            names = one.label_names
            if one.kind == "model":
                source = {"trust_remote_code": self.options.trust_remote_code, "revision": self.options.revision}
                id2label = read_config(one.name, **source).id2label
                names = [str(id2label[index]) for index in sorted(id2label)]
            if names:
                sets.setdefault(tuple(names), one.name)
        if not sets:
            raise ValueError(
                "No model says the names of its labels. Give them in the order of their numbers: --label-names"
            )
        if len(sets) > 1:
            listed = "; ".join(f"{name} has {', '.join(names)}" for names, name in sets.items())
            raise ValueError(f"The models have different labels: {listed}. Give --label-names if they mean the same.")
        return list(next(iter(sets)))


def _table(report: dict[str, Any]) -> str:
    first = next(iter(report["models"].values()))
    shown = [metric for metric in _SHOWN[report["task"]] if metric in first["metrics"]]
    counts = [name for name in ("examples", "tokens") if name in first]
    several = len(report["models"]) > 1
    header = ["model", *counts]
    for metric in shown:
        header.append(metric.replace("_", " "))
        header += ["difference"] if several and metric not in _WITHOUT_DIFFERENCE else []
    rows = []
    for name, entry in report["models"].items():
        row = [name, *(f"{entry[count]:,}" for count in counts)]
        for metric in shown:
            row.append(_shown(entry["metrics"][metric]))
            if several and metric not in _WITHOUT_DIFFERENCE:
                apart = entry["minus_reference"].get(metric)
                row.append("" if apart is None else _shown(apart, sign="+"))
        rows.append(row)
    notes = f"In brackets: {report['confidence']:.0%} intervals, by resampling the examples."
    if several:
        notes += f" Differences are to {report['reference']}, on the same examples."
    return f"{text_table(header, rows)}\n{notes}"


def _shown(interval: dict[str, float], sign: str = "") -> str:
    value, low, high = (f"{interval[part]:{sign}.4g}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
