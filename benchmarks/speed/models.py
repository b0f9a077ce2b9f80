"""The models, and the arms: what is put on a copy of one, whose base weights all copies share."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing, read_config, repeated_blocks
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.planning.budget import fit_budget

from .plan import Cell, rank_if_sized

_RATE = 1e-4


def _smollm2(dtype: torch.dtype) -> Any:
    from benchmarks.quality.language import model_folder

    return transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype)


def _minilm(dtype: torch.dtype) -> Any:
    from benchmarks.quality.data import minilm_folder

    model = transformers.AutoModel.from_pretrained(minilm_folder(), dtype=dtype)
    model.pooler = None
    return model


_TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def _tiny(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(**_TINY, num_hidden_layers=4, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).to(dtype)


def _tiny_encoder(dtype: torch.dtype) -> Any:
    config = transformers.BertConfig(**_TINY, num_hidden_layers=4)
    return transformers.BertModel(config, add_pooling_layer=False).to(dtype)


_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}


def _two_blocks(name: str) -> Any:
    config = read_config(name)
    config.update({"num_hidden_layers": 2, "vocab_size": 1024, "pad_token_id": None})
    return config


def _random(config: Any) -> Callable[[torch.dtype], Any]:
    """A language model of random weights, made on the default device."""
    return lambda dtype: transformers.AutoModelForCausalLM.from_config(config(), dtype=dtype)


MODELS: dict[str, Callable[[torch.dtype], Any]] = {
    "smollm2": _smollm2,
    "minilm": _minilm,
    "tiny": _tiny,
    "tiny-encoder": _tiny_encoder,
    # Of random weights: for what only depends on shapes, where no weights can be fetched.
    "random-smollm2": _random(
        lambda: transformers.LlamaConfig(**_SMOLLM2, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    ),
    "random-1b": _random(lambda: read_config("llama-1b")),
    "random-8b": _random(lambda: read_config("llama-8b")),
    # Two blocks with a small vocabulary: what a step costs at that width.
    "random-1b-blocks": _random(lambda: _two_blocks("llama-1b")),
}
_ENCODERS = ("minilm", "tiny-encoder")


@lru_cache(maxsize=2)
def load_base(name: str, dtype: torch.dtype, device: str) -> Any:
    """A model, frozen, with weights in memory that is its own (and no file's).

    Raises:
        FileNotFoundError: Its folder is not there; the message says how to make it.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device) if name.startswith("random-") else nullcontext():
        model = MODELS[name](dtype)
    model = model.to(device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def sharing_copy(model: Any) -> Any:
    """A copy of a model that has the very parameters and buffers of it."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def targets(model: nn.Module) -> list[str]:
    """Names of all linears in a model's blocks: not of its head."""
    blocks = repeated_blocks(model)
    assert blocks is not None
    inside = {id(module) for module in blocks.modules()}
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]


def put_on(name: str, model: Any, rank: int) -> Any:
    """Put an arm's adapters on a model, in place; what is then to be called."""
    names = targets(model)
    torch.manual_seed(0)
    if own := rank_if_sized(name):
        from benchmarks.quality.methods import METHODS

        layers = {name: model.get_submodule(name) for name in names}
        shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        matrices = [MatrixShape(layer.out_features, layer.in_features) for layer in layers.values()]
        fitted = fit_budget(GenLoRAConfig(), matrices, rank * sum(map(sum, matrices))).config
        latents = {key: getattr(fitted, key) for key in ("num_latents_a", "num_latents_b")}
        sizes = METHODS["genlora"].size(shapes, rank, rank=own, **latents)
        inject_adapters(model, GenLoRAConfig.from_dict({**sizes, "target_modules": names}))
    elif name.startswith("genlora"):
        groups = re.search(r"-g(\d+)$", name)
        sizes = {"num_groups_b": int(groups[1])} if groups else {}
        inject_adapters(model, GenLoRAConfig(rank=rank, target_modules=names, **sizes))
    elif name == "our-lora":
        # as PEFT's LoRA is configured below
        inject_adapters(model, LoRAConfig(rank=rank, alpha=2 * rank, scaling="rank", target_modules=names))
    elif name == "floor":
        model.enable_input_require_grads()
    elif name != "base":
        return _put_peft_on(name, model, rank, names)
    return model


def _put_peft_on(name: str, model: Any, rank: int, names: list[str]) -> Any:
    import peft

    config: peft.PeftConfig = peft.VeraConfig(r=rank, target_modules=names)
    if name.startswith("lora"):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    with warnings.catch_warnings():
        # PEFT asks transformers for it, which is going to rename it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=name != "lora-bf16")


def adapted_modules(model: Any, names: list[str]) -> list[nn.Module]:
    """The modules that stand where the linears of these names stood."""
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return [inner.get_submodule(name) for name in names]


def base_of(name: str, cell: Cell, device: str) -> Any:
    """The frozen base that an arm's model is a copy of."""
    is_narrow = cell.precision == "bf16" or name.endswith("-bf16")
    return load_base(cell.model, torch.bfloat16 if is_narrow else torch.float32, device)


def make_model(name: str, cell: Cell, device: str) -> Any:
    """A model with an arm's adapters."""
    model = sharing_copy(base_of(name, cell, device))
    if cell.checkpointing:
        enable_gradient_checkpointing(model)
    return put_on(name, model, cell.rank)


@dataclass
class Arm:
    """A model that is trained, with its own adapters and optimizer.

    Args:
        cell: The setting.
        name: A key of :data:`~benchmarks.speed.plan.ARMS`, or "genlora-g21" for 21 groups of B.
        model: What is called.
        batches: Token ids ``(batch, tokens)`` of a step's micro-batches.
        optimizer: ``None`` where nothing is trained.
    """

    cell: Cell
    name: str
    model: Any
    batches: list[Tensor]
    optimizer: torch.optim.Optimizer | None

    def loss(self, ids: Tensor) -> Tensor:
        """The loss of a micro-batch, as a share of the step's."""
        with autocast(self.cell, ids.device):
            return loss_of(self.cell, self.model, ids) / len(self.batches)

    def step(self) -> None:
        """Forwards, backwards, and the optimizer's step."""
        once: AbstractContextManager[None] = nullcontext()
        if self.name == "genlora-once":
            once = generated_once(self.model)
        with once:
            for ids in self.batches:
                self.loss(ids).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def make_arm(name: str, cell: Cell, device: str) -> Arm:
    """An arm, ready to be trained."""
    model = make_model(name, cell, device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The library's own choice, and the fastest, for every arm.
    optimizer = torch.optim.AdamW(trained, lr=_RATE, fused=True) if trained else None
    return Arm(cell, name, model, make_batches(cell, device), optimizer)


def make_batches(cell: Cell, device: str) -> list[Tensor]:
    """Random token ids, the same for every arm."""
    vocabulary = base_of("base", cell, device).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (cell.accumulation, cell.batch, cell.tokens)
    return [*torch.randint(3, vocabulary, shape, generator=generator).to(device)]


def loss_of(cell: Cell, model: Any, ids: Tensor) -> Tensor:
    """Of a language model its own loss; of an encoder the mean square of what it gives."""
    if is_language(cell):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    hidden: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.float().square().mean()


def is_language(cell: Cell) -> bool:
    """Whether the model has a head and can generate."""
    return cell.model not in _ENCODERS


def autocast(cell: Cell, device: torch.device | str) -> torch.autocast:
    """The cell's precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cell.precision != "fp32")
