"""Fine-tune transformers models: LightningModules made for adapters."""

from genlora_lightning.modules.base import GenLoRAModule
from genlora_lightning.modules.causal_lm import CausalLMModule
from genlora_lightning.modules.classification import SequenceClassificationModule

__all__ = ["CausalLMModule", "GenLoRAModule", "SequenceClassificationModule"]
