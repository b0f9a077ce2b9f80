"""Parts of a module that ``torch.compile`` has wrapped have the names that they have without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from genlora_lightning import (
    GenLoRAFinetuning,
    export_lora,
    import_lora,
    inject_adapters,
    load_adapter,
    load_module,
    merge_adapters,
    save_adapter,
)
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.names import plain_modules, plain_name, with_own_names
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import perturb, small_config
from tests.plain import PlainMLP, mlp_loader, trainer

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Counter(nn.Module):
    """State beside parameters: a buffer that moves, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.extra = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


class Plain(PlainMLP):
    def build(self) -> None:
        super().build()
        self.net.append(Counter())

    @property
    def counter(self) -> Any:
        return getattr(self.net, "_orig_mod", self.net)[5]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.counter.steps += 1
        self.counter.extra += 1
        return super().training_step(batch, batch_idx)


class Compiled(Plain):
    def build(self) -> None:
        super().build()
        self.net = torch.compile(self.net, backend="eager")


BOTH_WAYS = pytest.mark.parametrize(("one", "other"), [(Compiled, Plain), (Plain, Compiled), (Compiled, Compiled)])


def config(**changes: Any) -> Any:
    return small_config(modules_to_train=["net.4"], exclude_modules=["net.2"], **changes)


def run(module: Any, root: Any, **settings: Any) -> Any:
    checkpoints = ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    adapters = GenLoRAFinetuning(config(), save_adapter=False)  # a folder holds no buffers
    made = trainer(root, adapters, checkpoints, enable_checkpointing=True, max_epochs=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made.fit(module, mlp_loader(), **settings)
    return module


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a.eval()(X), b.eval()(X), rtol=1e-6, atol=1e-6)  # compiled parts may round otherwise
    left, right = adapter_state_dict(a), adapter_state_dict(b)
    assert list(left) == list(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6)


def test_plain_names_leave_out_wrappers_alone():
    assert plain_name("net._orig_mod.0._checkpoint_wrapped_module.weight") == "net.0.weight"
    assert plain_name("_orig_mod.net.weight") == "net.weight"
    assert plain_name("net._orig_mods.weight") == "net._orig_mods.weight"
    assert with_own_names({"a.b": 1, "c": 2}, ["a._orig_mod.b", "d"]) == {"a.b": 1, "c": 2, "a._orig_mod.b": 1}


def test_modules_of_a_compiled_part_are_those_of_the_part():
    plain, compiled = Plain(), Compiled()
    assert [(name, type(module)) for name, module in plain_modules(compiled)] == [
        (name, type(module) if name else Compiled) for name, module in plain.named_modules()
    ]
    assert [name for name, _ in plain_modules(torch.compile(plain, backend="eager"))] == [
        name for name, _ in plain.named_modules()
    ]


@BOTH_WAYS
def test_configuration_and_folder_fit_with_and_without_compile(one, other, tmp_path):
    module = one()
    report = inject_adapters(module, config())
    assert [row.module for row in (*report.adapted, *report.trained)] == ["net.0", "net.4"]
    perturb(module)
    folder = save_adapter(module, tmp_path / "adapter")
    assert not [name for name in load_file(folder / "adapter_model.safetensors") if "_orig_mod" in name]
    for load in (load_adapter, load_module):
        fresh = other()
        load(fresh, folder)
        same(fresh, module)
    again = other()
    inject_adapters(again, config())
    load_adapter(again, folder)
    same(again, module)


def test_folder_fits_a_module_that_is_compiled_as_a_whole(tmp_path):
    module = Plain()
    inject_adapters(module, config())
    perturb(module)
    folder = save_adapter(module, tmp_path / "adapter")
    fresh = Plain()
    load_adapter(torch.compile(fresh, backend="eager"), folder)
    same(fresh, module)


@BOTH_WAYS
def test_checkpoint_fits_with_and_without_compile(one, other, tmp_path):
    module = run(one(), tmp_path)
    content = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert "_orig_mod" not in str([*content["state_dict"], content["genlora"], content["optimizer_states"]])
    assert not [name for name in content["state_dict"] if name.startswith("net.2")]  # the base's
    for loaded in (
        load_module(other(), tmp_path / "step=8.ckpt"),
        other.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True),
    ):
        same(loaded, module)
        assert (int(loaded.counter.steps), loaded.counter.extra) == (8, 8)


@BOTH_WAYS
def test_run_resumes_with_and_without_compile(one, other, tmp_path):
    module = run(one(), tmp_path)
    resumed = run(other(), tmp_path, ckpt_path=tmp_path / "step=2.ckpt")
    same(resumed, module)
    assert (int(resumed.counter.steps), resumed.counter.extra) == (8, 8)
    tested = other()
    made = trainer(tmp_path / "test", GenLoRAFinetuning(config()))
    made.test(tested, mlp_loader(), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    same(tested, module)


@BOTH_WAYS
def test_exported_lora_has_the_names_of_the_part(one, other, tmp_path):
    module = one()
    inject_adapters(module, small_config())
    perturb(module)
    export_lora(module, tmp_path / "lora")
    assert "base_model.model.net.2.lora_A.weight" in load_file(tmp_path / "lora" / "adapter_model.safetensors")
    fresh = other()
    import_lora(fresh, tmp_path / "lora")
    torch.testing.assert_close(fresh(X), module(X))


def test_compiled_part_merges_by_its_plain_names():
    module = Compiled()
    inject_adapters(module, small_config())
    perturb(module)
    expected = module(X)
    assert [row.module for row in merge_adapters(module).rows] == ["net.0", "net.2", "net.4"]
    assert [*adapter_layers(module)] == ["net.0", "net.2", "net.4"]
    torch.testing.assert_close(module(X), expected)
