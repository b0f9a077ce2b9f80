"""What is written: adapters only, safe to load, of the size it should have; optimizer state by name."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.artifacts.checkpoint import pack
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


class Adam(PlainMLP):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def fit(folder: Path, module: Any, *callbacks: Any, **settings: Any) -> Any:
    ckpt_path = settings.pop("ckpt_path", None)
    config = settings.pop("config", small_config(exclude_modules=["4"]))
    made = trainer(folder, GenLoRAFinetuning(config, save_adapter=False), *callbacks, **settings)
    made.fit(module, mlp_loader(), ckpt_path=ckpt_path)
    return made


class Wide(Adam):
    """A base far larger than its adapters, with a tied head, buffers, and many adapted linears."""

    def build(self) -> None:
        layers = [nn.Linear(8, 256), *(nn.Linear(256, 256) for _ in range(40)), nn.Linear(256, 8), nn.Linear(8, 4)]
        self.net = nn.Sequential(*layers)
        self.net[3].weight = self.net[2].weight  # tied
        self.embedding = nn.Embedding(256, 256)
        self.embedding.weight = self.net[5].weight
        self.register_buffer("table", torch.randn(300, 300))
        self.norm = nn.BatchNorm1d(8)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["during", "after the run"])
def test_size_is_that_of_the_adapters_and_their_optimizer_state(tmp_path, weights_only, after):
    module, file = Wide(), tmp_path / "x.ckpt"
    config = small_config(num_groups=64, modules_to_train=["norm"], exclude_modules=["0", "41", "42"])
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x", save_weights_only=weights_only)
    made = fit(tmp_path, module, *([] if after else [saver]), config=config, enable_checkpointing=not after)
    if after:
        made.save_checkpoint(file, weights_only=weights_only)
    state = adapter_state_dict(module)
    size = sum(t.numel() * t.element_size() for t in state.values())
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    expected = size if weights_only else size + 2 * trained
    tensors = len(state) if weights_only else len(state) + 3 * sum(p.requires_grad for p in module.parameters())
    assert expected > 64 * 1024  # else the allowance for everything else would hide the difference
    # A tensor's name, shape and place take some 110 bytes, and 300 where each has a block of its own.
    assert file.stat().st_size <= 1.05 * expected + 110 * tensors + 64 * 1024
    checkpoint = torch.load(file, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint["state_dict"][name], tensor)


def test_saved_tensors_are_copies_in_one_block_per_dtype():
    tree = {"a": torch.arange(3.0), "b": [torch.ones(2, 2), torch.tensor(5)], "c": "text"}
    tree["again"] = tree["a"]
    packed = pack(tree)
    assert packed["c"] == "text"
    assert torch.equal(packed["a"], tree["a"])
    assert torch.equal(packed["again"], tree["a"])
    assert torch.equal(packed["b"][0], torch.ones(2, 2))
    assert packed["b"][1] == 5
    assert packed["a"].untyped_storage().data_ptr() == packed["b"][0].untyped_storage().data_ptr()
    tree["a"].add_(1)
    assert packed["a"].tolist() == [0, 1, 2]


def test_checkpoint_written_after_a_validation_holds_the_adapters_only(tmp_path):
    module = Adam()
    made = trainer(tmp_path, GenLoRAFinetuning(small_config(exclude_modules=["4"])))
    with pytest.warns(UserWarning, match="are new and untrained"):
        made.validate(module, mlp_loader(), verbose=False)
    made.save_checkpoint(tmp_path / "x.ckpt")
    assert set(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == set(adapter_state_dict(module))


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.filterwarnings("ignore:The checkpoint holds objects")
def test_paths_enums_and_numpy_values_become_plain_and_the_rest_is_named(tmp_path):
    import numpy as np

    class Saving(Adam):
        def __init__(self, place: Any, colour: Any, number: Any, thing: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Stateful(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"folder": tmp_path, "best": np.float64(0.5), "seen": {1, 2}}

    module = Saving(tmp_path, Colour.RED, np.int64(3), SimpleNamespace())
    made = fit(tmp_path, module, Stateful())
    with pytest.warns(UserWarning, match=r"hyperparameter 'thing' is a SimpleNamespace and was left out"):
        made.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"place": str(tmp_path), "colour": "red", "number": 3}
    (state,) = (value for name, value in checkpoint["callbacks"].items() if "Stateful" in name)
    assert state == {"folder": str(tmp_path), "best": 0.5, "seen": {1, 2}}


def test_objects_of_others_that_are_not_safe_are_kept_with_a_warning(tmp_path):
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"thing": SimpleNamespace(x=1)}

    made = fit(tmp_path, Adam(), Odd())
    with pytest.warns(UserWarning, match=r"safe loading refuses \(callbacks.*Odd.*thing: SimpleNamespace\)"):
        made.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=False)["callbacks"]


# -- optimizer state by name ----------------------------------------------------------------------------------------


class Grouped(PlainMLP):
    """Two parameter groups with settings of their own, in one order or the other."""

    def __init__(self, reverse: bool = False, groups: int = 2, only: str = "") -> None:
        super().__init__()
        self.reverse, self.groups, self.only = reverse, groups, only

    def configure_optimizers(self) -> Any:
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if self.reverse:
            trained = trained[::-1]
        if self.groups == 1:
            return torch.optim.AdamW([p for _, p in trained], lr=0.01)
        groups = [
            {"params": [p for n, p in trained if "update.A" in n], "lr": 0.01},
            {"params": [p for n, p in trained if "update.B" in n], "lr": 0.03, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups[::-1] if self.reverse else groups)


def state_by_name(made: Any, module: Any) -> dict[str, Any]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: state for p, state in made.optimizers[0].state.items()}


def test_optimizer_state_is_keyed_by_name_and_loads_in_any_order(tmp_path):
    first, second = Grouped(), Grouped(reverse=True)
    made = fit(tmp_path, first)
    made.save_checkpoint(tmp_path / "x.ckpt")
    (stored,) = torch.load(tmp_path / "x.ckpt", weights_only=True)["optimizer_states"]
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert set(stored["state"]) == trained
    assert {name for group in stored["param_groups"] for name in group["params"]} == trained

    resumed = fit(tmp_path, second, ckpt_path=tmp_path / "x.ckpt")  # no step is left to make
    before, after = state_by_name(made, first), state_by_name(resumed, second)
    assert set(before) == set(after) == trained
    for name in trained:
        for key, value in before[name].items():
            assert torch.equal(value, after[name][key]), (name, key)
    assert [group["lr"] for group in resumed.optimizers[0].param_groups] == [0.03, 0.01]


def test_optimizer_of_other_parameters_is_an_error_that_names_them(tmp_path):
    made = fit(tmp_path, Grouped())
    made.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    name = checkpoint["optimizer_states"][0]["param_groups"][0]["params"].pop()
    checkpoint["optimizer_states"][0]["param_groups"][0]["params"].append("stranger")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    message = rf"AdamW state .* 1 parameters have no state \({re.escape(name)}\); .* no parameter here \(stranger\)"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Grouped(), ckpt_path=tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="in one parameter group, the checkpoint in groups with different settings"):
        fit(tmp_path, Grouped(groups=1), ckpt_path=tmp_path / "x.ckpt")
