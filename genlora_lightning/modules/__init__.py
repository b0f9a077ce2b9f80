"""Fine-tune transformers models: LightningModules made for adapters."""

from genlora_lightning.modules.base import GenLoRAModule
from genlora_lightning.modules.causal_lm import CausalLMModule
from genlora_lightning.modules.classification import SequenceClassificationModule
from genlora_lightning.modules.image_classification import ImageClassificationModule

__all__ = ["CausalLMModule", "GenLoRAModule", "ImageClassificationModule", "SequenceClassificationModule"]
