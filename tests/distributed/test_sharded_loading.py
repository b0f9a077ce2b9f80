"""Two gloo ranks read a checkpoint of several files, each what it keeps, in plain torch."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from genlora_lightning.backbone import low_memory
from genlora_lightning.backbone.low_memory import build_without_weights, check_none_on_meta, weight_source
from genlora_lightning.injection.inject import adapter_parameters, inject_adapters
from tests.backbone.test_low_memory import CAUSAL, ordinary, saved
from tests.conftest import small_config
from tests.distributed.ranks import on_two_ranks
from tests.models import tiny_llama

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]
IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def folder(tmp_path):
    # 27 rows do not divide by two, and a norm's 16 do.
    return saved(tiny_llama(num_hidden_layers=3, intermediate_size=27), tmp_path / "model")


@pytest.fixture
def reference(folder):
    model = ordinary(CAUSAL, folder)
    torch.manual_seed(5)
    inject_adapters(model, small_config())
    return model


def started(folder: str) -> nn.Module:
    model = build_without_weights(CAUSAL, folder)
    torch.manual_seed(5)
    inject_adapters(model, small_config())
    weight_source(model).start_trained()
    return model


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_fsdp2_rank_reads_the_rows_it_keeps_and_computes_what_one_process_does(
    folder, reference, tmp_path, monkeypatch, sharding
):
    def work(rank):
        sizes = []
        read = low_memory._read
        monkeypatch.setattr(low_memory, "_read", lambda *args: sizes.append((t := read(*args)).to_local().numel()) or t)
        model = started(folder)
        ours = set(adapter_parameters(model).values()) if sharding == "replicate" else set()
        for block in model.model.layers:
            fully_shard(block, ignored_params=ours)
        fully_shard(model, ignored_params=ours)
        weight_source(model).load("cpu")
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                mine = reference.get_parameter(name).detach().chunk(2)[rank]
                assert torch.equal(parameter.to_local(), mine), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = {
            name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        assert model.lm_head.weight is model.model.embed_tokens.weight
        return {"loss": loss.detach(), "gradients": gradients, "read": sum(sizes)}

    results = on_two_ranks(work, tmp_path)
    loss = reference(input_ids=IDS, labels=IDS).loss
    loss.backward()
    base = sum(p.numel() for p in reference.parameters() if not p.requires_grad)
    assert sum(result["read"] for result in results) == base
    assert max(result["read"] for result in results) < 0.52 * base
    for result in results:
        assert result["loss"] == pytest.approx(loss.item(), abs=1e-6)
        for name, gradient in result["gradients"].items():
            torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def live_bytes() -> int:
    """Bytes of all tensors that live."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_fsdp1_reads_one_unit_after_the_other(folder, reference, tmp_path, monkeypatch):
    def work(rank):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        before = live_bytes()
        model = started(folder)
        ours = list(adapter_parameters(model).values())
        fill = weight_source(model).for_fsdp1("cpu")
        device = torch.device("cpu")
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            ignored_states=ours,
            param_init_fn=fill,
            device_id=device,
            use_orig_params=True,
        )
        check_none_on_meta(wrapped)
        alive = live_bytes() - before
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        held = sum(p.numel() for p in wrapped.parameters() if not p.requires_grad)
        return {"loss": loss.detach(), "held": held, "alive": alive, "gradients": [p.grad for p in ours]}

    results = on_two_ranks(work, tmp_path)
    loss = reference(input_ids=IDS, labels=IDS).loss
    loss.backward()
    base = sum(p.numel() for p in reference.parameters() if not p.requires_grad)
    for result in results:
        assert result["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert result["held"] < 0.6 * base
        assert result["alive"] < 0.6 * 4 * base + 4 * sum(p.numel() for p in adapter_parameters(reference).values())
        for gradient, parameter in zip(result["gradients"], adapter_parameters(reference).values(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
