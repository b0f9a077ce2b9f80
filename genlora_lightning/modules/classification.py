"""Fine-tune a text classifier: an encoder or a decoder, its head trained with the adapters."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torchmetrics
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.modules.base import Dtype, GenLoRAModule
from genlora_lightning.modules.metrics import WeightedMean
from genlora_lightning.training.optim import OptimizerConfig

_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class SequenceClassificationModule(GenLoRAModule):
    """Fine-tune a transformers model to put texts into classes.

    The head (what the model has outside its ``base_model``) and modules that the checkpoint lacks, such as a pooler,
    are trained in full beside the adapters, in float32 whatever the base's dtype.

    Batches are dictionaries of ``input_ids`` and ``attention_mask``, each (examples, tokens), and ``labels``
    (examples), which may be missing in prediction. Logged: ``train_loss``; for validation and test, over the whole
    split, ``val_loss`` (mean per example), ``val_accuracy`` and ``val_f1`` (mean of the classes' F1); ``test_…``
    alike.

    Args:
        model: Local folder or name on the Hugging Face Hub.
        num_labels: Number of classes; may be left out if ``label_names`` are given.
        label_names: Names of the classes, in the order of the labels.
        adapter: What to adapt, and how; as a dictionary with ``kind`` for another kind than GenLoRA; GenLoRA's
            defaults if ``None``. Leave it out if the trainer has a GenLoRAFinetuning
            callback. The head is added to its ``modules_to_train``.
        optimizer: AdamW and its schedule; the defaults if ``None``.
        dtype: Dtype of the frozen base's weights; ``"auto"``: the one they are stored in. Adapters are always float32.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: transformers' attention, such as ``"sdpa"`` or ``"eager"``; its choice if ``None``.
        trust_remote_code: Run the Python code that comes with the model.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        low_memory: Read the weights only once the model is sharded, each process what it keeps; for FSDP.
        model_kwargs: More arguments for ``from_pretrained``; plain values, because checkpoints hold them.

    Raises:
        TypeError: An argument holds something else than plain values.
        ValueError: The number of classes is missing, less than 2, or not that of the names.
    """

    def __init__(
        self,
        model: str,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        adapter: dict[str, Any] | AdapterConfig | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        low_memory: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            adapter=adapter,
            optimizer=optimizer,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            gradient_checkpointing=gradient_checkpointing,
            low_memory=low_memory,
            model_kwargs=model_kwargs,
        )
        self.label_names = _checked_names(num_labels, label_names)
        self.num_labels = len(self.label_names)
        self._trained_modules: list[str] = []
        self.val_metrics, self.test_metrics = _metrics(self.num_labels), _metrics(self.num_labels)

    @override
    def load_backbone(self) -> nn.Module:
        names = self.label_names
        model, absent = self.load_with(
            "AutoModelForSequenceClassification",
            num_labels=self.num_labels,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
        )
        new = self._find_trained_modules(model, absent)
        if new:
            rank_zero_info(
                f"The checkpoint {self.source!r} has no weights that fit {', '.join(new)}: they start at random and "
                "are trained in full with the adapters."
            )
        self._ensure_pad_token(model)
        text_config = model.config.get_text_config()
        if getattr(text_config, "use_cache", False):
            text_config.use_cache = False
        loaded: nn.Module = model
        return loaded

    def _find_trained_modules(self, model: nn.Module, absent: list[str]) -> list[str]:
        """Note which modules are trained in full; returns those of them that start at random."""
        body = getattr(model, "base_model", model)
        heads = []
        if body is not model:
            beside = {name: child for name, child in model.named_children() if child is not body}
            heads = [name for name, child in beside.items() if next(child.parameters(), None) is not None]
        in_body = {id(parameter): parameter.numel() for parameter in body.parameters()}
        parameters = dict(model.named_parameters())
        lacking = sum(in_body.get(id(parameters[name]), 0) for name in absent)
        if body is not model and 2 * lacking > sum(in_body.values()):
            raise ValueError(
                f"The checkpoint {self.source!r} lacks most weights of a {type(model).__name__}, "
                f"{', '.join(absent[:3])} among them; it was probably saved from another kind of model."
            )
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in absent))
        fresh = [owner for owner in owners if owner and not _is_inside(owner, heads)]
        self._trained_modules = [*heads, *fresh]
        return [name for name in self._trained_modules if any(_is_inside(owner, [name]) for owner in owners)]

    def _ensure_pad_token(self, model: Any) -> None:
        """Decoders classify from the last token that is not padding, so that they must know what padding is."""
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is not None:
            return
        end = getattr(config, "eos_token_id", None)
        end = end[0] if isinstance(end, (list, tuple)) and end else end
        if end is None:
            raise ValueError(
                f"The configuration of {self.source!r} has neither a pad nor an end-of-text token, so that the end "
                "of a padded text cannot be told. Set `model_kwargs: {pad_token_id: …}`."
            )
        rank_zero_info(f"{self.source!r} has no pad token; its end-of-text token {end} takes the place.")
        config.pad_token_id = model.config.pad_token_id = end

    @override
    def resolve_adapter_config(self, config: AdapterConfig) -> AdapterConfig:
        """Add the head, and modules that the checkpoint lacks, to ``modules_to_train``."""
        self.adapter_root()  # an error if the model is not loaded
        given = config.modules_to_train
        more = [
            name for name in self._trained_modules if not any(f".{name}".endswith(f".{pattern}") for pattern in given)
        ]
        if not more and not given:
            raise ValueError(
                f"The head of this {type(self.model).__name__} cannot be told from its body. Name it in the adapter's "
                "`modules_to_train`."
            )
        return dataclasses.replace(config, modules_to_train=[*given, *more])

    def class_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits (examples, classes), in float32."""
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        model: Any = self.adapter_root()
        # Decoders look for their pad token to find a text's end. Let them find it, whatever the batch was padded with.
        pad = model.config.get_text_config().pad_token_id
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
        logits: Tensor = model(**inputs).logits.float()
        return logits

    @override
    def look_at_labels(self, labels: Tensor) -> bool:
        """Whether the labels are classes; if not, the step says so."""
        return self._are_classes(labels)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = self._checked_labels(batch)
        loss = F.cross_entropy(self.class_logits(batch), labels, reduction="sum")
        return self.training_loss(loss, labels.new_full((), len(labels)))

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _checked_labels(self, batch: dict[str, Any]) -> Tensor:
        # Out of range they would be an assertion on a GPU that no Python code can explain any more.
        labels: Tensor = batch["labels"]
        if not self.known_of(labels) and not self._are_classes(labels):
            raise ValueError(
                f"The batch has labels from {int(labels.min())} to {int(labels.max())}, but the module has "
                f"{self.num_labels} classes (0 to {self.num_labels - 1}). Set `num_labels` or `label_names` to fit the "
                "data."
            )
        return labels

    def _are_classes(self, labels: Tensor) -> bool:
        return not labels.numel() or 0 <= int(labels.min()) <= int(labels.max()) < self.num_labels

    def _evaluate(self, batch: dict[str, Any], split: Literal["val", "test"], metrics: nn.ModuleDict) -> None:
        labels = self._checked_labels(batch)
        logits = self.class_logits(batch)
        for name, metric in metrics.items():
            assert isinstance(metric, torchmetrics.Metric)
            if isinstance(metric, WeightedMean):
                metric.update(F.cross_entropy(logits, labels, reduction="sum"), len(labels))
            else:
                metric.update(logits, labels)
            self.log(f"{split}_{name}", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Classify each text.

        Returns:
            For each example ``label`` (the class's number), ``label_name`` and ``probabilities`` (one per class).
        """
        probabilities = self.class_logits(batch).softmax(dim=-1).cpu()
        return [
            {
                "label": int(row.argmax()),
                "label_name": self.label_names[int(row.argmax())],
                "probabilities": row.tolist(),
            }
            for row in probabilities
        ]


def _metrics(num_labels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "loss": WeightedMean(),
            "accuracy": torchmetrics.classification.MulticlassAccuracy(num_labels, average="micro"),
            "f1": torchmetrics.classification.MulticlassF1Score(num_labels, average="macro"),
        }
    )


def _checked_names(num_labels: int | None, label_names: list[str] | None) -> list[str]:
    if label_names is None:
        if num_labels is None:
            raise ValueError("Give `num_labels`, the number of classes, or `label_names`, their names.")
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 2:
            raise ValueError(f"`num_labels` must be an integer of at least 2, got {num_labels!r}.")
        return [f"LABEL_{index}" for index in range(num_labels)]
    names = [str(name) for name in label_names]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`label_names` must be at least 2 different names, got {names}.")
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"`num_labels` is {num_labels}, but there are {len(names)} `label_names`: {names}.")
    return names


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
