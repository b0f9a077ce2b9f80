from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genlora_lightning import GenLoRAConfig, inject_adapters, merge_adapters, remove_adapters, unmerge_adapters
from genlora_lightning.adapters.genlora.generate import generate_matrices
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters, adapters_disabled
from genlora_lightning.injection.merging import adapters_merged
from genlora_lightning.layers.sharing import set_fused, sharing_modules, stop_sharing_generation
from tests.conftest import perturb, small_config
from tests.layers.test_fused import Operators
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

# Its name in transformers 5; version 4 has no other.
RENAMED = "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"


def adapted(make=tiny_llama, *, moved: bool = True, config=None, **changes) -> nn.Module:
    model = make(**changes)
    inject_adapters(model, config or small_config(num_centers=2, alpha=1.5))
    if moved:
        perturb(model)
    return model.train()


def ids_of(seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 3) -> torch.Tensor:
    ids = ids_of(seed)
    labels = ids if hasattr(model, "lm_head") else ids[:, 0] % 3
    return model(input_ids=ids, labels=labels).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: p.grad for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    return found


def assert_same_gradients(ours, theirs, tolerance=1e-6):
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@contextlib.contextmanager
def generations(monkeypatch):
    """Counts how many matrices each call generates."""
    calls: list[int] = []

    def counting(parameters, *args, **kwargs):
        calls.append(len(parameters))
        return generate_matrices(parameters, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("genlora_lightning.adapters.genlora.generator.generate_matrices", counting)
        yield calls


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_equal_those_of_the_plain_path(make, accumulate):
    model = adapted(make, moved=False, config=small_config(alpha=1.5)).eval()  # no dropout; gradients all the same
    plain = copy.deepcopy(model)
    set_fused(plain, False)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in (model, plain)
    ]
    first = last = 0.0
    for step in range(20):
        losses = []
        for m in (model, plain):
            for micro in range(accumulate):
                loss = loss_of(m, 10 * step + micro) / accumulate
                loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
        first, last = (float(losses[0]), last) if step == 0 else (first, float(losses[0]))
        ours = {n: p.grad for n, p in adapter_parameters(model).items()}
        assert_same_gradients(ours, {n: p.grad for n, p in adapter_parameters(plain).items()})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert first != last
    for one, other in zip(adapter_parameters(model).values(), adapter_parameters(plain).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled"])
def test_twenty_steps_with_checkpointed_activations_or_compiled_equal_those_of_the_plain_path(how):
    torch._dynamo.reset()
    model = adapted(moved=False, config=small_config(alpha=1.5), num_hidden_layers=1 if how == "compiled" else 2)
    plain = copy.deepcopy(model)
    set_fused(plain, False)
    runner = model
    if how == "compiled":
        runner = torch.compile(model, backend="aot_eager")
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in (model, plain)
    ]
    for step in range(20):
        losses = []
        for m in (runner, plain):
            loss = m(input_ids=ids_of(step), labels=ids_of(step)).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
        ours = {n: p.grad for n, p in adapter_parameters(model).items()}
        assert_same_gradients(ours, {n: p.grad for n, p in adapter_parameters(plain).items()})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = adapter_parameters(model)["model.layers.0.mlp.up_proj.update.B.latent"]
    assert moved.detach().abs().max() > 1e-3


def test_each_shape_is_generated_once_in_a_forward(monkeypatch):
    model = adapted(num_hidden_layers=5)
    with generations(monkeypatch) as calls:
        loss_of(model)
    # A of 16 and 24 inputs; B of 16, 8 and 24 outputs
    assert sorted(calls) == sorted([6 * 5, 5, 3 * 5, 2 * 5, 2 * 5])


def test_matrices_that_are_generated_in_pieces_are_those_that_are_generated_at_once(monkeypatch):
    model = adapted(num_hidden_layers=5)
    expected = loss_of(model)
    expected.backward()
    expected_gradients = gradients(model)
    monkeypatch.setattr("genlora_lightning.layers.sharing._AT_ONCE_ON_CPU", 500)
    with generations(monkeypatch) as calls:
        loss = loss_of(model)
    loss.backward()
    assert max(calls) == 500 // (8 * 4 * 2)  # B of 8 outputs: rank 4, 2 centres
    assert sum(calls) == 2 * 35
    assert torch.equal(loss, expected)
    assert_same_gradients(gradients(model), expected_gradients)


