"""Find layers whose weight their module reads in place of calling them: an adapter on one would not act there."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType

from torch import nn
from torch.nn.modules.conv import _ConvNd

from genlora_lightning.layers.sites import matrix_shape

# What is asked of a weight without computing with it.
_FACTS = {"dtype", "device", "shape", "requires_grad", "is_cuda", "ndim", "size", "dim", "numel"}


def uncalled_layers(model: nn.Module) -> dict[int, str]:
    """The layers (by id) whose ``weight`` a module's forward reads and which it never calls, with the module's class.

    As in ``F.linear(x, self.proj.weight)``. A convolution that is also called counts: Mamba's is read by its kernels
    and called where there are none. It is read off the source of the module's class, where there is one;
    ``nn.MultiheadAttention`` hands all of its parts to one function.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found |= {id(child): "nn.MultiheadAttention" for child in module.modules() if child is not module}
            continue
        layers = {name: child for name, child in module.named_children() if matrix_shape(child) is not None}
        if layers:
            read, used = _read_and_used(type(module), frozenset(layers))  # type: ignore[arg-type]
            found |= {
                id(child): type(module).__name__
                for name, child in layers.items()
                if name in read and (name not in used or isinstance(child, _ConvNd))
            }
    return found


@functools.cache
def _read_and_used(cls: type, children: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Those children of a class's modules of which the forward reads the weight, and those used in another way."""
    methods: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "torch":
            own = {name: inspect.unwrap(f) for name, f in vars(base).items() if inspect.isfunction(f)}
            methods |= {name: f for name, f in own.items() if isinstance(f, FunctionType)}
    reached: set[str] = set()
    waiting = {"forward"} & set(methods)
    while waiting:
        reached |= waiting
        waiting = {n for name in waiting for n in methods[name].__code__.co_names if n in methods} - reached
    # Most classes are done with here, because reading and parsing sources takes long.
    if not any("weight" in f.__code__.co_names for name, f in methods.items() if name in reached):
        return frozenset(), frozenset()
    read: set[str] = set()
    used: set[str] = set()
    for name, function in methods.items():
        if not children.isdisjoint(function.__code__.co_names) and name != "__init__":
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, SyntaxError):  # made without a file
                return frozenset(), frozenset()
            of_weight, of_others = _uses(tree)
            used |= of_others
            read |= of_weight if name in reached else set()
    return frozenset(read & children), frozenset(used & children)


def _uses(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The attributes of ``self`` whose weight is computed with, and those that are used in another way."""
    nodes = list(ast.walk(tree))
    around = {id(node.value): node for node in nodes if isinstance(node, ast.Attribute)}
    read: set[str] = set()
    used: set[str] = set()
    for node in nodes:
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        outer = around.get(id(node))
        if outer is None or outer.attr not in ("weight", "bias"):
            used.add(node.attr)
        elif outer.attr == "weight" and getattr(around.get(id(outer)), "attr", None) not in _FACTS:
            read.add(node.attr)
    return read, used
