"""Prune a base by calibration data and write it as a model folder: `genlora prune`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from genlora_lightning.fields import check_integer, check_number

# torch and transformers take seconds to import: only what loads a model does.
if TYPE_CHECKING:
    from torch import Tensor

    from genlora_lightning.modules import CausalLMModule

_WHAT = "pruned model"


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora prune``."""
    parser.add_argument("model", metavar="MODEL", help="language model to prune: a folder, or a name on the Hub")
    parser.add_argument("out", metavar="FOLDER", help="model folder to write; nothing is overwritten")
    parser.add_argument("--data", required=True, metavar="FILE", help="calibration data, as for `fit`: chats or texts")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--sparsity", type=float, default=0.5, help="share of each row to set to 0, below 1 (default: %(default)s)"
    )
    how.add_argument("--pattern", metavar="N:M", help="instead: of each M neighbours in a row N stay, such as 2:4")
    parser.add_argument(
        "--samples", type=int, default=128, help="examples to calibrate with, drawn by --seed (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, help="the most tokens of an example (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the choice of examples (default: %(default)s)"
    )
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="linears to prune, by name (default: all but the head)"
    )
    parser.add_argument("--exclude-modules", nargs="+", default=[], metavar="NAME", help="linears to leave alone")
    parser.add_argument("--batch-size", type=int, default=8, help="examples at a time for the loss alone (default: 8)")
    parser.add_argument("--chat-template", help="in place of the tokenizer's; `none`: plain text")
    parser.add_argument("--revision", help="the model's branch, tag or commit on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run_prune(options: argparse.Namespace) -> None:
    """Prune a model, write it, and print the sparsity of each matrix, and the loss before and after.

    Raises:
        ValueError: An argument is out of its range, or the model or the data cannot be used.
        OSError: Something is not there, or FOLDER exists or cannot be written.
    """
    check_number("--sparsity", options.sparsity, least=0.0, below=1.0)
    for name in ("samples", "max_length", "batch_size"):
        check_integer(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    pattern = None if options.pattern is None else _pattern_of(options.pattern)
    from genlora_lightning.artifacts.model_folder import check_new

    check_new(options.out, _WHAT)
    import torch
    import transformers

    from genlora_lightning.artifacts.model_folder import save_model
    from genlora_lightning.backbone.architectures import read_config
    from genlora_lightning.backbone.pruning import prune_model
    from genlora_lightning.data import InstructionDataModule
    from genlora_lightning.modules import CausalLMModule

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    data = InstructionDataModule(
        options.model,
        options.data,
        batch_size=options.samples,
        max_length=options.max_length,
        chat_template=options.chat_template,
        seed=options.seed,
        **source,
    )
    data.prepare_data()
    data.setup("fit")
    batch: dict[str, Tensor] = next(iter(data.train_dataloader()))
    module = CausalLMModule(options.model, **source)
    module.configure_model()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).eval()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    before = _loss(module, batch, options.batch_size)
    targets = {"target_modules": options.target_modules} if options.target_modules else {}
    report = prune_model(
        module.model,
        {**batch, "use_cache": False},
        options.sparsity,
        pattern=pattern,
        exclude_modules=options.exclude_modules,
        **targets,
    )
    after = _loss(module, batch, options.batch_size)
    print(report)
    tokens = int(batch["attention_mask"].sum())
    print(
        f"Loss on the {len(batch['input_ids'])} calibration examples ({tokens:,} tokens): {before:.4f} before, "
        f"{after:.4f} after."
    )
    stored = getattr(read_config(options.model, **source), "dtype", None)
    if isinstance(stored, torch.dtype):  # the module may have widened it for this machine, which loses nothing
        module.model.to(stored)
    print(f"The pruned model is in {save_model(module.model, options.out, _WHAT, tokenizer=data.tokenizer)}.")


def _loss(module: CausalLMModule, batch: dict[str, Tensor], batch_size: int) -> float:
    """The mean loss of the learned tokens."""
    number = len(batch["input_ids"])
    parts = [{k: t[at : at + batch_size] for k, t in batch.items()} for at in range(0, number, batch_size)]
    loss, tokens = sum(module.example_scores(part).statistics[:, :2].sum(0) for part in parts)  # type: ignore[misc]
    return float(loss / tokens)


def _pattern_of(text: str) -> tuple[int, int]:
    kept, _, group = text.partition(":")
    if not (kept.isdecimal() and group.isdecimal()):
        raise ValueError(f"--pattern must be two numbers such as 2:4, got {text!r}.")
    return int(kept), int(group)
