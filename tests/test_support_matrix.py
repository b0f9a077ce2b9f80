"""Execute every cell of the table of kinds, sites and strategies (`tests/support_matrix.py`)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from genlora_lightning import (
    GenLoRAFinetuning,
    convert_checkpoint,
    describe_adapter,
    export_lora,
    inject_adapters,
    load_adapter,
    load_module,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
    verify_adapter,
)
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.planning.budget import count
from genlora_lightning.planning.plan import make_plan
from genlora_lightning.planning.traffic import Setup
from tests.distributed.runs import PlainLlama, SaveAt, fit
from tests.ranks import on_ranks
from tests.support_matrix import (
    AFTERWARDS,
    KINDS,
    PAGE,
    PLACES,
    PLANNED,
    RULES,
    SITES,
    VOCABULARY,
    AllSites,
    NoMeaning,
    Refused,
    outcome,
    render,
    targets,
)
from tests.test_kinds_and_sites import OuterConfig, SinhConfig

# Kinds that the library does not know are trained under every strategy, too, and are in no table.
TRAINED = {**KINDS, "sinh": SinhConfig(), "outer": OuterConfig()}
SINGLE = "one process"
each_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))


def test_page_is_what_the_declarations_render_to():
    assert PAGE.read_text(encoding="utf-8") == render(), "write it anew: python -m tests.support_matrix"


def test_declarations_name_rows_and_columns_that_there_are():
    for *names, what in RULES:
        assert what is not None
        for own, known in zip(names, (KINDS, SITES, (*PLACES, *AFTERWARDS)), strict=True):
            assert own is None or set(own) <= set(known)
        assert isinstance(what, Refused) or names[2] == ("plan",)


# -- one process -------------------------------------------------------------------------------------------------------


def at(kind: str, *sites: str, **changes: Any) -> AdapterConfig:
    return dataclasses.replace(TRAINED[kind], **targets(*sites), **changes)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model.eval()(IDS)


def learned(kind: str, site: str) -> AllSites:
    """A model in which one site alone has learned something."""
    model = AllSites()
    before = outputs(model)
    config = at(kind, site)
    report = inject_adapters(model, config)
    layers = adapter_layers(model)
    assert {name.removeprefix("blocks.0.").removeprefix("blocks.1.") for name in layers} == {
        *SITES[site].layers,
        *SITES[site].parameters,
    }
    trained = count(config, [layer.shape for layer in layers.values()])
    assert report.adapter_parameters == report.trainable_parameters == trained
    assert torch.equal(outputs(model), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss := model.loss(IDS))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(layer.acts() for layer in layers.values())
    return model


# PEFT's own words on what it takes all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("site", SITES)
@each_kind
def test_site_learns_alone_and_is_saved_merged_and_exported(kind, site, tmp_path):
    model = learned(kind, site)
    wanted = outputs(model)
    save_adapter(model, tmp_path / "adapter")
    verify_adapter(tmp_path / "adapter")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe_adapter(tmp_path / "adapter").parameters == trained
    again = AllSites()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again), wanted)

    def merge() -> None:
        merge_adapters(model)
        torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)
        unmerge_adapters(model)
        assert torch.equal(outputs(model), wanted)

    def export() -> None:
        from peft import PeftModel

        export_lora(model, tmp_path / "lora")
        theirs = PeftModel.from_pretrained(AllSites(), tmp_path / "lora")
        torch.testing.assert_close(outputs(theirs), wanted, rtol=1e-4, atol=1e-5)

    for column, act in (("merge", merge), ("export-lora", export)):
        what = outcome(kind, site, column)
        if isinstance(what, Refused):
            with pytest.raises(ValueError, match=re.escape(what.words)):
                act()
            assert not (tmp_path / "lora").exists()
            assert torch.equal(outputs(model), wanted)
        else:
            assert what is None
            act()
    remove_adapters(model)
    assert torch.equal(outputs(model), outputs(AllSites()))


@pytest.mark.parametrize("name", PLANNED)
@each_kind
def test_plan_counts_what_a_run_trains(kind, name):
    make, task, where, sites = PLANNED[name]
    config = dataclasses.replace(KINDS[kind], **where)
    report = inject_adapters(make(), config)
    plan = make_plan(make().config, name, task, config, Setup(gpus=2, strategy="ddp", batch=1, tokens=8))
    assert plan.trainable_parameters == report.trainable_parameters
    assert plan.traffic[f"{config.kind} replicate"].all_reduced == report.trainable_parameters
    assert f"{config.title} of rank {config.rank} trains" in str(plan)
    assert all(outcome(kind, site, "plan") is None for site in sites)


def test_every_site_is_planned_or_has_no_place_in_a_plan():
    planned = {site for *_, sites in PLANNED.values() for site in sites}
    for site in SITES:
        for kind in KINDS:
            assert (outcome(kind, site, "plan") is None) == (site in planned)
            assert site in planned or isinstance(outcome(kind, site, "plan"), NoMeaning)


# -- training ----------------------------------------------------------------------------------------------------------


class Plain(PlainLlama):
    """The model in a module that knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__("init", "adamw")

    def build(self) -> None:
        self.net = AllSites()

    def step(self, batch: list[Tensor]) -> Tensor:
        return self.net.loss(batch[0])


