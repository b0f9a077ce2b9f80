"""Run the ``genlora`` command: set up, train and plan runs, try what was trained, and work on adapter folders.

Exit codes: 0 done, 1 the input is bad or the work failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlora_lightning.backbone.catalog import TASKS
from genlora_lightning.cli.chat import add_chat, run_chat
from genlora_lightning.cli.commands import TRAINING
from genlora_lightning.cli.completion import add_completion, completion_script
from genlora_lightning.cli.data import add_data, run_data
from genlora_lightning.cli.evaluate import add_evaluate, run_evaluate
from genlora_lightning.cli.generate import add_generate, run_generate
from genlora_lightning.cli.hub import add_push, run_push
from genlora_lightning.cli.init import add_init, run_init
from genlora_lightning.cli.plan import add_budget, add_plan, add_source, run_budget, run_plan, source_of
from genlora_lightning.cli.prune import add_prune, run_prune
from genlora_lightning.cli.runs import add_runs, add_show, run_runs, run_show

# torch and transformers take seconds to import: only the commands that need them do.
if TYPE_CHECKING:
    from torch import nn

_ADAPTER = (
    "adapter folder (also one of PEFT), or the name of one on the Hugging Face Hub: org/name, org/name@revision, "
    "hf://org/name"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: The command line without the program's name; ``sys.argv``'s if ``None``.

    Returns:
        The exit code: 0, or 1 after an error, which is one line on standard error. A wrong command line raises
        ``SystemExit(2)``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TRAINING:
        from genlora_lightning.cli.train import main as train

        train(given)
        return 0
    parser = _parser()
    options, left = parser.parse_known_args(given)
    # argparse gives a command its list of words up to the first option alone.
    if left and (not hasattr(options, "prompts") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.prompts += left
    command: Callable[[argparse.Namespace], None] = options.command
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' advice is not for users of a tool
        warnings.showwarning = _show_warning
        try:
            command(options)
        except (ValueError, OSError, ImportError) as error:
            print(f"genlora: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("genlora: stopped", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from genlora_lightning._version import __version__

    parser = argparse.ArgumentParser(
        prog="genlora",
        description="Train adapters with Lightning, plan runs, and use what was trained.",
        epilog="`genlora COMMAND --help` shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"genlora-lightning {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    init = _command(
        commands,
        "init",
        run_init,
        "write a short configuration for a model and data of your own",
        "--model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --name support",
    )
    add_init(init)
    data = _command(
        commands,
        "data",
        run_data,
        "show a configuration's data as the model sees them: lengths, what is cut, and what is learned",
        "--config support.yaml --examples 5",
    )
    add_data(data)
    for name, what in TRAINING.items():
        commands.add_parser(name, help=what, add_help=False)  # to be listed; `main` has passed it on

    show = _command(
        commands, "show", run_show, "say what a run has come to, and write a report with its curves", "runs/reviews"
    )
    add_show(show)
    runs = _command(commands, "runs", run_runs, "list the runs below a folder", "runs --html runs.html")
    add_runs(runs)

    plan = _command(
        commands,
        "plan",
        run_plan,
        "say what a run takes on each GPU and what it sends, from the model's configuration alone",
        "--model llama-70b --rank 64 --gpus 16 --strategy fsdp2 --gpu-memory 80 --seq 4096 --gradient-checkpointing",
    )
    add_plan(plan)

    budget = _command(
        commands,
        "budget",
        run_budget,
        "find the settings that have a given number of parameters: latents, rank and groups, or LoRA's rank",
        "--model HuggingFaceTB/SmolLM2-135M-Instruct --like-lora-rank 2",
    )
    add_budget(budget)

    generate = _command(
        commands,
        "generate",
        run_generate,
        "answer prompts with what was trained",
        "runs/reviews/adapter 'Is this review positive or negative? …' --max-new-tokens 20",
    )
    add_generate(generate)
    _add_base_check(generate)

    evaluate = _command(
        commands,
        "evaluate",
        run_evaluate,
        "score a base and what was trained on it on the same examples, with intervals and differences",
        "runs/reviews/adapter runs/other/adapter --data test.jsonl --generate --json scores.json",
    )
    add_evaluate(evaluate)
    _add_base_check(evaluate)

    chat = _command(
        commands, "chat", run_chat, "talk to what was trained, and to its base beside it", "runs/reviews/adapter"
    )
    add_chat(chat)
    _add_base_check(chat)

    inspect = _command(
        commands, "inspect", _inspect, "say what an adapter folder or a checkpoint holds", "runs/reviews/adapter --json"
    )
    inspect.add_argument("path", metavar="FOLDER|CKPT", help=f"{_ADAPTER}, or checkpoint of a run with adapters")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = _command(
        commands, "verify", _verify, "verify that an adapter folder is complete and unchanged", "runs/reviews/adapter"
    )
    verify.add_argument("path", metavar="FOLDER", help=_ADAPTER)
    verify.add_argument("--base", help="also prove that it fits this base: a folder, or a name on the Hugging Face Hub")
    _add_base_options(verify)
    _add_base_check(verify)
    verify.add_argument("--json", action="store_true", help="print JSON")

    convert = _command(
        commands,
        "convert",
        _convert,
        "make an adapter folder of a checkpoint or of PEFT's folder (type GENLORA), or such a folder of an adapter",
        "last.ckpt HuggingFaceTB/SmolLM2-135M-Instruct adapter",
    )
    convert.add_argument("adapter", metavar="CKPT|FOLDER", help="checkpoint of a run, PEFT folder, or adapter folder")
    _add_base_out(convert, "folder to write: PEFT's for an adapter folder, else an adapter folder")
    _add_base_check(convert)
    _add_overwrite(convert)

    export = _command(
        commands,
        "export-lora",
        _export_lora,
        "write an adapter as a LoRA adapter that PEFT and LoRA servers load",
        "runs/reviews/adapter HuggingFaceTB/SmolLM2-135M-Instruct lora",
    )
    _add_adapter_base_out(export, "LoRA adapter folder to write")
    export.add_argument("--rank", type=int, help="lower the rank to this (default: exact, the adapter's rank)")

    cut = _command(
        commands,
        "slice",
        _slice,
        "cut an elastic adapter to a lower rank, exactly and without its base",
        "runs/reviews/adapter adapter-8 --rank 8",
    )
    cut.add_argument("adapter", metavar="ADAPTER", help="adapter folder that was trained with `elastic`, or its name")
    cut.add_argument("out", metavar="OUT", help="adapter folder to write")
    to = cut.add_mutually_exclusive_group(required=True)
    to.add_argument("--rank", type=int, help="rank to cut to; layers of a lower rank stay as they are")
    to.add_argument("--rank-pattern", metavar="FILE", help="ranks by names of layers: JSON, {name or expression: rank}")
    _add_overwrite(cut)

    imported = _command(
        commands,
        "import-lora",
        _import_lora,
        "make an adapter folder of kind LoRA from a LoRA adapter that PEFT wrote, without loss",
        "lora HuggingFaceTB/SmolLM2-135M-Instruct adapter",
    )
    imported.add_argument("lora", metavar="LORA", help="LoRA adapter folder in PEFT's format")
    _add_base_out(imported, "adapter folder to write")
    _add_overwrite(imported)

    push = _command(
        commands,
        "push",
        run_push,
        "upload an adapter folder to the Hugging Face Hub",
        "runs/reviews/adapter me/reviews",
    )
    add_push(push)

    merge = _command(
        commands,
        "merge",
        _merge,
        "merge an adapter into its base and write a Hugging Face model folder",
        "runs/reviews/adapter HuggingFaceTB/SmolLM2-135M-Instruct merged --dtype float32",
    )
    _add_adapter_base_out(merge, "model folder to write")
    merge.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights (default: the base's own)"
    )
    prune = _command(
        commands,
        "prune",
        run_prune,
        "set the weights of a base that matter least to 0 (Wanda), by calibration data, and write it as a model folder",
        "HuggingFaceTB/SmolLM2-135M-Instruct pruned --sparsity 0.5 --data train.jsonl",
    )
    add_prune(prune)
    completion = _command(
        commands, "completion", _completion, "print a script that completes commands, options and files", "bash"
    )
    add_completion(completion)
    return parser


def _completion(options: argparse.Namespace) -> None:
    print(completion_script(_parser(), TRAINING, options.shell))


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], what: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: genlora {name} {example}"
    )
    parser.set_defaults(command=run)
    return parser


def _add_adapter_base_out(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help=_ADAPTER)
    _add_base_out(parser, out)
    _add_base_check(parser)


def _add_base_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-check",
        choices=["error", "warn", "off"],
        default="error",
        help="if BASE is not the one that was trained on: refuse, warn, or do not look (default: %(default)s)",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that lies in OUT")


def _add_base_out(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("base", metavar="BASE", help="the base model's folder, or its name on the Hugging Face Hub")
    parser.add_argument("out", metavar="OUT", help=out)
    _add_base_options(parser)


def _add_base_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(TASKS), help="what the model is for (default: as the base says)")
    parser.add_argument("--num-labels", type=int, help="labels of a sequence classification model")
    add_source(parser, "the base")


def _inspect(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.inspection import describe_adapter
    from genlora_lightning.interop.peft_report import describe_peft

    place = _peft_place(options.path)
    description = describe_peft(place) if place else describe_adapter(options.path)
    print(json.dumps(description.to_dict(), indent=2) if options.json else description)


def _verify(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.inspection import verify_adapter

    if place := _peft_place(options.path):
        options.path = place
        _verify_peft(options)
        return
    report = verify_adapter(options.path)
    if options.base:
        options.adapter = options.path
        _load_adapted(options)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    if options.base and not options.json:
        print(f"It fits {options.base}, which is the base it was trained on.")


def _verify_peft(options: argparse.Namespace) -> None:
    """Find out about a folder in PEFT's format what PEFT does not say when it loads it.

    Raises:
        ValueError: Something is wrong with it; it is described before.
    """
    from genlora_lightning.artifacts.peft_folder import read_peft_folder
    from genlora_lightning.backbone.identity import base_identity, require_same_base
    from genlora_lightning.interop.peft_report import describe_peft

    base = None
    stored = read_peft_folder(options.path)
    if options.base:
        identity = stored.manifest["base"] if stored.manifest else None
        base = _load_base(options, set(stored.tensors), identity, with_weights=identity is not None)
        if stored.manifest:
            present = base_identity(base, without=stored.manifest["trained_modules"])
            require_same_base(stored.manifest["base"], present, f"The adapter in {options.path}", options.base_check)
    report = describe_peft(options.path, base)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.proof())
    if report.problems:
        raise ValueError(" ".join(report.problems))
    if options.base and not options.json:
        proved = "is the base it was trained on" if stored.manifest else "has all its names and shapes"
        print(f"It fits {options.base}, which {proved}.")


def _peft_place(path: str) -> str | None:
    """Where a folder in PEFT's format lies, if it is one."""
    from genlora_lightning.artifacts.adapter_folder import adapter_place
    from genlora_lightning.artifacts.peft_folder import is_peft_folder

    place = adapter_place(path, "checkpoint or adapter folder")
    return str(place) if is_peft_folder(place) else None


