"""Gather what is trained from the shards that FSDP1 and FSDP2 have made of it, by its plain names.

A sharded tensor is cut, as the flat sequence of its values, into one piece per rank in the order of the ranks. That
holds for FSDP1's original parameters and for FSDP2's tensors sharded along their first dimension, so that one way of
gathering and loading does for both, and for optimizer state and gradients, which are cut as their parameters are. The
frozen base is never gathered. Tensors go by the names they have without the wrappers around the module's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.places import adapter_buffers, adapter_parameters, adapter_places
from genlora_lightning.injection.places import plain_name as plain_name
from genlora_lightning.overrides import note, noted

# On an original parameter of FSDP1: the whole one's shape, and where in its flat values this rank's piece begins.
_SHARD = "shard"
_Key = TypeVar("_Key")


# -- names and places -------------------------------------------------------------------------------------------------


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """``module.named_parameters()`` by their plain names, as they lie on this rank between two steps."""
    _reshard(module)
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What is trained, and what belongs to it, by plain names: this rank's pieces where it is sharded.

    These are the parameters and persistent buffers of the adapters and of modules trained in full, and whatever else is
    trainable. The tensors are the model's own.
    """
    _reshard(module)
    adapters = {**adapter_parameters(module), **adapter_buffers(module)}
    found: dict[str, Tensor] = {plain_name(name): tensor for name, tensor in adapters.items()}
    for tensors in tensors_trained_in_full(module).values():
        found |= tensors
    known = {id(parameter) for parameter in adapters.values()}  # those of a named adapter have two names while it acts
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            found.setdefault(plain_name(name), parameter)
    return {name: tensor.detach() if not is_sharded(tensor) else tensor for name, tensor in found.items()}


