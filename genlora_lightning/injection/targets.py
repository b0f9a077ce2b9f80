"""Find the modules that a configuration names, with clear errors for names that match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from genlora_lightning.adapters.config import ALL_LINEAR, AdapterConfig, matches
from genlora_lightning.injection.heads import TIED_TO_ADAPTED, UNTIED, output_heads
from genlora_lightning.injection.names import plain_modules, plain_name
from genlora_lightning.injection.uncalled import uncalled_layers
from genlora_lightning.layers.experts import StackOfMatrices, stack_of_matrices
from genlora_lightning.layers.sites import matrix_shape, obstacle

# A reason for leaving a module alone that its user should know of.
STACK = "several matrices in one parameter, as in a mixture of experts: `target_parameters` names such parameters"


def _named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is one of the given names or ends with one (at a dot)."""
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each module (by id): one for each place it stands in."""
    names: dict[int, list[str]] = {}
    for name, module in plain_modules(model, remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def match_modules(model: nn.Module, patterns: list[str], field: str) -> dict[str, nn.Module]:
    """The modules whose names are among the patterns or end with one; a pattern without a match is an error.

    A module that stands in several places matches by each of its names, and comes back under its first.
    """
    names = all_names(model)
    for pattern in patterns:
        if not any(_named(name, [pattern]) for several in names.values() for name in several):
            if any(_named(plain_name(name), [pattern]) for name, _ in model.named_parameters()):
                raise ValueError(
                    f"`{field}` names {pattern!r}, which is a parameter. Name the module that holds it, or put it into "
                    "a module of its own."
                )
            modules = dict(plain_modules(model, remove_duplicate=False))
            raise ValueError(f"`{field}` names {pattern!r}, which no module matches. {_near(pattern, modules)}")
    return {
        name: module
        for name, module in plain_modules(model)
        if any(_named(alias, patterns) for alias in names[id(module)])
    }


def select_targets(
    model: nn.Module, linears: dict[str, nn.Module], config: AdapterConfig, trained: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the linears (and other layers that are named) to adapt; what is left out comes back with the reason."""
    excluded = match_modules(model, config.exclude_modules, "exclude_modules")
    inside_excluded = {id(m) for module in excluded.values() for m in module.modules()}
    inside_trained = {id(m) for module in trained.values() for m in module.modules()}
    uncalled = uncalled_layers(model)
    names = all_names(model)
    numbers = _layer_numbers(linears, config)
    candidates: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    heads = output_heads(model) if config.target_modules == ALL_LINEAR else {}
    for name, module in linears.items():
        if id(module) in inside_trained:
            skipped[name] = "trained in full"
        elif id(module) in inside_excluded:
            skipped[name] = "in `exclude_modules`"
        elif id(module) in uncalled:
            skipped[name] = f"{uncalled[id(module)]} reads its weight without calling it"
        elif (reason := obstacle(module)) is not None:
            skipped[name] = reason
        elif id(module) in heads:
            skipped[name] = heads[id(module)]
        elif numbers is not None and not any(_layer_number(alias) in numbers for alias in names[id(module)]):
            skipped[name] = "in no layer of `layers_to_transform`"
        else:
            candidates[name] = module

    stacks = _select_stacks(model, config, inside_trained, inside_excluded, numbers)
    if config.target_modules == ALL_LINEAR:
        targets = candidates
        adapted = {id(stack.module) for stack in stacks.values()}
        skipped |= _stacks_of_matrices(model, inside_trained | inside_excluded | adapted)
    elif isinstance(config.target_modules, str):
        expression = re.compile(config.target_modules)
        targets = {
            name: module
            for name, module in candidates.items()
            if any(expression.fullmatch(alias) for alias in names[id(module)])
        }
        skipped = {name: reason for name, reason in skipped.items() if expression.fullmatch(name)}
    else:
        for pattern in config.target_modules:
            if not any(_named(alias, [pattern]) for module in candidates.values() for alias in names[id(module)]):
                raise ValueError(_unmatched_target(model, pattern, candidates, skipped))
        targets = {
            name: module
            for name, module in candidates.items()
            if any(_named(alias, config.target_modules) for alias in names[id(module)])
        }
        skipped = {name: reason for name, reason in skipped.items() if _named(name, config.target_modules)}
    targets = {**targets, **stacks}
    if not targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(
            f"`target_modules` {config.target_modules!r} matches none of the {len(linears)} layers that can be adapted."
            + (f" Left out were {reasons}." if reasons else "")
            + f" {_near(str(config.target_modules), linears)}"
        )
    return targets, skipped | _untied(model, inside_trained) | _tied_to(model, targets)