@pytest.mark.parametrize("backward", [False, True])
def test_number_of_generators_operators_does_not_grow_with_the_layers(backward):
    def count(layers: int) -> int:
        model = adapted(num_hidden_layers=layers)
        (shared,) = (h.__self__ for h in model._forward_pre_hooks.values())
        loss_of(model)  # makes the tables of signs, once for all models
        with Operators() as operators:
            shared.begin(model, ())
            stores = [layer.store for layer in adapter_layers(model).values()]
            total = [matrix for store in stores for matrix in (store.for_forward.A, store.for_forward.B)]
        if backward:
            with Operators() as operators:
                torch.autograd.backward(total, [torch.ones_like(matrix) for matrix in total])
            return len([name for name in operators.names if name != "ones_like"])
        return len(operators.names)

    assert count(2) == count(6) <= 5 * (50 if backward else 20)


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_activations_give_the_same_gradients_and_recompute_no_matrix_twice(
    monkeypatch, reentrant, autocast
):
    model = adapted(use_cache=False)  # as with checkpointing; a cache of transformers 4.57 changes roundings
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model)
    loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):
        with generations(monkeypatch) as calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                again = loss_of(model)
            again.backward()
        assert torch.equal(again, loss)
        assert_same_gradients(gradients(model), expected, 2e-2 if autocast else 1e-6)
        if not reentrant:
            assert len(calls) == 5
    served = [layer.store.for_forward for layer in adapter_layers(model).values()]
    assert all(one is None or one.A is None for one in served)


@pytest.mark.filterwarnings(RENAMED)
def test_second_backward_through_checkpointed_activations_gives_the_same_gradients():
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    expected = gradients(model)
    loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_part_that_is_called_after_a_step_uses_the_new_values():
    model = adapted()
    loss_of(model).backward()
    part, x = model.model.layers[0].mlp, torch.randn(3, 16)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1)
    output = part(x)
    set_fused(model, False)
    torch.testing.assert_close(output, part(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_part_that_is_called_by_itself_may_be_checkpointed(reentrant):
    model = adapted()
    loss_of(model).backward()
    model.zero_grad()
    part, x = model.model.layers[0].mlp, torch.randn(3, 16, requires_grad=True)
    part(x).square().sum().backward()
    expected = gradients(model)
    checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
    ours = gradients(model)
    for found in (ours, expected):
        for name in [name for name, gradient in found.items() if gradient is None]:
            del found[name]
    assert ours
    assert_same_gradients(ours, expected)


def test_layer_that_is_left_out_has_no_gradient():
    model = adapted()
    skipped = model.model.layers[1].mlp
    skipped.forward = torch.zeros_like
    loss_of(model).backward()
    for name, gradient in gradients(model).items():
        assert (gradient is None) == name.startswith("model.layers.1.mlp"), name


def test_two_forwards_before_one_backward_give_the_sum_of_their_gradients():
    model = adapted()
    parts = []
    for seed in (1, 2):
        loss_of(model, seed).backward()
        parts.append(gradients(model))
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    assert_same_gradients(gradients(model), {name: parts[0][name] + parts[1][name] for name in parts[0]})


def test_part_under_no_grad_inside_of_a_forward_and_the_reverse():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.quiet, self.loud = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                x = self.quiet(x)
            with torch.enable_grad():
                return self.loud(x)

    model = Both()
    inject_adapters(model, small_config())
    perturb(model)
    x = torch.randn(4, 8)
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            output = model(x)
        output.sum().backward()
        assert {name for name, g in gradients(model).items() if g is not None} == {
            name for name in adapter_parameters(model) if name.startswith("loud")
        }


def test_layers_with_autocast_off_inside_of_a_model_with_it_on_have_matrices_of_full_precision():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.inner(x)

    model = Mixed()
    inject_adapters(model, small_config())
    perturb(model)
    x = torch.randn(4, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_module_whose_forward_is_not_called_shares_by_its_parts(monkeypatch):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([tiny_llama(), tiny_llama()])

    holder = Holder()
    inject_adapters(holder, small_config(alpha=1.5))
    with generations(monkeypatch) as calls:
        loss_of(holder.nets[0]).backward()
    assert sum(calls) == 2 * 14
    assert len(calls) == 5


def test_merged_and_disabled_layers_are_not_generated_for(monkeypatch):
    model = adapted().eval()
    expected = loss_of(model)
    with adapters_disabled(model), generations(monkeypatch) as calls:
        assert not torch.equal(loss_of(model), expected)
    assert not calls
    merge_adapters(model)
    with generations(monkeypatch) as calls:
        torch.testing.assert_close(loss_of(model), expected, rtol=0, atol=1e-5)
    assert not calls
    unmerge_adapters(model)
    assert torch.equal(loss_of(model), expected)


def test_removed_adapters_leave_no_hook():
    model = adapted()
    assert sharing_modules(model)
    remove_adapters(model)
    assert not sharing_modules(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules())
    loss_of(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "file"])
def test_copy_of_a_model_that_was_run_generates_for_itself(how):
    model = adapted()
    loss = loss_of(model)
    if how == "file":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = how(model)
    assert torch.equal(loss_of(other), loss)
    perturb(other)
    assert torch.equal(loss_of(model), loss)
    assert not torch.equal(loss_of(other), loss)
    loss_of(other).backward()
    assert all(g is None for g in gradients(model).values())
    assert all(g is not None for g in gradients(other).values())


def test_failed_forward_leaves_nothing_behind():
    model = adapted()
    expected = loss_of(model).detach()
    with pytest.raises(IndexError, match="out of range"):
        model(input_ids=torch.full((1, 3), 10_000))
    assert not any(layer.store.is_served for layer in adapter_layers(model).values())
    assert torch.equal(loss_of(model), expected)


def test_forward_that_is_not_differentiated_frees_its_graph_with_the_next():
    model = adapted()
    layer = next(iter(adapter_layers(model).values()))
    loss_of(model)
    first = weakref.ref(layer.store.for_forward.A)
    loss_of(model)
    gc.collect()
    assert first() is None


def test_shared_layer_is_generated_for_once(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = self.one

        def forward(self, x):
            return self.two(self.one(x))

    model = Twice()
    inject_adapters(model, small_config())
    with generations(monkeypatch) as calls:
        model(torch.randn(2, 8)).sum().backward()
    assert sum(calls) == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_model_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 4)))
    inject_adapters(model, small_config())
    perturb(model)
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x).square().sum().backward()
    ours = gradients(model)
    model(x).square().sum().backward()
    assert_same_gradients(ours, gradients(model))


