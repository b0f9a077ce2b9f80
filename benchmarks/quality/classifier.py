"""The model of the classification tasks: a backbone, the mean over its tokens, and a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Logits from the mean of a backbone's last hidden states; the head starts from the seed, alike for all methods."""

    def __init__(self, base: nn.Module, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Linear(width, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 0.02, generator=generator)
            self.head.bias.zero_()

    def forward(self, *, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits ``(batch, num_classes)``; the mean is over the tokens of the mask, if one is given."""
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        hidden = self.base(**inputs, **masked).last_hidden_state.float()
        if attention_mask is None:
            return self.head(hidden.mean(1))
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((hidden * mask).sum(1) / mask.sum(1))
