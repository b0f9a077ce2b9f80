"""Put inputs into classes, or predict numbers: what classifiers of texts and of pictures have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.backbone.architectures import read_config
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.data.classification import ProblemType
from genlora_lightning.fields import check_choice, check_number
from genlora_lightning.injection.peft_adapters import AnyConfig, PeftAdapter
from genlora_lightning.modules.base import GenLoRAModule
from genlora_lightning.modules.intervals import Scores, macro_f1, ratio
from genlora_lightning.modules.metrics import R2, WeightedMean

_log = rank_zero_logger(__name__)


class ClassifierModule(GenLoRAModule):
    """Base of the classifiers: the head is trained in full, the body has adapters.

    The head (what the model has outside its ``base_model``) and modules that the checkpoint lacks, such as a pooler,
    are trained in full beside the adapters, in float32 whatever the base's dtype. A head in the checkpoint is kept if
    it is for as many classes, else it is replaced. The names of the classes go into the model's configuration.

    A subclass says which class of transformers loads its model (:attr:`auto_class`) and what goes into it
    (:meth:`class_logits`). :meth:`GenLoRAModule`'s arguments are handed on.

    Args:
        model: Local folder or name on the Hugging Face Hub.
        num_labels: Number of classes, or of values for regression; may be left out if ``label_names`` are given.
        label_names: Names of the classes, in the order of the labels.
        problem_type: What the head predicts.
        class_weights: A factor above zero for each class.
        arguments: Those of :class:`GenLoRAModule`.

    Raises:
        TypeError: An argument holds something else than plain values.
        ValueError: The number of classes is missing, less than 2, or not that of the names or the weights.
    """

    #: transformers' class that the model is loaded with.
    auto_class: str

    def __init__(
        self,
        model: str,
        *,
        num_labels: int | None,
        label_names: list[str] | None,
        problem_type: ProblemType,
        class_weights: list[float] | None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, **arguments)
        check_choice("problem_type", problem_type, get_args(ProblemType))
        self.problem_type: ProblemType = problem_type
        self.label_names = _checked_names(num_labels, label_names, least=1 if problem_type == "regression" else 2)
        self.num_labels = len(self.label_names)
        self._class_weights = _checked_weights(class_weights, problem_type, self.num_labels)
        self._trained_modules: list[str] = []
        self.starts_at_random: list[str] = []  # modules that the checkpoint lacks
        self.val_metrics, self.test_metrics = (_metrics(problem_type, self.num_labels) for _ in range(2))

    def class_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits (examples, classes), or the values (examples, values) of a regression, in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define `class_logits`.")

    def prepare_model(self, model: Any) -> None:
        """May change a model that was just loaded; called once."""

    @override
    def load_backbone(self) -> nn.Module:
        names = self.label_names
        model, absent = self.load_with(
            self.auto_class,
            num_labels=self.num_labels,
            problem_type=self.problem_type,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
        )
        new = self._find_trained_modules(model, absent)
        self.starts_at_random = new
        if new:
            _log.info(
                f"The checkpoint {self.source!r} has no weights that fit {', '.join(new)}: they start at random and "
                "are trained in full with the adapters."
            )
        self.prepare_model(model)
        loaded: nn.Module = model
        return loaded

    @override
    def kept_whole(self) -> list[str] | None:
        import transformers

        config = read_config(self.source, **self.tokenizer_options)
        trust = bool(self.tokenizer_options["trust_remote_code"])
        with torch.device("meta"):
            model = getattr(transformers, self.auto_class).from_config(config, trust_remote_code=trust)
        return _heads(model) or None

    def _find_trained_modules(self, model: nn.Module, absent: list[str]) -> list[str]:
        """Note which modules are trained in full; returns those of them that start at random."""
        body = getattr(model, "base_model", model)
        heads = _heads(model)
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

    @override
    def resolve_adapter_config(self, config: AnyConfig) -> AnyConfig:
        """Add the head, and modules that the checkpoint lacks, to ``modules_to_train`` (PEFT: ``modules_to_save``)."""
        self.adapter_root()  # an error if the model is not loaded
        config = super().resolve_adapter_config(config)
        if isinstance(config, PeftAdapter):
            given = config.values.get("modules_to_save") or []
        else:
            given = config.modules_to_train
        more = [
            name for name in self._trained_modules if not any(f".{name}".endswith(f".{pattern}") for pattern in given)
        ]
        if not more and not given:
            raise ValueError(
                f"The head of this {type(self.model).__name__} cannot be told from its body. Name it in the adapter's "
                "`modules_to_train`."
            )
        if isinstance(config, PeftAdapter):
            return config.replace(modules_to_save=[*given, *more])
        return dataclasses.replace(config, modules_to_train=[*given, *more])

    @override
    def look_at_labels(self, labels: Tensor) -> bool:
        """Whether the labels are such as the head predicts; if not, the step says so."""
        return self._fault_of(labels) is None

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = self._checked_labels(batch)
        return self.training_loss(*self._summed_loss(self.class_logits(batch), labels))

    def _summed_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses, and what it is to be divided by for their mean; scalars."""
        weights = self._class_weights
        if weights is not None:
            weights = self._class_weights = weights.to(logits.device)
        if self.problem_type == "single_label_classification":
            loss = F.cross_entropy(logits, labels, weights, reduction="sum")
            count = labels.new_full((), len(labels)) if weights is None else weights[labels].sum()
            return loss, count
        targets = labels.to(logits.dtype).reshape(logits.shape)
        if self.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
        else:
            loss = F.mse_loss(logits, targets, reduction="sum")
        return loss, torch.full((), logits.numel(), device=logits.device)

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _checked_labels(self, batch: dict[str, Any]) -> Tensor:
        # Out of range they would be an assertion on a GPU that no Python code can explain any more.
        labels: Tensor = batch["labels"]
        fault = None if self.known_of(labels) else self._fault_of(labels)
        if fault is not None:
            raise ValueError(f"The batch has {fault}")
        return labels

    def _fault_of(self, labels: Tensor) -> str | None:
        """What is wrong with the labels of a batch, and what to do; ``None`` if they are right."""
        other = f"Set `problem_type` (it is {self.problem_type!r}), `num_labels` or `label_names` to fit the data."
        found = f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}"
        number = self.num_labels
        if self.problem_type == "single_label_classification":
            if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                return f"{found}, but the module takes classes: whole numbers (examples). {other}"
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < number:
                return (
                    f"labels from {int(labels.min())} to {int(labels.max())}, but the module has {number} classes (0 "
                    f"to {number - 1}). Set `num_labels` or `label_names` to fit the data."
                )
            return None
        of_one_value = self.problem_type == "regression" and number == 1
        shapes = [(len(labels), number), *([(len(labels),)] if of_one_value else [])]
        if tuple(labels.shape) not in shapes or not labels.is_floating_point():
            return f"{found}, but the module takes floating point ones of {' or '.join(map(str, shapes))}. {other}"
        if self.problem_type == "regression":
            return None if bool(labels.isfinite().all()) else "labels that are NaN or infinite; leave such records out."
        return None if bool(((labels == 0) | (labels == 1)).all()) else f"labels that are neither 0 nor 1. {other}"

    def _evaluate(self, batch: dict[str, Any], split: Literal["val", "test"], metrics: nn.ModuleDict) -> None:
        labels = self._checked_labels(batch)
        logits = self.class_logits(batch)
        for name, metric in metrics.items():
            assert isinstance(metric, torchmetrics.Metric)
            if name == "loss":
                metric.update(*self._summed_loss(logits, labels))
            elif name == "mae":
                metric.update((logits - labels.reshape(logits.shape)).abs().sum(), labels.numel())
            elif self.problem_type == "regression":
                metric.update(*(x.squeeze(1) if self.num_labels == 1 else x for x in (logits, labels.view_as(logits))))
            else:
                metric.update(logits, labels.long())
            self.log(f"{split}_{name}", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    @torch.no_grad()
    def example_scores(self, batch: dict[str, Any]) -> Scores:
        """Compute the loss of each example of a batch, whether its class is found, and what F1 needs.

        The loss is the cross entropy, without ``class_weights``.

        Raises:
            ValueError: The examples do not have one class each.
        """
        if self.problem_type != "single_label_classification":
            raise ValueError(f"Only examples of one class each are scored one by one, not {self.problem_type!r}.")
        labels = self._checked_labels(batch)
        logits = self.class_logits(batch)
        loss, found = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1)
        predicted, true = (F.one_hot(x, self.num_labels).double() for x in (found, labels))
        columns = [torch.ones_like(loss), loss, found == labels]
        statistics = [torch.stack([c.double() for c in columns], dim=1), predicted * true, predicted, true]
        return Scores(
            torch.cat(statistics, dim=1),
            {"loss": ratio(1, 0), "accuracy": ratio(2, 0), "f1": macro_f1(3, self.num_labels)},
        )

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Classify each example.

        Returns:
            For each example ``label`` (the class's number), ``label_name`` and ``probabilities`` (one per class); with
            several labels ``labels``, ``label_names`` (those with a probability of at least 1/2) and ``probabilities``;
            for regression ``value``, a number or a list of them.
        """
        logits = self.class_logits(batch).cpu()
        if self.problem_type == "regression":
            return [{"value": row if self.num_labels > 1 else row[0]} for row in logits.tolist()]
        names = self.label_names
        if self.problem_type == "multi_label_classification":
            found = [(row, (row >= 0.5).nonzero().flatten().tolist()) for row in logits.sigmoid()]
            return [
                {"labels": chosen, "label_names": [names[i] for i in chosen], "probabilities": row.tolist()}
                for row, chosen in found
            ]
        return [
            {"label": int(row.argmax()), "label_name": names[int(row.argmax())], "probabilities": row.tolist()}
            for row in logits.softmax(dim=-1)
        ]


def _metrics(problem_type: ProblemType, num_labels: int) -> nn.ModuleDict:
    of_classes = torchmetrics.classification
    metrics: dict[str, nn.Module] = {"loss": WeightedMean()}
    if problem_type == "regression":
        metrics |= {"mae": WeightedMean(), "r2": R2()}
    elif problem_type == "multi_label_classification":
        metrics |= {
            "accuracy": of_classes.MultilabelAccuracy(num_labels, average="micro"),
            "exact_match": of_classes.MultilabelExactMatch(num_labels),
            "f1": of_classes.MultilabelF1Score(num_labels, average="macro"),
        }
    else:
        metrics |= {
            "accuracy": of_classes.MulticlassAccuracy(num_labels, average="micro"),
            "f1": of_classes.MulticlassF1Score(num_labels, average="macro"),
        }
    return nn.ModuleDict(metrics)


def _checked_weights(weights: list[float] | None, problem_type: ProblemType, num_labels: int) -> Tensor | None:
    if weights is None:
        return None
    if problem_type == "regression":
        raise ValueError("`class_weights` are for classes; `problem_type` is 'regression'.")
    if not isinstance(weights, (list, tuple)) or len(weights) != num_labels:
        raise ValueError(f"`class_weights` must be {num_labels} numbers, one for each class, got {weights!r}.")
    for index, weight in enumerate(weights):
        check_number(f"class_weights[{index}]", weight, above=0)
    return torch.tensor(weights, dtype=torch.float32)


def _heads(model: nn.Module) -> list[str]:
    """What a transformers model has beside its body, if that has parameters."""
    body = getattr(model, "base_model", model)
    beside = {} if body is model else {name: child for name, child in model.named_children() if child is not body}
    return [name for name, child in beside.items() if next(child.parameters(), None) is not None]


def _checked_names(num_labels: int | None, label_names: list[str] | None, least: int) -> list[str]:
    if label_names is None:
        if num_labels is None:
            raise ValueError("Give `num_labels`, the number of classes, or `label_names`, their names.")
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < least:
            raise ValueError(f"`num_labels` must be an integer of at least {least}, got {num_labels!r}.")
        return [f"LABEL_{index}" for index in range(num_labels)]
    names = [str(name) for name in label_names]
    if len(names) < least or len(set(names)) < len(names):
        raise ValueError(f"`label_names` must be at least {least} different names, got {names}.")
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"`num_labels` is {num_labels}, but there are {len(names)} `label_names`: {names}.")
    return names


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
