"""Generation for a whole model: all matrices of one shape at once, in each forward, or kept while nothing is trained.

A forward of the model first generates what its layers need, in a number of operators that grows with the number of
distinct shapes and not of layers. A layer that is called by itself, outside of such a forward, generates for itself; so
does one whose parameters are sharded, since they are whole only around its own forward. Under ``torch.compile`` each
layer has the formula in its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from genlora_lightning.basis import generate_matrices
from genlora_lightning.config import Kernel
from genlora_lightning.factors import Given, ModelForward
from genlora_lightning.generator import RBFGenerator
from genlora_lightning.layers import GenLoRALinear

# Entries of matrices that are generated at once: what the arithmetic needs in between is a few times as much. On a CPU
# it is to stay in a core's cache, which makes generation 2.5 times as fast; elsewhere few kernels count for more.
_AT_ONCE_ON_CPU = 1 << 18
_AT_ONCE = 1 << 24

T = TypeVar("T")


class Shape(NamedTuple):
    """What generators have in common that can be computed at once."""

    entries: int
    rank: int
    latents: int
    groups: int
    centers: int
    kernel: Kernel
    sign_table: int | None
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
    differentiated twice.
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
    before = [store.keeps for store in stores]
    hook = register_optimizer_step_post_hook(lambda *_: forget_factors(model))
    try:
        for store in stores:
            store.keeps = True
        yield
    finally:
        hook.remove()
        for store, keeps in zip(stores, before, strict=True):
            store.keeps = keeps
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
    found = [layer.store.given for layer in layers_of(model)]
    mine = [given for given in found if given is not None and given.forward is forward]
    try:
        yield [matrix for given in mine for matrix in (given.A, given.B) if matrix is not None]
    finally:
        forward.runs = False


class SharedGeneration:
    """Generates for all layers in a module, around each of its forwards."""

    def __init__(self, module: nn.Module) -> None:
        self._forwards: list[tuple[ModelForward, list[GenLoRALinear]]] = []
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
            given = layer.store.given
            if given is not None and given.forward is forward and not given.in_graph:
                layer.store.given = None


def _generate_for(layers: Iterable[GenLoRALinear]) -> ModelForward:
    forward = ModelForward()
    wanted: dict[tuple[bool, Shape], list[tuple[Given, str, RBFGenerator]]] = {}
    served: list[tuple[GenLoRALinear, Given]] = []
    for layer in layers:
        store = layer.store
        a, b = layer.generator_A, layer.generator_B
        # First what is soon asked: with one token at a time these questions are a good part of a forward.
        if not layer.is_active or store.has_kept(a, b):
            continue
        dtype = layer.wanted_dtype()
        if dtype is None or store.kept(a, b, dtype) is not None or not (a.is_whole and b.is_whole):
            continue
        given = Given(None, None, forward)
        served.append((layer, given))
        hold = store.held is not None and forward.has_graph
        if hold and (held := store.held_in(dtype)) is not None:
            given.A, given.B = (one.leaf for one in held)
            continue
        for name, generator, scale in (("A", a, 1.0), ("B", b, layer.scaling)):
            wanted.setdefault((hold, shape_of(generator, scale, dtype)), []).append((given, name, generator))
    for (hold, shape), matrices in wanted.items():
        with torch.set_grad_enabled(forward.has_graph and not hold):
            for some in at_once(shape, matrices):
                _generate(shape, some)
    for layer, given in served:
        store = layer.store
        store.given = given
        assert given.A is not None
        assert given.B is not None
        if store.held is not None and forward.has_graph:
            given.A, given.B = store.hold(layer.generator_A, layer.generator_B, given.A, given.B, layer.scaling)
        store.keep(layer.generator_A, layer.generator_B, given.A, given.B)
    return forward


def _generate(shape: Shape, wanted: list[tuple[Given, str, RBFGenerator]]) -> None:
    # Weakly: the graph, of which the matrices hold the end, would hold them, and nobody could free either.
    receivers = [(weakref.ref(given), name) for given, name, _ in wanted]

    def drop() -> None:
        for receiver, name in receivers:
            given = receiver()
            if given is not None:
                setattr(given, name, None)

    parameters = [generator.parts() for _, _, generator in wanted]
    matrices = generate_matrices(
        parameters,
        shape.kernel,
        scale=shape.scale,
        signs=wanted[0][2].signs(),
        dtype=shape.dtype,
        when_differentiated=drop,
    )
    for (given, name, _), matrix in zip(wanted, matrices, strict=True):
        setattr(given, name, matrix)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), SharedGeneration)


def shape_of(generator: RBFGenerator, scale: float, dtype: torch.dtype) -> Shape:
    """The shape of a matrix that a generator is to make."""
    latent: Tensor = generator.latent
    return Shape(
        generator.num_entries,
        generator.rank,
        generator.num_latents,
        generator.num_groups,
        generator.num_centers,
        generator.kernel,
        generator.sign_table,
        scale * generator.weight_gain,
        dtype,
        latent.dtype,
        latent.device,
    )


def at_once(shape: Shape, wanted: list[T]) -> Iterator[list[T]]:
    """Cut a list of what has one shape into pieces whose arithmetic takes no more than a little memory."""
    most = _AT_ONCE_ON_CPU if shape.device.type == "cpu" else _AT_ONCE
    number = max(1, most // (shape.entries * shape.rank * shape.latents * shape.centers))
    for start in range(0, len(wanted), number):
        yield wanted[start : start + number]


def layers_of(model: nn.Module) -> list[GenLoRALinear]:
    """The adapted linears in a module, each once."""
    # Each forward asks, so that it is always right; the generators in the layers are many and need no visit.
    found: dict[GenLoRALinear, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, GenLoRALinear):
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
        elif not isinstance(child, GenLoRALinear) and layers_of(child):
            found.append(child)
    return found
