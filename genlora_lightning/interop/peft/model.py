"""Put GenLoRA into a model for PEFT, and register it there."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from typing_extensions import override

from genlora_lightning.interop.peft.config import GenLoraConfig
from genlora_lightning.interop.peft.layer import GenLoraLinear
from genlora_lightning.interop.peft_folders import PEFT_TYPE, PREFIX
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.quantized import keep_layout
from genlora_lightning.layers.sharing import share_generation, stop_sharing_generation


class GenLoraModel(BaseTuner):  # type: ignore[misc]  # PEFT's classes are untyped
    """PEFT's view of a model with GenLoRA adapters.

    Args:
        model: The model.
        peft_config: The configuration, or one for each adapter.
        adapter_name: The first adapter.
        low_cpu_mem_usage: Make parameters without memory, to be loaded.
    """

    prefix = PREFIX
    tuner_layer_cls = GenLoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @override
    def _pre_injection_hook(self, model: nn.Module, config: GenLoraConfig, adapter_name: str) -> None:
        keep_layout(model)

    @override
    def _post_injection_hook(self, model: nn.Module, config: GenLoraConfig, adapter_name: str) -> None:
        share_generation(model)  # adapters that are added later are found in each forward

    @override
    def _create_and_replace(
        self,
        peft_config: GenLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, GenLoraLinear):
            target.update_layer(adapter_name, peft_config)
            return
        quantization = get_quantization_kwargs(self.model)
        _check_linear(target, current_key, quantization)
        layer = GenLoraLinear(target, adapter_name, peft_config, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # one that is added later is not trained by itself
        self._replace_module(parent, target_name, layer, target)

    @override
    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # PEFT casts parameters; what is fixed takes part in the same formula.
        for layer in self.model.modules():
            if isinstance(layer, GenLoraLinear) and adapter_name in layer.genlora_A:
                factors: tuple[Any, Any] = layer.genlora_A[adapter_name], layer.genlora_B[adapter_name]
                for factor in factors:
                    for buffer in factor.buffers(recurse=False):
                        buffer.data = buffer.data.to(factor.own_dtype)

    @override
    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_sharing_generation(model)
        return model


def _check_linear(target: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    if isinstance(target, AdaptedLayer):
        raise TypeError(
            f"{name} has an adapter of genlora_lightning itself. Load the base without it, or give PEFT the adapter's "
            "folder: `genlora convert ADAPTER BASE OUT` makes one that `PeftModel.from_pretrained` loads."
        )
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = resolve_quantization_backend(base, **quantization)
    is_linear = AdaptedLinear.matrix_shape(base) is not None or getattr(backend, "layer_type", None) == "linear"
    if not is_linear or not hasattr(base, "weight"):
        raise TypeError(
            f"{name} is a {type(base).__name__}, which GenLoRA cannot adapt: linears (quantized or not) and "
            "transformers' Conv1D can be. Leave it out of `target_modules`."
        )


def register() -> None:
    """Register the kind with PEFT; once is enough."""
    if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=GenLoraConfig, model_cls=GenLoraModel)
