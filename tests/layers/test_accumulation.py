from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from genlora_lightning import GenLoRAConfig, inject_adapters
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.accumulation import generated_once, is_generated_once, pass_gradients
from genlora_lightning.layers.factors import ForStep
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config
from tests.layers.test_fused import Operators
from tests.layers.test_sharing import RENAMED, adapted, assert_same_gradients, generations, gradients, loss_of
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

SEEDS = (1, 2, 3, 4)


def accumulate(model: nn.Module, seeds=SEEDS) -> list[torch.Tensor]:
    losses = []
    for seed in seeds:
        loss = loss_of(model, seed) / len(seeds)
        loss.backward()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_twenty_steps_of_four_micro_batches_equal_those_of_the_plain_path(make):
    model = adapted(make, moved=False, config=small_config(alpha=1.5)).eval()
    plain = copy.deepcopy(model)
    set_fused(plain, False)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05, momentum=0.9) for m in (model, plain)
    ]
    for step in range(20):
        seeds = [100 * step + seed for seed in SEEDS]
        with generated_once(model):
            ours = accumulate(model, seeds)
        theirs = accumulate(plain, seeds)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain)]
        assert_same_gradients(*grads)
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    moved = [p for name, p in adapter_parameters(model).items() if name.endswith("update.B.latent")]
    assert max(float(p.detach().abs().max()) for p in moved) > 1e-3
    for one, other in zip(adapter_parameters(model).values(), adapter_parameters(plain).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_work_of_the_generators_does_not_grow_with_the_micro_batches(monkeypatch):
    model = adapted()
    passed = []
    monkeypatch.setattr(
        "genlora_lightning.adapters.genlora.generator.pass_gradients_on",
        lambda parameters, *_, **__: passed.append(len(parameters)),
    )
    for seeds in (SEEDS[:1], SEEDS):
        passed.clear()
        with generations(monkeypatch) as calls, generated_once(model):
            accumulate(model, seeds)
        # A of 16 and 24 inputs; B of 16, 8 and 24 outputs
        assert sorted(calls) == sorted(passed) == sorted([12, 2, 6, 4, 4])


def test_each_further_micro_batch_takes_the_operators_of_a_step_without_generators():
    model = adapted()

    def count(micro_batches: int) -> int:
        model.zero_grad()
        with generated_once(model), Operators() as operators:
            accumulate(model, SEEDS[:micro_batches])
        return len(operators.names)

    third, second = count(4) - count(3), count(3) - count(2)
    assert third == second
    with Operators() as operators:
        accumulate(model, SEEDS[:1])
    generating = sum(name.startswith(("exp", "expm1")) for name in operators.names)
    assert generating
    with generated_once(model):
        accumulate(model, SEEDS[:1])
        with Operators() as operators:
            accumulate(model, SEEDS[:1])
    assert not any(name.startswith(("expm1", "stack")) for name in operators.names)


def test_bfloat16_gradients_are_summed_in_float32():
    model = adapted()

    def losses(seeds):
        with torch.autocast("cpu", torch.bfloat16):
            found = [loss_of(model, seed) for seed in seeds]
        for loss in found:
            loss.backward()

    seeds = range(16)
    for seed in seeds:
        losses([seed])
    expected = gradients(model)
    with generated_once(model):
        for seed in seeds:
            losses([seed])
        pair = next(iter(adapter_layers(model).values())).store.for_step[torch.bfloat16]
        assert pair[0].leaf.dtype is torch.bfloat16
        assert pair[0].leaf.grad is None
        assert pair[0]._sum.dtype is torch.float32
    ours = gradients(model)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    difference = torch.stack([(ours[name] - g).norm() for name, g in expected.items()]).norm()
    assert difference < 1e-5 * norm  # rounding of float32, where bfloat16's is 4e-3


def test_scaled_losses_give_what_unscaled_ones_do():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def run(scaler):
        for seed in SEEDS:
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, seed) / 4
            scaler.scale(loss).backward()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run(scaler)
    scaler.unscale_(optimizer)
    expected = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with generated_once(model):
        run(scaler)
    scaler.unscale_(optimizer)
    assert_same_gradients(gradients(model), expected)
    model.zero_grad()
    with generated_once(model):
        run(torch.amp.GradScaler("cpu", init_scale=2.0**60))
    assert not all(gradient.isfinite().all() for gradient in gradients(model).values())  # so that the step is skipped


@pytest.mark.filterwarnings(RENAMED)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_activations_share_too(monkeypatch, reentrant, autocast):
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected_losses = accumulate(model)
        expected = gradients(model)
        with generations(monkeypatch) as calls, generated_once(model):
            losses = accumulate(model)
        assert len(calls) == 5
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
    assert_same_gradients(gradients(model), expected, 2e-3 if autocast else 1e-6)


def test_several_forwards_in_a_micro_batch_and_layers_that_some_of_them_leave_out():
    model = adapted()
    skipped = model.model.layers[1].mlp

    def run():
        (loss_of(model, 1) * loss_of(model, 2)).backward()
        skipped.forward = torch.zeros_like
        loss_of(model, 3).backward()
        del skipped.forward

    run()
    expected = gradients(model)
    with generated_once(model):
        run()
    assert_same_gradients(gradients(model), expected)
    skipped.forward = torch.zeros_like
    with generated_once(model):
        accumulate(model)
    for name, gradient in gradients(model).items():
        assert (gradient is None) == name.startswith("model.layers.1.mlp"), name