def loader(n: int) -> Any:
    ids = torch.randint(4, VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(3))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)


def run(place: str, folder: Path, config: AdapterConfig, *callbacks: Any, n: int = 16, **settings: Any) -> Any:
    strategy, policy = PLACES[place]
    callback = GenLoRAFinetuning(config, adapter_sharding=policy, adapter_dir=str(folder / "adapter"))
    return fit(strategy, policy, folder, Plain(), *callbacks, adapter=callback, loader=loader(n), **settings)


class NoStep(Callback):
    """Lets no run begin that should have been refused before."""

    def on_train_start(self, trainer, pl_module):
        raise AssertionError("it was not refused")


def trained_at(kind: str, place: str) -> tuple[str, ...]:
    return tuple(site for site in SITES if outcome(kind, site, place) is None)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], where: Any) -> None:
    assert found.keys() == expected.keys(), where
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{where} {n}: {m}")


@pytest.mark.parametrize("kind", TRAINED)
def test_resumed_run_equals_an_uninterrupted_one_in_every_bit(kind, tmp_path):
    config, file = at(kind, *trained_at(kind, SINGLE), modules_to_train=["head"]), tmp_path / "half.ckpt"
    whole = run(SINGLE, tmp_path, config, SaveAt(file, 3), accumulate_grad_batches=2, n=32)
    resumed = run(SINGLE, tmp_path, config, ckpt_path=file, accumulate_grad_batches=2, n=32)
    assert whole.state.keys() == resumed.state.keys()
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in whole.state.items())
    start = adapter_state_dict(load_module(Plain(), file))
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, whole.state[name])}
    for name in (name for site in trained_at(kind, SINGLE) for name in (*SITES[site].layers, *SITES[site].parameters)):
        assert any(f"{name}.update." in own for own in moved), name
    assert convert_checkpoint(file, Plain(), tmp_path / "converted").is_dir()


@pytest.mark.timeout(280)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.filterwarnings("ignore:.* has both parameters with requires_grad=True and False:UserWarning")
def test_kinds_train_and_resume_at_all_sites_under_every_strategy_as_in_one_process(tmp_path):
    others = [place for place in PLACES if place != SINGLE]

    def config_at(kind: str, place: str) -> AdapterConfig:
        return at(kind, *trained_at(kind, place), modules_to_train=["head"])

    def file_of(kind: str, place: str) -> Path:
        return tmp_path / f"{kind}-{place}.ckpt"

    expected: dict[str, Any] = {}
    for kind in TRAINED:
        assert trained_at(kind, SINGLE) == tuple(SITES)
        save = SaveAt(file_of(kind, SINGLE), 2)
        expected[kind] = run(SINGLE, tmp_path / kind, config_at(kind, SINGLE), save)

    def all_places() -> list[Any]:
        found = []
        for kind in TRAINED:
            before = SINGLE
            for place in others:
                for site in SITES:
                    what = outcome(kind, site, place)
                    if isinstance(what, Refused):
                        with pytest.raises(ValueError, match=re.escape(what.words)):
                            run(place, tmp_path / "refused", at(kind, site), NoStep())
                if not trained_at(kind, place):
                    continue
                folder = tmp_path / kind / place
                resumed = whole = run(place, folder, config_at(kind, place), SaveAt(file_of(kind, place), 2))
                if kind in KINDS:  # the others are here for the strategies
                    # What the strategy before this one has written.
                    resumed = run(place, folder, config_at(kind, place), ckpt_path=file_of(kind, before))
                found.append((kind, place, whole.losses, whole.state, resumed.state))
                before = place
        return found

    last: dict[str, str] = {}
    for kind, place, losses, state, resumed in on_ranks(all_places, seconds=240)[0]:
        one = expected[kind]
        torch.testing.assert_close(losses, one.losses, rtol=0, atol=1e-6, msg=lambda m, w=(kind, place): f"{w} {m}")
        assert_close(state, one.state, (kind, place))
        assert_close(resumed, one.state, (kind, place, "resumed"))
        module = Plain()
        load_adapter(module, tmp_path / kind / place / "adapter")
        for name, tensor in adapter_state_dict(module).items():
            assert torch.equal(tensor, resumed[name]), (kind, place, name)  # written by the later run
        last[kind] = place
    for kind in KINDS:
        back = run(SINGLE, tmp_path / kind, config_at(kind, SINGLE), ckpt_path=file_of(kind, last[kind]))
        assert_close(back.state, expected[kind].state, (kind, last[kind], "to one process"))
