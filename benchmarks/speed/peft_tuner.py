"""Time a training step of GenLoRA as a tuner of PEFT beside PEFT's own LoRA and VeRA, interleaved, on one thread.

    python benchmarks/speed/peft_tuner.py [--rounds 5] [--layers 30]

Each adapts every linear of a model of SmolLM2-135M's shapes: random weights, float32, 4 x 128 tokens. A round takes one
step of each (forward, backward, Adam) in turn. What is printed is the median over rounds of the ratio to LoRA's step of
the same round, in CPU time, which other programs on the machine disturb less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from genlora_lightning.interop.peft import GenLoraConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, PeftConfig] = {
    "LoRA r16": LoraConfig(r=16, target_modules=TARGETS),
    "VeRA r256": VeraConfig(r=256, target_modules=TARGETS),
    "GenLoRA r16": GenLoraConfig(r=16, target_modules=TARGETS),
    "GenLoRA r64": GenLoraConfig(r=64, target_modules=TARGETS),
}


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    models = {name: get_peft_model(LlamaForCausalLM(shapes), config).train() for name, config in METHODS.items()}
    optimizers = {
        name: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for name, model in models.items()
    }
    tokens = torch.randint(0, shapes.vocab_size, (4, 128))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:  # the first one makes what is kept
                seconds[name].append(time.process_time() - start)
    lora = seconds["LoRA r16"]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, lora, strict=True))
        trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        print(f"{name:12} {statistics.median(own):6.2f} s  {ratio:5.2f} x LoRA  {trained:9,} parameters")


if __name__ == "__main__":
    main()
