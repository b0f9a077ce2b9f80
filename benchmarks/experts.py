"""What adapters of a mixture's experts have and cost: parameters on the shapes of known mixtures, and one layer's step.

``python -m benchmarks.experts`` prints three tables. No weights are read: the models are built on the meta device, from
the sizes in their configurations; the layer has random ones.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.architectures import build_on_meta
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.experts import AdaptedStack
from genlora_lightning.text import text_table

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
SHAPES: dict[str, Any] = {
    "Qwen3-30B-A3B": transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    ),
    "Mixtral-8x7B": transformers.MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "gpt-oss-120b": transformers.GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=128, num_experts_per_tok=4,
    ),
}  # fmt: skip


def count() -> str:
    """A table of the parameters on the shapes of known mixtures."""
    rows = []
    for name, config in SHAPES.items():
        own = []
        for parameters in ([], PARAMETERS):
            for adapter in (
                LoRAConfig(rank=16, target_parameters=parameters),
                GenLoRAConfig(target_parameters=parameters),
            ):
                model = build_on_meta(config, "causal-lm", torch.bfloat16)
                size = sum(parameter.numel() for parameter in model.parameters())
                own.append(f"{inject_adapters(model, adapter).adapter_parameters:,}")
        rows.append((name, f"{size:,}", *own))
    header = ("model", "parameters", "LoRA 16, linears", "GenLoRA, linears", "LoRA 16, all", "GenLoRA, all")
    return text_table(header, rows)


def count_shared() -> str:
    """A table of the parameters of the experts alone, with what they may have together."""
    kinds: dict[str, AdapterConfig] = {
        "LoRA 16": LoRAConfig(rank=16, target_parameters=PARAMETERS),
        "LoRA 16, one A": LoRAConfig(rank=16, target_parameters=PARAMETERS, share_over_experts="a"),
        "GenLoRA": GenLoRAConfig(target_parameters=PARAMETERS),
        "GenLoRA, one generator": GenLoRAConfig(target_parameters=PARAMETERS, share_over_experts="generator"),
        "GenLoRA, one A": GenLoRAConfig(target_parameters=PARAMETERS, share_over_experts="a"),
    }
    rows = []
    for name, config in SHAPES.items():
        own = []
        for kind in kinds.values():
            model = build_on_meta(config, "causal-lm", torch.bfloat16)
            report = inject_adapters(model, replace(kind, target_modules=[]))
            layers = adapter_layers(model).values()
            assert report.adapter_parameters == sum(kind.count_all(layer.shape) for layer in layers)
            own.append(f"{report.adapter_parameters:,}")
        rows.append((name, *own))
    return text_table(("model", *kinds), rows)


class Layer(nn.Module):
    """The experts of one layer, as a model that can be adapted."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, experts_implementation="eager"
        )
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts."""
        output: Tensor = self.experts(x, index, weights)
        return output


def _step(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, int]:
    """Seconds of a forward and backward, and the bytes that the forward keeps beside parameters."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs[0].clone().requires_grad_(), *inputs[1:])
    output.sum().backward()
    taken = time.perf_counter() - start
    model.zero_grad()
    return taken, sum(kept.values())


def measure(*, experts: int = 32, hidden: int = 512, intermediate: int = 256, tokens: int = 256, top_k: int = 4) -> str:
    """A table of one layer's step, with the sums W + ΔW formed and without; the fastest of 4, interleaved."""
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    inputs = torch.randn(tokens, hidden), index, torch.rand(tokens, top_k)
    models: dict[str, nn.Module] = {"frozen": Layer(experts, hidden, intermediate)}
    size = sum(parameter.numel() * 4 for parameter in models["frozen"].parameters())
    for adapter in (LoRAConfig(rank=16, target_parameters=PARAMETERS), GenLoRAConfig(target_parameters=PARAMETERS)):
        model = copy.deepcopy(models["frozen"])
        inject_adapters(model, adapter)
        models[adapter.title] = model
    beside = AdaptedStack.current_weight
    found: dict[str, list[tuple[float, int]]] = {}
    try:
        for _ in range(4):
            for name, model in models.items():
                for formed in (False, True) if name != "frozen" else (False,):
                    AdaptedStack.current_weight = (lambda stack: beside(stack).whole()) if formed else beside  # type: ignore[method-assign,union-attr]
                    found.setdefault(f"{name}, W + ΔW formed" if formed else name, []).append(_step(model, inputs))
    finally:
        AdaptedStack.current_weight = beside  # type: ignore[method-assign]
    fastest = min(found["frozen"])[0]
    rows = [(name, f"{min(runs)[0] / fastest:.2f}", f"{runs[-1][1] / 2**20:.1f}") for name, runs in found.items()]
    return text_table((f"layer of {size / 2**20:.0f} MiB", "time, of frozen's", "MiB kept for the backward"), rows)


if __name__ == "__main__":
    print(count())
    print(count_shared())
    print(measure())
