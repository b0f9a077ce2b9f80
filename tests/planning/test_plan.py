from __future__ import annotations

import json

import pytest
import torch

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.backbone.architectures import build_on_meta, read_config
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning.plan import GIB, Plan, make_plan
from genlora_lightning.planning.traffic import Setup
from tests.conftest import small_config
from tests.counted import counted_once  # noqa: F401 - a fixture
from tests.models import tiny_bert, tiny_llama, tiny_squeezebert

pytestmark = pytest.mark.usefixtures("counted_once")


def tiny_plan(config: GenLoRAConfig | None = None, **setup: object) -> Plan:
    """A plan of a tiny model."""
    made = Setup(**{"tokens": 64, **setup})  # type: ignore[arg-type]
    return make_plan(tiny_llama().config, "tiny", "causal-lm", config or small_config(), made)


def real(config: GenLoRAConfig):
    model = tiny_llama()
    inject_adapters(model, config)
    return model


@pytest.mark.parametrize("config", [small_config(), small_config(learn_centers=False, target_modules=["q_proj"])])
def test_parameters_are_those_of_the_real_model(config):
    model, plan = real(config), tiny_plan(config)
    assert plan.total_parameters == sum(p.numel() for p in model.parameters())
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears = 2 if len(config.target_modules) == 1 else 14
    assert plan.linears == linears
    assert plan.memory.adapters == 4 * sum(p.numel() for n, p in model.named_parameters() if ".update." in n)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's call
def test_lora_parameters_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert tiny_plan().lora_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_classification_head_counts_as_trained_in_full():
    config = small_config(modules_to_train=["classifier"])
    plan = make_plan(tiny_bert().config, "bert", "sequence-classification", config, Setup(tokens=16))
    model = tiny_bert()
    inject_adapters(model, config)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert (
        plan.lora_parameters
        == 4 * sum(sum(layer.base_layer.weight.shape) for layer in model.modules() if hasattr(layer, "base_layer"))
        + head
    )
    assert plan.memory.gradients == 4 * plan.trainable_parameters


def test_memory_of_one_gpu_is_that_of_its_tensors():
    model, plan = real(small_config()), tiny_plan()
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = plan.trainable_parameters
    memory = plan.memory
    assert (memory.base, memory.base_gathered, memory.buckets) == (4 * base, 0, 0)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    parts = (memory.base, memory.adapters, memory.gradients, memory.optimizer, memory.activations)
    assert memory.total == sum(parts)
    assert memory.activations_other_way < memory.activations  # with gradient checkpointing


def test_model_without_gradient_checkpointing_is_planned_without_it():
    def plan(**setup: object) -> Plan:
        config, adapter = tiny_squeezebert().config, small_config(target_modules=["query"])
        return make_plan(config, "tiny", "sequence-classification", adapter, Setup(batch=1, tokens=8, **setup))

    assert plan().memory.activations_other_way is None
    assert "does not support gradient checkpointing" in str(plan())
    small = plan(gpu_memory=1e-9)
    assert "the activations alone take" in str(small)
    with pytest.raises(ValueError, match="SqueezeBertForSequenceClassification does not support it: plan without it"):
        plan(gradient_checkpointing=True)


