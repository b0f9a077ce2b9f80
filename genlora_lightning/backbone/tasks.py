"""Find the transformers model inside a module, and what task it is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers

# PEFT's name of a task, by transformers' table of the model classes that are made for it.
_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model; asked by attributes, so that transformers need not be imported."""
    return hasattr(module, "base_model_prefix") and hasattr(getattr(module, "config", None), "model_type")


def transformers_base(model: nn.Module) -> nn.Module | None:
    """The outermost transformers model that holds all adapters of a model (a LightningModule, say); ``None`` if none.

    Names in files that other libraries read are relative to it.
    """
    wanted = {id(m) for m in (*adapter_layers(model).values(), *trained_modules(model).values())}
    for module in model.modules():
        if is_transformers_model(module) and wanted <= {id(inner) for inner in module.modules()}:
            return module
    return None


def evaluated_task(class_name: str) -> str | None:
    """What a transformers class is for, of language models, text classifiers and image classifiers; else ``None``."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", {}).values()
    if any(class_name in (name if isinstance(name, (list, tuple)) else [name]) for name in names):
        return "image-classification"
    known = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}
    return next((known[task] for task in class_tasks(class_name) if task in known), None)


def label_names(model: nn.Module) -> list[str] | None:
    """The names of the classes of a transformers classifier, or of the one that a module holds.

    ``None`` where nobody has named them, which transformers writes as ``LABEL_0``, ``LABEL_1``, …
    """
    config = _config_of(model)
    names = getattr(config, "id2label", None)
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        return None
    found = [str(names[index]) for index in range(len(names))]
    return None if found == _unnamed(len(found)) else found


def name_labels(model: nn.Module, names: list[str]) -> None:
    """Give the classes of a transformers classifier their names, if it has as many and they have none."""
    config = _config_of(model)
    if label_names(model) is None and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}


def _config_of(model: nn.Module) -> Any:
    return next((m.config for m in model.modules() if is_transformers_model(m)), None)


def _unnamed(number: int) -> list[str]:
    return [f"LABEL_{index}" for index in range(number)]


def class_tasks(class_name: str) -> list[str]:
    """PEFT's names of the tasks that a transformers class is made for, such as ``["CAUSAL_LM"]``."""
    from transformers.models.auto import modeling_auto

    tasks = []
    for task, table in _TASKS.items():
        names: Any = getattr(modeling_auto, table, {})
        # A model type may have several classes for a task.
        known = {n for value in names.values() for n in ([value] if isinstance(value, str) else value)}
        if class_name in known:
            tasks.append(task)
    return tasks
