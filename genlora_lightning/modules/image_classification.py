"""Fine-tune an image classifier: a vision transformer or another backbone, its head trained with the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.quantization import Quantization
from genlora_lightning.injection.peft_adapters import PeftConfigLike
from genlora_lightning.modules.base import Dtype
from genlora_lightning.modules.classifier import ClassifierModule
from genlora_lightning.training.optim import OptimizerConfig


class ImageClassificationModule(ClassifierModule):
    """Fine-tune a transformers model to put pictures into classes.

    Any model that ``AutoModelForImageClassification`` loads and that has linears: ViT, DINOv2, Swin, ConvNeXt, … The
    head (what the model has outside its ``base_model``) and modules that the checkpoint lacks are trained in full
    beside the adapters, in float32 whatever the base's dtype. A head in the checkpoint is kept if it is for as many
    classes, else it is replaced.

    Batches are dictionaries of ``pixel_values`` (pictures, channels, height, width), as the model's image processor
    makes them, and ``labels`` (pictures), which may be missing in prediction. Logged: ``train_loss``; for validation
    and test, over the whole split, as ``val_…`` and ``test_…``: ``loss``, the mean cross entropy; ``accuracy``; ``f1``,
    the mean of the classes' F1.

    Args:
        model: Local folder or name on the Hugging Face Hub.
        num_labels: Number of classes; may be left out if ``label_names`` are given.
        label_names: Names of the classes, in the order of the labels.
        class_weights: A factor above zero for each class, on the losses of its pictures; the mean is weighted:
            ``Σ w·loss / Σ w``.
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

    auto_class = "AutoModelForImageClassification"
    token_fields = ()

    def __init__(
        self,
        model: str,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
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
            problem_type="single_label_classification",
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
    def count_tokens(self, batch: dict[str, Any]) -> int:  # type: ignore[override]
        """Pictures have no tokens."""
        return 0

    @override
    def class_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits (pictures, classes) in float32.

        Raises:
            ValueError: The batch has no ``pixel_values`` (pictures, channels, height, width).
        """
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else None
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"The batch's `pixel_values` must be a tensor (pictures, channels, height, width), got {found}. The "
                "model's image processor makes them, with `return_tensors='pt'`."
            )
        model: Any = self.adapter_root()
        logits: Tensor = model(pixel_values=pixels.to(model.dtype)).logits.float()
        return logits
