"""Load transformers models, tokenizers and image processors, with errors that say what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from genlora_lightning.backbone.low_memory import build_without_weights, weight_source

_PROBE_SECONDS = 10


def load_pretrained(auto_class: str, source: str, *, low_memory: bool = False, **options: Any) -> tuple[Any, list[str]]:
    """Load a transformers model onto the CPU.

    Args:
        auto_class: Name of transformers' class to load with, such as ``"AutoModelForCausalLM"``.
        source: Local folder or name on the Hugging Face Hub.
        low_memory: Leave the weights in their files; :mod:`genlora_lightning.backbone.low_memory` reads them later.
        options: Passed on to ``from_pretrained``.

    Returns:
        The model, and the names of the parameters that the checkpoint lacks (or has in another shape), which are
        initialised at random.

    Raises:
        FileNotFoundError: A path that does not exist, or a folder without a model in it.
        OSError: The Hub cannot be reached, or the name is not there.
        ValueError: The files are there but do not make such a model.
    """
    import transformers

    source = _checked_source(source, options)
    # transformers warns of each weight that a new head lacks, and of each that the old one leaves over; the caller
    # knows which of these matter. The device is named because for another one, which Lightning makes the default,
    # transformers wants `accelerate`; Lightning moves the model afterwards.
    with _quiet_transformers(), torch.device("cpu"):
        try:
            if low_memory:
                model = build_without_weights(auto_class, source, **options)
                waiting = weight_source(model)
                assert waiting is not None
                return model, waiting.absent
            model, info = getattr(transformers, auto_class).from_pretrained(source, output_loading_info=True, **options)
        except Exception as error:
            raise _explained(error, source, f"with transformers' {auto_class}") from error
    # Keys of another shape come as text or as (key, shape there, shape here), depending on the release.
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    absent = {*info["missing_keys"], *mismatched}
    return model, [name for name, _ in model.named_parameters() if name in absent]


def load_tokenizer(source: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Raises:
        FileNotFoundError: A path that does not exist.
        OSError: The Hub cannot be reached, or the name is not there.
        ValueError: There is no tokenizer beside the model.
    """
    return _load_beside("AutoTokenizer", source, options)


def load_image_processor(source: str, **options: Any) -> Any:
    """Load the image processor of a model, by torchvision or by Pillow, as transformers chooses.

    Raises:
        FileNotFoundError: A path that does not exist.
        OSError: The Hub cannot be reached, or the name is not there.
        ValueError: There is no image processor beside the model, or a package is missing that it needs.
    """
    return _load_beside("AutoImageProcessor", source, options)


def _load_beside(auto_class: str, source: str, options: dict[str, Any]) -> Any:
    import transformers

    source = _checked_source(source, options)
    with _quiet_transformers():
        try:
            return getattr(transformers, auto_class).from_pretrained(source, **options)
        except Exception as error:
            raise _explained(error, source, f"with transformers' {auto_class}") from error


def _checked_source(source: str, options: dict[str, Any]) -> str:
    """Find out at once what transformers would find out after minutes, or say in other words."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and "gguf_file" not in options:
            files = sorted(entry.name for entry in folder.iterdir())
            held = f"holds {', '.join(files[:6])}{', …' if len(files) > 6 else ''}" if files else "is empty"
            raise FileNotFoundError(
                f"The folder {source!r} is no Hugging Face model folder: it has no config.json (it {held}). Give the "
                "folder of the base model, as `save_pretrained` writes it; an adapter's folder is not enough."
            )
        return str(folder)
    if folder.is_file():
        raise FileNotFoundError(f"{source!r} is a file. Give the Hugging Face model folder that holds it.")
    if os.path.isabs(folder) or source.startswith((".", "~")) or "\\" in source or source.count("/") > 1:
        raise FileNotFoundError(f"The model folder {source!r} does not exist (looked for {folder.absolute()}).")
    problem = _hub_problem(source, options.get("revision"))
    if problem is not None:
        raise OSError(_not_found(source, problem))
    return source


def _hub_problem(source: str, revision: str | None) -> str | None:
    """Why the Hub cannot be reached, if it is needed; asked once, where transformers would retry for a minute."""
    import huggingface_hub

    try:
        cached = huggingface_hub.try_to_load_from_cache(source, "config.json", revision=revision)
    except ValueError as error:
        return str(error)
    if isinstance(cached, str) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _explained(error: Exception, source: str, how: str) -> Exception:
    """The error to raise instead of one from deep inside transformers."""
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    cause = f"{type(error).__name__}: {cause}"
    if "trust_remote_code" in str(error):
        cause += " Set `trust_remote_code` to run it (--trust-remote-code on the command line)."
    if Path(source).is_dir():
        return ValueError(f"The model in {source!r} cannot be loaded {how}. {cause}")
    if isinstance(error, OSError):
        return OSError(_not_found(source, cause))
    return ValueError(f"{source!r} cannot be loaded {how}. {cause}")


def _not_found(source: str, cause: str) -> str:
    return (
        f"{source!r} is neither a local folder (looked for {Path(source).absolute()}) nor reachable on the Hugging "
        f"Face Hub. {cause}"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
