"""Average, broadcast, compare and shard what is trained on several processes.

The frozen base may be sharded by FSDP1 or FSDP2. What is trained is tiny and either *replicated* (outside of the
sharded groups, kept equal by :func:`broadcast_from_first` and :func:`reduce_gradients`) or *sharded* with the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from genlora_lightning.distributed.shards import is_dtensor, is_fsdp2_unit, is_sharded, local_part
from genlora_lightning.errors import RanksDifferError
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.places import adapter_parameters, has_adapters

# -- equal on all ranks -----------------------------------------------------------------------------------------------


@torch.no_grad()
def broadcast_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give all ranks rank 0's values, in one message per dtype; collective.

    Args:
        tensors: Whole tensors, on any device.
        device: One that the process group can send from.
    """
    for group in _by_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).to(device)
        distributed.broadcast(flat, src=0)
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the ranks, in one message per dtype; collective.

    A rank without a gradient counts as zeros. Where no rank has one there is none afterwards either, so that the
    optimizer leaves the parameter out, as it does in a single process.
    """
    parameters = list(parameters)
    for parameter, mean in zip(parameters, mean_gradients(parameters), strict=True):
        if mean is None:
            continue
        if parameter.grad is None:
            parameter.grad = mean
        else:
            parameter.grad.copy_(mean)


@torch.no_grad()
def mean_gradients(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """What :func:`reduce_gradients` replaces the gradients by, and ``None`` where no rank has one; collective."""
    parameters = list(parameters)
    means: dict[int, Tensor] = {}
    for group in _by_dtype(parameters):
        # Zeros of a sign that a sum has only if all of its terms have it: -0 is what is missing, +0 a gradient that is
        # zero (adding +0 turns -0 into it). This tells them apart without another message.
        gradients = [torch.full_like(p, -0.0) if p.grad is None else p.grad + 0.0 for p in group]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [parameter.numel() for parameter in group])
        world_size = distributed.get_world_size()
        for parameter, part in zip(group, parts, strict=True):
            if parameter.grad is None and bool((part[:1] == 0).all() and part[:1].signbit().all()):
                continue
            means[id(parameter)] = (part / world_size).view(parameter.shape)
    return [means.get(id(parameter)) for parameter in parameters]


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag whether it is set on any rank; collective."""
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together; collective where parameters are sharded. It stays on the device."""
    parameters = list(parameters)
    gradients = [(parameter, local_part(parameter.grad)) for parameter in parameters if parameter.grad is not None]
    whole = [gradient for parameter, gradient in gradients if not is_sharded(parameter)]
    pieces = [gradient for parameter, gradient in gradients if is_sharded(parameter)]
    device = parameters[0].device if parameters else torch.device("cpu")
    squares = [
        torch.stack(torch._foreach_norm(found)).square().sum() if found else torch.zeros((), device=device)
        for found in (whole, pieces)
    ]
    if any(is_sharded(parameter) for parameter in parameters):
        distributed.all_reduce(squares[1])
    return (squares[0] + squares[1]).sqrt()


def clip_gradient_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """:func:`torch.nn.utils.clip_grad_norm_` for FSDP1's original parameters, pieces or whole."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None or is_sharded(parameter)]
    if not any(is_sharded(parameter) for parameter in parameters):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = parameters[0].device
    squares = torch.zeros((), device=device)
    if gradients:
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    distributed.all_reduce(squares)
    # As torch's own: with a small number added, and clamped so that nothing is enlarged.
    factor = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor)


def check_ranks_agree(tensors: Mapping[str, Tensor], when: str) -> None:
    """Compare tensors between the ranks, in every bit; collective.

    Raises:
        RanksDifferError: On all ranks; the message names the ranks and the first tensors that differ.
    """
    digests = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
    total = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    totals: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(totals, total)
    if len(set(totals)) == 1:
        return
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, digests)
    others = [rank for rank, found in enumerate(totals) if found != totals[0]]
    names = [name for name in digests if any(rank.get(name) != ranks[0].get(name) for rank in ranks)]
    raise RanksDifferError(
        f"{when} the ranks differ: {len(names)} of {len(digests)} trained tensors ({', '.join(names[:3])}) have other "
        f"values on rank {', '.join(map(str, others[:8]))} than on rank 0. Something changes them outside of the "
        "optimizer step, on some ranks only, or the optimizer's settings differ between the ranks."
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


# -- units ------------------------------------------------------------------------------------------------------------


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists that hold adapters: the blocks of which one after another is needed.

    They decide FSDP's units, and what is planned of them.
    """
    found: list[nn.Module] = []
    taken: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and id(part) not in taken and has_adapters(part):
            taken |= {id(inner) for inner in part.modules()}
            found += [member for member in part if any(True for _ in member.parameters())]
    return found


def shard_with_fsdp2(module: nn.Module, root: nn.Module, mesh: Any, *, shards_adapters: bool) -> None:
    """Apply ``fully_shard`` to each block and to the modules around them.

    The module itself is none of the units: Lightning calls its ``training_step`` and not its ``forward``.

    Args:
        module: The LightningModule with the adapters.
        root: Its part that the adapters were put into.
        mesh: The data-parallel device mesh.
        shards_adapters: Whether what is trained is sharded, too; otherwise it stays as it is, whole on every rank.

    Raises:
        ValueError: What is trained is to be sharded, and some of it is in none of the units.
    """
    from torch.distributed.fsdp import fully_shard

    trained = set() if shards_adapters else set(trained_parameters(module))
    around = [unit for unit in (root, *outer_modules(module)) if unit is not module]
    for unit in (*transformer_blocks(module), *around):
        if is_fsdp2_unit(unit):
            continue
        left = any(not is_dtensor(parameter) and parameter not in trained for parameter in unit.parameters())
        if left or any(is_fsdp2_unit(part) for part in unit.modules()):
            fully_shard(unit, mesh=mesh, ignored_params=trained & set(unit.parameters()))
    left_over = [name for name, p in module.named_parameters() if p.requires_grad and not is_dtensor(p)]
    if shards_adapters and left_over:
        raise ValueError(
            f'`adapter_sharding="shard"` shards what lies in modules, and {type(module).__name__} has trainable '
            f"parameters of its own, {left_over[0]} among them, whose gradients nobody would average: set "
            '`adapter_sharding="replicate"`, or put them into a module.'
        )


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of :func:`trained_tensors`; an adapter's fixed ones are among them."""
    own = {id(p) for p in adapter_parameters(module).values()}
    own |= {id(p) for part in trained_modules(module).values() for p in part.parameters()}
    return [p for p in module.parameters() if p.requires_grad or id(p) in own]


def outer_modules(module: nn.Module) -> list[nn.Module]:
    """The children that a module calls; lists and dictionaries, which cannot be called, stand for their members."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += outer_modules(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found
