"""Models from checkpoints and folders, without a trainer, and folders from checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import errno
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from genlora_lightning import (
    CausalLMModule,
    GenLoRAFinetuning,
    convert_checkpoint,
    inject_adapters,
    load_adapter,
    load_module,
)
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import perturb, small_config
from tests.models import tiny_llama
from tests.plain import PlainMLP, mlp_loader, trainer

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Configured(PlainMLP):
    def __init__(self, build_in: str = "configure_model", lr: float = 0.05, missing: str = "given") -> None:
        super().__init__(build_in, lr)
        self.save_hyperparameters()


class Rooted(PlainMLP):
    """Adapters in a part of the module, and a parameter beside it that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def adapter_root(self) -> nn.Module:
        return self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.fixture
def trained(tmp_path):
    def train(module: Any) -> Any:
        made = trainer(tmp_path, GenLoRAFinetuning(small_config(exclude_modules=["4"])), max_epochs=3)
        made.fit(module, mlp_loader())
        made.save_checkpoint(tmp_path / "x.ckpt")
        return module.eval()

    return train


@pytest.mark.parametrize("source", ["x.ckpt", "adapter"])
def test_class_or_module_gets_the_trained_adapters(tmp_path, trained, source):
    module = trained(Configured(lr=0.1))
    assert not torch.equal(module(X), PlainMLP()(X))
    arguments = {} if source == "x.ckpt" else {"lr": 0.1}
    made = load_module(Configured, tmp_path / source, **arguments)
    assert made.lr == 0.1
    assert not made.training
    given = Configured()
    assert load_module(given, tmp_path / source) is given
    for loaded in (made, given):
        assert torch.equal(loaded(X), module(X))
    again = load_module(made, tmp_path / source)  # it has adapters already
    assert torch.equal(again(X), module(X))
    (result,) = trainer(tmp_path, GenLoRAFinetuning(small_config(exclude_modules=["4"]))).validate(
        load_module(Configured, tmp_path / source), mlp_loader(), verbose=False
    )
    assert result["val_loss"] == float(
        torch.stack([module.step(batch) for batch in mlp_loader()]).mean().detach()
    ) or result["val_loss"] == pytest.approx(float(torch.stack([module.step(b) for b in mlp_loader()]).mean()))


@pytest.mark.filterwarnings("ignore:1 trainable parameters, scale among them, lie outside of:UserWarning")
def test_what_is_trained_beside_the_adapters_is_loaded_too(tmp_path, trained):
    module = trained(Rooted())
    assert module.scale != 1
    assert torch.equal(load_module(Rooted(), tmp_path / "x.ckpt")(X), module(X))


