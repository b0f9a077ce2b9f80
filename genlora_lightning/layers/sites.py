"""List the sites: the layers that can be adapted, each by a class of its own."""

from __future__ import annotations

import torch
from torch import nn

from genlora_lightning.adapters.base import MatrixShape, StackShape
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.attention import AdaptedAttention
from genlora_lightning.layers.convolution import AdaptedConv
from genlora_lightning.layers.embedding import AdaptedEmbedding
from genlora_lightning.layers.experts import AdaptedStack, StackOfMatrices
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.token_rows import rows_layer

# The first one that knows a module adapts it.
SITES: list[type[AdaptedLayer]] = [AdaptedLinear, AdaptedEmbedding, AdaptedConv, AdaptedAttention, AdaptedStack]


def site_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """The class that adapts a module; ``None`` for one that nobody knows."""
    return next((site for site in SITES if site.matrix_shape(module) is not None), None)


def matrix_shape(module: nn.Module) -> MatrixShape | None:
    """The sizes of the matrix of a module that can be adapted; ``None`` for any other module."""
    site = site_of(module)
    return None if site is None else site.matrix_shape(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one of those that ``"all-linear"`` means."""
    site = site_of(module)
    return site is not None and not site.named_only


def obstacle(module: nn.Module) -> str | None:
    """Why a module of a site cannot be adapted all the same; ``None`` if it can."""
    site = site_of(module)
    return None if site is None else site.obstacle(module)


def without_memory(shape: MatrixShape) -> nn.Module:
    """A module on the meta device whose matrix, or stack of matrices, has these sizes: for adapters without a base."""
    if isinstance(shape, StackShape):
        return StackOfMatrices.on_meta(shape)
    return nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")


def adapt(module: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> AdaptedLayer:
    """Make the adapted layer that is to stand in the place of a module.

    Args:
        module: A module of which :func:`matrix_shape` knows the sizes.
        config: The kind, its rank, scaling, dropout, …
        generator: Random number generator for the initial values.

    Raises:
        TypeError: No site knows the module.
        ValueError: The configuration does not fit the matrix.
    """
    site = site_of(module)
    if site is None:
        known = ", ".join(s.__name__ for s in SITES)
        raise TypeError(f"A {type(module).__name__} cannot be adapted; {known} know none.")
    return (rows_layer(module) if config.is_derived else site)(module, config, generator)
