"""Adapt stacks of matrices in the parameters of a module: the experts of a mixture.

::

    experts: AdaptedExperts                what stands in the module's place
    ├── base_layer: MixtralExperts         the module, with gate_up_proj (E, 2I, H) and down_proj (E, H, I)
    ├── gate_up_proj: AdaptedStack         the updates of one parameter's matrices
    └── down_proj: AdaptedStack

Around each forward of the module a :class:`~genlora_lightning.layers.stacked_weight.StackedWeight` stands in the place
of each adapted parameter, so that the module may compute as it likes: its own loop, or any of transformers' ways.

Shapes: E matrices in a stack, R rank, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.base import FactorPair, MatrixShape, StackShape, WeightUpdate
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.stacked import make_stack
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.stacked_weight import StackedWeight

_ABSENT = object()
_GROUPED_ALIGNMENT = 16  # bytes of a row, that CUDA's grouped products ask for


class StackOfMatrices(nn.Module):
    """A parameter that holds a stack of matrices, seen as a layer: its ``weight`` is the parameter itself.

    It is no part of a model, and has no parameters of its own.

    Args:
        module: The module that has the parameter: ``(E, out, in)``, or ``(E, in, out)`` where the module says that it
            ``is_transposed``, as those of transformers do.
        name: The parameter's name in it.
    """

    module: nn.Module
    parameter: str

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__.update(module=module, parameter=name)

    @property
    def is_transposed(self) -> bool:
        """Whether the matrices are stored as ``(in, out)``."""
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def weight(self) -> Tensor:
        """The parameter, or what stands in its place (FSDP1's view of it)."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight

    @property
    def shape(self) -> StackShape:
        """How many matrices of which sizes it holds."""
        num, first, second = self.weight.shape
        return StackShape(num, *((second, first) if self.is_transposed else (first, second)))

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.module._parameters[self.parameter] = value
        else:
            super().__setattr__(name, value)

    @classmethod
    def on_meta(cls, shape: MatrixShape) -> StackOfMatrices:
        """A stack without memory."""
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(shape.sizes, device="meta"), requires_grad=False)
        return cls(module, "weight")


