from __future__ import annotations

import copy
import errno
import io
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from genlora_lightning import GenLoRAFinetuning, inject_adapters, load_adapter
from genlora_lightning.errors import NonFiniteGradientError
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.layers.fused import adapted_linear
from genlora_lightning.training import outcome
from tests.conftest import small_config
from tests.plain import LIGHTNING_2_5, PlainEncoder, PlainMLP, encoder_loader, mlp_loader, trainer

PLACES = ["init", "configure_model"]


def finetuning(**settings: object) -> GenLoRAFinetuning:
    config = settings.pop("config", None) or small_config(exclude_modules=["4"])
    return GenLoRAFinetuning(config, **settings)  # type: ignore[arg-type]


def base_weights(module: PlainMLP) -> dict[str, torch.Tensor]:
    names = adapter_state_dict(module)
    return {name: t.clone() for name, t in module.state_dict().items() if name not in names}


@pytest.mark.parametrize("place", PLACES)
def test_plain_module_trains_exactly_the_adapters_and_its_base_keeps_every_bit(tmp_path, place):
    module = PlainMLP(place)
    reference = PlainMLP("init")
    trainer(tmp_path, finetuning(), max_epochs=30).fit(module, mlp_loader())
    assert module.losses[-4] < 0.9 * module.losses[0]
    first = nn.functional.mse_loss(reference(mlp_loader().dataset.tensors[0][:8]), mlp_loader().dataset.tensors[1][:8])
    assert module.losses[0] == pytest.approx(first.item(), rel=1e-6)  # it starts from the base
    assert set(adapter_layers(module)) == {"net.0", "net.2"}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == set(adapter_state_dict(module))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(
            base_weights(module)[name.replace(".0.", ".0.base_layer.").replace(".2.", ".2.base_layer.")], tensor
        )


@pytest.mark.parametrize("place", PLACES)
def test_plain_transformers_encoder_trains_with_its_head_in_train_mode(tmp_path, place):
    module = PlainEncoder(place)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.net.training and pl_module.net.bert.encoder.layer[0].attention.self.dropout.training)

    config = small_config(modules_to_train=["classifier"])
    run = trainer(tmp_path, finetuning(config=config), Watch(), max_epochs=40)
    run.fit(module, encoder_loader())
    assert all(seen)
    assert sum(module.losses[-4:]) < 0.7 * sum(module.losses[:4])
    report = run.callbacks[0].report
    assert [row.module for row in report.trained] == ["net.classifier"]
    fresh = PlainEncoder("init")
    load_adapter(fresh, tmp_path / "adapter")
    batch = next(iter(encoder_loader()))
    assert torch.equal(fresh.eval().step(batch), module.eval().step(batch))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen statistics, on purpose
def test_train_mode_can_be_left_to_the_user_and_frozen_statistics_never_move(tmp_path):
    class Normed(PlainMLP):
        def build(self):
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.BatchNorm1d(4)).eval()

    module = Normed()
    module.net[3].train()
    run = trainer(tmp_path, finetuning(config=small_config(modules_to_train=["3"])))
    run.fit(module, mlp_loader())
    assert module.net[0].training
    assert torch.equal(module.net[1].running_mean, torch.zeros(16))
    assert not torch.equal(module.net[3].running_mean, torch.zeros(4))
    untouched = Normed()
    trainer(tmp_path, finetuning(config=small_config(), train_mode=False)).fit(untouched, mlp_loader())
    assert not untouched.net[0].training


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_adapters_and_their_optimizer_state_are_float32_under_every_precision(tmp_path, precision):
    module = PlainMLP("configure_model")
    if precision == "bf16-true":
        module.step = lambda batch: nn.functional.mse_loss(module(batch[0]).float(), batch[1].float())
    run = trainer(tmp_path, finetuning(), precision=precision)
    before = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({n: t.clone() for n, t in adapter_state_dict(pl_module).items()})

    run.callbacks.append(Watch())
    run.fit(module, mlp_loader())
    state = adapter_state_dict(module)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert {s["momentum_buffer"].dtype for s in run.optimizers[0].state.values()} == {torch.float32}
    assert not [n for n, t in state.items() if n.endswith(".latent") and torch.equal(t, before[n])]
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert module.net[0].base_layer.weight.dtype == expected


