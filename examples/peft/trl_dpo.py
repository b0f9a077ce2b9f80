"""Learn preferences with TRL's DPOTrainer; the reference is the model with its adapter switched off."""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def main(given: Sequence[str] | None = None) -> None:
    """Train on right answers as chosen and wrong ones as rejected."""
    options = common.arguments(__doc__, 18, given)
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": next(answer for answer in common.ANSWERS if answer != row["completion"]),
        }
        for row in common.rows(options.data)
    ]
    torch.manual_seed(1)
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(**common.settings(options), max_length=128, model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list(pairs),
        peft_config=common.adapter(options.rank),
    )
    common.finish(trainer, options)


if __name__ == "__main__":
    main()
