"""GenLoRA for PyTorch Lightning: low-rank adapters whose matrices are generated, not stored.

Names are imported when they are first used, so that the adapter itself (config, layers, injection, files) is at hand
without importing Lightning.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from genlora_lightning._version import __version__ as __version__
from genlora_lightning.lazy import names_of

if TYPE_CHECKING:
    from genlora_lightning.adapters.compacter import CompacterConfig as CompacterConfig
    from genlora_lightning.adapters.genlora.config import GenLoRAConfig as GenLoRAConfig
    from genlora_lightning.adapters.lora import LoRAConfig as LoRAConfig
    from genlora_lightning.adapters.polar import PoLARConfig as PoLARConfig
    from genlora_lightning.artifacts.adapter_io import load_adapter as load_adapter
    from genlora_lightning.artifacts.adapter_io import save_adapter as save_adapter
    from genlora_lightning.artifacts.adapter_set import AdapterSet as AdapterSet
    from genlora_lightning.artifacts.inspection import describe_adapter as describe_adapter
    from genlora_lightning.artifacts.inspection import verify_adapter as verify_adapter
    from genlora_lightning.artifacts.loading import convert_checkpoint as convert_checkpoint
    from genlora_lightning.artifacts.loading import load_module as load_module
    from genlora_lightning.artifacts.merged_model import save_merged as save_merged
    from genlora_lightning.data import ImageClassificationDataModule as ImageClassificationDataModule
    from genlora_lightning.data import InstructionDataModule as InstructionDataModule
    from genlora_lightning.data import TextClassificationDataModule as TextClassificationDataModule
    from genlora_lightning.injection.inject import adapters_disabled as adapters_disabled
    from genlora_lightning.injection.inject import effective_ranks as effective_ranks
    from genlora_lightning.injection.inject import inject_adapters as inject_adapters
    from genlora_lightning.injection.inject import remove_adapters as remove_adapters
    from genlora_lightning.injection.merging import adapters_merged as adapters_merged
    from genlora_lightning.injection.merging import merge_adapters as merge_adapters
    from genlora_lightning.injection.merging import unmerge_adapters as unmerge_adapters
    from genlora_lightning.interop.lora_export import export_lora as export_lora
    from genlora_lightning.interop.lora_import import import_lora as import_lora
    from genlora_lightning.modules import CausalLMModule as CausalLMModule
    from genlora_lightning.modules import GenLoRAModule as GenLoRAModule
    from genlora_lightning.modules import ImageClassificationModule as ImageClassificationModule
    from genlora_lightning.modules import SequenceClassificationModule as SequenceClassificationModule
    from genlora_lightning.training.callback import AdapterFinetuning as AdapterFinetuning
    from genlora_lightning.training.callback import GenLoRAFinetuning as GenLoRAFinetuning
    from genlora_lightning.training.optim import OptimizerConfig as OptimizerConfig

_HOME = {
    "AdapterFinetuning": "training.callback",
    "AdapterSet": "artifacts.adapter_set",
    "CausalLMModule": "modules",
    "CompacterConfig": "adapters.compacter",
    "GenLoRAConfig": "adapters.genlora.config",
    "GenLoRAFinetuning": "training.callback",
    "GenLoRAModule": "modules",
    "ImageClassificationDataModule": "data",
    "ImageClassificationModule": "modules",
    "InstructionDataModule": "data",
    "LoRAConfig": "adapters.lora",
    "OptimizerConfig": "training.optim",
    "PoLARConfig": "adapters.polar",
    "SequenceClassificationModule": "modules",
    "TextClassificationDataModule": "data",
    "adapters_disabled": "injection.inject",
    "adapters_merged": "injection.merging",
    "convert_checkpoint": "artifacts.loading",
    "describe_adapter": "artifacts.inspection",
    "effective_ranks": "injection.inject",
    "export_lora": "interop.lora_export",
    "import_lora": "interop.lora_import",
    "inject_adapters": "injection.inject",
    "load_adapter": "artifacts.adapter_io",
    "load_module": "artifacts.loading",
    "merge_adapters": "injection.merging",
    "remove_adapters": "injection.inject",
    "save_adapter": "artifacts.adapter_io",
    "save_merged": "artifacts.merged_model",
    "unmerge_adapters": "injection.merging",
    "verify_adapter": "artifacts.inspection",
}

__all__ = ["__version__", *_HOME]


# What is said goes to whoever sets up logging; nobody who does not is bothered.
logging.getLogger(__name__).addHandler(logging.NullHandler())


__getattr__, __dir__ = names_of(__name__, _HOME)