def test_parts_that_are_called_by_themselves_and_layers_that_occur_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = self.one
            self.three = nn.Linear(8, 8)

        def forward(self, x):
            return self.three(self.two(self.one(x)))

    model = Twice()
    inject_adapters(model, small_config())
    perturb(model)
    x = torch.randn(2, 8)

    def run():
        model(x).square().sum().backward()
        model.three(x).square().sum().backward()

    run()
    expected = gradients(model)
    with generated_once(model):
        run()
        assert model.three.update.A.latent.grad is None
    assert_same_gradients(gradients(model), expected)


def test_dropout_draws_the_same_numbers():
    model = adapted(config=small_config(dropout=0.3))
    torch.manual_seed(5)
    expected_losses = accumulate(model)
    expected = gradients(model)
    torch.manual_seed(5)
    with generated_once(model):
        losses = accumulate(model)
    assert losses == expected_losses
    assert_same_gradients(gradients(model), expected)


def test_evaluation_in_between_changes_nothing_and_sees_what_others_write():
    model = adapted()
    accumulate(model)
    expected = gradients(model)
    with torch.no_grad():
        plain = loss_of(model, 9)
    with generated_once(model):
        accumulate_one = [loss_of(model, seed) / 4 for seed in SEEDS[:2]]
        for loss in accumulate_one:
            loss.backward()
        with torch.inference_mode():
            assert torch.equal(loss_of(model, 9), plain)
        with torch.no_grad():
            assert torch.equal(loss_of(model, 9), plain)
        for seed in SEEDS[2:]:
            (loss_of(model, seed) / 4).backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_may_be_passed_on_in_the_middle(mode):
    model = adapted()
    accumulate(model)
    expected = gradients(model)
    with generated_once(model):
        for seed in SEEDS:
            (loss_of(model, seed) / 4).backward()
            with mode():
                pass_gradients(model)
            # None that inference mode has made: nobody could clip it later.
            assert not any(p.grad.is_inference() for p in adapter_parameters(model).values())
        pass_gradients(model)
    assert_same_gradients(gradients(model), expected)


def test_error_drops_what_was_not_passed_on_and_leaves_the_model_as_it_was():
    model = adapted()
    accumulate(model)
    expected = gradients(model)
    with pytest.raises(KeyError, match="x"), generated_once(model):  # noqa: PT012
        accumulate(model)
        raise KeyError("x")
    assert not is_generated_once(model)
    assert all(gradient is None for gradient in gradients(model).values())
    accumulate(model)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("then", ["forward", "end"])
def test_optimizer_step_inside_is_an_error(then, fused):
    model = adapted()
    parameters = [*adapter_parameters(model).values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    with pytest.raises(RuntimeError, match=r"have changed inside of `generated_once.* Leave it before the step"):  # noqa: PT012, SIM117
        with generated_once(model):
            accumulate(model)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if then == "forward":
                loss_of(model)
    assert not is_generated_once(model)


def test_backward_after_the_end_is_an_error():
    model = adapted()
    with generated_once(model):
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match=r"the backward belongs into the same `generated_once"):
        loss.backward()


def test_inner_block_leaves_the_gradients_to_the_outer_one():
    model = adapted()
    with generated_once(model):
        with generated_once(model):
            accumulate(model)
        assert all(p.grad is None for p in adapter_parameters(model).values())
        assert is_generated_once(model)
    assert all(gradient is not None for gradient in gradients(model).values())
    assert not is_generated_once(model)


@pytest.mark.parametrize("way", ["plain", "compiled"])
def test_layers_for_which_nothing_is_generated_beforehand_work_as_without(way):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    inject_adapters(model, small_config())
    perturb(model)
    x = torch.randn(5, 8)
    model(x).square().sum().backward()
    expected = gradients(model)
    set_fused(model, way != "plain")
    runner = torch.compile(model, backend="eager", fullgraph=True) if way == "compiled" else model
    with generated_once(model):
        runner(x).square().sum().backward()
    assert_same_gradients(gradients(model), expected)


def test_fixed_centers_and_hooks_on_parameters_are_respected():
    model = adapted(config=GenLoRAConfig(rank=4, num_groups_b=2, learn_widths=True))
    seen = []
    parameters = {name: p for name, p in adapter_parameters(model).items() if p.requires_grad}
    for name, parameter in parameters.items():
        parameter.register_hook(lambda gradient, n=name: seen.append(n))
    with generated_once(model):
        accumulate(model)
    assert sorted(seen) == sorted(parameters)
    for name, gradient in gradients(model).items():
        assert (gradient is None) == name.endswith("centers"), name


def test_model_without_adapters_is_left_alone():
    model = nn.Linear(2, 2)
    with generated_once(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_copy_that_is_made_inside_is_not_inside():
    model = adapted()
    with generated_once(model):
        loss_of(model).backward()
        other = copy.deepcopy(model)
        assert not is_generated_once(other)
        loss_of(other).backward()
        assert all(p.grad is not None for p in adapter_parameters(other).values())


def test_nothing_is_left_when_the_block_is():
    model = adapted()
    with generated_once(model), torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
        stores = [layer.store for layer in adapter_layers(model).values()]
        held = [one for store in stores for pair in store.for_step.values() for one in pair]
        assert isinstance(held[0], ForStep)
        leaf = weakref.ref(held[0].leaf)
        del held
    loss_of(model)
    gc.collect()
    assert leaf() is None