def test_frozen_parameters_are_taken_out_of_the_optimizer(tmp_path):
    module = PlainMLP()
    run = trainer(tmp_path, finetuning())
    run.fit(module, mlp_loader())
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}


def test_optimizer_that_misses_adapters_is_an_error_that_says_what_to_do(tmp_path):
    class Early(PlainMLP):
        def __init__(self):
            super().__init__()
            self.early = list(self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.early, lr=0.1)

    with pytest.raises(ValueError, match=r"16 trainable parameters, net.0.update.A.latent .* are in no optimizer"):
        trainer(tmp_path, finetuning()).fit(Early(), mlp_loader())


def test_optimizer_with_foreign_parameters_is_an_error(tmp_path):
    class Foreign(PlainMLP):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(ValueError, match=r"holds 1 parameters that the module does not have"):
        trainer(tmp_path, finetuning()).fit(Foreign(), mlp_loader())


def test_adapters_without_gradient_are_an_error_when_all_and_a_warning_when_some(tmp_path):
    class Detached(PlainMLP):
        def forward(self, x):
            return self.net[4](self.net[:4](x).detach())

    config = small_config(target_modules=["0", "2"], modules_to_train=["4"])
    with pytest.raises(RuntimeError, match=r"None of the 2 adapters has a gradient.*use_reentrant=False"):
        trainer(tmp_path, finetuning(config=config)).fit(Detached(), mlp_loader())
    config = small_config()
    with pytest.warns(UserWarning, match=r"2 of 3 adapters got no gradient at first, net.0 among them"):
        trainer(tmp_path, finetuning(config=config)).fit(Detached(), mlp_loader())


def test_gradients_may_be_zero_at_first_but_not_for_ever(tmp_path):
    class ZeroHead(PlainMLP):
        def build(self):
            super().build()
            nn.init.zeros_(self.net[4].weight)

    module = ZeroHead()
    config = small_config(target_modules=["0", "2"], modules_to_train=["4"])
    trainer(tmp_path, finetuning(config=config)).fit(module, mlp_loader())
    assert (module.net[0].update.B.latent != 0).any()

    class ZeroLoss(PlainMLP):
        def step(self, batch):
            return 0 * super().step(batch)

    with pytest.raises(RuntimeError, match="None of the 2 adapters had a gradient other than zero in 10 steps"):
        trainer(tmp_path, finetuning(), max_epochs=9).fit(ZeroLoss(), mlp_loader())


def test_each_of_several_optimizers_is_checked_for_its_own_adapters(tmp_path):
    class TwoOptimizers(PlainMLP):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            head, body = self.optimizers()
            for optimizer in (head, body):  # the head steps first, before any adapter has a gradient
                loss = self.step(batch) if optimizer is body else self.net[4](torch.ones(1, 16)).square().sum()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            head = list(self.net[4].parameters())
            body = [p for p in self.net[:4].parameters() if p.requires_grad]
            return torch.optim.SGD(head, lr=0.1), torch.optim.SGD(body, lr=0.1)

    module = TwoOptimizers()
    config = small_config(target_modules=["0", "2"], modules_to_train=["4"])
    trainer(tmp_path, finetuning(config=config)).fit(module, mlp_loader())
    assert (module.net[0].update.B.latent != 0).any()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_place_that_is_something_else_is_an_error_before_training(tmp_path, kind):
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        place.write_text("years of work")
    module = PlainMLP()
    with pytest.raises(FileExistsError, match=r"is no adapter folder|mine is a file"):
        trainer(tmp_path, finetuning(adapter_dir=str(place))).fit(module, mlp_loader())
    assert module.losses == []


def test_configuration_may_be_a_dictionary_and_nothing_else():
    assert GenLoRAFinetuning({"rank": 4}).config.rank == 4
    with pytest.raises(TypeError, match=r"must be a GenLoRAConfig, .* or a dictionary of its fields, got 4"):
        GenLoRAFinetuning(4)


