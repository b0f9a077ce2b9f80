"""Answers to prompts of the validation data that a run keeps."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule

from genlora_lightning import CausalLMModule, GenLoRAFinetuning
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.reports.record import read_samples
from genlora_lightning.training.samples import AnswerSamples, prompts_of
from tests.conftest import small_config
from tests.modules.conftest import EOS, loader, model_folders, text_batch  # noqa: F401 - a fixture
from tests.plain import PlainMLP, mlp_loader, trainer

ROWS = [([10 + index, 3], [20 + index, 30 - index, EOS]) for index in range(6)]


class Rows(list[Any]):
    column_names = ("input_ids", "labels")


def row(prompt: list[int], answer: list[int], after: int = 0) -> dict[str, list[int]]:
    return {"input_ids": [*prompt, *answer, *[5] * after], "labels": [-100] * len(prompt) + answer + [-100] * after}


class Texts(LightningDataModule):
    def __init__(self, rows: Rows | None = None) -> None:
        super().__init__()
        self._rows = Rows(row(*one) for one in ROWS) if rows is None else rows

    def rows(self, split: str) -> Rows:
        assert split == "val"
        return self._rows

    def train_dataloader(self) -> Any:
        return loader([text_batch(ROWS)])


def fit(folder: Any, source: str, *callbacks: Any, rows: Rows | None = None, **settings: Any) -> CausalLMModule:
    torch.manual_seed(0)
    module = CausalLMModule(source, adapter=small_config(rank=8), optimizer={"lr": 0.05, "schedule": "constant"})
    trainer(folder, *callbacks, max_epochs=-1, **{"max_steps": 20, **settings}).fit(module, datamodule=Texts(rows))
    return module


def test_same_prompts_are_answered_before_and_after(tmp_path, model_folders):  # noqa: F811
    module = fit(tmp_path, model_folders["llama"], AnswerSamples(2, max_new_tokens=4))
    samples = read_samples([tmp_path])
    assert [(one.step, one.index, one.prompt, one.reference) for one in samples] == [
        (step, index, f"w{10 + index} w3", f"w{20 + index} w{30 - index}") for step in (0, 20) for index in (0, 1)
    ]
    after = module.eval().answer_prompts([ROWS[0][0], ROWS[1][0]], 4)
    assert [one.answer for one in samples[2:]] == after
    assert [one.answer for one in samples[:2]] != after


def test_answers_end_where_they_take_too_long(tmp_path, model_folders, monkeypatch):  # noqa: F811
    monkeypatch.setattr("genlora_lightning.training.samples._SECONDS", 1e-9)
    fit(tmp_path, model_folders["llama"], AnswerSamples(2), max_steps=1)
    assert {len(one.answer.split()) for one in read_samples([tmp_path])} == {1}


def test_answers_at_validations_and_at_the_end_take_their_share_of_the_time(tmp_path, model_folders, monkeypatch):  # noqa: F811
    clock = SimpleNamespace(now=0.0)

    def slow(*_: Any) -> list[str]:
        clock.now += 1.0
        return ["w6"]

    class Steps(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += 10.0

    class Validated(Texts):
        def val_dataloader(self) -> Any:
            return loader([text_batch(ROWS)])

    monkeypatch.setattr("genlora_lightning.training.samples.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("genlora_lightning.training.samples._SHARE", 0.05)
    monkeypatch.setattr(CausalLMModule, "answer_prompts", slow)
    module = CausalLMModule(model_folders["llama"], adapter=small_config(rank=8))
    run = trainer(tmp_path, Steps(), AnswerSamples(1), max_steps=9, max_epochs=-1)
    run.fit(module, datamodule=Validated())
    steps = [one.step for one in read_samples([tmp_path])]
    assert steps == [0, 6, 8, 9]
    assert len(steps) <= 0.05 * clock.now


def test_answers_change_nothing_of_the_training(tmp_path, model_folders):  # noqa: F811
    states = []
    for place, callbacks in (("with", [AnswerSamples(3)]), ("without", [])):
        module = fit(tmp_path / place, model_folders["llama"], *callbacks, max_steps=3)
        states.append({name: value.detach().clone() for name, value in adapter_parameters(module).items()})
        assert module.adapter_root().training
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_prompts_of_two_lengths_are_answered_as_one_by_one(model_folders):  # noqa: F811
    module = CausalLMModule(
        model_folders["llama"], adapter=small_config(), generation={"do_sample": True, "max_new_tokens": 5}
    )
    module.configure_model()
    module.eval()
    prompts = [[10, 11, 12, 13, 3], [9, 3]]
    both = module.answer_prompts(prompts, 5)
    assert both == [module.answer_prompts([prompt], 5)[0] for prompt in prompts]
    assert module.answer_prompts(prompts, 9) == both  # no longer than `generation` has it
    assert module.answer_prompts(prompts, 2) == [" ".join(text.split()[:2]) for text in both]
    assert module.answer_prompts(prompts, 5, 1e-9) == [text.split()[0] for text in both]
    with pytest.raises(ValueError, match=r"A prompt of \d+ tokens leaves no room in the model's \d+"):
        module.answer_prompts([[3] * 10_000], 5)


def test_last_answer_of_a_row_is_what_is_asked_for():
    turns = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, -100, 5, -100]}
    document = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}
    nothing = {"input_ids": [1, 2], "labels": [-100, -100]}
    long = row([4] * 513, [5])
    found = prompts_of(Rows([nothing, long, turns, document, turns]), 2)
    assert [(one.tokens, one.reference) for one in found] == [([1, 2, 3, 4], [5]), ([1, 2], [3, 4, 5])]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [(Rows(), "no prompt of the validation data has 512 tokens or less"), (Rows([row([4] * 513, [5])]), "no prompt")],
)
def test_data_without_prompts_are_told(tmp_path, model_folders, caplog, rows, reason):  # noqa: F811
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        fit(tmp_path, model_folders["llama"], AnswerSamples(), rows=rows, max_steps=1)
    assert f"No answers are kept of this run: {reason}" in caplog.text
    assert read_samples([tmp_path]) == []


def test_modules_that_answer_nothing_are_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        trainer(tmp_path, GenLoRAFinetuning(small_config(rank=4)), AnswerSamples()).fit(PlainMLP(), mlp_loader())
    assert "No answers are kept of this run: PlainMLP answers no prompts." in caplog.text


def test_a_model_that_cannot_generate_does_not_fail_the_run(tmp_path, model_folders, caplog, monkeypatch):  # noqa: F811
    def fail(*_: Any) -> None:
        raise RuntimeError("no cache")

    monkeypatch.setattr(CausalLMModule, "answer_prompts", fail)
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        module = fit(tmp_path, model_folders["llama"], AnswerSamples(), max_steps=1)
    assert "No answers are kept of this run: no cache" in caplog.text
    assert module.adapter_root().training


@pytest.mark.parametrize("arguments", [{"count": 0}, {"max_new_tokens": 0}])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match=rf"`{next(iter(arguments))}` must be at least 1, got 0"):
        AnswerSamples(**arguments)