def test_causal_lm_loads_by_the_usual_classmethod(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    module = CausalLMModule(
        str(tmp_path / "model"), adapter=small_config(), optimizer={"lr": 0.1, "schedule": "constant"}
    )
    ids = torch.arange(3, 11).reshape(1, 8)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 3
    made = trainer(tmp_path)
    made.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    made.save_checkpoint(tmp_path / "x.ckpt")
    module.eval()
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")
    expected = module(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not torch.equal(tiny_llama().eval()(input_ids=ids).logits, expected)
    folder = CausalLMModule.load_from_checkpoint(tmp_path / "adapter", model=str(tmp_path / "model"))
    assert torch.equal(folder(input_ids=ids).logits, expected)

    bare = tiny_llama().eval()  # names without the module's prefix
    convert_checkpoint(tmp_path / "x.ckpt", bare, tmp_path / "converted")
    fresh = tiny_llama().eval()
    load_adapter(fresh, tmp_path / "converted")
    assert torch.equal(fresh(input_ids=ids).logits, expected)


@pytest.mark.parametrize("whole", [False, True])
def test_checkpoint_becomes_an_adapter_folder(tmp_path, trained, whole):
    module = trained(PlainMLP())
    base: Any = PlainMLP() if whole else PlainMLP().net
    assert convert_checkpoint(tmp_path / "x.ckpt", base, tmp_path / "folder") == tmp_path / "folder"
    fresh: Any = PlainMLP() if whole else PlainMLP().net
    load_adapter(fresh, tmp_path / "folder")
    assert torch.equal(fresh(X), module(X))


@pytest.mark.parametrize("source", ["x.ckpt", "adapter", "folder"])
def test_run_of_a_module_of_which_a_part_was_adapted_before_is_loaded(tmp_path, trained, source):
    module = PlainMLP()
    module.net[1] = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    fresh, whole = copy.deepcopy(module), copy.deepcopy(module.net)
    inject_adapters(module.net[1], small_config())
    run = trainer(tmp_path, GenLoRAFinetuning(small_config()), max_epochs=3)
    run.fit(module, mlp_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert list(adapter_layers(module)) == ["net.1.0"]
    assert adapter_layers(module)["net.1.0"].acts()
    if source == "folder":
        convert_checkpoint(tmp_path / "x.ckpt", whole, tmp_path / "folder")
        load_adapter(fresh.net, tmp_path / "folder")
    else:
        load_module(fresh, tmp_path / source)
    assert torch.equal(fresh(X), module.eval()(X))
    larger = PlainMLP()
    larger.net[1] = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_module(larger, tmp_path / "x.ckpt", base_check="off")


@pytest.mark.parametrize("source", ["x.ckpt", "adapter"])
def test_matrices_that_were_kept_before_the_load_are_not_used_after_it(tmp_path, trained, source):
    expected = trained(PlainMLP())(X)
    module = PlainMLP()
    inject_adapters(module, small_config(exclude_modules=["4"]))
    perturb(module)
    module.eval()
    with torch.no_grad():
        assert not torch.allclose(module(X), expected, atol=1e-3)
        load_module(module, tmp_path / source)
        assert torch.equal(module(X), expected)


def snapshot(model: nn.Module) -> dict[str, tuple[nn.Module, bool, torch.Tensor]]:
    """What stands where, whether it is trained, and its values."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return {"kinds": kinds, **parameters}  # type: ignore[dict-item]


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    after: dict[str, Any] = snapshot(model)
    assert after.pop("kinds") == before["kinds"]
    assert [(name, *entry[:2]) for name, entry in after.items()] == [
        (name, *before[name][:2]) for name in before if name != "kinds"
    ]
    assert all(torch.equal(entry[2], before[name][2]) for name, entry in after.items())


@pytest.mark.parametrize("problem", ["missing", "full disk", "foreign folder"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("head", [[], ["4"]])
def test_failed_load_leaves_the_model_as_it_was(tmp_path, problem, adapted, head, monkeypatch):
    config = small_config(target_modules=["0", "2"], modules_to_train=head, dropout=0.5)
    run = trainer(tmp_path, GenLoRAFinetuning(config), max_epochs=3)
    run.fit(PlainMLP(), mlp_loader())
    file = tmp_path / "x.ckpt"
    run.save_checkpoint(file)
    module = PlainMLP()
    module.net[2].bias.requires_grad_(False)  # what was frozen stays so, and what was not, too
    if adapted:
        inject_adapters(module, dataclasses.replace(config, dropout=0.25))
        perturb(module)
        module.net[0].base_layer.bias.requires_grad_(True)
    before = snapshot(module)
    loads = [lambda: convert_checkpoint(file, module, tmp_path / "folder")]
    if problem == "missing":
        content = torch.load(file, weights_only=True)
        content["state_dict"].pop("net.2.update.B.latent")
        file = tmp_path / "less.ckpt"
        torch.save(content, file)
        loads.append(lambda: load_module(module, file))
    elif problem == "full disk":
        monkeypatch.setattr("genlora_lightning.artifacts.adapter_io._write", _full_disk)
    else:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "thesis.tex").write_text("mine")
    error = {"missing": "tensors are missing", "full disk": "No space left", "foreign folder": "is not an adapter"}
    for load in loads:
        with pytest.raises((ValueError, OSError), match=error[problem]):
            load()
        assert_as_it_was(module, before)
        assert {layer.config.dropout for layer in adapter_layers(module).values()} <= {0.25}


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_loaded_is_an_error_and_changes_nothing(tmp_path, trained):
    trained(PlainMLP())
    file = tmp_path / "x.ckpt"
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*none.ckpt"):
        load_module(PlainMLP(), tmp_path / "none.ckpt")
    (tmp_path / "short.ckpt").write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"short.ckpt \([\d,]+ bytes\) has no end .* it is truncated"):
        load_module(PlainMLP(), tmp_path / "short.ckpt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no Lightning checkpoint: it has no state dict"):
        load_module(PlainMLP(), tmp_path / "other.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for use in (load_module, lambda m, p: convert_checkpoint(p, m, tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="holds no adapters"):
            use(PlainMLP(), tmp_path / "foreign.ckpt")
    assert not (tmp_path / "nowhere").exists()

    content = torch.load(file, weights_only=True)
    content["state_dict"].pop("net.0.update.A.latent")
    torch.save(content, tmp_path / "less.ckpt")
    module = PlainMLP()
    with pytest.raises(ValueError, match=r"1 tensors are missing \(net.0.update.A.latent\)"):
        load_module(module, tmp_path / "less.ckpt")
    assert not adapter_layers(module)

    class Other(LightningModule):
        def __init__(self, needed: int) -> None:
            super().__init__()

    with pytest.raises(TypeError, match=r"Other could not be made with no arguments: .*needed"):
        load_module(Other, file)
    with pytest.raises(TypeError, match=r"Arguments \(lr\) are for a class"):
        load_module(PlainMLP(), file, lr=1)


class BuiltInSetup(PlainMLP):
    def __init__(self) -> None:
        super().__init__("setup")

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.build()


@pytest.mark.parametrize("source", ["x.ckpt", "adapter"])
def test_module_that_has_no_layers_yet_is_an_error_that_says_what_to_call(tmp_path, trained, source):
    module = trained(BuiltInSetup())
    loaders = [lambda: load_module(BuiltInSetup, tmp_path / source)]
    if source == "x.ckpt":
        loaders.append(lambda: BuiltInSetup.load_from_checkpoint(tmp_path / source, weights_only=True))
    for load in loaders:
        with pytest.raises(ValueError, match=r"This BuiltInSetup has no parameters yet.*`module.setup\(\"fit\"\)`"):
            load()
    built = BuiltInSetup()
    built.setup("fit")
    assert torch.equal(load_module(built, tmp_path / source)(X), module(X))


def test_error_of_another_base_names_the_checkpoint_once(tmp_path, trained):
    trained(PlainMLP())
    other = PlainMLP()
    torch.nn.init.zeros_(other.net[0].weight)
    with pytest.raises(ValueError, match=r"^The checkpoint \S*x.ckpt was trained on another base"):
        load_module(other, tmp_path / "x.ckpt")

    class Other(PlainMLP):
        def build(self) -> None:
            super().build()
            torch.nn.init.zeros_(self.net[0].weight)

    with pytest.raises(ValueError, match=r"^The checkpoint was trained on another base"):
        Other.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)


def test_float64_checkpoint_loads_exactly_into_a_float64_module(tmp_path):
    module = PlainMLP()
    made = trainer(tmp_path, GenLoRAFinetuning(small_config(exclude_modules=["4"])), precision="64-true", max_epochs=3)
    made.fit(module, mlp_loader())  # batches are cast, too
    made.save_checkpoint(tmp_path / "x.ckpt")
    for source in ("x.ckpt", "adapter"):
        loaded = load_module(PlainMLP().double(), tmp_path / source)
        assert torch.equal(loaded(X.double()), module.eval()(X.double()))
