from __future__ import annotations

import random
import shutil

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning import GenLoRAFinetuning, load_adapter, load_module, save_adapter
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.artifacts.format1 import upgraded_names
from genlora_lightning.artifacts.inspection import describe_adapter, verify_adapter
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.injection.inject import adapter_layers
from tests.fixtures.format1 import FOLDER, Module
from tests.plain import trainer

CONFIG = {"rank": 4, "num_groups_b": 2, "modules_to_train": ["head"], "target_modules": ["first", "second"]}


def assert_as_it_was_trained(module: Module) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    for name, layer in adapter_layers(module).items():
        torch.testing.assert_close(layer.delta_weight(), expected.pop(name), rtol=0, atol=1e-7)
    assert torch.equal(module.head.weight, expected.pop("head.weight"))
    assert not expected


def test_folder_of_format_1_is_loaded_into_its_base_and_saved_in_the_present_format(tmp_path):
    module = Module()
    load_adapter(module, FOLDER / "adapter")
    assert_as_it_was_trained(module)
    save_adapter(module, tmp_path / "adapter")
    again = Module()
    load_adapter(again, tmp_path / "adapter")
    assert_as_it_was_trained(again)
    assert '"kind": "genlora"' in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_folder_of_format_1_is_verified_and_described():
    assert verify_adapter(FOLDER / "adapter").num_tensors == len(read_adapter(FOLDER / "adapter").tensors) == 18
    described = describe_adapter(FOLDER / "adapter")
    assert described.config["kind"] == "genlora"
    assert [(layer.module, layer.out_features, layer.in_features) for layer in described.layers] == [
        ("first", 8, 6),
        ("second", 5, 8),
    ]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_every_flipped_bit_in_a_folder_of_format_1_is_found(tmp_path, name):
    path = shutil.copytree(FOLDER / "adapter", tmp_path / "adapter") / name
    data = path.read_bytes()
    generator = random.Random(0)
    for bit in [0, 8 * len(data) - 1, *(generator.randrange(8 * len(data)) for _ in range(50))]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_|manifest"):
            read_adapter(path.parent)
    path.write_bytes(data)
    read_adapter(path.parent)


@pytest.mark.parametrize("length", [0, 5, 500, -1])
def test_truncated_weights_of_format_1_are_refused(tmp_path, length):
    path = shutil.copytree(FOLDER / "adapter", tmp_path / "adapter") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=r"safetensors is damaged: .* bytes, and 1,940 were written"):
        load_adapter(Module(), path.parent)


def test_checkpoint_of_format_1_is_loaded_and_described():
    assert_as_it_was_trained(load_module(Module, FOLDER / "last.ckpt"))
    described = describe_adapter(FOLDER / "last.ckpt")
    assert [(layer.module, layer.out_features, layer.in_features) for layer in described.layers] == [
        ("first", 8, 6),
        ("second", 5, 8),
    ]


@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning v2.6.6, which is newer")
def test_run_goes_on_from_a_checkpoint_of_format_1(tmp_path):
    seed_everything(3, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(12, 6), torch.randn(12, 3)), batch_size=4)
    module = Module()
    run = trainer(tmp_path, GenLoRAFinetuning(CONFIG, save_adapter=False), max_steps=5, max_epochs=2)
    run.fit(module, data, ckpt_path=str(FOLDER / "last.ckpt"))
    assert run.global_step == 5
    (state,) = {int(entry["step"]) for entry in run.optimizers[0].state.values()}
    assert state == 5  # AdamW's own count, of which the checkpoint brought three


def test_names_beside_the_generators_stay():
    names = ["a.generator_A.latent", "generator_B.weight", "generator_A", "my.generator_C.latent", "head.weight"]
    renamed = ["a.update.A.latent", "update.B.weight", "generator_A", "my.generator_C.latent", "head.weight"]
    assert [*upgraded_names(dict.fromkeys(names))] == renamed