def _select_stacks(
    model: nn.Module, config: AdapterConfig, trained: set[int], excluded: set[int], numbers: set[int] | None
) -> dict[str, StackOfMatrices]:
    """Choose the stacks of matrices to adapt, by the parameters' names.

    Raises:
        ValueError: A name matches no parameter that can be adapted.
    """
    chosen: dict[str, StackOfMatrices] = {}
    unmatched = dict.fromkeys(config.target_parameters, "")
    aliases = all_names(model) if unmatched else {}
    for module_name, module in plain_modules(model) if unmatched else ():
        for own, parameter in module._parameters.items():
            names = [f"{alias}.{own}" if alias else own for alias in aliases[id(module)]]
            asked = [pattern for pattern in config.target_parameters if matches(pattern, *names)]
            if parameter is None or not asked:
                continue
            name = f"{module_name}.{own}" if module_name else own
            stack = stack_of_matrices(module, own)
            reason = None
            if isinstance(module, _ConvNd):
                reason = "it is a convolution's"
            elif matrix_shape(module) is not None:
                reason = "it is a linear's: name the linear in `target_modules`"
            elif module is model:
                reason = "it is the model's own: put the model into a module"
            elif stack is None:
                reason = (
                    f"it is {tuple(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}, and a stack of "
                    "matrices has three dimensions, of floating point numbers of 16 bits or more"
                )
            elif id(module) in trained:
                reason = "trained in full"
            elif id(module) in excluded:
                reason = "in `exclude_modules`"
            elif numbers is not None and not any(_layer_number(alias) in numbers for alias in names):
                reason = "in no layer of `layers_to_transform`"
            if reason is None and stack is not None:
                chosen[name] = stack
            for pattern in asked:
                if reason is None:
                    unmatched.pop(pattern, None)
                elif pattern in unmatched:
                    unmatched[pattern] = f"{name} cannot be adapted: {reason}."
    for pattern, reason in unmatched.items():
        if reason:
            raise ValueError(f"`target_parameters` names {pattern!r}, but {reason}")
        parameters = ((n, m) for m in model.modules() if not isinstance(m, _ConvNd) for n in m._parameters)
        there = {name: module for name, module in parameters if stack_of_matrices(module, name) is not None}
        known = f" {_near(pattern, there)}" if there else " The model has no stacks of matrices."
        raise ValueError(f"`target_parameters` names {pattern!r}, which no parameter matches.{known}")
    return chosen


def configurations(
    model: nn.Module, targets: dict[str, nn.Module], config: AdapterConfig, skipped: dict[str, str]
) -> dict[str, AdapterConfig]:
    """The configuration of each linear to adapt: one object for all that have the same rank and alpha.

    Args:
        model: The model.
        targets: The linears, as :func:`select_targets` chose them.
        config: The configuration, with patterns or without.
        skipped: Linears that are left alone, with the reason.

    Raises:
        ValueError: A pattern matches none of them.
    """
    names = all_names(model)
    for name, module in targets.items():
        if isinstance(module, StackOfMatrices):  # which is no module of the model
            own = name.rpartition(".")[2]
            names[id(module)] = [f"{alias}.{own}" for alias in names[id(module.module)]]
    for field in ("rank_pattern", "alpha_pattern", "target_rows"):
        for pattern in filter(None, getattr(config, field)):
            if any(matches(pattern, *names[id(module)]) for module in targets.values()):
                continue
            for name, _ in plain_modules(model):
                if name and matches(pattern, name):
                    reason = skipped.get(name, "it is no linear, or not in `target_modules`")
                    raise ValueError(f"`{field}` has {pattern!r}, but {name} is not adapted: {reason}.")
            raise ValueError(f"`{field}` has {pattern!r}, which no adapted linear matches. {_near(pattern, targets)}")
    made: dict[tuple[int, float, str], AdapterConfig] = {}
    found = {name: config.of(*names[id(module)]) for name, module in targets.items()}
    return {name: made.setdefault((own.rank, own.alpha, str(own.rows)), own) for name, own in found.items()}


