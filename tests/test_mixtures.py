"""What is promised of adapters of linears, for those of a mixture's experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from genlora_lightning import (
    GenLoRAConfig,
    GenLoRAFinetuning,
    LoRAConfig,
    describe_adapter,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    save_merged,
    unmerge_adapters,
    verify_adapter,
)
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.artifacts.loading import load_module
from genlora_lightning.artifacts.slicing import slice_adapter
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_layers, adapters_disabled, effective_ranks
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.interop.lora_export import write_stored_lora
from genlora_lightning.layers.experts import AdaptedStack
from genlora_lightning.planning.budget import count, fit_budget
from genlora_lightning.planning.plan import make_plan
from genlora_lightning.planning.traffic import Setup
from tests.distributed.runs import POLICIES, PlainLlama, SaveAt, fit, llama_loader
from tests.layers.test_experts import CONFIGS, IDS
from tests.mixtures import KINDS, PARAMETERS, mixture, perturb
from tests.ranks import on_ranks

each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def stacks(model: nn.Module) -> dict[str, AdaptedStack]:
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, AdaptedStack)}


# -- which parameters --------------------------------------------------------------------------------------------------


def test_parameters_are_adapted_beside_linears_or_alone_in_some_layers_and_with_ranks_of_their_own():
    report = inject_adapters(mixture(), CONFIGS["lora"])
    assert report.summary().startswith("LoRA adapts 8 linears and 4 stacks of 20 matrices with 2,808 parameters. ")
    assert "Qwen3MoeExperts      2      (5, 24, 16)       1,200            1,200" in str(report)
    assert "mixture of experts" not in report.summary()  # which names what is left alone

    model = mixture()
    only = LoRAConfig(
        rank=2,
        target_modules=[],
        target_parameters=[r"experts\.(gate_up|down)_proj"],
        layers_to_transform=[1],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 8.0},
    )
    inject_adapters(model, only)
    found = adapter_layers(model)
    assert list(found) == [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert [layer.update.rank for layer in found.values()] == [2, 3]
    assert [layer.scaling for layer in found.values()] == [4.0, 32 / 3]
    assert inject_adapters(model, only).adapter_parameters == 5 * (2 * (24 + 16) + 3 * (16 + 12))
    with pytest.raises(ValueError, match=r"another configuration \(.*at model.layers.1.mlp.experts.gate_up_proj"):
        inject_adapters(model, dataclasses.replace(only, alpha_pattern={"experts.gate_up_proj": 4.0}))

    model = mixture()
    report = inject_adapters(model, LoRAConfig(rank=2, target_parameters=["down_proj"], exclude_modules=["layers.0"]))
    assert list(stacks(model)) == ["model.layers.1.mlp.experts.down_proj"]
    assert "model.layers.0.mlp.experts" not in report.skipped  # but excluded
    report = inject_adapters(mixture(), LoRAConfig(target_parameters=["1.mlp.experts.down_proj"]))
    assert "Left alone: model.layers.0.mlp.experts" in report.summary()


def test_name_that_is_no_stack_of_matrices_is_an_error_that_says_why():
    for names, message in (
        (["gate_up"], r"'gate_up', which no parameter matches. Near matches: gate_up_proj"),
        (["lm_head.weight"], r"lm_head.weight cannot be adapted: it is a linear's"),
        (["gate.weight"], r"cannot be adapted: it is \(5, 16\) float32, and a stack of matrices has three dimensions"),
    ):
        model = mixture()
        with pytest.raises(ValueError, match=message):
            inject_adapters(model, LoRAConfig(target_parameters=names))
        assert not adapter_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 2), "linear": nn.Linear(3, 4)})
    with pytest.raises(ValueError, match=r"conv.weight cannot be adapted: it is a convolution's"):
        inject_adapters(model, LoRAConfig(target_parameters=["conv.weight"]))
    with pytest.raises(ValueError, match=r"'experts.down_proj', which no parameter matches. The model has no stacks"):
        inject_adapters(model, LoRAConfig(target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match=r"experts.down_proj cannot be adapted: trained in full"):
        inject_adapters(
            mixture(), LoRAConfig(target_parameters=["0.mlp.experts.down_proj"], modules_to_train=["layers.0.mlp"])
        )
    other = LoRAConfig(target_parameters=["layers.0.mlp.experts.down_proj"], layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"in no layer of `layers_to_transform`"):
        inject_adapters(mixture(), other)
    with pytest.raises(TypeError, match="`target_parameters` must be a list of parameter names"):
        LoRAConfig(target_parameters="experts.down_proj")
    with pytest.raises(ValueError, match="neither a name nor a valid regular expression"):
        LoRAConfig(target_parameters=["("])
    with pytest.raises(ValueError, match="`target_modules` is an empty list"):
        LoRAConfig(target_modules=[])


# -- files -------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kind", KINDS)
def test_merging_saving_and_loading_give_the_same_model(config, kind, tmp_path):
    if config.kind != "genlora" and kind in ("mixtral", "deepseek"):
        pytest.skip("the two ways to store experts are enough")
    mixture(kind).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation="eager")

    model = base()
    before = logits(model)
    inject_adapters(model, config)
    assert torch.equal(logits(model), before)
    assert set(effective_ranks(model).values()) == {0.0}
    wanted = logits(perturb(model))
    assert all(rank > 0 for rank in effective_ranks(model).values())
    report = merge_adapters(model)
    assert report.worst.relative_error < 1e-4
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(logits(model), wanted)
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)

    folder = save_adapter(model, tmp_path / "adapter")
    verify_adapter(folder)
    described = describe_adapter(folder)
    for layer in described.layers:
        own = adapter_layers(model)[layer.module]
        assert (layer.num_matrices, layer.out_features, layer.in_features) == (own.shape.num_matrices, *own.shape)
        assert layer.parameters == sum(p.numel() for p in own.adapter_parameters().values() if p.requires_grad)
    assert "(5, 24, 16)" in str(described) or kind == "deepseek"
    again = base()
    load_adapter(again, folder)
    assert torch.equal(logits(again), wanted)
    with pytest.raises(ValueError, match=r"LoRA servers do not take: .*experts\.gate_up_proj is no linear"):
        write_stored_lora(read_adapter(folder), tmp_path)

    save_merged(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"would take the adapter's tensors in model.layers.*experts for theirs"):
        model.save_pretrained(tmp_path / "both")
    remove_adapters(model)
    assert torch.equal(logits(model), before)


# PEFT says that it passes over a parameter's rank, and takes it.
@pytest.mark.parametrize(
    "config",
    [
        GenLoRAConfig(rank=4, elastic=[1, 4]),
        GenLoRAConfig(rank=4, elastic=[1, 4], target_parameters=PARAMETERS, share_over_experts="a"),
        LoRAConfig(rank=4, elastic=[1, 4]),
    ],
)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_elastic_ranks_are_cut_in_a_forward_in_merging_and_in_a_slice(config, experts, tmp_path):
    config = dataclasses.replace(config, target_modules=[], target_parameters=PARAMETERS)
    model, again = mixture(experts=experts), mixture(experts=experts)
    inject_adapters(model, config)
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    whole = logits(model)
    set_active_rank(model, 1)
    cut = logits(model)
    assert not torch.allclose(cut, whole, atol=1e-4)
    load_adapter(again, slice_adapter(tmp_path / "adapter", tmp_path / "sliced", 1))
    torch.testing.assert_close(logits(again), cut)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), cut, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
)
@each
@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_export_is_what_peft_has_for_such_parameters(config, kind, tmp_path):
    from peft import PeftModel

    model = mixture(kind)
    inject_adapters(model, dataclasses.replace(config, rank_pattern={"1.mlp.experts.down_proj": 2}))
    wanted = logits(perturb(model))
    report = export_lora(model, tmp_path / "lora")
    assert "target_parameters" in report.server_hint()
    theirs = PeftModel.from_pretrained(mixture(kind), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-4)
    low = export_lora(model, tmp_path / "low", rank=1)
    assert all(0 < row.energy_kept <= 1 for row in low.rows)
    assert not torch.allclose(logits(PeftModel.from_pretrained(mixture(kind), tmp_path / "low")), wanted)


# Each way to store experts is planned with and without autocast, which changes nothing in what a kind is made of.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "outer"])
def test_plan_and_budget_count_experts(name):
    config, autocast = CONFIGS[name], name == "genlora"
    model = mixture()
    report = inject_adapters(model, config)
    shapes = [layer.shape for layer in adapter_layers(model).values()]
    assert count(config, shapes) == report.adapter_parameters
    assert report.lora_parameters == 2808
    is_shared = "one" in name  # which is no matter of how experts are stored
    for kind in ("qwen3",) if is_shared else KINDS:
        model = mixture(kind)
        trained = inject_adapters(model, config).trainable_parameters
        setup = Setup(gpus=2, strategy="ddp", batch=1, tokens=8, autocast=autocast)
        plan = make_plan(model.config, "tiny", "causal-lm", config, setup)
        assert plan.trainable_parameters == trained
        assert plan.traffic[f"{config.kind} replicate"].all_reduced == trained
        assert plan.lora_parameters == report.lora_parameters if kind == "qwen3" else plan.lora_parameters > 0
        if not is_shared:
            assert plan.traffic["lora replicate"].all_reduced == plan.lora_parameters
    assert fit_budget(LoRAConfig(), shapes, report.lora_parameters).config.rank == 3


# -- training ----------------------------------------------------------------------------------------------------------


class PlainMixture(PlainLlama):
    """A small mixture in a module that knows nothing of adapters."""

    def build(self) -> None:
        with torch.random.fork_rng():
            self.net = mixture()


def run(place: tuple[str, str], folder: Path, config: AdapterConfig, *callbacks: Any, **settings: Any) -> Any:
    strategy, policy = place
    folder = folder / f"{config.kind}-{strategy}-{policy}"
    callback = GenLoRAFinetuning(config, adapter_sharding=policy, adapter_dir=str(folder / "adapter"))
    settings = {"loader": llama_loader(16), **settings}
    return fit(strategy, policy, folder, PlainMixture("init", "adamw"), *callbacks, adapter=callback, **settings)


SINGLE = ("single", "replicate")


@each
def test_resumed_run_equals_an_uninterrupted_one_in_every_bit(config, tmp_path):
    file = tmp_path / "half.ckpt"
    whole = run(SINGLE, tmp_path, config, SaveAt(file, 3), accumulate_grad_batches=2, loader=llama_loader(32))
    resumed = run(SINGLE, tmp_path, config, ckpt_path=file, accumulate_grad_batches=2, loader=llama_loader(32))
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in whole.state.items())
    start = adapter_state_dict(load_module(PlainMixture(), file))
    changed = {name.rpartition(".")[2] for name in start if not torch.equal(start[name], whole.state[name])}
    moved = {"genlora": {"latent", "weight"}, "lora": {"matrix"}}.get(config.kind, changed)
    assert changed == moved | ({"centers", "log_widths"} if getattr(config, "learn_centers", False) else set()) != set()
    assert {layer.num_matrices for layer in describe_adapter(file).layers} == {1, 5}


@pytest.mark.timeout(280)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.filterwarnings("ignore:.* has both parameters with requires_grad=True and False:UserWarning")
def test_experts_train_and_resume_the_same_under_every_strategy_and_policy(tmp_path):
    config = CONFIGS["genlora, one generator"]  # the support matrix has each expert with its own
    one = run(SINGLE, tmp_path, config, SaveAt(tmp_path / "half.ckpt", 2))
    places = [("ddp", "replicate"), *((kind, policy) for kind in ("fsdp1", "fsdp2") for policy in POLICIES)]

    def all_places() -> list[Any]:
        found = []
        for place in places:
            whole = run(place, tmp_path, config)
            resumed = run(place, tmp_path, config, ckpt_path=tmp_path / "half.ckpt")
            found.append((place, whole.losses, whole.state, resumed.state))
        return found

    for place, losses, *states in on_ranks(all_places, seconds=240)[0]:
        torch.testing.assert_close(losses, one.losses, rtol=0, atol=1e-6, msg=lambda m, at=place: f"{at} {m}")
        for state in states:
            assert state.keys() == one.state.keys()
            for name, tensor in one.state.items():
                torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6, msg=lambda m, at=place: f"{at} {m}")
        module = PlainMixture()
        load_adapter(module, tmp_path / f"genlora-{'-'.join(place)}" / "adapter")
        for name, tensor in adapter_state_dict(module).items():
            assert torch.equal(tensor, states[-1][name]), (place, name)
