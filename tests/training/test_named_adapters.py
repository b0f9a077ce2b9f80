"""Several named adapters in one run: each trains on its rows as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genlora_lightning import (
    AdapterSet,
    CompacterConfig,
    GenLoRAFinetuning,
    LoRAConfig,
    PoLARConfig,
    load_adapter,
    load_module,
    verify_adapter,
)
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.artifacts.inspection import describe_adapter
from genlora_lightning.artifacts.loading import convert_checkpoint
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import small_config
from tests.distributed.runs import SaveAt, strategy
from tests.plain import PlainMLP, trainer

CONFIGS = {
    "support": small_config(),
    "legal": LoRAConfig(rank=2, target_modules=["0", "4"]),
    "polar": PoLARConfig(rank=2),
    "compacter": CompacterConfig(rank=4, num_products=2),
}
# Of each batch the adapters of its rows: "legal" is missing in some, and alone in one.
BATCHES = [
    ["support", "legal", "polar", "compacter", "support"],
    ["polar", "support", "support", "polar", "compacter"],
    ["legal", "legal", "legal", "legal", "legal"],
    ["compacter", "legal", "support", "polar", "legal"],
]


class OfRows(PlainMLP):
    """A module that knows nothing of adapters: the loss is a sum over rows."""

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        assert set(batch) == {"x", "y"}
        return (self(batch["x"]) - batch["y"]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A large eps: Adam makes steps of full length out of gradients that are nothing but rounding.
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)


def batches(names: list[list[str | None]] = BATCHES) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for rows in names:
        x = torch.randn(len(rows), 8, generator=generator)
        made.append({"x": x, "y": x[:, :4].sin(), "adapter": rows})
    return made


def loader(given: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(given, batch_size=None)


class Watch(Callback):
    """Keeps the values of all that is trained, and the optimizer's, before the first and after each step."""

    def __init__(self, start: dict[str, Tensor] | None = None) -> None:
        self.start = start
        self.steps: list[dict[str, Tensor]] = []

    def look(self, trainer, module):
        names = {p: name for name, p in module.named_parameters()}
        found = {name: p.detach().clone() for p, name in names.items() if p.requires_grad}
        for p, state in trainer.optimizers[0].state.items():
            found |= {f"{names[p]} {key}": value.clone() for key, value in state.items()}
        self.steps.append(found)

    def on_train_start(self, trainer, pl_module):
        for name, value in (self.start or {}).items():
            pl_module.get_parameter(name).data.copy_(value)
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(trainer, pl_module)


def run(folder: Path, *callbacks: Callback, adapters: Any = CONFIGS, module: Any = None, **settings: Any) -> Any:
    data = settings.pop("data", None) or loader(batches())
    ckpt_path = settings.pop("ckpt_path", None)
    options = settings.pop("options", {})
    tuning = GenLoRAFinetuning(adapters=adapters, adapter_dir=str(folder / "adapter"), **options)
    made = trainer(folder, tuning, *callbacks, overwrite=settings.pop("overwrite", True), **settings)
    module = module or OfRows()
    made.fit(module, data, ckpt_path=ckpt_path)
    return made


def of(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"adapters.{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# --- as if each were alone --------------------------------------------------------------------------------------------


def test_each_adapter_is_the_one_of_a_run_on_its_rows_alone(tmp_path):
    watch = Watch()
    run(tmp_path, watch, gradient_clip_val=0.5, max_epochs=2)
    for name, config in CONFIGS.items():
        own = []
        for batch in batches():
            rows = [index for index, row in enumerate(batch["adapter"]) if row == name]
            own += [{"x": batch["x"][rows], "y": batch["y"][rows]}] if rows else []
        alone = Watch(of(name, watch.steps[0]))
        tuning = GenLoRAFinetuning(config, save_adapter=False)
        trainer(tmp_path, tuning, alone, gradient_clip_val=0.5, max_epochs=2).fit(OfRows(), loader(own))
        together = of(name, watch.steps[-1])
        assert together.keys() == alone.steps[-1].keys()
        for key, value in alone.steps[-1].items():
            torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-6, msg=key)
        assert any(
            not torch.equal(value, alone.steps[0][key]) for key, value in alone.steps[-1].items() if " " not in key
        )


def test_adapter_without_rows_keeps_its_values_and_moments_in_every_bit(tmp_path):
    watch = Watch()
    run(tmp_path, watch, max_epochs=2)
    for step, rows in enumerate([*BATCHES, *BATCHES]):
        before, after = watch.steps[step : step + 2]
        for name in CONFIGS:
            here, there = of(name, before), of(name, after)
            same = here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
            assert same == (name not in rows), (step, name)


