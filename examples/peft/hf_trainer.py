"""Fine-tune with transformers' Trainer: a PEFT model like any other."""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

LENGTH = 128


def main(given: Sequence[str] | None = None) -> None:
    """Train on prompts and completions; the loss is that of the completions."""
    options = common.arguments(__doc__, 60, given)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, common.adapter(options.rank))

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"] + "\n").input_ids
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        return {"input_ids": [*prompt, *answer][-LENGTH:], "labels": [*[-100] * len(prompt), *answer][-LENGTH:]}

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**common.settings(options)),
        train_dataset=[tokenized(row) for row in common.rows(options.data)],
        data_collator=collate,
    )
    common.finish(trainer, options)


if __name__ == "__main__":
    main()
