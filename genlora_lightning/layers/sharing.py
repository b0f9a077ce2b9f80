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
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from genlora_lightning.adapters.autograd import is_tracing
from genlora_lightning.adapters.base import Factor
from genlora_lightning.layers.factors import FactorLayer, ForForward, ModelForward

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
        dtype: Of the matrices.
        own_dtype: Of the parameters.
        device: Of the parameters.
    """

    factor: type[Factor]
    key: Hashable
    cost: int
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


def sharing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose forwards generate for all layers in them."""
    return [m for m in model.modules() if any(_is_ours(hook) for hook in m._forward_pre_hooks.values())]


@contextmanager
def generated(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that generates as a forward of the model does, without one, and gives A and B of all layers."""
    forward = ModelForward()
    served = _generate_for(_wanted_by(layers_of(model)), forward)
    try:
        yield [matrix for one in served for matrix in (one.given.A, one.given.B) if matrix is not None]
    finally:
        forward.runs = False


def generate_for_good(layers: Iterable[FactorLayer]) -> int:
    """Generate for layers whose parameters nobody changes, once: all their forwards use it, until their stores are new.

    Returns:
        The bytes of what was generated.
    """
    with torch.inference_mode(False), torch.no_grad():
        forward = ModelForward()
        served = _generate_for(_wanted_by(layers), forward)
    forward.has_graph = True  # as constants they serve forwards under autograd, too
    matrices = [matrix for one in served for matrix in (one.given.A, one.given.B) if matrix is not None]
    return sum(matrix.nbytes for matrix in matrices)


class SharedGeneration:
    """Generates for all layers in a module, around each of its forwards."""

    def __init__(self, module: nn.Module) -> None:
        self._forwards: list[tuple[ModelForward, list[FactorLayer]]] = []
        self._kept: _Kept | None = None
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": [], "_kept": None}

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the forward: generate what the layers need, unless an outer module has."""
        if _is_recorded():
            return
        forward = ModelForward()
        layers = layers_of(module)
        if any(layer.store.is_served for layer in layers):
            layers = []
        wanted = _wanted_by(layers)
        if self._kept is None or forward.has_graph or not self._kept.serves(forward, wanted):
            self._kept = None  # freed before anything is generated
            served = _generate_for(wanted, forward)
            if served and not forward.has_graph and _may_be_kept(served):
                self._kept = _Kept(wanted, served)
        self._forwards.append((forward, layers))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward, also one that failed: what was generated is for nobody else."""
        if _is_recorded() or not self._forwards:
            return
        forward, layers = self._forwards.pop()
        forward.runs = False
        for layer in layers:
            given = layer.store.for_forward
            if given is not None and given.forward is forward and not given.in_graph:
                layer.store.for_forward = None


class _Wanted(NamedTuple):
    """A layer, and what it would use in a forward: another library's layer may have several adapters."""

    layer: FactorLayer
    pair: tuple[Factor, Factor] | None
    dtype: torch.dtype | None


class _Served(NamedTuple):
    """A layer for which a model's forward generates."""

    layer: FactorLayer
    pair: tuple[Factor, Factor]
    given: ForForward


class _Kept:
    """What a forward without autograd has generated, for the forwards after it that find the same parameters.

    Versions of tensors do not tell of all writes (``.data``, fused optimizers, other code's views), so the values are
    compared, all at once. They are few: that is what a generator is for.

    Args:
        wanted: The layers, their factors and dtypes.
        served: What was generated for them.
    """

    def __init__(self, wanted: list[_Wanted], served: list[_Served]) -> None:
        self._wanted = wanted
        self._served = served
        self._parts = self._current_parts()
        self._places = _places(self._parts)
        # They look at the parameters' memory: to flatten hundreds of tensors takes longer than to compare their values.
        self._views = [part.detach().view(-1) for part in self._parts]
        self._values = self._current_values()

    def _current_parts(self) -> list[Tensor]:
        return [part for one in self._served for factor in one.pair for part in factor.parts()]

    def _current_values(self) -> list[Tensor]:
        by_dtype: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for view in self._views:
            by_dtype.setdefault((view.dtype, view.device), []).append(view)
        return [torch.cat(views) for views in by_dtype.values()]

    def serves(self, forward: ModelForward, wanted: list[_Wanted]) -> bool:
        """Give the layers what is kept, if it is what they want and what their parameters make."""
        if wanted != self._wanted or _is_captured(self._parts[0]):
            return False
        parts = self._current_parts()
        if not all(map(is_, parts, self._parts)) or _places(parts) != self._places:
            return False
        if not all(map(torch.equal, self._current_values(), self._values)):
            return False
        for layer, _, given in self._served:
            given.forward = forward
            layer.store.for_forward = given
        return True


def _may_be_kept(served: list[_Served]) -> bool:
    """Whether parameters have values that can be compared, in one piece of memory each."""
    parts = [part for one in served for factor in one.pair for part in factor.parts()]
    are_there = all(part.is_contiguous() and not part.is_meta and not isinstance(part, FakeTensor) for part in parts)
    return are_there and not _is_captured(parts[0])


def _places(parts: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    return [(part.data_ptr(), part.stride()) for part in parts]


def _is_recorded() -> bool:
    return torch.compiler.is_compiling() or is_tracing()


def _is_captured(part: Tensor) -> bool:
    """Whether a CUDA graph records what runs: it may not wait for values, and runs again with others."""
    return part.is_cuda and torch.cuda.is_current_stream_capturing()


def _wanted_by(layers: Iterable[FactorLayer]) -> list[_Wanted]:
    return [_Wanted(layer, layer.pair, layer.wanted_dtype()) for layer in layers]


def _generate_for(wanted: Iterable[_Wanted], forward: ModelForward) -> list[_Served]:
    """Generate for one forward what layers want, but for those that had better do it themselves."""
    batches: dict[tuple[bool, BatchKey], list[tuple[ForForward, str, Factor]]] = {}
    served: list[_Served] = []
    for layer, pair, dtype in wanted:
        store = layer.store
        if pair is None or dtype is None or not all(factor.is_whole for factor in pair):
            continue
        given = ForForward(None, None, forward)
        served.append(_Served(layer, pair, given))
        hold = store.for_step is not None and forward.has_graph
        if hold and (held := store.for_step_in(dtype)) is not None:
            given.A, given.B = (one.leaf for one in held)
            continue
        for name, factor in zip(("A", "B"), pair, strict=True):
            batches.setdefault((hold, batch_key(factor, dtype)), []).append((given, name, factor))
    for (hold, key), matrices in batches.items():
        with torch.set_grad_enabled(forward.has_graph and not hold):
            for some in at_once(key, matrices):
                _generate(key, some)
    for layer, pair, given in served:
        store = layer.store
        store.for_forward = given
        assert given.A is not None
        assert given.B is not None
        if store.for_step is not None and forward.has_graph:
            given.A, given.B = store.keep_for_step(*pair, given.A, given.B)
    return served


def _generate(key: BatchKey, wanted: list[tuple[ForForward, str, Factor]]) -> None:
    # Weakly: the graph, of which the matrices hold the end, would hold them, and nobody could free either.
    receivers = [(weakref.ref(given), name) for given, name, _ in wanted]

    def drop() -> None:
        for receiver, name in receivers:
            given = receiver()
            if given is not None:
                setattr(given, name, None)

    factors = [factor for _, _, factor in wanted]
    matrices = key.factor.make_many(factors, dtype=key.dtype, when_differentiated=drop)
    for (given, name, _), matrix in zip(wanted, matrices, strict=True):
        setattr(given, name, matrix)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), SharedGeneration)


def batch_key(factor: Factor, dtype: torch.dtype) -> BatchKey:
    """Find out with which other matrices a factor's can be made at once."""
    return BatchKey(type(factor), factor.batch_key(), factor.cost, dtype, factor.own_dtype, factor.device)


def number_at_once(key: BatchKey) -> int:
    """How many matrices of one key are made at once, at most."""
    most = _AT_ONCE_ON_CPU if key.device.type == "cpu" else _AT_ONCE
    return max(1, most // key.cost)


def at_once(key: BatchKey, wanted: list[T]) -> Iterator[list[T]]:
    """Cut a list of what has one key into pieces whose arithmetic takes no more than a little memory."""
    number = number_at_once(key)
    for start in range(0, len(wanted), number):
        yield wanted[start : start + number]


def layers_of(model: nn.Module) -> list[FactorLayer]:
    """The adapted layers in a module, each once."""
    # Each forward asks, so that it is always right; what is inside of the layers is much and needs no visit.
    found: dict[FactorLayer, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, FactorLayer):
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
        elif not isinstance(child, FactorLayer) and layers_of(child):
            found.append(child)
    return found
