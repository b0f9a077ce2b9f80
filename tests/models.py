"""Tiny transformers models, made from configurations."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def tiny_llama(**changes: object):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def give_own_code(folder: Path) -> None:
    """Have the Llama in a folder be of a class that only code beside it defines."""
    (folder / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Conf(LlamaConfig):\n    model_type = 'own'\n"
        "class LM(LlamaForCausalLM):\n    config_class = Conf\n"
    )
    file = folder / "config.json"
    auto = {"AutoConfig": "own_code.Conf", "AutoModelForCausalLM": "own_code.LM"}
    own = {"model_type": "own", "architectures": ["LM"], "auto_map": auto}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2))


def tiny_bert(num_labels: int = 3):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def tiny_t5():
    from transformers import T5Config, T5ForSequenceClassification

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=2,
        num_labels=3,
        decoder_start_token_id=0,
    )
    return T5ForSequenceClassification(config)


def tiny_squeezebert():
    """Whose layers are convolutions, with groups and without."""
    from transformers import SqueezeBertConfig, SqueezeBertForSequenceClassification

    torch.manual_seed(0)
    config = SqueezeBertConfig(
        vocab_size=64,
        hidden_size=16,
        embedding_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        q_groups=2,
        num_labels=3,
    )
    return SqueezeBertForSequenceClassification(config)