# -- forwards without autograd ----------------------------------------------------------------------------------------


def test_forwards_without_autograd_generate_once_and_change_no_bit(monkeypatch):
    model = adapted().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = loss_of(copy.deepcopy(model))
        with generations(monkeypatch) as calls:
            for _ in range(3):
                assert torch.equal(loss_of(model), expected)
        assert len(calls) == 5
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_generating_text_generates_the_matrices_once(monkeypatch):
    model = adapted().eval()
    ids = torch.tensor([[1, 2, 3]])
    with generations(monkeypatch) as calls:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0)
    assert len(calls) == 5


def test_part_that_is_called_by_itself_generates_for_itself():
    model = adapted().eval()
    part, x = model.model.layers[0].mlp, torch.randn(3, 16)
    with torch.no_grad():
        first = part(x)
        loss_of(model)
        assert torch.equal(part(x), first)


def by_optimizer(model):
    loss_of(model).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()


def by_load(model):
    model.load_state_dict({name: t + 0.1 if ".update." in name else t for name, t in model.state_dict().items()})


def by_assigning_load(model):
    state = {name: t + 0.1 if ".update." in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_generator_load(model):
    generator = next(iter(adapter_layers(model).values())).update.B
    generator.load_state_dict({name: t + 0.1 for name, t in generator.state_dict().items()})


def by_reset(model):
    next(iter(adapter_layers(model).values())).update.A.reset_parameters()


def by_data(model):
    for parameter in adapter_parameters(model).values():
        parameter.data.add_(0.1)


def by_one_value_of_data(model):
    [*adapter_layers(model).values()][-1].update.B.latent.data.view(-1)[-1] += 0.5


def by_new_data(model):
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data + 0.1


def by_new_parameter(model):
    layer = next(iter(adapter_layers(model).values()))
    layer.update.A.latent = nn.Parameter(layer.update.A.latent.detach() + 0.1)


def by_numpy(model):
    next(iter(adapter_layers(model).values())).update.A.latent.detach().numpy()[:] += 0.1


def by_cast(model):
    model.bfloat16()


CHANGES = [
    by_optimizer,
    by_load,
    by_assigning_load,
    by_generator_load,
    by_reset,
    by_data,
    by_one_value_of_data,
    by_new_data,
    by_new_parameter,
    by_numpy,
    by_cast,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_change_of_a_parameter_is_missed(change, mode):
    model = adapted().eval()
    with mode():
        before = loss_of(model)
        assert torch.equal(loss_of(model), before)
    change(model)
    with mode():
        after = loss_of(model)
        assert not torch.equal(after, before)
        assert torch.equal(after, loss_of(copy.deepcopy(model)))


def test_no_change_is_missed_where_parameters_lie_in_memory_in_another_order():
    model = adapted().eval()
    parameter = next(p for name, p in adapter_parameters(model).items() if name.endswith("B.weight"))
    parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)  # flattened it is a copy
    assert not parameter.is_contiguous()
    with torch.no_grad():
        before = loss_of(model)
        parameter.data.mul_(1.5)
        after = loss_of(model)
        assert not torch.equal(after, before)
        assert torch.equal(after, loss_of(copy.deepcopy(model)))


def test_what_a_forward_without_autograd_kept_is_not_used_under_it_and_is_freed_by_training():
    model = adapted().eval()
    layer = next(iter(adapter_layers(model).values()))
    found = []
    handle = layer.register_forward_hook(lambda *_: found.append(weakref.ref(layer.store.for_forward.A)))
    with torch.no_grad():
        loss_of(model)
    handle.remove()
    gc.collect()
    assert found[0]() is not None
    loss_of(model).backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    gc.collect()
    assert found[0]() is None


def test_switched_off_merged_and_removed_adapters_are_seen_without_autograd():
    model = adapted().eval()
    with torch.no_grad():
        expected = loss_of(model)
        with adapters_disabled(model):
            base = loss_of(model)
        assert not torch.equal(base, expected)
        assert torch.equal(loss_of(model), expected)
        with adapters_merged(model):
            torch.testing.assert_close(loss_of(model), expected)
        assert torch.equal(loss_of(model), expected)
        set_fused(model, False)
        torch.testing.assert_close(loss_of(model), expected)
        remove_adapters(model)
        assert torch.equal(loss_of(model), base)


def test_forwards_of_inference_mode_and_of_several_dtypes():
    model = adapted().eval()
    with torch.no_grad():
        expected = loss_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss_of(model)
    with torch.inference_mode():
        assert torch.equal(loss_of(model), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss_of(model), rounded)
    with torch.no_grad():
        assert torch.equal(loss_of(model), expected)
    loss_of(model).backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_trace_is_the_same_each_time_also_with_gradients(grad):  # which TensorBoard's graph of a module needs
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 9)).eval()
    inject_adapters(model, GenLoRAConfig(rank=3, num_groups_b=2))  # of a size that no other test has: no table is there
    perturb(model)
    x = torch.randn(3, 9)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_traced_model_is_saved_and_generates_from_its_own_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    inject_adapters(model, small_config())
    perturb(model)
    x, file = torch.randn(3, 8), io.BytesIO()
    with torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, file)
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1)
        torch.testing.assert_close(traced(x), model(x))
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected)