def _layer_number(name: str) -> int | None:
    """The first number in a module's name: that of its layer, whatever is numbered in it."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _layer_numbers(linears: dict[str, nn.Module], config: AdapterConfig) -> set[int] | None:
    """The numbers of the layers to adapt; ``None`` for all."""
    if config.layers_to_transform is None:
        return None
    there = {number for name in linears if (number := _layer_number(name)) is not None}
    absent = sorted(set(config.layers_to_transform) - there)
    if absent:
        known = f"from {min(there)} to {max(there)}" if there else "none"
        raise ValueError(
            f"`layers_to_transform` has {absent}, but no linear is in a layer of that number. The numbers in the "
            f"names of linears are {known}."
        )
    return set(config.layers_to_transform)


def _unmatched_target(model: nn.Module, pattern: str, candidates: dict[str, nn.Module], skipped: dict[str, str]) -> str:
    for name, reason in skipped.items():
        if _named(name, [pattern]):
            return f"`target_modules` names {pattern!r}, but {name} cannot be adapted: {reason}."
    for name, module in plain_modules(model):
        if name and _named(name, [pattern]):
            inner = sorted({n.rsplit(".", 1)[-1] for n in candidates if n.startswith(f"{name}.")})
            hint = f" Name its linears: {inner}." if inner else ""
            return f"`target_modules` names {pattern!r}, but {name} is a {type(module).__name__}, not a linear.{hint}"
    for name, parameter in model.named_parameters():
        if _named(plain_name(name), [pattern]):
            what = ", no linear"
            if parameter.dim() == 3:  # as of a mixture's experts
                what = f": put it into `target_parameters`, as {'.'.join(name.split('.')[-2:])!r}"
            return (
                f"`target_modules` names {pattern!r}, but {name} is a parameter of shape {tuple(parameter.shape)}"
                f"{what}. {_near(pattern, candidates)}"
            )
    return f"`target_modules` names {pattern!r}, which no linear matches. {_near(pattern, candidates)}"


def _near(pattern: str, modules: dict[str, nn.Module]) -> str:
    """A sentence with the names that come nearest to one that matched nothing."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in modules}
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], last_parts, n=3, cutoff=0.5)
    close += [name for name in difflib.get_close_matches(pattern, modules, n=3, cutoff=0.6) if name not in close]
    if close:
        return f"Near matches: {', '.join(close)}."
    names = sorted(name for name in last_parts if name and not name.isdigit()) or [name for name in modules if name]
    return f"There are: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."


def _untied(model: nn.Module, trained: set[int]) -> dict[str, str]:
    """Modules whose weight is tied to one of a module trained in full, and will not be any more."""
    weights = {id(p) for m in model.modules() if id(m) in trained for p in m.parameters(recurse=False)}
    return {
        name: UNTIED
        for name, module in plain_modules(model)
        if id(module) not in trained and any(id(p) in weights for p in module.parameters(recurse=False))
    }


def _tied_to(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, str]:
    """Modules that share the weight of an adapted embedding, of which they see no update."""
    weights = {id(m.weight) for m in targets.values() if isinstance(m, nn.Embedding)}
    taken = {id(m) for m in targets.values()}
    return {
        name: TIED_TO_ADAPTED
        for name, module in plain_modules(model)
        if id(module) not in taken and id(getattr(module, "weight", None)) in weights
    }


def _stacks_of_matrices(model: nn.Module, settled: set[int]) -> dict[str, str]:
    """Modules that hold several matrices in one parameter, as the experts of a mixture do: nothing we can adapt."""
    found = {}
    for name, module in plain_modules(model):
        if id(module) in settled or isinstance(module, _ConvNd):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 2 and parameter.shape[0] > 1 and min(parameter.shape[-2:]) > 1:
                found[name] = STACK
    return found
