"""Find layers whose weight their module reads: an adapter acts where a layer is called, and not where it is read."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType

from torch import nn
from torch.nn.modules.conv import _ConvNd

from genlora_lightning.injection.names import plain_modules
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.sites import matrix_shape

# What is asked of a weight without computing with it.
_FACTS = {
    *("dtype", "device", "layout", "shape", "size", "stride", "ndim", "dim", "numel", "nelement", "element_size"),
    *("requires_grad", "grad", "is_cuda", "is_meta", "is_floating_point", "is_contiguous", "data_ptr"),
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"),
}
_ASK = {"isinstance", "hasattr", "getattr", "type", "id", "len"}  # functions
_TAKE_THE_DTYPE = {"to", "type_as", "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"}
_FORWARD = frozenset({"forward"})
# What a LightningModule computes in, which need not go through its `forward`.
_STEPS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})


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
            read, used = _read_and_used(type(module), frozenset(layers), _FORWARD)  # type: ignore[arg-type]
            found |= {
                id(child): type(module).__name__
                for name, child in layers.items()
                if name in read and (name not in used or isinstance(child, _ConvNd))
            }
    return found


def read_layers(model: nn.Module) -> dict[str, str]:
    """The adapted layers, by name, whose ``weight`` a module computes with, with that module's class.

    As in ``F.linear(h, self.emb.weight)``, of an embedding that is called, too. The update does not act there, and a
    merged weight does. Found as :func:`uncalled_layers`, also in the steps of a LightningModule.
    """
    names = {id(module): name for name, module in plain_modules(model) if isinstance(module, AdaptedLayer)}
    found: dict[str, str] = {}
    for module in model.modules() if names else ():
        children = frozenset(name for name, _ in module.named_children())
        if not children or isinstance(module, AdaptedLayer):
            continue
        read, _ = _read_and_used(type(module), children, _FORWARD | _STEPS)  # type: ignore[arg-type]
        for path in read:
            part: nn.Module | None = module
            for own in path.split("."):
                part = None if part is None else part._modules.get(own)
            if id(part) in names:
                found.setdefault(names[id(part)], type(module).__name__)
    return {name: found[name] for name in names.values() if name in found}


@functools.cache
def _read_and_used(
    cls: type, children: frozenset[str], entries: frozenset[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """The parts of a class's modules whose weight is computed with, and the children that are used in another way.

    Args:
        cls: The class.
        children: The names of the children that are asked about.
        entries: The methods through which all computing goes.

    Returns:
        The paths of the parts (``"enc.0"`` for ``self.enc[0].weight``), which begin with a child; and the children.
    """
    methods: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__):
        # Lightning's own steps compute nothing.
        if base.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning"):
            own = {name: inspect.unwrap(f) for name, f in vars(base).items() if inspect.isfunction(f)}
            methods |= {name: f for name, f in own.items() if isinstance(f, FunctionType)}
    reached: set[str] = set()
    waiting = entries & set(methods)
    while waiting:
        reached |= waiting
        waiting = frozenset(n for name in waiting for n in methods[name].__code__.co_names if n in methods) - reached
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
    return frozenset(path for path in read if path.partition(".")[0] in children), frozenset(used & children)


def _uses(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The parts of ``self`` whose weight is computed with, and its attributes that are used in another way."""
    nodes = list(ast.walk(tree))
    parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
    read: set[str] = set()
    used: set[str] = set()
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        outer = parents.get(id(node))
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            if not (isinstance(outer, ast.Attribute) and outer.attr in ("weight", "bias")):
                used.add(node.attr)
        elif node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and not _is_asked(node, parents, nodes):
                read.add(".".join(path))
    return read, used


def _path(node: ast.AST) -> list[str] | None:
    """``["enc", "0"]`` for ``self.enc[0]``; ``None`` for what is no part of ``self``."""
    if isinstance(node, ast.Name):
        return [] if node.id == "self" else None
    if isinstance(node, ast.Attribute):
        own = node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        own = str(node.slice.value)
    else:
        return None
    before = _path(node.value)
    return None if before is None else [*before, own]


def _is_asked(node: ast.AST, parents: dict[int, ast.AST], nodes: list[ast.AST], depth: int = 0) -> bool:
    """Whether a weight is asked for its dtype or the like, and not computed with."""
    outer = parents.get(id(node))
    if isinstance(outer, ast.Attribute):
        return outer.attr in _FACTS or (outer.attr == "data" and _is_asked(outer, parents, nodes, depth))
    if isinstance(outer, ast.Call):
        function = outer.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        return name in (_TAKE_THE_DTYPE if isinstance(function, ast.Attribute) else _ASK)
    if isinstance(outer, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in outer.ops)
    if isinstance(outer, ast.Assign) and not depth and all(isinstance(target, ast.Name) for target in outer.targets):
        given = {target.id for target in outer.targets if isinstance(target, ast.Name)}
        loads = [n for n in nodes if isinstance(n, ast.Name) and n.id in given and isinstance(n.ctx, ast.Load)]
        return all(_is_asked(load, parents, nodes, depth + 1) for load in loads)
    return False