def _convert(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.checkpoint import describe
    from genlora_lightning.artifacts.loading import convert_checkpoint, read_checkpoint

    if os.path.isdir(options.adapter):
        _convert_folder(options)
        return
    _check_out(options)
    content = read_checkpoint(options.adapter)
    base = _load_base(options, set(content["state_dict"]), describe(content).get("base"))
    written = convert_checkpoint(options.adapter, base, options.out, base_check=options.base_check)
    print(f"The adapter is in {written}.")


def _convert_folder(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.adapter_io import save_adapter
    from genlora_lightning.interop.peft_folders import export_peft, import_peft, is_peft_folder, peft_tensors

    if not is_peft_folder(options.adapter):
        print(f"The PEFT folder is {export_peft(_load_adapted(options), options.out)}.")
        return
    _check_out(options)
    model = _load_base(options, peft_tensors(options.adapter))
    print(import_peft(model, options.adapter).summary())
    print(f"The adapter is in {save_adapter(model, options.out)}.")


def _export_lora(options: argparse.Namespace) -> None:
    from genlora_lightning.interop.lora_export import export_lora

    print(export_lora(_load_adapted(options), options.out, rank=options.rank))


def _slice(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.inspection import describe_adapter
    from genlora_lightning.artifacts.slicing import slice_adapter

    _check_out(options)
    rank = options.rank
    if options.rank_pattern:
        try:
            rank = json.loads(Path(options.rank_pattern).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{options.rank_pattern} is no JSON: {error}.") from error
        if not isinstance(rank, dict):
            raise ValueError(f"{options.rank_pattern} must hold ranks by names of layers, {{name: rank}}.")
    folder = slice_adapter(options.adapter, options.out, rank)
    ranks = sorted({layer.rank for layer in describe_adapter(folder).layers})
    print(f"The adapter of rank {', '.join(map(str, ranks))} is in {folder}.")


def _merge(options: argparse.Namespace) -> None:
    import torch

    from genlora_lightning.artifacts.merged_model import save_merged
    from genlora_lightning.errors import MergeRoundingWarning

    warnings.simplefilter("always", MergeRoundingWarning)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    print(save_merged(_load_adapted(options), options.out, dtype=dtype))


def _import_lora(options: argparse.Namespace) -> None:
    from genlora_lightning.artifacts.adapter_io import save_adapter
    from genlora_lightning.interop.lora_files import read_lora
    from genlora_lightning.interop.lora_import import import_lora

    _check_out(options)
    model = _load_base(options, set(read_lora(options.lora).saved))
    print(import_lora(model, options.lora).summary())
    print(f"The adapter is in {save_adapter(model, options.out)}.")


def _check_out(options: argparse.Namespace) -> None:
    """Refuse to replace an adapter, which may have taken days to train."""
    from genlora_lightning.artifacts.adapter_folder import stored_facts
    from genlora_lightning.storage.paths import local_path

    if not options.overwrite and stored_facts(local_path(options.out, "adapter folder")) is not None:
        raise FileExistsError(f"{options.out} holds an adapter. Give another OUT, or --overwrite to replace it.")


def _load_adapted(options: argparse.Namespace) -> nn.Module:
    from genlora_lightning.artifacts.adapter_folder import read_adapter
    from genlora_lightning.artifacts.adapter_io import load_adapter
    from genlora_lightning.interop.lora_files import read_lora
    from genlora_lightning.interop.lora_import import import_lora

    if place := _peft_place(options.adapter):
        options.adapter = place
        model = _load_base(options, set(read_lora(options.adapter).saved), _check_peft_base(options))
        _check_peft_base(options, model)
        import_lora(model, options.adapter)
        return model.eval()
    stored = read_adapter(options.adapter)
    model = _load_base(options, set(stored.tensors), stored.base)
    load_adapter(model, options.adapter, base_check=_form_check(options))
    return model.eval()


def _form_check(options: argparse.Namespace) -> Any:
    """The check of the base that takes the unquantized form of a quantized one, too: that can be merged into."""
    return "unquantized" if options.base_check == "error" else options.base_check


def _check_peft_base(options: argparse.Namespace, model: nn.Module | None = None) -> dict[str, Any] | None:
    """What the manifest beside PEFT's files says of the base, if there is one; a model is compared with it.

    Raises:
        WrongBaseError: The model is another base.
    """
    from genlora_lightning.artifacts.peft_folder import read_peft_folder
    from genlora_lightning.backbone.identity import base_identity, require_same_base

    manifest = read_peft_folder(options.adapter).manifest
    if manifest is not None and model is not None:
        present = base_identity(model, without=manifest["trained_modules"])
        require_same_base(manifest["base"], present, f"The adapter in {options.adapter}", _form_check(options))
    return None if manifest is None else dict(manifest["base"])


def _load_base(
    options: argparse.Namespace,
    adapter_tensors: set[str],
    trained_on: dict[str, Any] | None = None,
    *,
    with_weights: bool = True,
) -> nn.Module:
    """Load the base in its own dtype; weights that neither it nor the adapter has are an error."""
    import transformers

    from genlora_lightning.backbone.architectures import class_of, without_weights

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = source_of(options)
    config = transformers.AutoConfig.from_pretrained(options.base, **source)
    if options.task:
        loader = getattr(transformers, TASKS[options.task])
    else:
        loader = class_of(config, options.base, (trained_on or {}).get("class"))
    changes = {} if options.num_labels is None else {"num_labels": options.num_labels}
    if not with_weights:  # names and shapes do
        return without_weights(loader, config)
    model, info = loader.from_pretrained(options.base, dtype="auto", output_loading_info=True, **source, **changes)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    # Of an adapter of a module that holds the model: by the model's own names, too.
    theirs = {name[at:] for name in adapter_tensors for at in (0, *(i + 1 for i, c in enumerate(name) if c == "."))}
    absent = sorted({str(key) for key in info["missing_keys"]} - theirs - tied)
    if absent:
        raise ValueError(
            f"{options.base} lacks weights that a {type(model).__name__} needs ({', '.join(absent[:3])}), and the "
            "adapter does not have them either. Give the base the adapter was trained on, or another --task."
        )
    return model  # type: ignore[no-any-return]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"genlora: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