def test_stochastic_weight_averaging_is_refused_before_any_work(tmp_path):
    module = PlainMLP()
    with pytest.raises(ValueError, match=r"does not work with StochasticWeightAveraging: .* Use .* EMAWeightAveraging"):
        trainer(tmp_path, finetuning(), StochasticWeightAveraging(0.1)).fit(module, mlp_loader())
    assert not adapter_layers(module)


def test_pruning_while_training_is_refused_before_any_work(tmp_path):
    module = PlainMLP()
    with pytest.raises(ValueError, match=r"does not work with ModelPruning: .*`genlora prune`"):
        trainer(tmp_path, finetuning(), ModelPruning("l1_unstructured", amount=0.3)).fit(module, mlp_loader())
    assert not adapter_layers(module)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"save_on_exception": True},
            marks=pytest.mark.skipif(LIGHTNING_2_5, reason="Lightning 2.6 has brought it"),
        ),
        {"every_n_train_steps": 1},
    ],
)
def test_checkpoint_of_a_run_that_fails_holds_no_base(tmp_path, options):
    saver = ModelCheckpoint(dirpath=tmp_path, **options)
    with pytest.raises(KeyError, match="a bug"):
        trainer(tmp_path, finetuning(), BreakAt(2, KeyError("a bug")), saver, enable_checkpointing=True).fit(
            PlainMLP(), mlp_loader()
        )
    (file,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert "genlora" in checkpoint
    assert not [name for name in checkpoint["state_dict"] if "base_layer" in name]


def test_checkpoint_saved_by_hand_after_the_run_holds_no_base_and_can_be_used(tmp_path):
    module, fresh = PlainMLP(), PlainMLP()
    run = trainer(tmp_path, finetuning())
    run.fit(module, mlp_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not [n for n in torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"] if "base_layer" in n]
    trainer(tmp_path, finetuning()).validate(fresh, mlp_loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), module(x))


def test_strategy_that_was_another_trainers_writes_of_its_present_one(tmp_path):
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    # The first trainer gives the strategy its accelerator, and Lightning refuses to be given one twice.
    for steps, accelerator in ((1, "cpu"), (3, "auto")):
        run = trainer(tmp_path, finetuning(), strategy=strategy, accelerator=accelerator, max_steps=steps)
        run.fit(PlainMLP(), mlp_loader())
        run.save_checkpoint(tmp_path / "x.ckpt")
        resume = torch.load(tmp_path / "x.ckpt", weights_only=True)["genlora"]["resume"]
        assert resume["ranks"][0]["loaders"][0]["batches"] == steps


def test_two_callbacks_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="more than one GenLoRAFinetuning"):
        trainer(tmp_path, finetuning(), finetuning()).fit(PlainMLP(), mlp_loader())


def test_unmatched_target_stops_before_training_and_names_near_ones(tmp_path):
    module = PlainEncoder()
    config = small_config(target_modules=["querry"])
    with pytest.raises(ValueError, match=r"names 'querry', which no linear matches. Near matches: query"):
        trainer(tmp_path, finetuning(config=config)).fit(module, encoder_loader())
    assert module.losses == []


def test_hooks_of_the_module_still_run_and_are_restored(tmp_path):
    calls = []

    class Hooked(PlainMLP):
        def on_save_checkpoint(self, checkpoint):
            calls.append("save")
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint):
            calls.append(checkpoint["mine"])

    module = Hooked()
    run = trainer(tmp_path, finetuning())
    run.fit(module, mlp_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not {"configure_model", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(module))
    assert module.strict_loading
    copy.deepcopy(module)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_holds_adapters_and_no_base_and_loads_safely(tmp_path, weights_only):
    module = PlainMLP()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x", save_weights_only=weights_only)
    trainer(tmp_path, finetuning(), saver, enable_checkpointing=True).fit(module, mlp_loader())
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapter_state_dict(module))
    assert ("optimizer_states" in checkpoint) == (not weights_only)
    assert checkpoint["genlora"]["config"]["rank"] == 4


