"""List the names that commands offer: tasks, and the shapes of well-known models. Imports nothing."""

from __future__ import annotations

from typing import Any

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }


# Shapes of the Llama 3 family, for planning where no hub is in reach.
SHAPES = {
    "llama-1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama-8b": _llama(4096, 14336, 32, 32),
    "llama-70b": _llama(8192, 28672, 80, 64),
    "llama-405b": _llama(16384, 53248, 126, 128),
}
