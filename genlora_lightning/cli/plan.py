"""Run ``genlora plan`` and ``genlora budget``: say what a model needs from its configuration alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from genlora_lightning.backbone.catalog import SHAPES, TASKS

if TYPE_CHECKING:
    import torch

    from genlora_lightning.adapters.config import AdapterConfig

# The kinds and their sizes, here in plain words: importing the configurations would take a second of torch.
_KINDS = ("genlora", "lora", "polar", "compacter")
_SIZES = {
    "rank": "rank",
    "num_latents_a": "GenLoRA: latents of A",
    "num_latents_b": "GenLoRA: latents of B",
    "num_groups_a": "GenLoRA: groups of A",
    "num_groups_b": "GenLoRA: groups of B",
    "num_centers": "GenLoRA: centres",
    "num_products": "Compacter: Kronecker products",
}


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora plan``."""
    _add_model(parser)
    for name, what in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{what} (default: the kind's)")
    parser.add_argument(
        "--rank-pattern",
        nargs="+",
        metavar="NAME=RANK",
        default=[],
        help="ranks of linears that are to have another one, by name or regular expression",
    )
    parser.add_argument(
        "--strategy",
        choices=["auto", "single", "ddp", "fsdp1", "fsdp2"],
        default="auto",
        help="auto (the default): one GPU, else ddp where it fits, else fsdp2",
    )
    parser.add_argument(
        "--adapter-sharding", choices=["replicate", "shard"], default="replicate", help="default: %(default)s"
    )
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs on all nodes (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of each (default: %(default)g)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="dtype of the frozen base"
    )
    parser.add_argument(
        "--quantization", choices=["nf4", "int8", "int8-weight-only", "float8"], help="how the frozen base is quantized"
    )
    parser.add_argument(
        "--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed", help="default: %(default)s"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora budget``."""
    _add_model(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--like-lora-rank", type=float, metavar="R", help="as many parameters as LoRA of this rank")
    budget.add_argument("--parameters", type=int, metavar="N", help="this many parameters")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="ID|FOLDER",
        help=f"folder with a config.json, name on the Hugging Face Hub, or one of {', '.join(SHAPES)}",
    )
    add_source(parser, "the model")
    parser.add_argument("--kind", choices=_KINDS, default=_KINDS[0], help="kind of adapter (default: %(default)s)")
    parser.add_argument("--task", choices=list(TASKS), help="what the model is for (default: as it says)")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", default=[], help="linears to adapt (default: all)"
    )
    parser.add_argument(
        "--target-parameters",
        nargs="+",
        metavar="NAME",
        default=[],
        help="stacks of matrices to adapt, such as experts.gate_up_proj (default: none)",
    )
    parser.add_argument(
        "--layers-to-transform", nargs="+", type=int, metavar="N", help="numbers of the layers to adapt (default: all)"
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", default=[], help="linears to leave alone")
    parser.add_argument("--modules-to-train", nargs="+", metavar="NAME", default=[], help="modules trained in full")


def add_source(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options of reading a model from the Hub, or with code of its own; :func:`source_of` is what they say."""
    parser.add_argument("--revision", help=f"branch, tag or commit of {what} on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help=f"run the code that comes with {what}")


def source_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``from_pretrained`` that :func:`add_source` asks for."""
    return {"revision": options.revision, "trust_remote_code": options.trust_remote_code}


def _config(options: argparse.Namespace, sizes: dict[str, Any]) -> AdapterConfig:
    """The adapter of these sizes; one target name alone may be a regular expression, as in a configuration file."""
    from genlora_lightning.adapters.config import ALL_LINEAR
    from genlora_lightning.adapters.kinds import read_config

    targets: Any = options.target_modules or [ALL_LINEAR]
    if len(targets) == 1 and (targets[0] == ALL_LINEAR or not targets[0].replace(".", "").isidentifier()):
        targets = targets[0]
    return read_config(
        {
            "kind": options.kind,
            "target_modules": targets,
            "target_parameters": options.target_parameters,
            "exclude_modules": options.exclude_modules,
            "modules_to_train": options.modules_to_train,
            "layers_to_transform": options.layers_to_transform,
            **sizes,
        }
    )


def _pattern(text: str) -> tuple[str, int]:
    name, equals, rank = text.rpartition("=")
    if not equals or not rank.isdecimal():
        raise ValueError(f"`--rank-pattern` must be NAME=RANK, such as down_proj=16, got {text!r}.")
    return name, int(rank)


def _model(options: argparse.Namespace) -> tuple[Any, str]:
    import transformers

    from genlora_lightning.backbone.architectures import read_config, task_of

    transformers.utils.logging.set_verbosity_error()
    config = read_config(options.model, **source_of(options))
    return config, options.task or task_of(config, options.model)


def run_plan(options: argparse.Namespace) -> None:
    """Print a plan."""
    if sys.stderr.isatty():  # torch's import alone takes seconds
        print(f"Counting what a step of {options.model} holds, without weights: up to half a minute.", file=sys.stderr)
    import torch

    from genlora_lightning.planning.plan import make_plan
    from genlora_lightning.planning.traffic import Setup

    setup = Setup(
        strategy=options.strategy,
        adapter_sharding=options.adapter_sharding,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        batch=options.batch,
        tokens=options.seq,
        accumulate=options.accumulate,
        autocast=options.precision == "bf16-mixed",
        gradient_checkpointing=options.gradient_checkpointing,
    )
    given = {name: getattr(options, name) for name in _SIZES}
    adapter = _config(options, {name: value for name, value in given.items() if value is not None})
    adapter = dataclasses.replace(adapter, rank_pattern=dict(map(_pattern, options.rank_pattern)))
    config, task = _model(options)
    dtype: torch.dtype | None = None if options.dtype == "auto" else getattr(torch, options.dtype)
    trust = options.trust_remote_code
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust, "quantization": options.quantization}
    plan = make_plan(config, options.model, task, adapter, setup, **how)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else plan)


def run_budget(options: argparse.Namespace) -> None:
    """Print a configuration that meets a budget."""
    from genlora_lightning.backbone.architectures import build_on_meta
    from genlora_lightning.injection.inject import adapter_layers, inject_adapters
    from genlora_lightning.planning.budget import fit_budget

    # The smallest adapter fits wherever one does: what is asked here is which linears there are.
    kind = _config(options, {})
    sizes = {name: 1 for name in _SIZES if hasattr(kind, name) and name != "num_products"}
    smallest = _config(options, sizes | {"rank": kind.rank_unit})
    model = build_on_meta(*_model(options), trust_remote_code=options.trust_remote_code)
    inject_adapters(model, smallest)
    shapes = [layer.shape for layer in adapter_layers(model).values()]
    wanted = options.parameters or round(
        options.like_lora_rank * sum(shape.num_matrices * sum(shape) for shape in shapes)
    )
    found = fit_budget(kind, shapes, wanted)
    chosen: dict[str, Any] = {"kind": kind.kind} if options.kind != _KINDS[0] else {}
    chosen |= {name: getattr(found.config, name) for name in _SIZES if hasattr(kind, name)}
    if found.config.alpha != kind.alpha:
        chosen["alpha"] = found.config.alpha
    if options.json:
        facts = {"linears": len(shapes), "parameters": found.parameters, "wanted": wanted}
        print(json.dumps({**chosen, **facts, "like_lora_rank": found.lora_rank}, indent=2))
        return
    print("adapter:")
    for name, value in chosen.items():
        print(f"  {name}: {value}")
    print(
        f"# {found.parameters:,} parameters on {len(shapes)} linears, {found.parameters / wanted:.3f} of the "
        f"{wanted:,} asked for; as many as LoRA of rank {found.lora_rank:.2f} has"
    )