def tensors_trained_in_full(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The parameters and persistent buffers of each module trained in full, by its plain name and by theirs.

    The name is that in the base: of the place, where another library trains a copy in it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    copies = [name for name, place in adapter_places(module).items() if place.is_copy]
    for module_name, trained in trained_modules(module).items():
        own = next((place for place in copies if module_name.startswith(f"{place}.")), module_name)
        of_module = found.setdefault(plain_name(own), {})
        for inner_name, inner in trained.named_modules(prefix=module_name):
            tensors = {**inner._parameters, **inner._buffers}
            for name, tensor in tensors.items():
                if tensor is not None and name not in inner._non_persistent_buffers_set:
                    of_module[plain_name(f"{inner_name}.{name}")] = tensor
    return found


def state_names(module: nn.Module) -> set[str]:
    """The plain names in ``module.state_dict()``."""
    return {plain_name(name) for name in own_state_names(module)}


def own_state_names(module: nn.Module) -> set[str]:
    """The names in ``module.state_dict()``, which is not called: FSDP1 would gather the whole base for it."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in (*part._parameters, *(set(part._buffers) - part._non_persistent_buffers_set), "_extra_state")
    }


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a piece of a tensor."""
    return is_dtensor(tensor) or noted(tensor, _SHARD) is not None


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor that this one is, or is a piece of."""
    mark: tuple[torch.Size, int] | None = noted(tensor, _SHARD)
    return tensor.shape if mark is None else mark[0]


def local_part(tensor: Tensor) -> Tensor:
    """The values that lie on this rank, without autograd."""
    tensor = tensor.detach()
    return cast("Any", tensor).to_local() if is_dtensor(tensor) else tensor


def mark_shards(parameters: Iterable[nn.Parameter], shapes: Iterable[torch.Size]) -> None:
    """Tell FSDP1's original parameters, after the wrapping, which pieces they are; collective.

    Args:
        parameters: This rank's pieces, flat, in the same order on all ranks.
        shapes: The shapes they had before.
    """
    parameters = list(parameters)
    if distributed.get_world_size() == 1:
        return  # FSDP1 cuts nothing then, and keeps shapes
    sizes: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(sizes, [parameter.numel() for parameter in parameters])
    for index, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
        start = sum(rank[index] for rank in sizes[: distributed.get_rank()])
        assert sum(rank[index] for rank in sizes) == shape.numel(), "the ranks' pieces do not make up the parameter"
        note(parameter, _SHARD, (shape, start))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that lies on this rank, cut as another one is."""
    if is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        placed = cast("Any", like)
        # No communication (`src_data_rank=None`): each rank has the whole, and takes its own.
        whole = whole.to(local_part(like).device)
        return distribute_tensor(whole, placed.device_mesh, placed.placements, src_data_rank=None)
    mark = noted(like, _SHARD)
    if mark is None:
        return whole
    return whole.reshape(-1)[mark[1] : mark[1] + like.numel()]


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is FSDP2's."""
    return hasattr(tensor, "placements")  # by this, because importing the class takes time in runs without any


def _reshard(module: nn.Module) -> None:
    """Have FSDP2's units hold their sharded parameters: after a validation the outermost ones hold whole ones."""
    if in_group():
        for part in module.modules():
            if is_fsdp2_unit(part):
                cast("Any", part).reshard()


def is_fsdp2_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def in_group() -> bool:
    """Whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


# -- whole tensors out of pieces --------------------------------------------------------------------------------------


def whole_like(module: nn.Module) -> dict[str, Tensor]:
    """Tensors without memory, of the names and whole shapes of what is trained."""
    return {name: torch.empty(whole_shape(t), device="meta") for name, t in trained_tensors(module).items()}


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """:func:`trained_tensors`, whole, on every rank; collective where something is sharded."""
    tensors = trained_tensors(module)
    pieces = {name: local_part(tensor) for name, tensor in tensors.items() if is_sharded(tensor)}
    if not pieces:
        return tensors
    whole = gather_pieces(pieces, lambda name: whole_shape(tensors[name]))
    return {name: whole.get(name, tensor) for name, tensor in tensors.items()}


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into what is trained; each rank takes its part."""
    with torch.no_grad():
        for name, tensor in trained_tensors(module).items():
            target = local_part(tensor)
            target.copy_(local_part(part_of(state[name], tensor)).view(target.shape))


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Sharded parameters' gradients, whole, by plain names; collective where something is sharded."""
    parameters = {name: p for name, p in plain_parameters(module).items() if p.requires_grad and is_sharded(p)}
    if not parameters:
        return {}
    pieces = {name: local_part(p.grad) for name, p in parameters.items() if p.grad is not None}
    return gather_pieces(pieces, lambda name: whole_shape(parameters[name]))


def gather_pieces(
    pieces: Mapping[_Key, Tensor], shape_of: Callable[[_Key], torch.Size], equal: Mapping[_Key, Any] | None = None
) -> dict[_Key, Any]:
    """Put whole tensors together on every rank; collective.

    Args:
        pieces: This rank's pieces. Ranks need not have the same ones: one that holds no value of a parameter may have
            nothing of its state either.
        shape_of: The whole tensor's shape.
        equal: What is not cut, and equal on all ranks that have it.

    Returns:
        What any rank has; tensors on the CPU.
    """
    # One tensor for each dtype: pickled by themselves small tensors take several times their size.
    by_dtype: dict[torch.dtype, dict[_Key, Tensor]] = {}
    for key, piece in pieces.items():
        by_dtype.setdefault(piece.dtype, {})[key] = piece.reshape(-1)
    mine = [
        (list(group), [piece.numel() for piece in group.values()], torch.cat([*group.values()]).cpu())
        for group in by_dtype.values()
    ]
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, (mine, dict(equal or {})))
    parts: dict[_Key, list[Tensor]] = {}
    whole: dict[_Key, Any] = {}
    for groups, same in ranks:
        for keys, sizes, values in groups:
            for key, part in zip(keys, torch.split(values, sizes), strict=True):
                parts.setdefault(key, []).append(part)
        whole = {**same, **whole}
    return whole | {key: torch.cat(found).view(shape_of(key)) for key, found in parts.items()}


# -- the optimizer's state --------------------------------------------------------------------------------------------


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors; collective where the parameters are sharded."""
    state = optimizer.state_dict()
    parameters = _in_order(optimizer)
    if not any(is_sharded(parameter) for parameter in parameters):
        return state
    pieces: dict[tuple[int, str], Tensor] = {}
    equal: dict[tuple[int, str], Any] = {}
    for number, row in state["state"].items():
        here = local_part(parameters[number])
        for name, value in row.items():
            local = local_part(value) if isinstance(value, Tensor) else value
            is_cut = isinstance(local, Tensor) and local.ndim and local.shape == here.shape
            (pieces if is_cut and is_sharded(parameters[number]) else equal)[number, name] = local
    whole = gather_pieces(pieces, lambda key: whole_shape(parameters[key[0]]), equal)
    rows: dict[int, dict[str, Any]] = {}
    for number, name in sorted(whole):
        rows.setdefault(number, {})[name] = whole[number, name]
    return {**state, "state": rows}


def load_whole_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a state with whole tensors; each rank takes its part."""
    parameters = _in_order(optimizer)
    rows = {
        number: {
            name: part_of(value, parameters[number])
            if isinstance(value, Tensor) and value.ndim and value.shape == whole_shape(parameters[number])
            else value
            for name, value in row.items()
        }
        for number, row in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": rows})


def _in_order(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
