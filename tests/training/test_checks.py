from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from genlora_lightning import (
    GenLoRAConfig,
    GenLoRAFinetuning,
    LoRAConfig,
    adapters_disabled,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.training.checks import check_adapters_act, prune_frozen, warn_of_low_rates
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


def adapted(config) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    inject_adapters(model, config)
    return model


@pytest.mark.parametrize(
    ("config", "low", "good"), [(GenLoRAConfig(rank=4), 1e-4, 2e-3), (LoRAConfig(rank=4), 2e-5, 2e-4)]
)
def test_rate_for_a_whole_model_is_a_warning_that_names_the_usual_ones(config, low, good):
    model = adapted(config)
    with pytest.warns(UserWarning, match=rf"a rate of {low:g}\. .*{config.title} mostly learns at .* with Adam"):
        warn_of_low_rates([torch.optim.AdamW(model.parameters(), lr=low)], model)
    warm = torch.optim.AdamW(model.parameters(), lr=good)
    torch.optim.lr_scheduler.LinearLR(warm, start_factor=1e-3)  # now far below its rate
    own = [*adapter_parameters(model).values()]
    kept = {id(p) for p in own}
    others = [p for p in model.parameters() if id(p) not in kept]
    by_parts = torch.optim.AdamW([{"params": own, "lr": good}, {"params": others, "lr": low}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_low_rates([torch.optim.AdamW(model.parameters(), lr=good)], model)
        warn_of_low_rates([warm], model)
        warn_of_low_rates([by_parts], model)
        warn_of_low_rates([torch.optim.SGD(model.parameters(), lr=low)], model)
        warn_of_low_rates([torch.optim.AdamW(others, lr=low)], model)


def finetuning(**settings: object) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(small_config(exclude_modules=["4"]), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Adagrad", "LBFGS"])
def test_optimizer_with_state_or_a_list_of_its_own_trains_saves_and_resumes_without_frozen_parameters(tmp_path, name):
    class Own(PlainMLP):
        def __init__(self, only_trainable: bool) -> None:
            super().__init__()
            self.only_trainable = only_trainable

        def configure_optimizers(self) -> torch.optim.Optimizer:
            given = [p for p in self.parameters() if p.requires_grad or not self.only_trainable]
            return getattr(torch.optim, name)(given, lr=0.01)

    def fit(*, only_trainable: bool = False, **settings: object) -> list[float]:
        torch.manual_seed(0)
        module = Own(only_trainable)
        save = LambdaCallback(
            on_train_epoch_end=lambda run, _: run.save_checkpoint(tmp_path / f"{run.global_step}.ckpt")
        )
        run = trainer(tmp_path, finetuning(), save, max_epochs=2)
        run.fit(module, mlp_loader(), **settings)
        return module.losses

    losses = fit()
    # To rounding, because LBFGS multiplies long vectors, whose place in memory decides on the order of the sums.
    assert fit(only_trainable=True) == pytest.approx(losses, rel=1e-3)
    assert fit(ckpt_path=tmp_path / "4.ckpt") == pytest.approx(losses[-len(losses) // 2 :], rel=1e-3)


def test_names_of_an_optimizers_parameters_stay_beside_them():
    model = adapted(GenLoRAConfig(rank=4))
    optimizer = torch.optim.AdamW(model.parameters())
    group = optimizer.param_groups[0]
    group["param_names"] = [name for name, _ in model.named_parameters()]  # as torch 2.6 does with named ones
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert prune_frozen([optimizer]) == len(list(model.parameters())) - len(trained)
    assert group["param_names"] == [trained[id(p)] for p in group["params"]] == list(trained.values())


class Skipping(PlainMLP):
    """Gives no loss for its first batches, by which Lightning skips them."""

    skipped = 2

    def training_step(self, batch, batch_idx):
        return None if batch_idx < self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss_are_no_missing_gradients(tmp_path, accumulate):
    module = Skipping()
    trainer(tmp_path, finetuning(), accumulate_grad_batches=accumulate).fit(module, mlp_loader())
    assert len(module.losses) == 2
    assert all(bool((layer.update.B.latent != 0).any()) for layer in adapter_layers(module).values())


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_missing_gradient_is_found_in_the_first_batch_that_has_a_loss(tmp_path):
    class Detached(Skipping):
        def forward(self, x):
            return self.net[4](self.net[:4](x).detach())

    module = Detached()
    config = small_config(target_modules=["0", "2"], modules_to_train=["4"])
    with pytest.raises(RuntimeError, match=r"None of the 2 adapters has a gradient"):
        trainer(tmp_path, GenLoRAFinetuning(config)).fit(module, mlp_loader())
    assert len(module.losses) == 1


def test_missing_gradient_is_found_where_the_module_calls_backward_itself(tmp_path):
    class Manual(PlainMLP):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            (self.step(batch).detach() + self.net[4].bias.sum()).backward()
            self.optimizers().step()

    config = small_config(target_modules=["0", "2"], modules_to_train=["4"])
    with pytest.raises(RuntimeError, match=r"None of the 2 adapters has a gradient"):
        trainer(tmp_path, GenLoRAFinetuning(config)).fit(Manual(), mlp_loader())


def test_merged_or_disabled_adapters_are_refused_before_a_step_and_stay_as_they_are(tmp_path):
    module = PlainMLP()
    inject_adapters(module, small_config(exclude_modules=["4"]))
    merge_adapters(module)
    with pytest.raises(
        ValueError, match=r"2 of 2 adapters are merged .*net\.0 among them.*`unmerge_adapters\(model\)`"
    ):
        trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    assert all(layer.merged for layer in adapter_layers(module).values())
    unmerge_adapters(module)
    with (
        adapters_disabled(module),
        pytest.raises(ValueError, match=r"2 of 2 adapters are disabled, net\.0 .*adapters_disabled\(model\)"),
    ):
        trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    assert module.losses == []
    trainer(tmp_path, finetuning()).fit(module, mlp_loader())
    assert len(module.losses) == 4


def test_merged_or_disabled_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    from genlora_lightning.injection.peft_adapters import put_adapters, read_any_config
    from tests.models import tiny_bert

    model = tiny_bert()
    put_adapters(model, read_any_config(peft.LoraConfig(target_modules=["query"], r=2)))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    check_adapters_act(model)
    layers[0].merge()
    with pytest.raises(ValueError, match="1 of 2 adapters are merged"):
        check_adapters_act(model)
    layers[0].unmerge()
    layers[1].enable_adapters(False)
    with pytest.raises(ValueError, match="1 of 2 adapters are disabled"):
        check_adapters_act(model)


class Outside(PlainMLP):
    """Has its adapters in a part of itself, beside a head."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(4, 4)

    def adapter_root(self) -> nn.Module:
        return self.net

    def forward(self, x):
        return self.head(super().forward(x))


def test_what_is_trained_outside_of_the_adapter_root_is_said_before_and_after(tmp_path):
    callback, module = finetuning(), Outside()
    before = module.head.weight.clone()
    with pytest.warns(UserWarning, match=r"2 trainable parameters, head\.weight among them, lie outside") as caught:
        trainer(tmp_path, callback).fit(module, mlp_loader())
    texts = [str(warning.message) for warning in caught if "lie outside" in str(warning.message)]
    assert [("trained in full. Checkpoints hold them" in t, "have learned; checkpoints do" in t) for t in texts] == [
        (True, False),
        (False, True),
    ]
    assert not torch.equal(module.head.weight, before)
    assert callback.report.summary().endswith("and outside of the adapted model 20, which no adapter folder holds.")


def test_nothing_is_said_of_what_is_frozen_outside_of_the_adapter_root(tmp_path):
    callback, module = finetuning(), Outside()
    module.head.requires_grad_(False)
    trainer(tmp_path, callback).fit(module, mlp_loader())
    assert callback.report.trained_outside == 0
    assert "outside" not in callback.report.summary()
