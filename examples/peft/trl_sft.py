"""Fine-tune with TRL's SFTTrainer, which puts the adapter in by itself."""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main(given: Sequence[str] | None = None) -> None:
    """Train on prompts and completions; the loss is that of the completions."""
    options = common.arguments(__doc__, 40, given)
    torch.manual_seed(1)
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(**common.settings(options), max_length=128, model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list(common.rows(options.data)),
        peft_config=common.adapter(options.rank),
    )
    common.finish(trainer, options)


if __name__ == "__main__":
    main()
