"""Run ``genlora generate``: load what was trained, an adapter or a whole model, and let it answer prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from genlora_lightning.cli.trained import Trained, attach
from genlora_lightning.fields import check_integer, check_number

# torch and transformers take seconds to import: only what loads a model does.
if TYPE_CHECKING:
    from genlora_lightning.artifacts.adapter_set import AdapterSet
    from genlora_lightning.data.prompts import Prompts
    from genlora_lightning.modules import CausalLMModule

T = TypeVar("T")

_MODEL_FILES = (
    "adapter folder (also one of PEFT), checkpoint, model folder (merged, or a base), or name of one on the Hugging "
    "Face Hub"
)


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora generate``."""
    add_model(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to answer")
    parser.add_argument(
        "--file", help="prompts: .jsonl or .csv with `prompt` or `messages`, else a prompt a line; - is standard input"
    )
    parser.add_argument("--out", help="JSON-lines file to write: prompt, generated, and completion where it is known")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default: %(default)s)")
    add_sampling(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to load; the one for the base check is common to more commands."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL_FILES)
    parser.add_argument("--base", help="an adapter's base (default: the one it names)")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]FOLDER",
        help="a further adapter folder of the same base, by a name of its own (default: the folder's); may be repeated",
    )
    parser.add_argument("--revision", help="the base's branch, tag or commit on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the base")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the base's weights (default: as stored; float32 on a CPU without 16-bit arithmetic)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how to generate."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="the most tokens of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (the default): always the most probable token"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--chat-template", help="a Jinja file in place of the tokenizer's template; `none`: prompts are plain text"
    )


def run_generate(options: argparse.Namespace) -> None:
    """Answer prompts, on standard output or into a file.

    Raises:
        ValueError: There are no prompts, or something that was given cannot be used.
        OSError: A file or the base is not there.
    """
    if bool(options.prompts) == bool(options.file):
        raise ValueError("Give prompts either as arguments or as --file FILE (`--file -` reads standard input).")
    check_integer("--batch-size", options.batch_size, least=1)
    settings = sampling(options)
    subject = Subject(options)
    prompts = make_prompts(subject, options)
    conversations = prompts.of_file(options.file) if options.file else prompts.of_texts(options.prompts)
    subject.load()
    # With several adapters each prompt is a row for each of them.
    names: list[str | None] = [None] if subject.adapters is None else [*subject.adapters.names]
    asked = [(conversation, name) for conversation in conversations for name in names]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(asked), options.batch_size):
        some = asked[start : start + options.batch_size]
        if subject.adapters is not None:
            subject.adapters.activate(rows=[name for _, name in some])
        answers = answered(subject.module, prompts.batch([conversation for conversation, _ in some]), settings)
        for row, (_, name) in zip(answers, some, strict=True):
            rows.append(row if name is None else {**row, "adapter": name})
            if not options.out:
                head = f"> {row['prompt']}\n" if len(conversations) > 1 and name == names[0] else ""
                print(f"{head}{f'[{name}] ' if name else ''}{row['generated']}", flush=True)
    if options.out:
        from genlora_lightning.storage.atomic import atomic_file

        with atomic_file(options.out) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
        print(f"{len(rows)} answers are in {options.out}.")


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What transformers' ``generate`` is to be told.

    Raises:
        ValueError: A value is out of its range.
    """
    check_integer("--max-new-tokens", options.max_new_tokens, least=1)
    check_number("--temperature", options.temperature, least=0.0)
    check_number("--top-p", options.top_p, above=0.0, most=1.0)
    if options.temperature == 0:
        if options.top_p != 1:
            raise ValueError(f"--top-p {options.top_p:g} has no effect without sampling: give a --temperature above 0.")
        # What a model's own settings for sampling say would only be warned of.
        return {"max_new_tokens": options.max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
    return {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": 0,  # transformers' own default is 50
    }


class Subject:
    """A model that answers, with the adapter that it has; nothing is loaded until :meth:`load`.

    Args:
        options: The arguments of :func:`add_model`, and ``base_check``.

    Attributes:
        module: The base, with the adapter in it.
        adapter: Where the adapter was loaded from, or its name among several; ``None`` for a model by itself.
        adapters: The adapters by name, if several are asked for.

    Raises:
        ValueError: What the arguments name cannot be used, or is no model that writes text.
        OSError: It is not there.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import transformers

        from genlora_lightning.modules import CausalLMModule

        transformers.utils.logging.set_verbosity_error()
        self._found = _writing(options.model)
        self._options = options
        name = options.base or self._found.base
        if name is None:
            raise ValueError(f"{options.model} does not say which base it was trained on. Give it with --base.")
        if self._found.kind == "model" and options.base:
            raise ValueError(f"{options.model} is a model by itself, and --base is for adapters. Give one of the two.")
        self.adapter: str | None = None
        self.adapters: AdapterSet | None = None
        self._named = _by_name(self._found, options.adapter or ())
        # The commit that the adapter was trained on; another base has other commits.
        revision = options.revision or (self._found.revision if options.base is None else None)
        self.module = CausalLMModule(
            name,
            revision=revision,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype,
            quantization=self._found.quantization,
        )
        self.tokenizer = self._of_base(lambda: self.module.tokenizer)

    def load(self) -> None:
        """Load the model, and the adapter into it.

        Raises:
            ValueError: One of them cannot be used, or they do not belong together.
            OSError: The base is not there.
        """
        import torch

        self._of_base(self.module.configure_model)
        device = self._options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.module.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
            raise ValueError(f"The model cannot be put on --device {device}: {str(error).splitlines()[0]}") from error
        if self._named:
            from genlora_lightning.artifacts.adapter_set import AdapterSet

            self.adapters = AdapterSet(self.module.adapter_root())
            for name, folder in self._named.items():
                self.adapters.add(name, folder, base_check=self._options.base_check)
            self.switch(next(iter(self._named)))
        elif self._found.kind != "model":
            self._attach(self._found)
        torch.manual_seed(self._options.seed)

    def switch(self, adapter: str) -> None:
        """Load another adapter in place of the one that there is, which stays if that fails.

        Args:
            adapter: Where it lies; of several, a name, or the folder of one more.

        Raises:
            ValueError: It cannot be used, or does not fit the base.
            OSError: It is not there.
        """
        from genlora_lightning.injection.inject import adapter_layers, remove_adapters

        if self.adapters is not None:
            name = adapter if adapter in self.adapters.names else Path(adapter).name
            if name not in self.adapters.names:
                self.adapters.add(name, adapter, base_check=self._options.base_check)
            self.adapters.activate(name)
            self.adapter = name
            return
        found, before = _writing(adapter), self.adapter
        if found.kind == "model":
            raise ValueError(f"{adapter} is no adapter folder and no checkpoint.")
        if adapter_layers(self.module):
            remove_adapters(self.module.adapter_root())
        try:
            self._attach(found)
        except BaseException:
            if before is not None:
                self._attach(Trained(before))
            raise

    def _attach(self, found: Trained) -> None:
        attach(self.module, found, self._options.base_check)
        self.adapter = found.name

    def _of_base(self, load: Callable[[], T]) -> T:
        try:
            return load()
        except OSError as error:
            if self._options.base or self._found.kind == "model":
                raise
            raise OSError(
                f"The base of {self._options.model} cannot be loaded: give its folder with --base. {error}"
            ) from error