def test_switching_between_the_fused_and_the_plain_path_stays_within_rounding(monkeypatch):
    model = adapted()
    loss_of(model).backward()
    ours = gradients(model)
    set_fused(model, False)
    with generations(monkeypatch) as calls:
        loss_of(model).backward()
    assert not calls
    assert_same_gradients(ours, gradients(model))
    stop_sharing_generation(model)
    set_fused(model, True)
    with generations(monkeypatch) as calls:
        loss_of(model).backward()
    assert calls == [1] * 28
    assert_same_gradients(ours, gradients(model))


# -- what is kept for the backward, beside PEFT's LoRA -----------------------------------------------------------------


def bytes_kept(model: nn.Module, autocast: bool) -> int:
    """Bytes of all storages that autograd keeps of a forward, each once, the frozen base's own weights apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(3, 64, (4, 128))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize(("autocast", "bar"), [(False, 1.0), (True, 0.75)])
def test_less_is_kept_for_the_backward_than_by_lora_of_the_same_rank(rank, autocast, bar):
    peft = pytest.importorskip("peft")
    sizes = {  # two blocks of SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
    }
    ours = tiny_llama(**sizes)
    inject_adapters(ours, small_config(rank=rank, num_groups=8))
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapter_layers(ours)})
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llama(**sizes), config)
    ratio = bytes_kept(ours.train(), autocast) / bytes_kept(theirs.train(), autocast)
    assert ratio <= bar
