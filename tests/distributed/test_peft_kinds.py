"""PEFT's adapters on two gloo ranks, against one process on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from genlora_lightning import AdapterFinetuning
from tests.distributed.runs import PlainLlama, Record, SaveAt, fit
from tests.models import tiny_llama
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]

LINEARS = ["q_proj", "v_proj", "down_proj"]
# A head that is trained in full, too: the path of PEFT's `modules_to_save`.
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, modules_to_save=["lm_head"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=LINEARS),
}
BATCHES = 6


def run(kind: str, policy: str, name: str, folder: Path, *callbacks: Any, ckpt: Path | None = None) -> Record:
    adapter = AdapterFinetuning(
        KINDS[name](), adapter_sharding=policy, adapter_dir=str(folder / f"{kind}-{policy}-{name}")
    )
    return fit(kind, policy, folder, PlainLlama(), *callbacks, adapter=adapter, ckpt_path=ckpt, max_steps=BATCHES)


@pytest.mark.parametrize(
    "kinds", [[("ddp", "replicate")], [("fsdp1", "replicate"), ("fsdp2", "replicate"), ("fsdp2", "shard")]]
)
def test_two_ranks_equal_one_process_and_resume_exactly(tmp_path, kinds):
    expected = {name: run("single", "replicate", name, tmp_path) for name in KINDS}

    def ranks() -> list[Any]:
        found = []
        for kind, policy in kinds:
            for name in KINDS:
                file = tmp_path / f"{kind}-{policy}-{name}.ckpt"
                whole = run(kind, policy, name, tmp_path, SaveAt(file, 3))
                resumed = run(kind, policy, name, tmp_path, ckpt=file)
                found.append((kind, policy, name, whole.losses, whole.state, resumed.losses, resumed.state))
        return found

    first, second = on_ranks(ranks)
    for (kind, policy, name, losses, state, later, resumed), (*_, other) in zip(first, second, strict=True):
        what = f"{name} under {kind}, {policy}"
        torch.testing.assert_close(
            losses, expected[name].losses, rtol=1e-5, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}"
        )
        assert set(state) == set(expected[name].state)
        for key, tensor in expected[name].state.items():
            torch.testing.assert_close(
                state[key], tensor, rtol=0, atol=1e-6, msg=lambda m, k=key, w=what: f"{w}, {k}: {m}"
            )
            assert torch.equal(state[key], resumed[key]), f"{what}, {key}"
            assert torch.equal(state[key], other[key]), f"{what}, {key}"
        assert later == losses[3:]

        # What rank 0 has saved is PEFT's, and whole.
        loaded = peft.PeftModel.from_pretrained(
            tiny_llama(tie_word_embeddings=False), tmp_path / f"{kind}-{policy}-{name}"
        )
        prefix = "net."
        stored = loaded.base_model.model.state_dict()
        assert all(torch.equal(stored[key.removeprefix(prefix)], tensor) for key, tensor in state.items())
