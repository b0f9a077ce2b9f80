from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.layers.factors import FactorStore, ForForward, ForStep, ModelForward


def generators(**changes) -> tuple[RBFGenerator, RBFGenerator]:
    return tuple(RBFGenerator(n, rank=3, num_groups=2, **changes) for n in (6, 4))


def given_by(pair, dtype: torch.dtype = torch.float32, grad: bool = True) -> ForForward:
    """What a model's forward, which runs, has generated; different from what the layer would for itself."""
    with torch.set_grad_enabled(grad):
        forward = ModelForward()
        A, B = (2 * generator(dtype=dtype) for generator in pair)
    return ForForward(A, B, forward)


def ask(store: FactorStore, pair, dtype: torch.dtype = torch.float32):
    return store.matrices(*pair, dtype)


def own(pair, dtype: torch.dtype = torch.float32):
    return pair[0](dtype=dtype), pair[1](dtype=dtype)


def assert_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def recomputed(function):
    """What a function gives when it is called in a backward, as activation checkpointing calls layers again."""
    results = []

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                results.append(function())
            return gradient

    Again.apply(torch.ones((), requires_grad=True)).backward()
    return results[0]


def test_layer_by_itself_generates_with_the_scaling_in_b():
    pair = generators()
    A, B = ask(FactorStore(), pair)
    assert_same((A, B), own(pair))
    torch.testing.assert_close(B, pair[1]())
    (A.sum() + B.sum()).backward()
    assert all(generator.latent.grad is not None for generator in pair)


def test_running_forward_serves_its_own_tensors_and_one_that_is_over_nothing():
    pair, store = generators(), FactorStore()
    store.for_forward = given = given_by(pair)
    assert store.is_served
    A, B = ask(store, pair)
    assert A is given.A
    assert B is given.B
    assert given.in_graph
    given.forward.runs = False
    assert not store.is_served
    assert_same(ask(store, pair), own(pair))
    assert store.for_forward is None


def test_tensors_of_a_forward_without_autograd_are_not_used_under_autograd():
    pair, store = generators(), FactorStore()
    store.for_forward = given = given_by(pair, grad=False)
    with torch.no_grad():
        assert ask(store, pair)[0] is given.A
    A, B = ask(store, pair)
    assert A.requires_grad
    assert B.requires_grad


@pytest.mark.parametrize(
    ("has", "asked", "served"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),  # autocast is on around the model and off in the layer
        (torch.bfloat16, torch.float16, False),
    ],
)
def test_tensors_are_rounded_for_a_layer_but_never_widened(has, asked, served):
    pair, store = generators(), FactorStore()
    store.for_forward = given = given_by(pair, has)
    A, B = ask(store, pair, asked)
    expected = (given.A.to(asked), given.B.to(asked)) if served else own(pair, asked)
    assert_same((A, B), expected)


def test_recomputation_after_the_forward_sees_its_values_but_only_if_the_layer_has_used_them():
    pair, store = generators(), FactorStore()
    store.for_forward = given = given_by(pair)
    ask(store, pair)
    given.forward.runs = False
    assert_same(recomputed(lambda: ask(store, pair)), (given.A, given.B))
    given.in_graph = False
    assert_same(recomputed(lambda: ask(store, pair)), own(pair))


def test_recomputation_after_the_gradients_makes_tensors_of_the_same_kind_in_a_graph_of_their_own():
    pair, store = generators(), FactorStore()
    pair[0].requires_grad_(False)
    given = ForForward(None, None, ModelForward(), in_graph=True)
    given.forward.runs = False
    store.for_forward = given
    A, B = recomputed(lambda: ask(store, pair))
    assert_same((A, B), own(pair))
    assert (A.requires_grad, B.requires_grad) == (False, True)
    assert B.is_leaf


def test_recomputation_under_reentrance_leads_to_the_parameters():
    pair, store = generators(), FactorStore()
    with torch.no_grad():
        store.for_forward = given = given_by(pair, grad=False)
        ask(store, pair)
    given.forward.runs = False
    A, B = recomputed(lambda: ask(store, pair))
    (A.sum() + B.sum()).backward()
    assert all(generator.latent.grad is not None for generator in pair)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_copy_is_empty(how):
    pair, store = generators(), FactorStore()
    store.for_forward = given_by(pair)
    other = how(store)
    assert (other.for_forward, other.for_step) == (None, None)
    assert store.for_forward is not None


def test_store_holds_no_graph_once_a_forward_that_nobody_differentiates_is_replaced():
    pair, store = generators(), FactorStore()
    store.for_forward = given_by(pair)
    matrix = weakref.ref(store.for_forward.A)
    store.for_forward.forward.runs = False
    ask(store, pair)
    assert matrix() is None


# -- matrices that several forwards use ------------------------------------------------------------------------------


def test_held_matrices_serve_all_that_is_differentiated_and_nothing_else():
    pair, store = generators(), FactorStore()
    with torch.no_grad():
        A, B = own(pair)
    store.for_step = {}
    assert_same(ask(store, pair), own(pair))  # for which nothing was generated beforehand
    leaves = store.keep_for_step(*pair, A, B)
    assert store.keep_for_step(*pair, 2 * A, 2 * B)[0] is leaves[0]
    assert ask(store, pair)[0] is leaves[0]
    assert recomputed(lambda: ask(store, pair))[1] is leaves[1]
    with torch.no_grad():
        assert ask(store, pair)[0] is not leaves[0]
    assert ask(store, pair, torch.bfloat16)[0].grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_matrix_sums_gradients_in_float32_until_they_are_taken(dtype):
    generator = generators()[0]
    with torch.no_grad():
        held = ForStep(generator(dtype=dtype), generator)
    assert held.take() is None
    for _ in range(2):
        for value in (1.0, 1 / 512):  # whose sum has too many bits for bfloat16
            (value * held.leaf).sum().backward()
        taken = held.take()
        assert taken.dtype is torch.float32
        assert torch.equal(taken, torch.full_like(taken, 1 + 1 / 512))
        assert held.take() is None


def test_held_matrix_of_fixed_parameters_needs_no_gradient():
    generator = generators()[0].requires_grad_(False)
    held = ForStep(generator(), generator)
    assert not held.leaf.requires_grad
    held.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_that_comes_after_the_end_is_an_error(dtype):
    generator = generators()[0]
    held = ForStep(generator(dtype=dtype), generator)
    loss = held.leaf.sum()
    held.end()
    with pytest.raises(RuntimeError, match="gradients have been passed on"):
        loss.backward()


def test_held_matrices_of_other_values_are_not_given_to_a_forward():
    pair, store = generators(), FactorStore()
    store.for_step = {}
    with torch.no_grad():
        store.keep_for_step(*pair, *own(pair))
        pair[1].latent.add_(0.1)
    assert store.for_step_in(torch.bfloat16) is None
    with pytest.raises(RuntimeError, match="parameters have changed inside"):
        store.for_step_in(torch.float32)
