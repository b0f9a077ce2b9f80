"""Learn from rewards with TRL's GRPOTrainer: sampled answers that begin with the right word are rewarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """One for an answer that begins with the right word, a half for one that has it somewhere."""
    texts = [text.strip().lower() for text in completions]
    return [1.0 if t.startswith(a) else 0.5 * (a in t) for t, a in zip(texts, answer, strict=True)]


def main(given: Sequence[str] | None = None) -> None:
    """Train on prompts; the answers are the reward's matter."""
    options = common.arguments(__doc__, 4, given)
    prompts = [{"prompt": row["prompt"] + "\n", "answer": row["completion"]} for row in common.rows(options.data)]
    torch.manual_seed(1)
    trainer = GRPOTrainer(
        model=options.model,
        args=GRPOConfig(
            **common.settings(options),
            num_generations=4,
            max_completion_length=8,
            model_init_kwargs={"dtype": "float32"},
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        peft_config=common.adapter(options.rank),
    )
    common.finish(trainer, options)


if __name__ == "__main__":
    main()
