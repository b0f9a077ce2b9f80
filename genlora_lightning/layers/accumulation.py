"""Accumulate gradients with one generation per optimizer step instead of one per micro-batch.

::

    parameters ── generator ──► A, B ── leaves ──┬─ micro-batch 1 ─┐
        ▲                                        ├─ micro-batch 2 ─┤ gradients of A and B, summed up
        └──── generator's backward, once ◄───────┴─ micro-batch n ─┘

The sum of the gradients goes through the generator as one, because its backward is linear in them: the parameters get
what they would have got, to rounding. They get it when the block is left, in an ordinary backward, so that clipping,
the averaging between ranks and the optimizer find what they expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from genlora_lightning.layers.factors import ForStep, check_current
from genlora_lightning.layers.sharing import BatchKey, at_once, batch_key, layers_of


@contextmanager
def generated_once(model: nn.Module) -> Iterator[None]:
    """Context manager in which all forwards of a model use the same generated matrices.

    It is for the micro-batches of one optimizer step, forwards and backwards alike::

        with generated_once(model):
            for batch in batches:
                (model(**batch).loss / len(batches)).backward()
        optimizer.step()

    The first forward generates. The adapters' parameters get their gradients at the end of the block; before it, only
    those of modules trained in full have them. Where autograd is off (validation) nothing is different, nor in layers
    for which nothing is generated beforehand: under ``torch.compile``, where FSDP has cut the parameters, and with
    ``set_fused(model, False)``.

    On several ranks leave the last micro-batch outside, as with the ``no_sync`` of ``DistributedDataParallel``: its
    backward is the one upon which gradients are averaged. Inside of another such block it does nothing.

    Args:
        model: A model with adapters, or without, for which it does nothing.

    Raises:
        RuntimeError: The parameters change inside of the block, or a backward comes after it.

    Note:
        From one micro-batch to the next A and B of all layers live on, and their gradients in the parameters' dtype, as
        much as those of a stored LoRA. ``zero_grad`` does not reach them, and an exception in the block drops them.
    """
    if is_generated_once(model):
        yield
        return
    begin_generating_once(model)
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: _note_step(model, optimizer))
    try:
        yield
        pass_gradients(model)
    finally:
        hook.remove()
        end_generating_once(model)


def _note_step(model: nn.Module, optimizer: Optimizer) -> None:
    # Optimizers that are fused into one kernel write past the tensors' versions.
    written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers_of(model):
        for factor in layer.pair or ():
            for part in factor.parts():
                if id(part) in written:
                    torch.autograd.graph.increment_version(part)


def is_generated_once(model: nn.Module) -> bool:
    """Whether forwards of a model use the same matrices at present."""
    return any(layer.store.for_step is not None for layer in layers_of(model))


def begin_generating_once(model: nn.Module) -> None:
    """From here on forwards of the model use the same matrices; the gradients of these are summed up."""
    for layer in layers_of(model):
        layer.store.for_step = {}


def pass_gradients(model: nn.Module) -> None:
    """Pass the gradients so far on to the parameters; nothing if there are none.

    Raises:
        RuntimeError: The parameters are others than those of the forwards.
    """
    found: dict[BatchKey, list[tuple[ForStep, Tensor]]] = {}
    for layer in layers_of(model):
        for pair in (layer.store.for_step or {}).values():
            taken = [(one, gradient) for one in pair if (gradient := one.take()) is not None]
            if taken:
                check_current(pair)
            for one, gradient in taken:
                found.setdefault(batch_key(one.factor, one.leaf.dtype), []).append((one, gradient))
    for key, everything in found.items():
        for some in at_once(key, everything):
            factors, gradients = [one.factor for one, _ in some], [gradient for _, gradient in some]
            with torch.autocast(key.device.type, enabled=False):
                key.factor.pass_gradients(factors, gradients)


def end_generating_once(model: nn.Module) -> None:
    """Generate for each forward again; gradients that were not passed on are dropped."""
    for layer in layers_of(model):
        for pair in (layer.store.for_step or {}).values():
            for one in pair:
                one.end()
        layer.store.for_step = None