@pytest.mark.parametrize("place", PLACES)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, place):
    whole, first, second = PlainMLP(place), PlainMLP(place), PlainMLP(place)
    torch.manual_seed(5)
    trainer(tmp_path, finetuning(), max_epochs=4).fit(whole, mlp_loader())
    torch.manual_seed(5)
    run = trainer(
        tmp_path,
        finetuning(),
        ModelCheckpoint(dirpath=tmp_path, filename="half"),
        max_epochs=2,
        enable_checkpointing=True,
    )
    run.fit(first, mlp_loader())
    torch.manual_seed(99)  # a resumed run must not depend on the values it would have started from
    trainer(tmp_path, finetuning(), max_epochs=4).fit(second, mlp_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    for name, tensor in adapter_state_dict(second).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name


def test_validation_uses_the_checkpoints_adapters(tmp_path):
    module, fresh = PlainMLP(), PlainMLP()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x")
    trainer(tmp_path, finetuning(), saver, enable_checkpointing=True, max_epochs=5).fit(module, mlp_loader())
    run = trainer(tmp_path, finetuning())
    (result,) = run.validate(fresh, mlp_loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    (expected,) = trainer(tmp_path, finetuning()).validate(module, mlp_loader(), verbose=False)
    with pytest.warns(UserWarning, match=r"are new and untrained, and no `ckpt_path` is given"):
        (untrained,) = trainer(tmp_path, finetuning()).validate(PlainMLP(), mlp_loader(), verbose=False)
    assert result == expected
    assert untrained["val_loss"] > 1.05 * result["val_loss"]


def test_full_checkpoint_with_the_base_in_it_loads_too(tmp_path):
    module, fresh = PlainMLP(), PlainMLP()
    run = trainer(tmp_path, finetuning(), ModelCheckpoint(dirpath=tmp_path, filename="x"), enable_checkpointing=True)
    run.fit(module, mlp_loader())
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["state_dict"] = module.state_dict()
    torch.save(checkpoint, tmp_path / "full.ckpt")
    trainer(tmp_path, finetuning()).validate(fresh, mlp_loader(), ckpt_path=tmp_path / "full.ckpt", verbose=False)
    assert torch.equal(fresh.net[0].update.B.latent, module.net[0].update.B.latent)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["state_dict"].pop("net.0.update.A.latent"),
            r"1 tensors are missing \(net.0.update.A.latent",
        ),
        (lambda c: c["state_dict"].update(stranger=torch.zeros(1)), r"no place in the model \(stranger\)"),
        (
            lambda c: c["state_dict"].update({"net.0.update.A.latent": torch.zeros(3)}),
            r"stored \(3,\), needed \(8, 1\)",
        ),
        (lambda c: c.pop("genlora"), r"holds no adapters"),
        (
            lambda c: c["genlora"]["config"].update(rank=8),
            r"another configuration \(rank: 8 in the checkpoint, 4 here\)",
        ),
        (lambda c: c["genlora"].update(format_version=9), r"format version 9; .* update genlora-lightning"),
    ],
)
def test_checkpoint_that_does_not_fit_is_an_error(tmp_path, edit, message):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x")
    trainer(tmp_path, finetuning(), saver, enable_checkpointing=True).fit(PlainMLP(), mlp_loader())
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, finetuning()).fit(PlainMLP(), mlp_loader(), ckpt_path=tmp_path / "bad.ckpt")


# -- the adapter folder, and what goes wrong --------------------------------------------------------------------------


def test_finished_run_leaves_an_adapter_folder_with_its_facts(tmp_path):
    module, fresh = PlainMLP(), PlainMLP()
    run = trainer(tmp_path, finetuning(adapter_dir=str(tmp_path / "mine")), max_epochs=2)
    run.fit(module, mlp_loader(), mlp_loader())
    load_adapter(fresh, tmp_path / "mine")
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), module(x))
    text = (tmp_path / "mine" / "manifest.json").read_text()
    assert '"global_step": 8' in text
    assert '"val_loss"' in text
    trainer(tmp_path / "none", finetuning(save_adapter=False)).fit(PlainMLP(), mlp_loader())
    assert not (tmp_path / "none" / "adapter").exists()


