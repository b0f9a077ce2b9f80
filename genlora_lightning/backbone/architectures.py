"""Build transformers models from their configurations on the meta device, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from genlora_lightning.backbone.catalog import SHAPES, TASKS
from genlora_lightning.backbone.tasks import class_tasks

_TASK_OF = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}


def read_config(source: str, **options: Any) -> Any:
    """A transformers configuration, without the weights it belongs to.

    Args:
        source: A shape in :data:`SHAPES`, a folder, a ``config.json``, or a name on the Hugging Face Hub.
        options: Passed on to ``AutoConfig.from_pretrained``.

    Raises:
        OSError: There is no such model.
    """
    import transformers

    if source in SHAPES:
        return transformers.LlamaConfig(**SHAPES[source])
    path = Path(source).expanduser()
    if (path.is_absolute() or source.startswith(".") or source.count("/") > 1) and not path.exists():
        raise FileNotFoundError(
            f"There is no model folder {source!r}. Give a folder with a config.json, the file itself, a name on the "
            f"Hugging Face Hub, or one of the built-in shapes: {', '.join(SHAPES)}."
        )
    try:
        # Said, because transformers asks on the terminal where it is left open.
        options = {"trust_remote_code": False, **options}
        return transformers.AutoConfig.from_pretrained(str(path) if path.exists() else source, **options)
    except (OSError, ValueError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(
            f"{source!r} has no configuration that can be read ({cause}) Give a folder with a config.json, the file "
            f"itself, a name on the Hugging Face Hub, or one of the built-in shapes: {', '.join(SHAPES)}."
        ) from error


def task_of(config: Any, source: str) -> str:
    """What a model is for, a key of :data:`TASKS`, by the class that its configuration names.

    A class of the model's own code counts as what its configuration maps it to.

    Raises:
        ValueError: It names none that is known.
    """
    for name in getattr(config, "architectures", None) or []:
        for task in class_tasks(name):
            if task in _TASK_OF:
                return _TASK_OF[task]
    own_code = getattr(config, "auto_map", None) or {}
    for task, auto_class in TASKS.items():
        if auto_class in own_code:
            return task
    raise ValueError(
        f"{source} does not say what it is for (its architectures are {getattr(config, 'architectures', None)}). Give "
        f"--task {' or --task '.join(TASKS)}."
    )


def class_of(config: Any, source: str, trained: str | None = None) -> Any:
    """The class of transformers that loads a model: the one an adapter was trained on, else the one it says it is.

    Args:
        config: The model's configuration.
        source: Where it is, for the message.
        trained: Name of the class that the adapter was trained on, if it is known.

    Raises:
        ValueError: Neither is a class that transformers has, and the model brings none along.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in [trained, *names]:
        found = getattr(transformers, name or "", None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto_class, target in (getattr(config, "auto_map", None) or {}).items():  # code of its own
        if str(target).rpartition(".")[2] in names and hasattr(transformers, auto_class):
            return getattr(transformers, auto_class)
    raise ValueError(
        f"{source} does not say which class of transformers it is of (its architectures are {names or None}). Give "
        f"--task {' or --task '.join(TASKS)}, or load it in Python and call `load_adapter`, then `save_merged` or "
        "`export_lora`."
    )


def build_on_meta(config: Any, task: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A transformers model on the meta device.

    Args:
        config: Its configuration.
        task: A key of :data:`TASKS`.
        dtype: Of its weights; the configuration's, else float32, if ``None``.
        options: Passed on to ``from_config``.
    """
    import transformers

    with torch.device("meta"):
        return getattr(transformers, TASKS[task]).from_config(config, dtype=dtype or config.dtype, **options)


def without_weights(loader: Any, config: Any) -> nn.Module:
    """A transformers model on the meta device, of a class of it or of an ``AutoModel…``: names and shapes."""
    make = getattr(loader, "from_config", None) or loader._from_config
    with torch.device("meta"):
        return make(config)  # type: ignore[no-any-return]


def repeated_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of a model's layers: of its lists of modules of one class, the one with the most parameters.

    For counting, since each adds the same. FSDP's units are
    :func:`genlora_lightning.distributed.collectives.transformer_blocks`, which are of all such lists: an encoder and a
    decoder have one each.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1
    ]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def enable_gradient_checkpointing(model: Any) -> None:
    """Let a model compute its activations again in the backward pass.

    Raises:
        ValueError: The model does not support it.
    """
    # Not the reentrant kind: behind an input that needs no gradient, which a frozen embedding is, it gives none.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name; the older one warns
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
