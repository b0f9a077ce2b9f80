"""What works where, declared: each kind of adapter at each site, in each place, and what is done with it afterwards.

``tests/test_support_matrix.py`` executes every cell. ``docs/support.md`` is rendered from here, by
``python -m tests.support_matrix``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from genlora_lightning import CompacterConfig, LoRAConfig, PoLARConfig
from genlora_lightning.adapters.config import AdapterConfig
from tests.conftest import small_config
from tests.mixtures import mixture
from tests.models import tiny_gpt2, tiny_llama, tiny_squeezebert

PAGE = Path(__file__).parents[1] / "docs/support.md"
VOCABULARY, WIDTH = 24, 8


# -- the rows and columns ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Where :class:`AllSites` has a site: names of layers, and of parameters."""

    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


KINDS: dict[str, AdapterConfig] = {
    "GenLoRA": small_config(),
    "LoRA": LoRAConfig(rank=3, alpha=5.0, elastic=[1, 2, 3]),  # ranks that are drawn, on all processes alike
    "LoRA with `keep_zeros`": LoRAConfig(rank=3, alpha=5.0, keep_zeros=True),
    "PoLAR": PoLARConfig(rank=3, alpha=5.0, landing=0.5),
    "Compacter": CompacterConfig(rank=4, alpha=3.0, num_products=2),
    "Compacter with `shared=False`": CompacterConfig(rank=4, alpha=3.0, num_products=2, shared=False),
}
SITES = {
    "`nn.Linear`": Site(("linear",)),
    "transformers' `Conv1D`": Site(("transposed",)),
    "`nn.Embedding`": Site(("embedding",)),
    "`nn.Conv1d`, `2d`, `3d`": Site(("line", "image", "volume")),
    "these with `groups`": Site(("grouped",)),
    "`nn.MultiheadAttention`": Site(("attention",)),
    "stacks of experts": Site(parameters=("experts.gate_up_proj", "experts.down_proj")),
}
# Strategy and `adapter_sharding`.
PLACES = {
    "one process": ("single", "replicate"),
    "DDP": ("ddp", "replicate"),
    "FSDP1": ("fsdp1", "replicate"),
    "FSDP1, sharded": ("fsdp1", "shard"),
    "FSDP2": ("fsdp2", "replicate"),
    "FSDP2, sharded": ("fsdp2", "shard"),
}
AFTERWARDS = ("merge", "export-lora", "plan")
# Models of transformers in which a plan is made: what is adapted in them, and which sites these are.
PLANNED: dict[str, tuple[Callable[[], Any], str, dict[str, list[str]], tuple[str, ...]]] = {
    "Llama": (
        lambda: tiny_llama(num_hidden_layers=1),
        "causal-lm",
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        ("`nn.Linear`", "`nn.Embedding`"),
    ),
    "GPT-2": (tiny_gpt2, "causal-lm", {"target_modules": ["c_attn"]}, ("transformers' `Conv1D`",)),
    "SqueezeBERT": (
        tiny_squeezebert,
        "sequence-classification",
        {"target_modules": ["query", "post_attention.conv1d"]},
        ("`nn.Conv1d`, `2d`, `3d`", "these with `groups`"),
    ),
    "Mixtral": (
        lambda: mixture("mixtral"),
        "causal-lm",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        ("stacks of experts",),
    ),
}

# -- the cells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """An error before anything is done, in whose message these words stand."""

    words: str


@dataclass(frozen=True)
class NoMeaning:
    """There is nothing to try; for plans alone, because everything else can be tried."""

    why: str


Outcome = Refused | NoMeaning | None  # None: it works
_SHARDED = tuple(name for name, (_, policy) in PLACES.items() if policy == "shard")
# Kinds, sites, columns (all of them where there is `None`), and what is so there. Everywhere else it works.
RULES: tuple[tuple[tuple[str, ...] | None, tuple[str, ...] | None, tuple[str, ...] | None, Outcome], ...] = (
    (("PoLAR",), None, _SHARDED, Refused("cannot be sharded: the landing field needs its matrices whole")),
    (
        ("Compacter",),
        None,
        _SHARDED,
        Refused("cannot be sharded: all layers share the matrices of its Kronecker products"),
    ),
    (
        ("LoRA with `keep_zeros`",),
        tuple(site for site in SITES if site not in ("these with `groups`", "`nn.MultiheadAttention`")),
        ("export-lora",),
        Refused("with `keep_zeros` its update is B·A masked where the base's weight is 0"),
    ),
    (
        None,
        ("these with `groups`",),
        ("export-lora",),
        Refused("PEFT's LoRA of a convolution with groups"),
    ),
    (
        None,
        ("`nn.MultiheadAttention`",),
        ("export-lora",),
        Refused("PEFT's LoRA of an nn.MultiheadAttention adapts its `out_proj`, too"),
    ),
    (
        None,
        ("`nn.MultiheadAttention`",),
        ("plan",),
        NoMeaning("a plan is of transformers' language models and classifiers of texts, which have no such layer"),
    ),
)


