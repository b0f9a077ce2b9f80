"""Every strategy and policy, two gloo ranks on the CPU, against one process on the same global batches."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from genlora_lightning import GenLoRAFinetuning, load_adapter
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.layers.accumulation import is_generated_once
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import small_config
from tests.distributed.runs import (
    CONFIG,
    POLICIES,
    SHARDED,
    STRATEGIES,
    PlainLlama,
    causal_lm,
    fit,
    mask_loader,
    tensors_of,
)
from tests.models import tiny_llama
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]

# accumulation, clipping by norm, optimizer, where the backbone is built
CASES: list[tuple[int, float | None, str, str]] = [
    (1, None, "sgd", "init"),
    (2, 0.5, "sgd", "configure_model"),
    (1, 0.5, "adamw", "configure_model"),
    (2, None, "adamw", "init"),
]


def assert_close(state: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def run_case(kind: str, policy: str, folder: Any, case: tuple[int, float | None, str, str], **settings: Any) -> Any:
    accumulate, clip, optimizer, place = case
    return fit(
        kind,
        policy,
        folder,
        PlainLlama(place, optimizer),
        max_epochs=accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        **settings,
    )


@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_ranks_equal_one_process(tmp_path, kind):
    expected = [run_case("single", "replicate", tmp_path, case) for case in CASES]
    policies = POLICIES if kind in SHARDED else POLICIES[:1]

    def both_policies() -> list[Any]:
        return [
            (policy, index, record.losses, record.state)
            for policy in policies
            for index, case in enumerate(CASES)
            for record in [run_case(kind, policy, tmp_path, case)]
        ]

    first, second = on_ranks(both_policies)
    for (policy, index, losses, state), (*_, other) in zip(first, second, strict=True):
        one = expected[index]
        assert len(losses) >= 10
        torch.testing.assert_close(
            losses, one.losses, rtol=0, atol=1e-6, msg=lambda m, p=policy, i=index: f"{p} {i} {m}"
        )
        assert_close(state, one.state)
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    moved = expected[0].state["net.model.layers.0.mlp.up_proj.update.B.latent"]
    assert moved.abs().max() > 1e-3
    # The same folder, tensors and base, that one process writes; and it loads.
    for policy in policies:
        assert tensors_of(tmp_path / f"{kind}-{policy}") == tensors_of(tmp_path / "single-replicate")
        module = PlainLlama()
        load_adapter(module, tmp_path / f"{kind}-{policy}")
        assert_close(
            adapter_state_dict(module), first[-1][3] if policy == policies[-1] else first[len(CASES) - 1][3], 0.0
        )


@pytest.mark.parametrize("kind", SHARDED)
def test_clipping_by_value_checkpointed_activations_and_bf16_are_those_of_one_process(tmp_path, kind):
    variants: list[tuple[bool, dict[str, Any], float]] = [
        (False, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 1e-6),
        (True, {}, 1e-6),
        (False, {"precision": "bf16-mixed"}, 5e-3),
    ]

    def run(kind: str, policy: str) -> list[Any]:
        return [
            fit(kind, policy, tmp_path, PlainLlama("init", "sgd", checkpointing), **settings).state
            for checkpointing, settings, _ in variants
        ]

    expected = run("single", "replicate")
    states, _ = on_ranks(lambda: {policy: run(kind, policy) for policy in POLICIES})
    for policy in POLICIES:
        for state, one, (_, _, tolerance) in zip(states[policy], expected, variants, strict=True):
            assert_close(state, one, tolerance)
            assert all(tensor.dtype is torch.float32 for tensor in state.values())


@pytest.mark.parametrize("kind", STRATEGIES)
def test_our_module_counts_each_token_alike_under_every_strategy(tmp_path, kind):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model")

    def run(kind: str, policy: str) -> Any:
        torch.manual_seed(100)
        settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        return fit(kind, policy, tmp_path, causal_lm(tmp_path), loader=mask_loader(), **settings).state

    expected = run("single", "replicate")
    for states in on_ranks(lambda: [run(kind, policy) for policy in (POLICIES if kind in SHARDED else POLICIES[:1])]):
        for state in states:
            assert_close(state, expected)
    assert CONFIG["modules_to_train"] == ["lm_head"]
    assert any("lm_head" in name for name in expected)


class Plain(Callback):
    """Has the adapters computed by the formula, left to autograd, in each forward."""

    def on_fit_start(self, trainer, pl_module):
        set_fused(pl_module, False)


class Windows(Callback):
    """Whether forwards share what was generated, after each micro-batch."""

    def on_fit_start(self, trainer, pl_module):
        self.open: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.open.append(is_generated_once(pl_module))


class Leaving(PlainLlama):
    """Leaves some layers out in the last micro-batch of four."""

    def training_step(self, batch, batch_idx):
        assert self.net is not None
        part = self.net.model.layers[1].mlp
        if batch_idx % 4 == 3:
            part.forward = torch.zeros_like
        try:
            return super().training_step(batch, batch_idx)
        finally:
            vars(part).pop("forward", None)


@pytest.mark.parametrize("kind", ["ddp, unused", *SHARDED])
def test_generation_once_per_step_equals_plain_autograd_in_one_process(tmp_path, kind):
    settings = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}  # 3 steps an epoch

    def run(kind: str, policy: str, generate: str, *callbacks: Callback) -> Any:
        adapter = GenLoRAFinetuning(
            small_config(**CONFIG), adapter_sharding=policy, generate=generate, save_adapter=False
        )
        epochs = 7 if policy == "replicate" else 1  # there is nothing to share with "shard"
        return fit(kind, policy, tmp_path, Leaving(), *callbacks, adapter=adapter, max_epochs=epochs, **settings)

    expected = run("single", "replicate", "forward", Plain())
    assert expected.state["net.model.layers.0.mlp.up_proj.update.B.latent"].abs().max() > 1e-3

    def all_policies() -> list[Any]:
        found = []
        for policy in POLICIES if kind in SHARDED else POLICIES[:1]:
            windows = Windows()
            context = pytest.warns(UserWarning, match='no effect with `adapter_sharding="shard"`')
            # Rank 0 alone warns.
            with context if policy == "shard" and os.environ["RANK"] == "0" else nullcontext():
                record = run(kind, policy, "step", windows)
            found.append((policy, record.losses, record.state, windows.open))
        return found

    first, second = on_ranks(all_policies)
    for (policy, losses, state, opened), (*_, other, _) in zip(first, second, strict=True):
        assert len(losses) == (7 * 12 if policy == "replicate" else 12)
        assert opened == [policy == "replicate" and batch % 4 < 3 for batch in range(len(losses))]
        torch.testing.assert_close(losses, expected.losses[: len(losses)], rtol=0, atol=1e-6)
        if policy == "replicate":
            assert_close(state, expected.state)
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
