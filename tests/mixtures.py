"""Tiny random mixtures of experts of transformers, of each way to store and to compute experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from genlora_lightning.injection.inject import adapter_parameters

_SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_CONFIGS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SMALL, num_local_experts=5),
    "qwen3": lambda: transformers.Qwen3MoeConfig(**_SMALL, num_experts=5),
    "deepseek": lambda: transformers.DeepseekV3Config(
        **_SMALL | {"head_dim": 4}, n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SMALL, num_local_experts=5, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip
KINDS = tuple(_CONFIGS)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(kind: str = "qwen3", experts: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose weights are the same each time; of deviation 0.2, so that the experts have a say."""
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 has no stacks of experts but some models' own")
    config = _CONFIGS[kind]()
    config._experts_implementation = experts
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)
    torch.manual_seed(0)  # what was drawn so far depends on the dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def perturb(model: nn.Module) -> nn.Module:
    """Give all adapters values at which they act."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model
