"""Effective ranks and singular values that a run records of its updates."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from genlora_lightning import GenLoRAFinetuning, LoRAConfig, describe_adapter, effective_ranks, inject_adapters
from genlora_lightning.adapters.low_rank import effective_rank, singular_values, singular_values_of_many
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.reports.spectra import read_spectra
from genlora_lightning.training.spectra import UpdateSpectra, _is_readable, measure
from tests.conftest import perturb, small_config
from tests.mixtures import PARAMETERS, mixture
from tests.models import tiny_llama
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.test_kinds_and_sites import OuterConfig


def test_many_products_have_the_singular_values_that_each_has():
    A, B = torch.randn(3, 5, 4), torch.randn(3, 5, 9)
    A[1] *= 1e-4
    B[1, 2:] = 0
    found = singular_values_of_many(A, B)
    assert found.shape == (3, 5)
    for one, a, b in zip(found, A, B, strict=True):
        exact = singular_values(a, b.T)
        torch.testing.assert_close(one[: len(exact)], exact, rtol=1e-6, atol=1e-7 * float(exact[0]))
        assert float(one[len(exact) :].sum()) < 1e-6 * float(exact[0])


def test_a_product_that_is_not_finite_spoils_no_other_one():
    A, B = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    A[0, 1, 1] = math.inf
    found = singular_values_of_many(A, B)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], singular_values(A[1], B[1].T))


@pytest.mark.parametrize(
    "config", [small_config(rank=4, scaling="rank"), LoRAConfig(rank=3, rank_pattern={"q_proj": 6})]
)
def test_layers_of_all_shapes_are_measured_as_one_by_one(config, monkeypatch):
    monkeypatch.setattr("genlora_lightning.training.spectra._AT_ONCE", 100)  # so that groups are cut
    model = tiny_llama()
    inject_adapters(model, config)
    layers = adapter_layers(model)
    assert set(measure(layers, 0).effective) == {0.0}
    perturb(model)
    point = measure(layers, 7)
    assert point.step == 7
    assert dict(zip(layers, point.effective, strict=True)) == pytest.approx(effective_ranks(model), rel=1e-5)
    for layer, largest, ratios in zip(layers.values(), point.largest, point.ratios, strict=True):
        exact = abs(layer.scaling) * singular_values(*layer.factors())
        assert [largest * ratio for ratio in ratios][: len(exact)] == pytest.approx(exact.tolist(), rel=1e-5, abs=1e-7)


def test_stacks_of_matrices_are_left_out():
    model = mixture()
    inject_adapters(model, LoRAConfig(rank=2, target_parameters=PARAMETERS))
    layers = adapter_layers(model)
    assert {name for name, layer in layers.items() if not _is_readable(layer)} == {
        f"model.layers.{number}.mlp.{own}" for number in range(2) for own in PARAMETERS
    }


def fit(folder, share=1.0, config=None, *, steps=9, **settings):
    module = PlainMLP()
    run = trainer(
        folder,
        GenLoRAFinetuning(config or small_config(rank=4)),
        UpdateSpectra(share),
        max_steps=steps,
        max_epochs=-1,
        **settings,
    )
    run.fit(module, mlp_loader())
    return module


def test_run_records_from_its_first_step_to_its_last(tmp_path):
    module = fit(tmp_path)
    spectra = read_spectra([tmp_path])
    assert spectra.layers == tuple(layer.module for layer in describe_adapter(tmp_path / "adapter").layers)
    assert [point.step for point in spectra.points] == list(range(10))
    assert set(spectra.points[0].effective) == {0.0}
    assert spectra.points[-1].effective == pytest.approx(tuple(effective_ranks(module).values()), abs=1e-3)
    assert len(set(spectra.points[4].effective) & set(spectra.points[-1].effective)) == 0


def test_a_recorder_that_takes_too_long_records_the_ends_only(tmp_path):
    fit(tmp_path, 1e-9)
    assert [point.step for point in read_spectra([tmp_path]).points] == [0, 9]


def test_all_of_it_with_the_end_takes_its_share_of_the_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def slow(*given):
        clock.now += 1.0
        return measure(*given)

    class Steps(Callback):
        def on_train_batch_start(self, *_):
            clock.now += 10.0

    monkeypatch.setattr("genlora_lightning.training.spectra.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("genlora_lightning.training.spectra.measure", slow)
    recorder = UpdateSpectra(0.05)
    run = trainer(tmp_path, Steps(), GenLoRAFinetuning(small_config(rank=4)), recorder, max_steps=9, max_epochs=-1)
    run.fit(PlainMLP(), mlp_loader())
    points = read_spectra([tmp_path]).points
    assert [point.step for point in points] == [0, 6, 8, 9]
    assert len(points) <= 0.05 * clock.now


def test_long_runs_are_recorded_at_equal_distances_and_at_powers_of_two(tmp_path, monkeypatch):
    monkeypatch.setattr("genlora_lightning.training.spectra._POINTS", 4)
    fit(tmp_path, steps=19)
    assert [point.step for point in read_spectra([tmp_path]).points] == [0, 1, 2, 4, 5, 8, 10, 15, 16, 19]


def test_recording_changes_nothing_of_the_training(tmp_path):
    states = []
    for place, callbacks in (("with", [UpdateSpectra(1.0)]), ("without", [])):
        torch.manual_seed(0)
        module = PlainMLP()
        run = trainer(tmp_path / place, GenLoRAFinetuning(small_config(rank=4)), *callbacks, max_steps=5, max_epochs=-1)
        run.fit(module, mlp_loader())
        states.append({name: value.detach().clone() for name, value in adapter_parameters(module).items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_kinds_without_factors_are_left_out_with_a_word(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        fit(tmp_path, config=OuterConfig())
    assert "Effective ranks of 3 of 3 adapters are not recorded" in caplog.text
    assert read_spectra([tmp_path]) is None


def test_nothing_is_recorded_of_a_trial(tmp_path):
    fit(tmp_path, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=rf"`share` must be above 0 and at most 1, got {share}"):
        UpdateSpectra(share)


def test_entropy_rank_of_a_zero_product_is_zero():
    assert effective_rank(torch.zeros(2, 3), torch.zeros(4, 2)) == 0.0