def _by_name(found: Trained, given: Sequence[str]) -> dict[str, str]:
    """The folders of several adapters by their names, the model's own first; empty if there are no further ones.

    Raises:
        ValueError: A name is given twice, or the model's own adapter is in no folder.
    """
    if not given:
        return {}
    if found.kind not in ("adapter", "model"):
        raise ValueError(
            f"--adapter goes with adapter folders, and {found.name} is a {found.kind}: make one of it with "
            f"`genlora {'convert' if found.kind == 'checkpoint' else 'import-lora'}`."
        )
    named: dict[str, str] = {}
    for text in ([found.name] if found.kind == "adapter" else []) + list(given):
        name, is_named, folder = text.rpartition("=")
        name, folder = (name, folder) if is_named else (Path(text).name, text)
        if not name or name in named:
            raise ValueError(
                f"Two adapters are called {name!r}: give --adapter NAME=FOLDER, with another name for each."
            )
        named[name] = folder
    return named


def make_prompts(subject: Subject, options: argparse.Namespace) -> Prompts:
    """Make what encodes prompts for a model.

    Raises:
        ValueError: The model has no chat template and none was given, or what was given is none.
    """
    from genlora_lightning.data.prompts import Prompts

    if options.chat_template is None and not subject.tokenizer.chat_template:
        raise ValueError(
            f"{subject.module.source} has no chat template. Give the one that the adapter was trained with by "
            "--chat-template FILE, or let prompts be plain text by --chat-template none."
        )
    return Prompts(subject.tokenizer, options.chat_template, options.system)


def answered(module: CausalLMModule, batch: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, str]]:
    """Generate the answers of a batch of :class:`~genlora_lightning.data.prompts.Prompts`.

    Raises:
        ValueError: A prompt leaves no room for an answer in the model's context.
    """
    model = module.adapter_root()
    device = next(model.parameters()).device
    length = batch["input_ids"].shape[1]
    most: int | None = getattr(model.config, "max_position_embeddings", None)
    room = settings["max_new_tokens"] if most is None else min(settings["max_new_tokens"], most - length)
    if room < 1:
        raise ValueError(f"The prompt has {length} tokens, and the model takes {most} with the answer. Shorten it.")
    module.generation = {**settings, "max_new_tokens": room}
    tensors = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    return module.predict_step({**batch, **tensors}, 0)


def _writing(name: str) -> Trained:
    """What a name stands for, if it writes text.

    Raises:
        ValueError: It does not.
    """
    from genlora_lightning.backbone.tasks import class_tasks

    found = Trained(name)
    tasks = class_tasks(found.class_name) if found.class_name else []
    if tasks and "CAUSAL_LM" not in tasks:
        raise ValueError(
            f"{name} was trained on a {found.class_name}, which is no causal language model and writes no text. Its "
            "predictions come from `python train.py predict` with the run's configuration, or from the model in "
            "Python, after `load_adapter`."
        )
    return found