class BreakAt(Callback):
    """Raises, or spoils the batch, at one batch."""

    def __init__(self, batch_idx: int, what: BaseException | str) -> None:
        self.batch_idx, self.what = batch_idx, what
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx != self.batch_idx:
            return
        self.before = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}
        if isinstance(self.what, BaseException):
            raise self.what
        batch[0].fill_(math.nan)


def assert_saved(folder, before):
    fresh = PlainMLP()
    load_adapter(fresh, folder)
    for name, tensor in adapter_state_dict(fresh).items():
        assert torch.equal(tensor, before[name]), name
    assert any((tensor != 0).any() for name, tensor in before.items() if name.endswith("update.B.latent"))


def test_nan_stops_the_run_before_the_step_and_keeps_the_last_good_adapter(tmp_path):
    breaker = BreakAt(2, "nan")
    with pytest.raises(
        NonFiniteGradientError,
        match=r"NaN or infinite at optimizer step 3, epoch 0, batch 2, in 16 tensors .*the last loss was not finite.*"
        r"The adapter after 2 steps is saved in .*adapter-interrupted",
    ):
        trainer(tmp_path, finetuning(), breaker).fit(PlainMLP(), mlp_loader())
    assert_saved(tmp_path / "adapter-interrupted", breaker.before)


def test_nan_at_the_first_step_says_that_there_is_nothing_to_save(tmp_path):
    with pytest.raises(NonFiniteGradientError, match="No step had been made"):
        trainer(tmp_path, finetuning(), BreakAt(0, "nan")).fit(PlainMLP(), mlp_loader())
    assert not (tmp_path / "adapter-interrupted").exists()


def test_check_for_nan_can_be_switched_off(tmp_path):
    module = PlainMLP()
    run = trainer(tmp_path, finetuning(check_finite_every_n_steps=0, save_adapter=False), BreakAt(2, "nan"))
    run.fit(module, mlp_loader())
    assert module.net[0].update.A.latent.isnan().all()


def test_interrupted_run_keeps_its_adapter_and_the_finished_one_beside_it(tmp_path):
    trainer(tmp_path, finetuning()).fit(PlainMLP(), mlp_loader())
    finished = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    breaker = BreakAt(3, KeyboardInterrupt())
    with pytest.raises(SystemExit, match="1"):
        trainer(tmp_path, finetuning(), breaker).fit(PlainMLP(), mlp_loader())
    assert_saved(tmp_path / "adapter-interrupted", breaker.before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == finished


def test_error_in_the_users_code_keeps_the_adapter_and_the_module_can_be_used_again(tmp_path):
    module, breaker = PlainMLP(), BreakAt(1, KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        trainer(tmp_path, finetuning(), breaker).fit(module, mlp_loader())
    assert_saved(tmp_path / "adapter-interrupted", breaker.before)
    trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    assert (tmp_path / "adapter").is_dir()


def test_full_disk_at_the_end_saves_the_adapter_elsewhere(tmp_path, monkeypatch):
    real = outcome.write_adapter

    def full(model, folder, **kwargs):
        if folder == tmp_path / "adapter":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(model, folder, **kwargs)

    monkeypatch.setattr(outcome, "write_adapter", full)
    monkeypatch.setattr(outcome, "_spare_folder", lambda: tmp_path / "spare")
    module = PlainMLP()
    with pytest.warns(UserWarning, match="No space left"):
        trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    fresh = PlainMLP()
    load_adapter(fresh, tmp_path / "spare")
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), module(x))


