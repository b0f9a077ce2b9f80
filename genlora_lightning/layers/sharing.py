"""Make all factors of one shape in a model at once, in each forward, or keep them while nothing is trained.

A forward of the model first generates what its layers need, in a number of operators that grows with the number of
distinct shapes and not of layers. A layer that is called by itself, outside of such a forward, generates for itself; so
does one whose parameters are sharded, since they are whole only around its own forward. Under ``torch.compile`` each
layer has the formula in its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from genlora_lightning.adapters.base import Factor
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.factors import ForForward, ModelForward

# Entries of matrices that are generated at once: what the arithmetic needs in between is a few times as much. On a CPU
# it is to stay in a core's cache, which makes generation 2.5 times as fast; elsewhere few kernels count for more.
_AT_ONCE_ON_CPU = 1 << 18
_AT_ONCE = 1 << 24

T = TypeVar("T")


class BatchKey(NamedTuple):
    """What matrices have in common that can be made at once.

    Args:
        factor: The class of their factors.
        key: What it says they have in common.
        cost: Numbers that one of them needs in between.
        scale: The factor on them.
        dtype: Of the matrices.
        own_dtype: Of the parameters.
        device: Of the parameters.
    """

    factor: type[Factor]
    key: Hashable
    cost: int
    scale: float
    dtype: torch.dtype
    own_dtype: torch.dtype
    device: torch.device


def share_generation(model: nn.Module) -> None:
    """Have each forward of a model generate for all of its layers at once.

    The model may be one whose forward nobody calls (a LightningModule whose ``training_step`` calls its parts): the
    outermost parts that hold adapters do the same, unless the model has done it.
    """
    stop_sharing_generation(model)
    for module in (model, *_outer_parts(model)):
        SharedGeneration(module)


def stop_sharing_generation(model: nn.Module) -> None:
    """Take back :func:`share_generation`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, h in hooks.items() if _is_ours(h)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def set_fused(model: nn.Module, on: bool) -> None:
    """Have a model's adapters computed by functions with backwards of their own (the default), or by plain autograd.

    The two give the same to rounding. The plain path is slower and keeps more for the backward, but can be
    differentiated twice. Inside of transforms of ``torch.func`` it is taken by itself.
    """
    for layer in layers_of(model):
        layer.fused = on


@contextmanager
def cached_factors(model: nn.Module) -> Iterator[None]:
    """Context manager in which matrices that are generated without autograd are generated once.

    They are generated anew after an optimizer's step, a load, a move or a cast, and after :func:`forget_factors`. Where
    autograd is on, nothing is cached. Nothing in the model is changed; in the end all is as it was.

    Args:
        model: A model with adapters, or without, for which it does nothing.
    """
    stores = [layer.store for layer in layers_of(model)]
    before = [store.caches for store in stores]
    hook = register_optimizer_step_post_hook(lambda *_: forget_factors(model))
    try:
        for store in stores:
            store.caches = True
        yield
    finally:
        hook.remove()
        for store, keeps in zip(stores, before, strict=True):
            store.caches = keeps
            if not keeps:
                store.forget()


def forget_factors(model: nn.Module) -> None:
    """Drop what :func:`cached_factors` keeps: to be called after writing to adapters' parameters by other ways."""
    for layer in layers_of(model):
        layer.store.forget()


def sharing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose forwards generate for all layers in them."""
    return [m for m in model.modules() if any(_is_ours(hook) for hook in m._forward_pre_hooks.values())]


@contextmanager
def generated(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that generates as a forward of the model does, without one, and gives A and B of all layers."""
    forward = _generate_for(layers_of(model))
    found = [layer.store.for_forward for layer in layers_of(model)]
    mine = [given for given in found if given is not None and given.forward is forward]
    try:
        yield [matrix for given in mine for matrix in (given.A, given.B) if matrix is not None]
    finally:
        forward.runs = False


