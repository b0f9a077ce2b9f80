"""Write a short configuration for a model and data of the user's own: `genlora init`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# torch and transformers take seconds to import.
if TYPE_CHECKING:
    from genlora_lightning.data.recognition import Recognized

_FORMS = (
    "conversations (messages, or ShareGPT's), instructions (prompt and completion, or Alpaca's), texts to go on "
    "learning (text), texts with labels (text and label), or pictures with labels (image and label, or a folder with a "
    "folder per class)"
)
_FILES = ".jsonl, .json, .csv, .parquet, .arrow, a folder of pictures, or hf://org/name:split"
_MOST_LABELS = 100
_HEADER = """\
# {what}, made by `genlora init`.
#     genlora fit --config {file}
# Every setting: `genlora fit --help`; this file with all defaults: `genlora fit --config {file} --print_config`.

seed_everything: 42

adapter:
  kind: genlora # or lora: kind: lora, rank: 16, alpha: 32
  rank: 64
  target_modules: all-linear # or names, [q_proj, v_proj], or a regular expression

"""
_CHAT = """\
model:
  class_path: CausalLMModule
  init_args:
    model: {model} # a folder, or a name on the Hugging Face Hub
    optimizer: {{lr: 2.0e-3, schedule: cosine, warmup_ratio: 0.05}}

data:
  class_path: InstructionDataModule
  init_args:
    train_file: {data}
    val_fraction: 0.1 # held out of train_file; or val_file: …
    max_length: 1024 # tokens; longer conversations lose their start, and a message says how many
    batch_size: 8
    group_by_length: true

"""
_CLASSES = """\
model:
  class_path: SequenceClassificationModule
  init_args:
    model: {model} # a folder, or a name on the Hugging Face Hub
    label_names: {labels}
    optimizer: {{lr: 4.0e-3, head_lr_factor: 0.5, schedule: linear, warmup_ratio: 0.06}}

data:
  class_path: TextClassificationDataModule
  init_args:
    train_file: {data}
    val_fraction: 0.1 # held out of train_file; or val_file: …
    max_length: 256
    batch_size: 32

"""
_IMAGES = """\
model:
  class_path: ImageClassificationModule
  init_args:
    model: {model} # a folder, or a name on the Hugging Face Hub
    label_names: {labels}
    optimizer: {{lr: 4.0e-3, head_lr_factor: 0.5, schedule: linear, warmup_ratio: 0.06}}

data:
  class_path: ImageClassificationDataModule
  init_args:
    train_file: {data}{val}
    augmentation: flip # or crop-flip, or none where left and right differ
    batch_size: 32
    num_workers: 2 # processes that decode pictures

"""
_TRAINER = """\
trainer:
  accelerator: auto
  devices: 1 # more: add --config genlora:strategy/ddp
  precision: auto # bf16-mixed where the machine multiplies bfloat16, else 32-true
  max_epochs: 3
  gradient_clip_val: 1.0
  num_sanity_val_steps: 0
  log_every_n_steps: 5
  enable_model_summary: false # one line says what is trained
  default_root_dir: runs/{name} # each run gets a folder of its own in it, logs/version_N
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{monitor: val_loss, save_top_k: 1, filename: "{{step}}"}}
"""


def add_init(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", help="a model's folder, or its name on the Hugging Face Hub")
    parser.add_argument("--data", metavar="FILE", help=f"training data, {_FILES}: {_FORMS}")
    parser.add_argument("--name", help="the run's name: the configuration is NAME.yaml, results are in runs/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace NAME.yaml if there is one")


def run_init(options: argparse.Namespace) -> None:
    """Ask for what is not given, look at the data, and write the file.

    Raises:
        ValueError: Something is missing and nobody can be asked, or the data have no form that is known.
        FileNotFoundError: There is no such file, or no model in the folder.
        FileExistsError: The configuration is there already.
    """
    model = _given(options.model, "--model", "Model (a folder, or a name on the Hugging Face Hub): ", check_model)
    data = _given(options.data, "--data", f"Training data ({_FILES}): ", check_data)
    name = _given(options.name, "--name", "Name of the run: ", check_name)
    file = Path(f"{name}.yaml")
    if file.exists() and not options.overwrite:
        raise FileExistsError(f"There is a {file} already. Give another --name, or --overwrite to replace it.")
    found = _recognized(data)
    fields = {"file": file, "name": _scalar(name), "model": _scalar(model), "data": _scalar(data)}
    if found.labels is None:
        text = (_HEADER + _CHAT + _TRAINER).format(what="A model that answers as your data do", **fields)
    else:
        shown = f"[{', '.join(map(_scalar, found.labels))}]"
        what, classes = ("Pictures", _IMAGES) if found.of_images else ("Texts", _CLASSES)
        text = (_HEADER + classes + _TRAINER).format(
            what=f"{what} into classes", labels=shown, val=_held_out(data), **fields
        )
    file.write_text(text, encoding="utf-8")
    talk = f"\n  genlora chat runs/{name}/logs/version_0/adapter" if found.labels is None else ""
    print(f"{file} is written. Look at it, then:\n  genlora fit --config {file}{talk}")


def check_model(model: str) -> None:
    """Refuse a folder without a model; a name on the Hub is taken as it is."""
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} is a folder without a config.json, so it holds no model.")
    if not folder.exists() and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {model}.")


def check_data(data: str) -> None:
    """Refuse a file that is not there, or has no form that is known."""
    _recognized(data)


def check_name(name: str) -> None:
    """Refuse what is no plain name of a file."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"{name!r} is no name for a run: letters, digits, `_`, `-` and `.`, a letter or digit first.")


def _given(value: str | None, flag: str, question: str, check: Callable[[str], None]) -> str:
    """The flag's value, or a valid answer of whoever sits at the terminal."""
    if value is not None:
        check(value)
        return value
    if not sys.stdin.isatty():
        raise ValueError(f"{flag} is missing, and there is no terminal to ask at.")
    while True:
        answer = input(question).strip()
        try:
            check(answer)
        except (ValueError, OSError) as error:
            print(error)
        else:
            return answer


def _recognized(data: str) -> Recognized:
    """Look at what data are: with labels, or conversations, instructions and texts without.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, cannot be read, or has another form; the message says which are known.
    """
    from genlora_lightning.data.recognition import recognize

    found = recognize(data, "--data")
    if found.labels is not None and not 2 <= len(found.labels) <= _MOST_LABELS:
        raise ValueError(f"{data} has {len(found.labels)} different labels; a classifier needs 2 to {_MOST_LABELS}.")
    return found


def _held_out(data: str) -> str:
    """The line of a configuration of pictures that says what they are validated on."""
    from genlora_lightning.data.recognition import has_validation

    if has_validation(data):
        return " # its folders train and val, and test if there is one"
    return "\n    val_fraction: 0.1 # held out of train_file; or val_file: …"


def _scalar(text: str) -> str:
    """The text as YAML; JSON's strings are YAML's, too."""
    plain = re.fullmatch(r"[A-Za-z_./~][\w./~@-]*( [\w./~@-]+)*", text)
    word = text.lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n", "~")
    return text if plain and not word else json.dumps(text, ensure_ascii=False)