@pytest.mark.parametrize("fails", [False, True])
def test_interrupted_run_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch, fails):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(outcome.tempfile, "tempdir", str(tmp_path / "temporary"))
    if fails:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(outcome, "write_adapter", full)
    with pytest.raises(SystemExit, match="1"):
        trainer(tmp_path, finetuning(), BreakAt(3, KeyboardInterrupt())).fit(PlainMLP(), mlp_loader())
    assert (tmp_path / "adapter-interrupted").exists() is not fails
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_a_run_killed_while_it_saved_has_left_is_removed_by_the_next_one(tmp_path):
    left = tmp_path / f".adapter-interrupted.genlora-new-{'0' * 16}"
    left.mkdir()
    (left / "config.json").write_text("{")
    trainer(tmp_path, finetuning()).fit(PlainMLP(), mlp_loader())
    assert sorted(path.name for path in tmp_path.iterdir() if "adapter" in path.name) == ["adapter"]


def test_too_little_space_is_an_error_before_training(tmp_path, monkeypatch):
    from genlora_lightning.training import checks

    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    module = PlainMLP()
    with pytest.raises(OSError, match=r"is to be saved in .*adapter, which takes [\d,]+ bytes; 10 are free"):
        trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    assert module.losses == []


def test_model_that_has_these_adapters_already_goes_on_training_them(tmp_path):
    module = PlainMLP()
    config = small_config(exclude_modules=["4"])
    inject_adapters(module, config)
    with torch.no_grad():
        module.net[0].update.B.latent.fill_(0.1)
    before = module.net[0].update.B.latent.clone()
    trainer(tmp_path, finetuning(config=config)).fit(module, mlp_loader(n=8))
    assert not torch.equal(module.net[0].update.B.latent, before)
    torch.testing.assert_close(module.net[0].update.B.latent, before, atol=0.2, rtol=0)


def test_strategy_that_is_not_supported_is_an_error_before_any_work(tmp_path):
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    module = PlainMLP()
    run = trainer(tmp_path, finetuning(), strategy=DeepSpeedStrategy())
    with pytest.raises(ValueError, match=r"does not support DeepSpeedStrategy: set"):
        run.fit(module, mlp_loader())
    assert not adapter_layers(module)


@pytest.mark.parametrize("way", ["fit", "validate", "test", "predict"])
def test_matrices_are_generated_once_while_nothing_is_trained_and_anew_after_it(tmp_path, way, monkeypatch):
    module, adapter, used = PlainMLP(), finetuning(), []

    def linear(x, weight, bias, A, B, **options):
        if not torch.is_grad_enabled():
            used.append(A)
        return adapted_linear(x, weight, bias, A, B, **options)

    monkeypatch.setattr("genlora_lightning.layers.linear.adapted_linear", linear)
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    run = trainer(tmp_path, adapter, max_epochs=2, num_sanity_val_steps=0)
    if way == "fit":
        run.fit(module, mlp_loader(), mlp_loader(16))
    else:
        with pytest.warns(UserWarning, match="new and untrained"):
            getattr(run, way)(module, mlp_loader(16))
    number = len(adapter_layers(module))  # of layers, each used once in a batch, of which there are two
    assert len(used) == 2 * number * (2 if way == "fit" else 1)
    assert all(first is second for first, second in zip(used[:number], used[number:], strict=False))
    if way == "fit":
        assert not torch.equal(used[0], used[2 * number])


@pytest.mark.parametrize("generate", ["forward", "step"])
def test_module_can_be_pickled_and_copied_while_it_is_fitted(tmp_path, generate):
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            file = io.BytesIO()
            torch.save(pl_module, file)
            file.seek(0)
            kept[:] = [torch.load(file, weights_only=False), copy.deepcopy(pl_module)]
            for module in kept:
                assert not {"configure_model", "on_save_checkpoint", "__getstate__"} & set(vars(module))
                assert module.strict_loading
            assert not pl_module.strict_loading  # the run goes on as it was

    module = PlainMLP()
    run = trainer(tmp_path, finetuning(generate=generate, save_adapter=False), Keep(), accumulate_grad_batches=2)
    run.fit(module, mlp_loader())
    for other in kept:
        other.configure_model()
        assert other(torch.ones(1, 8)).shape == (1, 4)
        for name, tensor in adapter_state_dict(module).items():
            assert torch.equal(adapter_state_dict(other)[name], tensor), name
    assert "__getstate__" not in vars(module)
