"""Targets: which modules a configuration names, and clear errors for names that match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from genlora_lightning.config import ALL_LINEAR, GenLoRAConfig
from genlora_lightning.layers import linear_shape


def _named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is one of the given names or ends with one (at a dot)."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def match_modules(model: nn.Module, patterns: list[str], field: str) -> dict[str, nn.Module]:
    """The modules whose names are among the patterns or end with one; a pattern without a match is an error."""
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(_named(name, [pattern]) for name in modules):
            raise ValueError(f"`{field}` names {pattern!r}, which no module matches. {_near(pattern, modules)}")
    return {name: module for name, module in modules.items() if _named(name, patterns)}


def select_targets(
    model: nn.Module, linears: dict[str, nn.Module], config: GenLoRAConfig, trained: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the linears to adapt; what "all-linear" leaves out comes back with the reason."""
    excluded = match_modules(model, config.exclude_modules, "exclude_modules")
    inside_excluded = {id(m) for module in excluded.values() for m in module.modules()}
    inside_trained = {id(m) for module in trained.values() for m in module.modules()}
    uncalled = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    candidates: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    heads = _output_heads(model) if config.target_modules == ALL_LINEAR else {}
    for name, module in linears.items():
        if id(module) in inside_trained:
            skipped[name] = "trained in full"
        elif id(module) in inside_excluded:
            skipped[name] = "in `exclude_modules`"
        elif id(module) in uncalled:
            skipped[name] = "nn.MultiheadAttention reads its weight without calling it"
        elif id(module) in heads:
            skipped[name] = heads[id(module)]
        else:
            candidates[name] = module

    if config.target_modules == ALL_LINEAR:
        targets = candidates
    elif isinstance(config.target_modules, str):
        expression = re.compile(config.target_modules)
        targets = {name: module for name, module in candidates.items() if expression.fullmatch(name)}
        skipped = {name: reason for name, reason in skipped.items() if expression.fullmatch(name)}
    else:
        for pattern in config.target_modules:
            if not any(_named(name, [pattern]) for name in candidates):
                raise ValueError(_unmatched_target(model, pattern, candidates, skipped))
        targets = {name: module for name, module in candidates.items() if _named(name, config.target_modules)}
        skipped = {name: reason for name, reason in skipped.items() if _named(name, config.target_modules)}
    if not targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(
            f"`target_modules` {config.target_modules!r} matches none of the {len(linears)} linears."
            + (f" Left out were {reasons}." if reasons else "")
            + f" {_near(str(config.target_modules), linears)}"
        )
    return targets, skipped


def _unmatched_target(model: nn.Module, pattern: str, candidates: dict[str, nn.Module], skipped: dict[str, str]) -> str:
    for name, reason in skipped.items():
        if _named(name, [pattern]):
            return f"`target_modules` names {pattern!r}, but {name} cannot be adapted: {reason}."
    for name, module in model.named_modules():
        if name and _named(name, [pattern]):
            inner = sorted({n.rsplit(".", 1)[-1] for n in candidates if n.startswith(f"{name}.")})
            hint = f" Name its linears: {inner}." if inner else ""
            return f"`target_modules` names {pattern!r}, but {name} is a {type(module).__name__}, not a linear.{hint}"
    return f"`target_modules` names {pattern!r}, which no linear matches. {_near(pattern, candidates)}"


def _near(pattern: str, modules: dict[str, nn.Module]) -> str:
    """A sentence with the names that come nearest to one that matched nothing."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in modules}
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], last_parts, n=3, cutoff=0.5)
    close += [name for name in difflib.get_close_matches(pattern, modules, n=3, cutoff=0.6) if name not in close]
    if close:
        return f"Near matches: {', '.join(close)}."
    names = sorted(name for name in last_parts if not name.isdigit())
    return f"There are: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."


def _output_heads(model: nn.Module) -> dict[int, str]:
    """The linears that are output heads (by id), with the reason why they are taken for one."""
    heads: dict[int, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if linear_shape(module) is not None and id(module.weight) in embeddings:
            heads[id(module)] = "output head, tied to an embedding"
        # A transformers model says by itself what its body is; asked by attribute, so that we need not import it.
        body = getattr(module, "base_model", None) if hasattr(module, "base_model_prefix") else None
        if isinstance(body, nn.Module) and body is not module:
            inside = {id(m) for m in body.modules()}
            for child in module.modules():
                if linear_shape(child) is not None and id(child) not in inside:
                    heads.setdefault(id(child), "output head")
    return heads
