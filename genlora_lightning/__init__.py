"""GenLoRA for PyTorch Lightning: low-rank adapters whose matrices are generated, not stored.

Names are imported when they are first used, so that the adapter itself (config, layers, injection, files) is at hand
without importing Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from genlora_lightning._version import __version__ as __version__

if TYPE_CHECKING:
    from genlora_lightning.adapters.genlora.config import GenLoRAConfig as GenLoRAConfig
    from genlora_lightning.adapters.genlora.generator import RBFGenerator as RBFGenerator
    from genlora_lightning.adapters.lora import LoRAConfig as LoRAConfig
    from genlora_lightning.adapters.low_rank import effective_rank as effective_rank
    from genlora_lightning.artifacts.adapter_io import load_adapter as load_adapter
    from genlora_lightning.artifacts.adapter_io import save_adapter as save_adapter
    from genlora_lightning.artifacts.inspection import describe_adapter as describe_adapter
    from genlora_lightning.artifacts.inspection import verify_adapter as verify_adapter
    from genlora_lightning.artifacts.loading import convert_checkpoint as convert_checkpoint
    from genlora_lightning.artifacts.loading import load_module as load_module
    from genlora_lightning.artifacts.merged_model import save_merged as save_merged
    from genlora_lightning.backbone.identity import WrongBaseError as WrongBaseError
    from genlora_lightning.data import InstructionDataModule as InstructionDataModule
    from genlora_lightning.data import TextClassificationDataModule as TextClassificationDataModule
    from genlora_lightning.injection.inject import adapter_parameters as adapter_parameters
    from genlora_lightning.injection.inject import adapters_disabled as adapters_disabled
    from genlora_lightning.injection.inject import effective_ranks as effective_ranks
    from genlora_lightning.injection.inject import inject_adapters as inject_adapters
    from genlora_lightning.injection.inject import remove_adapters as remove_adapters
    from genlora_lightning.injection.merging import MergeReport as MergeReport
    from genlora_lightning.injection.merging import adapters_merged as adapters_merged
    from genlora_lightning.injection.merging import merge_adapters as merge_adapters
    from genlora_lightning.injection.merging import unmerge_adapters as unmerge_adapters
    from genlora_lightning.injection.report import CoverageReport as CoverageReport
    from genlora_lightning.interop.lora_export import LoRAExport as LoRAExport
    from genlora_lightning.interop.lora_export import export_lora as export_lora
    from genlora_lightning.interop.lora_import import import_lora as import_lora
    from genlora_lightning.layers.accumulation import generated_once as generated_once
    from genlora_lightning.layers.linear import AdaptedLinear as AdaptedLinear
    from genlora_lightning.layers.sharing import cached_factors as cached_factors
    from genlora_lightning.layers.sharing import forget_factors as forget_factors
    from genlora_lightning.layers.sharing import set_fused as set_fused
    from genlora_lightning.modules import CausalLMModule as CausalLMModule
    from genlora_lightning.modules import GenLoRAModule as GenLoRAModule
    from genlora_lightning.modules import SequenceClassificationModule as SequenceClassificationModule
    from genlora_lightning.storage.digests import DamagedFileError as DamagedFileError
    from genlora_lightning.training.callback import GenLoRAFinetuning as GenLoRAFinetuning
    from genlora_lightning.training.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from genlora_lightning.training.optim import OptimizerConfig as OptimizerConfig
    from genlora_lightning.training.resumable import ResumableDataLoader as ResumableDataLoader

_HOME = {
    "AdaptedLinear": "layers.linear",
    "AtomicCheckpointIO": "training.checkpoint_io",
    "CausalLMModule": "modules",
    "CoverageReport": "injection.report",
    "DamagedFileError": "storage.digests",
    "GenLoRAConfig": "adapters.genlora.config",
    "GenLoRAFinetuning": "training.callback",
    "GenLoRAModule": "modules",
    "InstructionDataModule": "data",
    "LoRAConfig": "adapters.lora",
    "LoRAExport": "interop.lora_export",
    "MergeReport": "injection.merging",
    "OptimizerConfig": "training.optim",
    "RBFGenerator": "adapters.genlora.generator",
    "ResumableDataLoader": "training.resumable",
    "SequenceClassificationModule": "modules",
    "TextClassificationDataModule": "data",
    "WrongBaseError": "backbone.identity",
    "adapter_parameters": "injection.inject",
    "adapters_disabled": "injection.inject",
    "adapters_merged": "injection.merging",
    "cached_factors": "layers.sharing",
    "convert_checkpoint": "artifacts.loading",
    "describe_adapter": "artifacts.inspection",
    "effective_rank": "adapters.low_rank",
    "effective_ranks": "injection.inject",
    "export_lora": "interop.lora_export",
    "forget_factors": "layers.sharing",
    "generated_once": "layers.accumulation",
    "import_lora": "interop.lora_import",
    "inject_adapters": "injection.inject",
    "load_adapter": "artifacts.adapter_io",
    "load_module": "artifacts.loading",
    "merge_adapters": "injection.merging",
    "remove_adapters": "injection.inject",
    "save_adapter": "artifacts.adapter_io",
    "save_merged": "artifacts.merged_model",
    "set_fused": "layers.sharing",
    "unmerge_adapters": "injection.merging",
    "verify_adapter": "artifacts.inspection",
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
