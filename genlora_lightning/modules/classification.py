"""Fine-tune a text classifier (or a regression): an encoder or a decoder, its head trained with the adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.quantization import Quantization
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.data.classification import ProblemType
from genlora_lightning.injection.peft_adapters import PeftConfigLike
from genlora_lightning.modules.base import Dtype
from genlora_lightning.modules.classifier import ClassifierModule
from genlora_lightning.training.optim import OptimizerConfig

_log = rank_zero_logger(__name__)

_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class SequenceClassificationModule(ClassifierModule):
    """Fine-tune a transformers model to put texts into classes, or to predict numbers from them.

    The head (what the model has outside its ``base_model``) and modules that the checkpoint lacks, such as a pooler,
    are trained in full beside the adapters, in float32 whatever the base's dtype.

    Batches are dictionaries of ``input_ids`` and ``attention_mask``, each (examples, tokens), and ``labels``, which may
    be missing in prediction. Logged: ``train_loss``; for validation and test, over the whole split, as ``val_…`` and
    ``test_…``, what belongs to ``problem_type``:

    - ``single_label_classification``: labels are classes (examples). ``loss``, the mean cross entropy; ``accuracy``;
      ``f1``, the mean of the classes' F1.
    - ``multi_label_classification``: labels are 0 or 1 (examples, labels), floating point. ``loss``, the mean binary
      cross entropy; ``accuracy``, the share of all labels of all examples that are right; ``exact_match``, the share of
      examples whose labels are all right; ``f1``, the mean of the labels' F1.
    - ``regression``: labels are numbers (examples), or (examples, values) if there are several. ``loss``, the mean
      squared error; ``mae``, the mean absolute error; ``r2``, the share of the variance that is explained (NaN for a
      single example).

    Args:
        model: Local folder or name on the Hugging Face Hub.
        num_labels: Number of classes, or of values for regression; may be left out if ``label_names`` are given.
        label_names: Names of the classes, in the order of the labels.
        problem_type: What the head predicts.
        class_weights: A factor above zero for each class. With one label an example, on the losses of its examples,
            and the mean is weighted: ``Σ w·loss / Σ w``; with several, on the loss of the label where it is 1.
        adapter: What to adapt, and how; as a dictionary with ``kind`` for another kind than GenLoRA; GenLoRA's
            defaults if ``None``. Leave it out if the trainer has a GenLoRAFinetuning
            callback. The head is added to its ``modules_to_train``.
        optimizer: AdamW and its schedule; the defaults if ``None``.
        dtype: Dtype of the frozen base's weights; ``"auto"``: the one they are stored in, or float32 on a CPU without
            bfloat16 arithmetic. Adapters are always float32.
        revision: Branch, tag or commit on the Hub.
        attn_implementation: transformers' attention, such as ``"sdpa"`` or ``"eager"``; its choice if ``None``.
        trust_remote_code: Run the Python code that comes with the model.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        low_memory: Read the weights only once the model is sharded, each process what it keeps; for FSDP.
        quantization: Quantize the frozen base while it is loaded: ``"nf4"`` or ``"int8"`` by bitsandbytes,
            ``"int8-weight-only"`` or ``"float8"`` by torchao (extra ``quant``).
        model_kwargs: More arguments for ``from_pretrained``; plain values, because checkpoints hold them.

    Raises:
        TypeError: An argument holds something else than plain values.
        ValueError: The number of classes is missing, less than 2, or not that of the names or the weights.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(
        self,
        model: str,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        problem_type: ProblemType = "single_label_classification",
        class_weights: list[float] | None = None,
        adapter: dict[str, Any] | AdapterConfig | PeftConfigLike | None = None,
        optimizer: OptimizerConfig | dict[str, Any] | None = None,
        dtype: Dtype = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
        low_memory: bool = False,
        quantization: Quantization | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            num_labels=num_labels,
            label_names=label_names,
            problem_type=problem_type,
            class_weights=class_weights,
            adapter=adapter,
            optimizer=optimizer,
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            gradient_checkpointing=gradient_checkpointing,
            low_memory=low_memory,
            quantization=quantization,
            model_kwargs=model_kwargs,
        )

    @override
    def prepare_model(self, model: Any) -> None:
        self._ensure_pad_token(model)
        text_config = model.config.get_text_config()
        if getattr(text_config, "use_cache", False):
            text_config.use_cache = False

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
        _log.info(f"{self.source!r} has no pad token; its end-of-text token {end} takes the place.")
        config.pad_token_id = model.config.pad_token_id = end

    @override
    def class_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits (examples, classes), or the values (examples, values) of a regression, in float32."""
        inputs = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        model: Any = self.adapter_root()
        # Decoders look for their pad token to find a text's end. Let them find it, whatever the batch was padded with.
        pad = model.config.get_text_config().pad_token_id
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
        logits: Tensor = model(**inputs).logits.float()
        return logits