def outcome(kind: str, site: str, column: str) -> Outcome:
    """What is so in a cell."""
    cell = (kind, site, column)
    found = [
        what
        for *where, what in RULES
        if all(names is None or own in names for names, own in zip(where, cell, strict=True))
    ]
    assert len(found) <= 1, f"{cell} is declared twice"
    return found[0] if found else None


# -- the model ---------------------------------------------------------------------------------------------------------


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.image = nn.Conv2d(WIDTH, WIDTH, 1)
        self.volume = nn.Conv3d(WIDTH, WIDTH, 1)
        self.grouped = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.grouped(self.line(x.mT).tanh())
        rows = self.image(rows.tanh()[..., None])
        return x + self.volume(rows.tanh()[..., None])[..., 0, 0].mT


class _Rest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.linear = nn.Linear(WIDTH, 12)
        self.transposed = Conv1D(WIDTH, 12)
        self.experts = _experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.transposed(self.linear(x).tanh())
        rows = x.reshape(-1, WIDTH)
        weights, experts = rows[:, :4].softmax(-1).topk(2)  # a router without parameters
        return x + self.experts(rows, experts, weights).view_as(x)


def _experts() -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


class AllSites(nn.Module):
    """A next-token model that has every site once or more, in two blocks and around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.blocks = nn.ModuleList([_Convolutions(), _Rest()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
                if parameter.ndim > 1:  # pruned, for what keeps zeros
                    parameter[parameter.abs() < 0.1] = 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def loss(self, ids: Tensor) -> Tensor:
        """The mean cross-entropy of predicting each id from those up to the one before."""
        return F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def targets(*sites: str) -> dict[str, list[str]]:
    """What a configuration names for these sites of :class:`AllSites`."""
    return {
        "target_modules": [name for site in sites for name in SITES[site].layers],
        "target_parameters": [name for site in sites for name in SITES[site].parameters],
    }


# -- the page ----------------------------------------------------------------------------------------------------------

_HEAD = """\
# Support

What is tested for each [kind](kinds.md) at each [site](adapters.md#where), on CPUs: in one process, and in two with
gloo. Tests execute every cell: these tables are written from what they declare (`tests/support_matrix.py`).

- **One process, DDP, FSDP1, FSDP2**: losses and all that is trained equal those of one process to rounding; a run
  resumed from a checkpoint of another strategy ends with the same tensors; the adapter folder loads. In one process a
  run resumed from its own checkpoint is the same in every bit. *Sharded* is `adapter_sharding="shard"`; otherwise
  adapters are replicated.
- **merge**: outputs are the same, and after unmerging every bit is. A warning says where a module also computes with
  the weight of an adapted layer, beside calling it. **export-lora**: PEFT's outputs are the same. Both are done in one
  process, with what a run under any strategy has saved.
- **plan**: `genlora plan` counts what a run trains, in tiny models of {planned}.
- *Refused* is an error before anything is done, whose message has the words below. A dash: there is nothing to
  try.

What does not depend on kind and site, quantized bases among it, stands under
[Choose](choose.md#what-was-tested-where); for PEFT's own kinds there is
[another table](coming-from-peft.md#your-peft-adapter-in-lightning).
"""


def render() -> str:
    """The page: a table for the kinds that are alike, and the reasons."""
    columns = (*PLACES, *AFTERWARDS)
    reasons = list(dict.fromkeys(what for *_, what in RULES))

    def cell(kind: str, site: str, column: str) -> str:
        what = outcome(kind, site, column)
        number = reasons.index(what) + 1 if what is not None else 0
        return "tested" if what is None else f"{'refused' if isinstance(what, Refused) else '–'} ({number})"

    alike: dict[str, list[str]] = {}
    for kind in KINDS:
        rows = [f"| {site} | {' | '.join(cell(kind, site, column) for column in columns)} |" for site in SITES]
        alike.setdefault("\n".join(rows), []).append(kind)
    models = list(PLANNED)
    parts = [_HEAD.format(planned=f"{', '.join(models[:-1])} and {models[-1]}")]
    for table, kinds in alike.items():
        parts.append(f"## {', '.join(kinds)}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n{table}\n")
    notes = [
        f"{number}. Refused: “{what.words}”." if isinstance(what, Refused) else f"{number}. No meaning: {what.why}."
        for number, what in enumerate(reasons, 1)
        if what is not None
    ]
    return "\n".join([*parts, "## Reasons\n", *notes, ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