def test_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole, rest = Watch(), Watch()
    for saved, place in ((SaveAt(tmp_path / "a.ckpt", 2), whole), (SaveAt(tmp_path / "b.ckpt", 5), Watch())):
        torch.manual_seed(1)
        run(tmp_path, saved, place, **settings)
    for file, batch in (("a.ckpt", 2), ("b.ckpt", 5)):
        rest = Watch()
        torch.manual_seed(2)
        run(tmp_path, rest, ckpt_path=tmp_path / file, **settings)
        assert rest.steps[0].keys() == whole.steps[batch].keys()
        assert all(torch.equal(value, whole.steps[batch][key]) for key, value in rest.steps[0].items())
        assert all(torch.equal(value, rest.steps[-1][key]) for key, value in whole.steps[-1].items())


class OfRank(Callback):
    """Gives each rank its rows of the global batch, before the adapters' callback sees it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.world_size > 1:
            half = slice(0, 2) if trainer.global_rank == 0 else slice(2, 4)
            for key, value in batch.items():
                batch[key] = value[half]
            if not len(batch["x"]):
                raise AssertionError("a rank without rows")


class Keep(Callback):
    """Writes what rank 0 and rank 1 have in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.timeout(120)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_whose_rows_are_of_other_adapters_equal_one_process(tmp_path, accumulate):
    rows = [  # the first two of each are rank 0's
        ["support", "support", "legal", "polar"],
        ["support", "legal", "support", "legal"],
        ["compacter", "compacter", "polar", "compacter"],
        ["legal", "legal", "legal", "legal"],
    ]
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}

    class Half(OfRows):
        def step(self, batch):
            return super().step(batch) / len(batch["x"])  # so that the mean over ranks is that of the batch

    torch.manual_seed(5)
    watch = Watch()
    run(tmp_path, watch, Keep(tmp_path), module=Half(), data=loader(batches(rows)), **settings)
    single = torch.load(tmp_path / "rank0.pt")
    torch.manual_seed(5)
    ddp = DDPStrategy(start_method="fork", process_group_backend="gloo")
    tuning = GenLoRAFinetuning(adapters=CONFIGS, adapter_dir=str(tmp_path / "ddp"))
    several = trainer(
        tmp_path, OfRank(), tuning, Keep(tmp_path), devices=2, strategy=ddp, use_distributed_sampler=False, **settings
    )
    several.fit(Half(), loader(batches(rows)))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6, msg=name)
    for name in CONFIGS:
        assert any(
            not torch.equal(watch.steps[0][key], single[key]) for key in single if key.startswith(f"adapters.{name}.")
        )
        stored = read_adapter(tmp_path / "ddp" / name).tensors
        assert all(torch.equal(tensor, stored[key]) for key, tensor in of(name, first).items())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OfRows]:
    """A run's folder, with a checkpoint and adapter folders, and its module."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    made = run(folder, SaveAt(folder / "last.ckpt", 4))
    return folder, made.lightning_module


def test_each_adapter_ends_in_a_folder_of_its_own_that_computes_what_it_does_in_the_set(trained):
    folder, module = trained
    x = batches()[0]["x"]
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == sorted(CONFIGS)
    for name in CONFIGS:
        verify_adapter(folder / "adapter" / name)
        alone = OfRows()
        load_adapter(alone, folder / "adapter" / name)
        with module.adapters.using(name):
            assert torch.equal(module(x), alone(x))
        assert not torch.equal(module(x), alone(x))


def test_module_is_loaded_from_a_checkpoint_with_all_its_adapters(trained, tmp_path):
    folder, module = trained
    loaded = load_module(OfRows(), folder / "last.ckpt")
    for name in CONFIGS:
        pairs = zip(loaded.adapters.parameters_of(name), module.adapters.parameters_of(name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        loaded.adapters.save(name, tmp_path / name)
        one, other = read_adapter(tmp_path / name), read_adapter(folder / "adapter" / name)
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
        assert one.configs == other.configs
    described = describe_adapter(folder / "last.ckpt")
    assert {layer.module.split(".")[1] for layer in described.layers} == set(CONFIGS)
    with pytest.raises(ValueError, match=r"holds several adapters \(support, legal, polar, compacter\)"):
        convert_checkpoint(folder / "last.ckpt", OfRows(), tmp_path / "one")


def test_damaged_checkpoint_leaves_the_module_as_it_was(trained, tmp_path):
    content = torch.load(trained[0] / "last.ckpt", weights_only=True)
    content["state_dict"].pop(next(iter(content["state_dict"])))
    torch.save(content, tmp_path / "damaged.ckpt")
    module = OfRows()
    before = dict(module.named_modules())
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_module(module, tmp_path / "damaged.ckpt")
    assert dict(module.named_modules()) == before


def test_checkpoint_of_other_names_is_refused(trained, tmp_path):
    file = trained[0] / "last.ckpt"
    with pytest.raises(ValueError, match="holds the adapters compacter, legal, polar, support, and here it is for the"):
        run(tmp_path, adapters={"support": CONFIGS["support"]}, ckpt_path=file, max_epochs=2)
    single = trainer(tmp_path, GenLoRAFinetuning(CONFIGS["support"]), max_epochs=2)
    with pytest.raises(ValueError, match="and here it is for one adapter, without a name"):
        single.fit(OfRows(), loader(batches()), ckpt_path=file)


def test_checkpoint_is_the_same_whatever_is_active_when_it_is_saved(tmp_path):
    class Several(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                for name, active in (("none", {}), ("one", {"which": "polar"}), ("rows", {"rows": ["legal", None]})):
                    with pl_module.adapters.using(**active):
                        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")

    run(tmp_path, Several())
    first, *others = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("none", "one", "rows"))
    assert len(first["state_dict"]) == len(first["optimizer_states"][0]["param_groups"][0]["params"])
    for other in others:
        assert other["state_dict"].keys() == first["state_dict"].keys()
        assert other["genlora"].keys() == first["genlora"].keys()
        assert other["optimizer_states"][0]["state"].keys() == first["optimizer_states"][0]["state"].keys()


def test_interrupted_run_saves_each_adapter_and_takes_the_rows_out_of_the_model(tmp_path):
    class Fails(OfRows):
        def step(self, batch):
            if len(self.losses) == 2:
                raise RuntimeError("in the middle")
            return super().step(batch)

    module = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        run(tmp_path, module=module)
    assert not adapter_layers(module)
    for name in CONFIGS:
        verify_adapter(tmp_path / "adapter-interrupted" / name)


def test_adapters_of_another_run_are_not_replaced(trained, tmp_path):
    with pytest.raises(FileExistsError, match=r"adapter/support holds the adapter of another run"):
        run(trained[0], overwrite=False)
    single = GenLoRAFinetuning(CONFIGS["support"], adapter_dir=str(tmp_path / "adapter"))
    trainer(tmp_path, single).fit(OfRows(), loader([{"x": b["x"], "y": b["y"]} for b in batches()]))
    with pytest.raises(FileExistsError, match=r"and .*adapter is an adapter's own folder"):
        run(tmp_path)


def test_second_fit_goes_on_with_the_same_adapters_and_refuses_others(trained, tmp_path):
    module = trained[1]
    before = {name: [p.clone() for p in module.adapters.parameters_of(name)] for name in CONFIGS}
    adapters = module.adapters
    run(tmp_path, module=module)
    assert module.adapters is adapters
    assert not any(
        torch.equal(p, q) for n in CONFIGS for p, q in zip(adapters.parameters_of(n), before[n], strict=True)
    )
    with pytest.raises(ValueError, match=r"a set of other adapters \(support, legal, polar, compacter\)"):
        run(tmp_path, module=module, adapters=["support"])
    with pytest.raises(ValueError, match=r"'legal' made with another configuration \(rank: 2 there, 3 asked for"):
        run(tmp_path, module=module, adapters={**CONFIGS, "legal": LoRAConfig(rank=3, target_modules=["0", "4"])})


# --- which rows are whose ---------------------------------------------------------------------------------------------


def test_evaluation_computes_each_row_with_its_adapter(trained, tmp_path):
    module = trained[1]
    seen: list[Tensor] = []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            assert pl_module.adapters.active == ["support", "legal", "polar", "compacter", "support"]

        on_test_batch_end = on_validation_batch_end

    module.predict_step = lambda batch, batch_idx: seen.append(module(batch["x"])) or seen[-1]
    made = trainer(tmp_path, Looks(), GenLoRAFinetuning(adapters=CONFIGS))
    for what in (made.validate, made.test):
        (metrics,) = what(module, loader(batches()[:1]), verbose=False)
        assert metrics
    made.predict(module, loader(batches()[:1]))
    del module.predict_step
    assert module.adapters.active is None
    for row, name, given in zip(batches()[0]["x"], batches()[0]["adapter"], seen[0], strict=True):
        with module.adapters.using(name):
            torch.testing.assert_close(module(row[None])[0], given)


def test_training_step_may_choose_the_rows_itself(tmp_path):
    class Chooses(OfRows):
        def training_step(self, batch, batch_idx):
            with self.adapters.using(rows=batch.pop("names")):
                return super().training_step(batch, batch_idx)

    data = [{**{k: v for k, v in batch.items() if k != "adapter"}, "names": batch["adapter"]} for batch in batches()]
    torch.manual_seed(0)
    by_key = run(tmp_path).lightning_module
    torch.manual_seed(0)
    itself = run(tmp_path, module=Chooses(), data=loader(data)).lightning_module
    for name in CONFIGS:
        assert all(map(torch.equal, by_key.adapters.parameters_of(name), itself.adapters.parameters_of(name)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["support", "leagl"], "There is no adapter 'leagl' in this set; there are 'support', 'legal'"),
        ([None, None], "names no adapter, so that the batch would train nothing"),
        (["support"], "has 1 names, and the batch has 2 rows: give one for each"),
        (torch.tensor([0, 1]), "must be a list with the name of an adapter for each row"),
        (None, "must be a list with the name of an adapter for each row"),
    ],
    ids=["unknown", "base alone", "too few", "numbers", "none"],
)
def test_rows_that_do_not_say_whose_they_are_are_refused(tmp_path, rows, message):
    given = {**batches([["support", "legal"]])[0], "adapter": rows}
    module = OfRows()
    with pytest.raises(ValueError, match=message):
        run(
            tmp_path,
            adapters=["support", "legal"],
            options={"config": LoRAConfig(rank=2)},
            module=module,
            data=loader([given]),
        )
    assert module.adapters.active is None


def test_batch_without_names_is_an_error_that_says_how_to_give_them(tmp_path):
    given = [{name: value for name, value in batch.items() if name != "adapter"} for batch in batches()]
    with pytest.raises(
        ValueError, match=r'whose entry "adapter" is a list .* `with self.adapters.using\(rows=names\)`'
    ):
        run(tmp_path, data=loader(given))


# --- what has no meaning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ("support", TypeError, "`adapters` must be a list of names"),
        ([], ValueError, "`adapters` names none"),
        (["a", "a"], ValueError, "`adapters` names one twice"),
        (["a.b"], ValueError, "of letters, digits, `_` and `-`, as they name folders, got 'a.b'"),
        (["../a"], ValueError, "as they name folders"),
        ([1], ValueError, "as they name folders, got 1"),
        ({"a": {"kind": "none"}}, ValueError, "There is no kind of adapter 'none'"),
    ],
)
def test_names_are_checked_when_they_are_given(adapters, error, message):
    with pytest.raises(error, match=message):
        GenLoRAFinetuning(adapters=adapters)


PEFT_LORA = {"kind": "peft", "peft_type": "LORA", "target_modules": ["0"]}


@pytest.mark.parametrize(
    ("config", "options", "settings", "message"),
    [
        (LoRAConfig(rank=2, elastic=[1, 2]), {}, {}, "cannot train 'a' beside others: `elastic` draws ranks"),
        (LoRAConfig(rank=2, modules_to_train=["4"]), {}, {}, r"trains modules in full \(4\)"),
        (PEFT_LORA, {}, {}, "it is PEFT's LORA, and they are of this library's kinds"),
        (None, {"generate": "step"}, {}, '`generate="step"` does not work with `adapters`'),
        (None, {}, {"strategy": "fsdp1"}, "`adapters` does not work with GenLoRAFSDPStrategy"),
        (None, {}, {"strategy": "fsdp2"}, "`adapters` does not work with ModelParallelStrategy"),
    ],
    ids=["elastic", "in full", "peft", "step", "fsdp1", "fsdp2"],
)
def test_what_cannot_be_trained_together_is_refused_before_anything_is_loaded(
    tmp_path, config, options, settings, message
):
    if "strategy" in settings:
        settings = {"strategy": strategy(settings["strategy"])}
    module = OfRows("configure_model")
    made = trainer(tmp_path, **settings)
    tuning = GenLoRAFinetuning(adapters={"a": config, "b": None}, **options)
    with pytest.raises(ValueError, match=message):
        tuning.setup(made, module, "fit")
    assert module.net is None


def test_static_graph_of_ddp_is_refused(tmp_path):
    made = trainer(tmp_path, strategy=DDPStrategy(process_group_backend="gloo", static_graph=True))
    with pytest.raises(ValueError, match="`static_graph=True` of DDPStrategy says that all batches use the same"):
        GenLoRAFinetuning(adapters=["a", "b"]).setup(made, OfRows(), "fit")


class Convolution(OfRows):
    def build(self) -> None:
        self.net = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 1, 1), nn.Flatten(1), nn.Linear(8, 4))


class Taken(OfRows):
    adapters = "mine"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Convolution, r"net.1 \(AdaptedConv\) takes one adapter for all rows: only linears are computed by row"),
        (Taken, "Taken has an attribute `adapters`, which is to be the set of named adapters"),
    ],
)
def test_model_that_cannot_have_them_is_refused_before_the_training_and_left_alone(tmp_path, module, message):
    module = module()
    before = dict(module.named_modules())
    config = LoRAConfig(rank=1, target_modules=["1", "3"] if isinstance(module, Convolution) else ["0"])
    with pytest.raises(ValueError, match=message):
        run(tmp_path, module=module, adapters={"a": config, "b": config})
    assert dict(module.named_modules()) == before
    assert AdapterSet(module)  # which one with adapters refuses
