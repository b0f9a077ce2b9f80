from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from genlora_lightning import (
    GenLoRAFinetuning,
    describe_adapter,
    effective_ranks,
    inject_adapters,
    save_adapter,
    verify_adapter,
)
from genlora_lightning.artifacts.adapter_io import adapter_bytes
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import perturb, small_config
from tests.models import tiny_gpt2, tiny_llama
from tests.plain import PlainMLP, mlp_loader, trainer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_description_agrees_with_the_model_that_was_saved(tmp_path, make):
    model = make()
    report = inject_adapters(model, small_config(learn_centers=False, learn_widths=False))
    perturb(model)
    folder = save_adapter(model, tmp_path / "adapter", training={"global_step": 7})
    described = describe_adapter(folder)
    layers = adapter_layers(model)
    assert [layer.module for layer in described.layers] == list(layers)
    for layer in described.layers:
        own = layers[layer.module]
        assert (layer.out_features, layer.in_features, layer.rank) == (own.out_features, own.in_features, 4)
        assert layer.parameters == sum(p.numel() for p in own.adapter_parameters().values() if p.requires_grad)
        assert layer.fixed == sum(p.numel() for p in own.adapter_parameters().values() if not p.requires_grad)
        assert layer.fixed > 0
        assert layer.effective_rank == pytest.approx(effective_ranks(model)[layer.module], rel=1e-6)
        assert layer.effective_rank > 1
    assert described.num_bytes == adapter_bytes(folder)
    values = json.loads(json.dumps(described.to_dict()))
    assert values["training"] == {"global_step": 7}
    assert values["config"]["rank"] == 4
    assert values["layers"][0]["module"] == described.layers[0].module
    assert values["parameters"] == report.trainable_parameters
    assert values["fixed"] == sum(layer.fixed for layer in described.layers)
    counted = f"{values['parameters']:,} trained values and {values['fixed']:,} fixed ones"
    assert f": {counted} in " in str(described)
    assert f": {counted} for {len(layers)} layers." in (folder / "README.md").read_text()


def test_description_prints_a_line_per_layer_and_module_trained_in_full(tmp_path):
    model = tiny_llama()
    fixed = {"learn_centers": False, "learn_widths": False}
    inject_adapters(model, small_config(modules_to_train=["norm"], target_modules=["q_proj"], **fixed))
    lines = str(describe_adapter(save_adapter(model, tmp_path / "adapter"))).splitlines()
    assert len(lines) == 2 + 2 + 1 + 1
    assert lines[2].split() == ["model.layers.0.self_attn.q_proj", "(16,", "16)", "4", "0.00", "48"]
    assert lines[4].split() == ["model.norm", "trained", "in", "full", "-", "-", "16"]
    assert "112 trained values and 32 fixed ones in" in lines[5]
    assert "2 layers, mean effective rank 0.00 of 4." in lines[5]


def test_verification_says_what_was_proved(tmp_path):
    model = tiny_llama()
    inject_adapters(model, small_config())
    report = verify_adapter(save_adapter(model, tmp_path / "adapter"))
    assert report.num_tensors == 112
    assert report.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(report.to_dict()))["num_tensors"] == 112
    assert str(report).startswith(f"{tmp_path / 'adapter'} is complete and unchanged: 112 tensors, ")
    assert "for a model without a name (LlamaForCausalLM, 20 tensors of" in str(report)


class Beside(PlainMLP):
    """Adapters in a part of the module, and a parameter beside that part which is trained, too."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.ones(2))

    def adapter_root(self) -> nn.Module:
        return self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale.sum()


@pytest.mark.filterwarnings("ignore:1 trainable parameters, scale among them, lie outside of:UserWarning")
def test_checkpoint_is_described_as_the_folder_of_the_same_run(tmp_path):
    config = small_config(modules_to_train=["4"])
    run = trainer(tmp_path, GenLoRAFinetuning(config), max_epochs=2)
    module = Beside()
    run.fit(module, mlp_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    folder, file = describe_adapter(tmp_path / "adapter"), describe_adapter(tmp_path / "x.ckpt")
    assert folder.trained_modules == {"4": 16 * 4 + 4}
    assert file.trained_modules == {"net.4": 16 * 4 + 4}
    assert (folder.other_tensors, file.other_tensors) == ({}, {"scale": 2})
    assert file.parameters == folder.parameters + 2
    assert [dataclasses.replace(layer, module=layer.module.removeprefix("net.")) for layer in file.layers] == [
        *folder.layers
    ]
    assert (file.config, file.base) == (folder.config, folder.base)
    lines = str(file).splitlines()
    assert lines[4].split() == ["net.4", "trained", "in", "full", "-", "-", "68"]
    assert lines[5].split() == ["scale", "other", "tensor", "-", "-", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["genlora"].pop("layers"), "does not say which linears it adapts"),
        (lambda c: c["state_dict"].pop("net.0.update.B.latent"), "The tensors of net.0 in .* incomplete"),
        (lambda c: c["state_dict"].pop("net.4.bias"), "The tensors of net.4 in .* incomplete"),
        (lambda c: c["genlora"]["layers"].update({"net.0": [3, 8]}), "The tensors of net.0 in .* fit together"),
    ],
)
def test_checkpoint_whose_record_and_tensors_disagree_is_an_error(tmp_path, change, message):
    run = trainer(tmp_path, GenLoRAFinetuning(small_config(modules_to_train=["4"]), save_adapter=False))
    run.fit(PlainMLP(), mlp_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "y.ckpt")
    with pytest.raises(ValueError, match=message):
        describe_adapter(tmp_path / "y.ckpt")
