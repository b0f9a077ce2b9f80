from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.modules import CausalLMModule, GenLoRAModule
from genlora_lightning.training.callback import AdapterFinetuning, GenLoRAFinetuning
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.modules.conftest import loader, text_batch
from tests.plain import LIGHTNING_2_5

MakeTrainer = Callable[..., Trainer]

# Answers of 1, 6, 2 and 3 tokens: a mean of means would weigh their tokens 1 : 1/6 : 1/2 : 1/3.
ROWS = [([5, 6], [7]), ([8], [9, 10, 11, 12, 13, 14]), ([15, 16, 17], [18, 19]), ([20], [21, 22, 23])]


def batches_of(*groups: list[int]) -> list[dict[str, torch.Tensor]]:
    return [text_batch([ROWS[index] for index in group], length=8) for group in groups]


class PlainDescent(CausalLMModule):
    """Plain gradient descent that keeps the gradients it steps with."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.steps: list[torch.Tensor] = []
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        super().configure_gradient_clipping(*arguments, **options)
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in adapter_parameters(self).values()]))


def gradients(
    make_trainer: MakeTrainer, folder: str, batches: list[dict[str, torch.Tensor]], **options: Any
) -> list[torch.Tensor]:
    torch.manual_seed(1)
    module = PlainDescent(folder, adapter=small_config())
    make_trainer(max_epochs=1, **options).fit(module, loader(batches))
    return module.steps


def assert_alike(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert (first[0] - second[0]).abs().max() <= 1e-6
    for one, other in zip(first, second, strict=True):  # later steps start from weights that differ by rounding
        assert one.norm() > 5e-4
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_accumulated_gradient_equals_that_of_one_large_batch(
    make_trainer: MakeTrainer, model_folders: dict[str, str], clip: float | None
) -> None:
    folder = model_folders["llama"]
    whole = gradients(make_trainer, folder, batches_of([0, 1, 2, 3]), gradient_clip_val=clip)
    parts = gradients(
        make_trainer, folder, batches_of([0], [1, 2, 3]), accumulate_grad_batches=2, gradient_clip_val=clip
    )
    assert_alike(whole, parts)


def test_incomplete_last_window_of_an_epoch_is_right_too(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    folder = model_folders["llama"]
    whole = gradients(make_trainer, folder, batches_of([0, 1], [2, 3]))
    parts = gradients(make_trainer, folder, batches_of([0], [1], [2, 3]), accumulate_grad_batches=2)
    assert_alike(whole, parts)


def test_gradient_scaler_clips_and_accumulates_true_gradients(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    folder = model_folders["llama"]
    norms = []

    class Adam(CausalLMModule):
        def configure_gradient_clipping(
            self, optimizer: torch.optim.Optimizer, *arguments: Any, **options: Any
        ) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in adapter_parameters(self).values()]).norm()))
            super().configure_gradient_clipping(optimizer, *arguments, **options)

    for accumulate, batches in ((1, batches_of([0, 1, 2, 3])), (2, batches_of([0], [1, 2, 3]))):
        torch.manual_seed(1)
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        trainer = make_trainer(
            max_epochs=1, plugins=[scaler], accumulate_grad_batches=accumulate, gradient_clip_val=0.1
        )
        trainer.fit(Adam(folder, adapter=small_config()), loader(batches))
        assert trainer.optimizers[0].defaults["fused"] is False
    torch.manual_seed(1)
    exact = gradients(make_trainer, folder, batches_of([0, 1, 2, 3]))[0]
    assert norms == pytest.approx([float(exact.norm())] * 2, rel=0.05)


class OwnShare(PlainDescent):
    """Two of the examples for each rank, in micro-batches of one."""

    def train_dataloader(self) -> Any:
        return loader(batches_of([0], [1]) if self.global_rank == 0 else batches_of([2], [3]))


class SaveSteps(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.steps, self.file)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_give_the_gradient_of_one_large_batch(
    make_trainer: MakeTrainer, model_folders: dict[str, str], tmp_path: Path, accumulate: int
) -> None:
    folder = model_folders["llama"]
    whole = batches_of([0, 1, 2, 3]) if accumulate == 2 else batches_of([0, 2], [1, 3])
    expected = gradients(make_trainer, folder, whole)

    torch.manual_seed(1)
    trainer = make_trainer(
        max_epochs=1,
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        callbacks=[SaveSteps(tmp_path / "steps.pt")],
    )
    trainer.fit(OwnShare(folder, adapter=small_config()))
    assert_alike(expected, torch.load(tmp_path / "steps.pt"))


def test_logged_loss_is_the_mean_over_the_window_s_tokens(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    logged = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["train_loss"]))

    def fit(batches: list[dict[str, torch.Tensor]], accumulate: int) -> None:
        torch.manual_seed(1)
        trainer = make_trainer(max_epochs=1, callbacks=[Watch()], accumulate_grad_batches=accumulate)
        trainer.fit(PlainDescent(model_folders["llama"], adapter=small_config()), loader(batches))

    fit(batches_of([0], [1, 2, 3], [0]), accumulate=2)
    fit(batches_of([0, 1, 2, 3]), accumulate=1)
    assert logged[1] == pytest.approx(logged[3], abs=1e-5)  # both micro-batches, against one batch
    assert logged[0] != pytest.approx(logged[3], abs=1e-2)


def test_hyperparameters_are_plain_and_make_the_module_again(
    make_trainer: MakeTrainer, model_folders: dict[str, str], tmp_path: Path
) -> None:
    module = CausalLMModule(
        model_folders["llama"],
        adapter=small_config(rank=3),
        optimizer=OptimizerConfig(lr=0.01, betas=(0.8, 0.9), warmup_steps=2, schedule="constant"),
        dtype="float32",
        generation={"max_new_tokens": 5},
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(batches_of([0])))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["adapter"]["rank"] == 3
    assert stored["optimizer"]["betas"] == [0.8, 0.9]

    again = CausalLMModule(**stored)
    assert again.adapter == module.adapter
    assert again.optimizer_config == module.optimizer_config
    assert again.generation == module.generation
    assert dict(again.hparams) == dict(module.hparams) == stored


def test_subclass_keeps_its_own_arguments_among_the_hyperparameters() -> None:
    class Mine(CausalLMModule):
        def __init__(self, temperature: float, **arguments: Any) -> None:
            super().__init__("nowhere", **arguments)
            self.temperature = temperature

    module = Mine(0.5, adapter=small_config())
    assert module.hparams["temperature"] == 0.5
    assert module.hparams["adapter"] == small_config().to_dict()


def test_no_model_is_loaded_before_it_is_needed(model_folders: dict[str, str]) -> None:
    module = CausalLMModule(model_folders["llama"])
    assert module.model is None
    with pytest.raises(RuntimeError, match=r"model of this CausalLMModule is not loaded yet.*`configure_model\(\)`"):
        module.adapter_root()
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model is module.adapter_root()


def test_module_brings_its_own_callback_and_uses_the_trainer_s_where_there_is_one(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    def callbacks(trainer: Trainer) -> list[AdapterFinetuning]:
        return [callback for callback in trainer.callbacks if isinstance(callback, AdapterFinetuning)]

    module = CausalLMModule(model_folders["llama"], adapter=small_config(rank=2))
    trainer = make_trainer(max_steps=1)
    for _ in range(2):  # a second run must not add a second one
        trainer.fit(module, loader(batches_of([0])))
        assert [callback.config.rank for callback in callbacks(trainer)] == [2]

    given = GenLoRAFinetuning(small_config(rank=3))
    trainer = make_trainer(max_steps=1, callbacks=[given])
    trainer.fit(CausalLMModule(model_folders["llama"]), loader(batches_of([0])))
    assert callbacks(trainer) == [given]

    trainer = make_trainer(max_steps=1, callbacks=[GenLoRAFinetuning(small_config(rank=3))])
    with pytest.raises(ValueError, match=r"callback and the module's `adapter` differ \(rank: 3 and 2\)"):
        trainer.fit(CausalLMModule(model_folders["llama"], adapter=small_config(rank=2)), loader(batches_of([0])))


def test_length_of_the_run_is_asked_for_only_by_a_schedule_that_needs_it(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    def fit(optimizer: OptimizerConfig, **options: Any) -> Trainer:
        module = CausalLMModule(model_folders["llama"], adapter=small_config(), optimizer=optimizer)
        trainer = make_trainer(**options)
        trainer.fit(module, loader(batches_of([0], [1], [2], [3])))
        return trainer

    trainer = fit(OptimizerConfig(lr=0.1, schedule="linear"), max_epochs=2, accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)  # the end is reached, at the last step

    class StopAtOnce(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    fit(OptimizerConfig(schedule="constant"), max_epochs=-1, callbacks=[StopAtOnce()])
    with pytest.raises(ValueError, match="needs to know how many optimizer steps the run takes, but that is inf"):
        fit(OptimizerConfig(), max_epochs=-1, callbacks=[StopAtOnce()])


def test_gradient_checkpointing_changes_no_gradient(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        module = PlainDescent(model_folders["llama"], adapter=small_config(), gradient_checkpointing=checkpointing)
        make_trainer(max_epochs=1).fit(module, loader(batches_of([0, 1])))
        assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules()) is checkpointing
        results.append(module.steps)
    assert_alike(*results)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": ""}, TypeError, "`model` must be a folder or a name on the Hugging Face Hub, got ''"),
        ({"model": "x", "dtype": "fp8"}, ValueError, "`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"model": "x", "adapter": {"rnak": 3}}, ValueError, r"Unknown GenLoRAConfig fields \['rnak'\]"),
        ({"model": "x", "optimizer": {"lr": -1}}, ValueError, "`lr` must be finite and greater than 0"),
        (
            {"model": "x", "model_kwargs": {"quantization_config": [torch.float16]}},
            TypeError,
            r"`model_kwargs.quantization_config\[0\]` must be a plain value .* got a dtype",
        ),
    ],
)
def test_bad_argument_is_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GenLoRAModule(**arguments)


def test_copy_of_a_config_given_as_dictionary_is_not_shared() -> None:
    given: dict[str, Any] = {"adapter": GenLoRAConfig().to_dict(), "optimizer": OptimizerConfig().to_dict()}
    before = copy.deepcopy(given)
    module = CausalLMModule("nowhere", **given)
    assert given == before
    assert module.adapter.to_dict() == GenLoRAConfig().to_dict()
    assert module.optimizer_config == OptimizerConfig()


def test_tokens_are_counted_without_padding() -> None:
    count = CausalLMModule("nowhere").count_tokens(batches_of([0, 1])[0])
    assert isinstance(count, torch.Tensor)  # which need not be read at once
    assert count == 3 + 7


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_run_that_reads_the_weights_later_equals_one_that_loads_them_first(
    make_trainer: MakeTrainer, model_folders: dict[str, str], precision: str
) -> None:
    steps = {}
    for low_memory in (False, True):
        torch.manual_seed(1)
        module = PlainDescent(model_folders["llama"], adapter=small_config(), low_memory=low_memory)
        make_trainer(max_epochs=1, precision=precision).fit(module, loader(batches_of([0, 1], [2, 3])))
        steps[low_memory] = module.steps
        assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(steps[False], steps[True], strict=True))


def test_module_without_a_trainer_is_loaded_as_always(model_folders: dict[str, str]) -> None:
    module = CausalLMModule(model_folders["llama"], low_memory=True)
    module.configure_model()
    assert not any(parameter.is_meta for parameter in module.model.parameters())


@pytest.mark.skipif(LIGHTNING_2_5, reason="the run then goes on where the trial has ended")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_learning_rate_finder_sets_the_rate_of_groups_and_schedule(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    factors = {"latents": 2.0, "rbf_weights": 0.5}
    config = OptimizerConfig(schedule="constant", warmup_steps=2, lr_factors=factors)
    module = CausalLMModule(model_folders["llama"], adapter=small_config(), optimizer=config)
    rates: list[dict[str, float]] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    finder = LearningRateFinder(num_training_steps=16, min_lr=1e-5, max_lr=1e-2)
    batches = batches_of(*([step % 4] for step in range(20)))
    make_trainer(max_epochs=1, callbacks=[finder, Rates()]).fit(module, loader(batches))
    assert finder.optimal_lr is not None
    assert module.lr == module.hparams["optimizer"]["lr"] == finder.optimal_lr.suggestion() != OptimizerConfig().lr
    assert len(rates) == 20
    for step, rate in enumerate(rates):
        warmup = min(1.0, (step + 1) / 3)
        assert rate == pytest.approx({name: module.lr * factors.get(name, 1.0) * warmup for name in rate})


@pytest.mark.parametrize(
    ("multiplies", "precision", "options", "expected"),
    [
        (False, "32-true", {}, torch.float32),
        (False, None, {}, torch.float32),
        (True, "32-true", {}, torch.bfloat16),
        (True, None, {}, torch.bfloat16),
        (False, "bf16-mixed", {}, torch.bfloat16),
        (False, "32-true", {"dtype": "bfloat16"}, torch.bfloat16),
        (False, None, {"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_base_of_16_bits_is_float32_where_a_cpu_would_compute_it_that_way_in_any_case(
    tmp_path: Path,
    model_folders: dict[str, str],
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    multiplies: bool,
    precision: str | None,
    options: dict[str, Any],
    expected: torch.dtype,
) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_folders["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    monkeypatch.setattr("genlora_lightning.modules.base.cpu_multiplies_bfloat16", lambda: multiplies)
    module = CausalLMModule(str(tmp_path / "m"), adapter=small_config(), **options)
    if precision is None:
        module.configure_model()
    else:
        run = make_trainer(precision=precision, max_steps=1, limit_val_batches=0)
        run.fit(module, loader([text_batch(ROWS)]))
    found = {p.dtype for p in module.adapter_root().parameters() if not p.requires_grad or precision is None}
    assert found - {torch.float32} == {expected} - {torch.float32}