def test_sharding_divides_the_base_and_gathers_root_and_two_layers():
    one, eight = tiny_plan(), tiny_plan(strategy="fsdp2", gpus=8)
    base = one.memory.base
    assert eight.memory.base == -(-base // 8 // 4) * 4
    assert eight.memory.base_gathered == base  # root and two layers: all that a model of two layers has
    assert eight.memory.adapters == one.memory.adapters
    sharded = tiny_plan(strategy="fsdp2", gpus=8, adapter_sharding="shard").memory
    assert sharded.optimizer == 8 * -(-one.trainable_parameters // 8)
    assert tiny_plan(strategy="ddp", gpus=8).memory.base == base


def test_lora_sends_what_its_rank_is_larger():
    plan = tiny_plan(small_config(rank=8), strategy="fsdp2", gpus=2)
    ratio = plan.lora_parameters / plan.trainable_parameters
    replicated, lora = plan.traffic["genlora replicate"], plan.traffic["lora replicate"]
    assert lora.sent / replicated.sent == pytest.approx(ratio, rel=1e-3)
    assert lora.base_sent == replicated.base_sent > 0
    assert set(tiny_plan(strategy="ddp", gpus=2).traffic) == {"genlora replicate", "lora replicate"}


def test_verdict_overlay_and_text():
    plan = tiny_plan(strategy="fsdp2", gpus=8, gpu_memory=1.0)
    assert plan.fits
    assert plan.overlay == "genlora:strategy/fsdp2"
    assert tiny_plan().overlay is None
    text = str(plan)
    assert "8 GPUs, fsdp2, adapters replicated" in text
    assert "It fits" in text
    assert "--config genlora:strategy/fsdp2" in text
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["total"] == plan.memory.total
    tight = tiny_plan(strategy="fsdp2", gpus=8, gpu_memory=plan.memory.total / GIB)
    assert "It does not fit" in str(tight)  # 90 % of it may be used


def test_a_70b_shape_is_built_and_adapted_without_drawing_numbers():
    model = build_on_meta(read_config("llama-70b"), "causal-lm")
    state = torch.random.get_rng_state()
    report = inject_adapters(model, GenLoRAConfig(rank=64, num_groups_b=16))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(report.adapted) == 560
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_strategy_is_the_simplest_that_fits():
    assert tiny_plan().setup.strategy == "single"
    whole = tiny_plan(gpus=4)
    assert whole.setup.strategy == "ddp"
    need = whole.memory.total / GIB / 0.9
    assert tiny_plan(gpus=4, gpu_memory=1.01 * need).setup.strategy == "ddp"
    cut = tiny_plan(gpus=4, gpu_memory=0.99 * need)
    assert cut.setup.strategy == "fsdp2"
    assert cut == tiny_plan(gpus=4, gpu_memory=0.99 * need, strategy="fsdp2")
    assert tiny_plan(gpus=4, adapter_sharding="shard").setup.strategy == "fsdp2"


def test_plan_that_does_not_fit_says_what_would():
    fits = {"gradient_checkpointing": True, "batch": 4}
    with_checkpointing, without = tiny_plan(**fits), tiny_plan(batch=4)
    room = (with_checkpointing.memory.total + without.memory.total) / 2 / GIB / 0.9
    assert with_checkpointing.remedy is None
    plan = tiny_plan(batch=4, gpu_memory=room)
    assert not plan.fits
    assert plan.remedy in str(plan)
    assert plan.remedy.startswith("It would fit on 1 GPU, with gradient checkpointing: ")
    hopeless = tiny_plan(batch=4, gpu_memory=0.5 * with_checkpointing.memory.activations / GIB)
    assert hopeless.remedy.startswith("No number of GPUs changes that: the activations alone take")


def test_remedy_names_the_least_number_of_gpus():
    config = tiny_llama(num_hidden_layers=16).config  # of two layers all is gathered at once

    def plan(**setup: object) -> Plan:
        made = Setup(**{"tokens": 2, "gradient_checkpointing": True, **setup})  # type: ignore[arg-type]
        return make_plan(config, "deep", "causal-lm", small_config(), made)

    room = 0.9 * plan().memory.total / GIB / 0.9
    remedy = plan(gpu_memory=room).remedy
    gpus = int(remedy.removeprefix("It would fit on ").split(" GPU")[0])
    assert remedy.startswith(f"It would fit on {gpus} GPUs under fsdp2, with gradient checkpointing: ")
    assert plan(gpu_memory=room, gpus=gpus).fits
    assert plan(gpu_memory=room, gpus=gpus).setup.strategy == "fsdp2"
    assert not plan(gpu_memory=room, gpus=gpus // 2).fits