class SharedGeneration:
    """Generates for all layers in a module, around each of its forwards."""

    def __init__(self, module: nn.Module) -> None:
        self._forwards: list[tuple[ModelForward, list[AdaptedLayer]]] = []
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": []}

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the forward: generate what the layers need, unless an outer module has."""
        if torch.compiler.is_compiling():
            return
        layers = layers_of(module)
        if any(layer.store.is_served for layer in layers):
            layers = []
        self._forwards.append((_generate_for(layers), layers))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward, also one that failed: what was generated is for nobody else."""
        if torch.compiler.is_compiling() or not self._forwards:
            return
        forward, layers = self._forwards.pop()
        forward.runs = False
        for layer in layers:
            given = layer.store.for_forward
            if given is not None and given.forward is forward and not given.in_graph:
                layer.store.for_forward = None


def _generate_for(layers: Iterable[AdaptedLayer]) -> ModelForward:
    forward = ModelForward()
    wanted: dict[tuple[bool, BatchKey], list[tuple[ForForward, str, Factor]]] = {}
    served: list[tuple[AdaptedLayer, tuple[Factor, Factor], ForForward]] = []
    for layer in layers:
        store = layer.store
        pair = layer.pair
        # First what is soon asked: with one token at a time these questions are a good part of a forward.
        if pair is None or not layer.is_active or store.has_cached(*pair):
            continue
        a, b = pair
        dtype = layer.wanted_dtype()
        if dtype is None or store.cached(a, b, dtype) is not None or not (a.is_whole and b.is_whole):
            continue
        given = ForForward(None, None, forward)
        served.append((layer, pair, given))
        hold = store.for_step is not None and forward.has_graph
        if hold and (held := store.for_step_in(dtype)) is not None:
            given.A, given.B = (one.leaf for one in held)
            continue
        for name, factor, scale in (("A", a, 1.0), ("B", b, layer.scaling)):
            wanted.setdefault((hold, batch_key(factor, scale, dtype)), []).append((given, name, factor))
    for (hold, key), matrices in wanted.items():
        with torch.set_grad_enabled(forward.has_graph and not hold):
            for some in at_once(key, matrices):
                _generate(key, some)
    for layer, pair, given in served:
        store = layer.store
        store.for_forward = given
        assert given.A is not None
        assert given.B is not None
        if store.for_step is not None and forward.has_graph:
            given.A, given.B = store.keep_for_step(*pair, given.A, given.B, layer.scaling)
        store.cache(*pair, given.A, given.B)
    return forward


def _generate(key: BatchKey, wanted: list[tuple[ForForward, str, Factor]]) -> None:
    # Weakly: the graph, of which the matrices hold the end, would hold them, and nobody could free either.
    receivers = [(weakref.ref(given), name) for given, name, _ in wanted]

    def drop() -> None:
        for receiver, name in receivers:
            given = receiver()
            if given is not None:
                setattr(given, name, None)

    factors = [factor for _, _, factor in wanted]
    matrices = key.factor.make_many(factors, scale=key.scale, dtype=key.dtype, when_differentiated=drop)
    for (given, name, _), matrix in zip(wanted, matrices, strict=True):
        setattr(given, name, matrix)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), SharedGeneration)


def batch_key(factor: Factor, scale: float, dtype: torch.dtype) -> BatchKey:
    """Find out with which other matrices a factor's can be made at once."""
    return BatchKey(type(factor), factor.batch_key(), factor.cost, scale, dtype, factor.own_dtype, factor.device)


def at_once(key: BatchKey, wanted: list[T]) -> Iterator[list[T]]:
    """Cut a list of what has one key into pieces whose arithmetic takes no more than a little memory."""
    most = _AT_ONCE_ON_CPU if key.device.type == "cpu" else _AT_ONCE
    number = max(1, most // key.cost)
    for start in range(0, len(wanted), number):
        yield wanted[start : start + number]


def layers_of(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers in a module, each once."""
    # Each forward asks, so that it is always right; what is inside of the layers is much and needs no visit.
    found: dict[AdaptedLayer, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, AdaptedLayer):
            found[module] = None
        elif module is not None:
            waiting.extend(module._modules.values())
    return [*found]


def _outer_parts(model: nn.Module) -> list[nn.Module]:
    """The outermost parts of a module that hold adapters and can be called."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += _outer_parts(child)
        elif not isinstance(child, AdaptedLayer) and layers_of(child):
            found.append(child)
    return found
