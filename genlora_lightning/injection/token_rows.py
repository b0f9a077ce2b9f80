"""Find the embeddings and heads of which rows are trained in full (``tokens_to_train``), and the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.token_rows import TokenRowsConfig
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.targets import match_modules
from genlora_lightning.injection.uncalled import uncalled_layers
from genlora_lightning.layers.quantized import is_quantized
from genlora_lightning.layers.sites import obstacle

_FIELD = "tokens_to_train"


def token_rows(
    model: nn.Module, config: AdapterConfig, taken: Mapping[int, str]
) -> dict[str, tuple[nn.Module, AdapterConfig]]:
    """The modules of which rows are trained, and the rows, by their names.

    Args:
        model: A model without adapters.
        config: The configuration.
        taken: What the modules are that are adapted or trained otherwise (by id), for messages.

    Raises:
        ValueError: A token is a string, or there is no such row, a name matches nothing, or a module or one that is
            tied to it cannot have rows of its own.
    """
    found = _named(model, config)
    strings = next(([t for t in tokens if isinstance(t, str)] for tokens in found.values()), [])
    if strings:
        raise ValueError(
            f"`{_FIELD}` names {strings[0]!r}, and there is no tokenizer here to look it up: give ids "
            "(`tokenizer.convert_tokens_to_ids([…])`). The modules for texts look strings up by themselves."
        )
    by_weight: dict[int, list[int]] = {}
    modules = dict(plain_modules(model))
    for name, given in found.items():
        tokens = sorted(token for token in given if isinstance(token, int))
        module = modules[name]
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            raise ValueError(
                f"`{_FIELD}` names {name}, which is a {type(module).__name__}: name embeddings or linears."
            )
        if by_weight.setdefault(id(module.weight), tokens) != tokens:
            raise ValueError(f"`{_FIELD}` has other tokens for {name} than for what it is tied to: give it the same.")
    users = {
        name: module
        for name, module in (modules.items() if by_weight else ())
        if any(id(parameter) in by_weight for parameter in module._parameters.values())
    }
    uncalled = uncalled_layers(model) if users else {}
    rows: dict[str, tuple[nn.Module, AdapterConfig]] = {}
    for name, module in users.items():
        weight: Any = module.weight
        reason = obstacle(module)
        if id(module) in taken:
            reason = f"it is {taken[id(module)]}"
        elif not isinstance(module, (nn.Embedding, nn.Linear)):
            reason = f"it is a {type(module).__name__}, whose forward may do anything with them"
        elif id(module) in uncalled:
            reason = f"{uncalled[id(module)]} reads its weight without calling it"
        elif is_quantized(weight) or not weight.is_floating_point():
            reason = "it is quantized"
        if reason is not None:
            raise ValueError(f"Rows of {name} cannot be trained in full (`{_FIELD}`): {reason}.")
        tied = sum(other.weight is weight for other in users.values()) > 1
        rows[name] = module, TokenRowsConfig(tokens=by_weight[id(weight)], tied=tied)
    return rows


def untied_heads(model: nn.Module, named: Collection[str]) -> list[str]:
    """Output heads of a transformers model that have a weight of their own, and are not among the named modules."""
    heads = (getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules())
    own = {id(head) for head in heads if isinstance(head, nn.Linear)}
    return [name for name, module in plain_modules(model) if id(module) in own and name not in named]


def _named(model: nn.Module, config: AdapterConfig) -> dict[str, list[int | str]]:
    """The tokens by the full names of modules that a configuration names, or means."""
    given = config.tokens_to_train
    if isinstance(given, dict):
        return {name: tokens for pattern, tokens in given.items() for name in match_modules(model, [pattern], _FIELD)}
    if not given:
        return {}
    names = {id(module): name for name, module in plain_modules(model)}
    for module in model.modules():
        try:
            embedding = getattr(module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Embedding) and id(embedding) in names:
            return {names[id(embedding)]: given}
    embeddings = [name for name, module in plain_modules(model) if isinstance(module, nn.Embedding)]
    if len(embeddings) != 1:
        known = f"there are {', '.join(embeddings[:5])}" if embeddings else "there is none"
        raise ValueError(
            f"`{_FIELD}` is for the input embedding, which this {type(model).__name__} does not tell: {known}. Give "
            f"the tokens by its name: {{name: {given!r:.80}}}."
        )
    return {embeddings[0]: given}
