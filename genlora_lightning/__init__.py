"""GenLoRA for PyTorch Lightning: low-rank adapters whose matrices are generated, not stored.

Names are imported when they are first used, so that the adapter itself (config, layers, injection, files) is at hand
without importing Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from genlora_lightning.accumulation import generated_once as generated_once
    from genlora_lightning.adapter_io import load_adapter as load_adapter
    from genlora_lightning.adapter_io import save_adapter as save_adapter
    from genlora_lightning.analysis import effective_rank as effective_rank
    from genlora_lightning.base_identity import WrongBaseError as WrongBaseError
    from genlora_lightning.callback import GenLoRAFinetuning as GenLoRAFinetuning
    from genlora_lightning.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from genlora_lightning.config import GenLoRAConfig as GenLoRAConfig
    from genlora_lightning.coverage import CoverageReport as CoverageReport
    from genlora_lightning.data import InstructionDataModule as InstructionDataModule
    from genlora_lightning.data import TextClassificationDataModule as TextClassificationDataModule
    from genlora_lightning.digests import DamagedFileError as DamagedFileError
    from genlora_lightning.generation import cached_factors as cached_factors
    from genlora_lightning.generation import forget_factors as forget_factors
    from genlora_lightning.generation import set_fused as set_fused
    from genlora_lightning.generator import RBFGenerator as RBFGenerator
    from genlora_lightning.injection import adapter_parameters as adapter_parameters
    from genlora_lightning.injection import adapters_disabled as adapters_disabled
    from genlora_lightning.injection import effective_ranks as effective_ranks
    from genlora_lightning.injection import inject_adapters as inject_adapters
    from genlora_lightning.injection import remove_adapters as remove_adapters
    from genlora_lightning.inspection import describe_adapter as describe_adapter
    from genlora_lightning.inspection import verify_adapter as verify_adapter
    from genlora_lightning.layers import AdaptedLinear as AdaptedLinear
    from genlora_lightning.loading import convert_checkpoint as convert_checkpoint
    from genlora_lightning.loading import load_module as load_module
    from genlora_lightning.lora import LoRAConfig as LoRAConfig
    from genlora_lightning.lora_export import LoRAExport as LoRAExport
    from genlora_lightning.lora_export import export_lora as export_lora
    from genlora_lightning.lora_import import import_lora as import_lora
    from genlora_lightning.merged_model import save_merged as save_merged
    from genlora_lightning.merging import MergeReport as MergeReport
    from genlora_lightning.merging import adapters_merged as adapters_merged
    from genlora_lightning.merging import merge_adapters as merge_adapters
    from genlora_lightning.merging import unmerge_adapters as unmerge_adapters
    from genlora_lightning.modules import CausalLMModule as CausalLMModule
    from genlora_lightning.modules import GenLoRAModule as GenLoRAModule
    from genlora_lightning.modules import SequenceClassificationModule as SequenceClassificationModule
    from genlora_lightning.optim import OptimizerConfig as OptimizerConfig
    from genlora_lightning.resumable import ResumableDataLoader as ResumableDataLoader

_HOME = {
    "AdaptedLinear": "layers",
    "AtomicCheckpointIO": "checkpoint_io",
    "CausalLMModule": "modules",
    "CoverageReport": "coverage",
    "DamagedFileError": "digests",
    "GenLoRAConfig": "config",
    "GenLoRAFinetuning": "callback",
    "GenLoRAModule": "modules",
    "InstructionDataModule": "data",
    "LoRAConfig": "lora",
    "LoRAExport": "lora_export",
    "MergeReport": "merging",
    "OptimizerConfig": "optim",
    "RBFGenerator": "generator",
    "ResumableDataLoader": "resumable",
    "SequenceClassificationModule": "modules",
    "TextClassificationDataModule": "data",
    "WrongBaseError": "base_identity",
    "adapter_parameters": "injection",
    "adapters_disabled": "injection",
    "adapters_merged": "merging",
    "cached_factors": "generation",
    "convert_checkpoint": "loading",
    "describe_adapter": "inspection",
    "effective_rank": "analysis",
    "effective_ranks": "injection",
    "export_lora": "lora_export",
    "forget_factors": "generation",
    "generated_once": "accumulation",
    "import_lora": "lora_import",
    "inject_adapters": "injection",
    "load_adapter": "adapter_io",
    "load_module": "loading",
    "merge_adapters": "merging",
    "remove_adapters": "injection",
    "save_adapter": "adapter_io",
    "save_merged": "merged_model",
    "set_fused": "generation",
    "unmerge_adapters": "merging",
    "verify_adapter": "inspection",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
