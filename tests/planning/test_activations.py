from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning import activations
from genlora_lightning.planning.activations import StepMemory, count_step
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


def adapted(make=tiny_llama, **changes: object) -> nn.Module:
    model = make(**changes)
    inject_adapters(model, small_config(rank=8))
    return model.train()


def saved_bytes(model: nn.Module, batch: int, tokens: int) -> int:
    """Bytes that autograd keeps of a real forward pass, each storage once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    tensors = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.zeros(batch, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.config.use_cache = False
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_counted_memory_holds_what_autograd_keeps_of_a_real_step(make, checkpointing):
    model = adapted(make)
    if checkpointing:
        enable_gradient_checkpointing(model)
    labels = 3 if make is tiny_bert else None
    counted = count_step(model, 4, 32, autocast=False, num_labels=labels).activations
    kept = saved_bytes(model, 4, 32)
    # Beside it: logits and the loss's own, or what one layer's recomputation needs.
    logits = 4 * 32 * 64 * 4
    layer = kept if not checkpointing else saved_bytes(adapted(make), 4, 32) / 2
    assert kept < counted < kept + 6 * logits + (layer if checkpointing else 0.25 * kept)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_equal_layers_are_counted_by_two_and_three(checkpointing):
    model = adapted(num_hidden_layers=7)
    if checkpointing:
        enable_gradient_checkpointing(model)
    whole = activations._count(activations._Step(model, True, None), 2, 64)
    assert activations._count_pass(model, 2, 64, True, None) == whole
    assert len(model.model.layers) == 7


@pytest.mark.parametrize("at_once", [1, 130])  # matrices alone; some of two layers
def test_generation_is_counted_by_whole_batches_of_few_layers(at_once, monkeypatch):
    monkeypatch.setattr("genlora_lightning.layers.sharing._AT_ONCE_ON_CPU", at_once)
    model = adapted(num_hidden_layers=7)
    whole = activations._count(activations._Generation(model, True), 1, 1)
    counted = activations.count_generation(model, True)
    # but for a table of signs, which may live on from the first
    assert counted.activations == pytest.approx(whole.activations, rel=1e-3)
    assert counted.factors == pytest.approx(whole.factors, rel=1e-3)
    assert len(model.model.layers) == 7


@pytest.mark.parametrize("layers", [2, 7])
def test_with_few_tokens_the_peak_is_in_the_generators_backward(layers, monkeypatch):
    model = adapted(num_hidden_layers=layers)
    counted = count_step(model, 1, 4, autocast=True)
    assert counted.factors > counted.activations / 2
    # The whole step at once, as it is; in it not all gradients wait for the last shape's turn.
    monkeypatch.setattr(
        activations._Counter, "paused", property(lambda self: False, lambda self, value: None), raising=False
    )
    monkeypatch.setattr(activations, "count_generation", lambda *_: StepMemory(0, 0))
    monkeypatch.setattr(activations, "_FEW", 10)
    assert 0.8 * counted.activations < count_step(model, 1, 4, autocast=True).activations <= counted.activations


def test_counting_changes_nothing_in_the_model():
    model = adapted(num_hidden_layers=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    count_step(model, 2, 16, autocast=True)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_factors_are_the_matrices_of_all_layers_whether_activations_are_checkpointed_or_not(make, checkpointing):
    # A forward generates for all of its layers at its beginning, and what it generates lives until its gradient is
    # there: gradient checkpointing does not make it less. Nothing else of the generators lives with it, but one table
    # of signs for each side and number of entries, a byte each.
    model = adapted(make)
    if checkpointing:
        enable_gradient_checkpointing(model)
    step = count_step(model, 4, 32, autocast=False, num_labels=3 if make is tiny_bert else None)
    generators = [module for module in model.modules() if isinstance(module, RBFGenerator)]
    tables = {(g.sign_table, g.num_entries): g.rank * g.num_entries for g in generators}
    matrices = 4 * sum(generator.rank * generator.num_entries for generator in generators)
    assert step.factors == matrices + sum(tables.values())


def test_factors_grow_with_the_rank_and_other_activations_hardly():
    sizes = {}
    for rank in (8, 32):
        model = tiny_llama()
        inject_adapters(model, small_config(rank=rank))
        sizes[rank] = count_step(model.train(), 4, 32, autocast=False)
    assert 3 < sizes[32].factors / sizes[8].factors < 4.5
    rest = {rank: size.activations - size.factors for rank, size in sizes.items()}
    assert rest[32] < 2 * rest[8]


def test_memory_grows_linearly_with_the_batch_and_autocast_lowers_it():
    model = adapted()
    one, two, three = (count_step(model, batch, 64, autocast=True).activations for batch in (1, 2, 3))
    assert three - two == two - one > 0
    more = [count_step(model, 8, 64, autocast=autocast).activations for autocast in (True, False)]
    assert more[0] < more[1]
