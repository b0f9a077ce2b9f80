"""Find the output heads of a model: linears that are new, or no part of what was trained before."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genlora_lightning.layers.sites import is_linear

# Reasons for leaving a linear alone that its user should know of.
NEW_HEAD = "output head; if it is new, name it in `modules_to_train`"
NEW_LINEAR = "new, as its values say, and frozen at random: name it in `modules_to_train`"
UNTIED = (
    "tied before to a module that is trained in full, and now a weight of its own, as in the base; to train both as "
    "one, name both in `modules_to_train`"
)
UNTIED_HEAD = (
    "a head with a weight of its own, whose rows of `tokens_to_train` stay as they are; to train them, too, give "
    "`tokens_to_train` by names of modules, the head's among them"
)
TIED_HEAD = "output head, tied to an embedding"
TIED_TO_ADAPTED = "tied to an embedding that is adapted, and goes on with the base's weight"
_SAMPLE = 4096


def output_heads(model: nn.Module) -> dict[int, str]:
    """The linears that are output heads (by id), with the reason why they are taken for one."""
    heads: dict[int, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    in_transformers: set[int] = set()
    for module in model.modules():
        if is_linear(module) and id(module.weight) in embeddings:
            heads[id(module)] = TIED_HEAD
        # A transformers model says by itself what its body is; asked by attribute, so that we need not import it.
        if not hasattr(module, "base_model_prefix"):
            continue
        in_transformers |= {id(m) for m in module.modules()}
        body = getattr(module, "base_model", None)
        if isinstance(body, nn.Module) and body is not module:
            inside = {id(m) for m in body.modules()}
            heads |= {id(m): NEW_HEAD for m in _linears(module) if id(m) not in inside and id(m) not in heads}
    outside = [m for m in _linears(model) if id(m) not in in_transformers and id(m) not in heads]
    if in_transformers:
        return heads | {id(m): NEW_HEAD for m in outside}
    return heads | {id(m): NEW_LINEAR for m in _new_among(model, outside)}


def last_if_new(model: nn.Module) -> nn.Module | None:
    """The last linear of a model, if its values are those that it was made with: it may be a head."""
    linears = _linears(model)
    return linears[-1] if linears and is_new(linears[-1].weight) else None


def is_new(weight: object) -> bool:
    """Whether a weight's values are those that ``nn.Linear`` and convolutions are made with: uniform in ±1/√inputs.

    No training leaves all of them inside of the bounds, as they lie close to them too; a sample mostly tells.
    """
    if not (isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()):
        return False
    if weight.is_meta or weight.dim() < 2 or weight.numel() < 2:
        return False
    bound, rounding = 1 / math.sqrt(weight[0].numel()), torch.finfo(weight.dtype).eps
    for values in (weight.detach().reshape(-1)[:_SAMPLE], weight.detach()):
        largest = float(values.abs().max())
        # All of n uniform values are below this share of the bound once in a million times.
        if not bound * (1e-6 ** (1 / values.numel()) - rounding) <= largest <= bound * (1 + rounding):
            return False
    return True


def _new_among(model: nn.Module, linears: list[nn.Module]) -> Iterable[nn.Module]:
    """Those linears that are new while most of the model was trained; none where nothing can be told from them."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = [m.weight for m in model.modules() if isinstance(m, kinds) and not m.weight.is_meta]
    trained = [w for w in weights if not is_new(w) and bool((w != w.reshape(-1)[0]).any())]
    new = [linear for linear in linears if is_new(linear.weight)]
    return new if len(new) <= len(trained) else []


def _linears(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_linear(module)]