class AdaptedStack(AdaptedLayer):
    r"""The updates of a stack of frozen matrices in one parameter, each of its own.

    .. math:: W_e \to W_e + \Delta W_e, \qquad \Delta W_e = s \, B_e A_e

    It is called by nobody: :class:`AdaptedExperts`, which it is a part of, asks it for :meth:`current_weight`.

    Args:
        base_layer: The stack.
        config: The kind, its rank, scaling, dropout, …
        generator: Random number generator for the initial values.
    """

    is_place: ClassVar[bool] = False
    named_only: ClassVar[bool] = True
    noun: ClassVar[str] = "stack of matrices"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(base_layer, config, generator)
        # The parameter's module is AdaptedExperts' to hold.
        self.__dict__["base_layer"] = self._modules.pop("base_layer")
        self.weight.requires_grad_(False)

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        return module.shape if isinstance(module, StackOfMatrices) else None

    @override
    def _make_update(self, config: AdapterConfig, generator: torch.Generator | None) -> WeightUpdate:
        assert isinstance(self.shape, StackShape)
        return make_stack(config, self.shape, device=self.weight.device, generator=generator)

    @property
    @override
    def weight_place(self) -> tuple[nn.Module, str]:
        base: Any = self.base_layer
        return base.module, base.parameter

    @override
    def to_stored(self, delta: Tensor) -> Tensor:
        return delta.mT if self.base_layer.is_transposed else delta

    @override
    def wanted_dtype(self) -> torch.dtype | None:
        pair = self.pair
        if not self.is_active or not self.fused or pair is None or self.update.is_stored or in_transform():
            return None
        return None if self.forms_delta else self.weight.dtype  # grouped products do not follow autocast

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        number = self.shape.num_matrices  # of what they share there is one
        return A.expand(number, *A.shape[1:]), B.expand(number, *B.shape[1:])

    def current_weight(self) -> Tensor | StackedWeight:
        """What is to stand in the parameter's place in a forward: with the updates, or the parameter if not active."""
        weight = self.weight
        if not self.is_active:
            return weight
        has_dropout = self.training and self.config.dropout > 0
        pair = None if self.forms_delta else self.pair
        if pair is None:
            if has_dropout:
                why = "`keep_zeros` is set" if self.forms_delta else f"{self.config.title} has no two factors"
                raise RuntimeError(
                    f"`dropout` is {self.config.dropout}, and {why}: the update of experts is added to their weights, "
                    "which leaves no input to drop. Set it to 0."
                )
            return weight + self.masked(self.to_stored(self.update()).to(weight.dtype))
        if not self.fused or in_transform():
            A, B = (factor(dtype=weight.dtype, plain=True) for factor in pair)
        else:
            A, B = self.store.matrices(*pair, weight.dtype)
        assert isinstance(self.update, FactorPair)
        A, B = self.update.active_rows(A, B)
        # For the grouped product's sake, on a CPU of what a plain one has made: rows of zeros add nothing.
        is_asked = weight.is_cuda or min(len(A), len(B)) < len(weight)
        short = -A.shape[-2] % max(1, _GROUPED_ALIGNMENT // weight.element_size()) if is_asked else 0
        if short:
            A, B = F.pad(A, (0, 0, 0, short)), F.pad(B, (0, 0, 0, short))
        left, right = (A.mT, B) if self.base_layer.is_transposed else (B.mT, A)
        found = StackedWeight(weight, left, right, self.scaling, self.dropout if has_dropout else None)
        return found.whole() if torch.compiler.is_compiling() or in_transform() else found

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("A stack of matrices is no layer that can be called; the module that holds it is.")


class AdaptedExperts(nn.Module):
    """A module some of whose parameters are stacks of matrices with updates; its forward is the module's own.

    Args:
        base_layer: The module. It is kept, not copied, and frozen.
        stacks: The adapted ones of its parameters by name.
    """

    is_place: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, stacks: Mapping[str, AdaptedStack]) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.adapted = tuple(stacks)
        for name, stack in stacks.items():
            self._modules[name] = stack  # `add_module` asks whether the name is taken, which the module would say
        self.train(base_layer.training)

    @property
    def stacks(self) -> dict[str, AdaptedStack]:
        """The adapted parameters by name."""
        return {name: self._modules[name] for name in self.adapted}  # type: ignore[misc]

    @property
    def merged(self) -> bool:
        """Whether all updates are added into their parameters at present."""
        return all(stack.merged for stack in self.stacks.values())

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by their names in this module; fixed ones are among them."""
        return {
            f"{name}.{own}": parameter
            for name, stack in self.stacks.items()
            for own, parameter in stack.adapter_parameters().items()
        }

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with the updates in its weights."""
        stacks = self.stacks.items()
        with _in_place(self.base_layer, {n: s.current_weight() for n, s in stacks if s.is_active}):
            return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the module's users ask of it, such as the number of experts
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # By the names that they have in a base without adapters, too.
        base = self.base_layer
        for name in (*(n for n, _ in base.named_parameters()), *(n for n, _ in base.named_buffers())):
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}base_layer.{name}", state_dict.pop(f"{prefix}{name}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def stack_of_matrices(module: nn.Module, name: str) -> StackOfMatrices | None:
    """A parameter as a stack of matrices; ``None`` if it is none, or of less than 16 bits a number."""
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dim() != 3 or not parameter.is_floating_point() or parameter.element_size() < 2:
        return None
    return StackOfMatrices(module, name)


@contextmanager
def _in_place(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Context manager in which a module has other values for some parameters, which it finds before its own."""
    own = module.__dict__
    before = {name: own.get(name, _ABSENT) for name in values}  # FSDP1 has its views there
    own.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value
