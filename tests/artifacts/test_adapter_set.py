from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from genlora_lightning import (
    AdapterSet,
    CompacterConfig,
    LoRAConfig,
    effective_ranks,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
    verify_adapter,
)
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.errors import WrongBaseError
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config
from tests.mixtures import PARAMETERS, mixture
from tests.models import tiny_gpt2, tiny_llama

CONFIGS = {
    "all": small_config(),
    "few": small_config(rank=6, target_modules=["q_proj", "down_proj"]),
    "lora": LoRAConfig(rank=3),
    "again": small_config(rank=4, num_groups=1),
}
ROWS = ["all", "few", None, "lora", "again", "all"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter folders of one base: of other kinds, ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = tiny_llama()
        torch.manual_seed(seed)
        inject_adapters(model, config)
        perturb(model)
        save_adapter(model, root / name)
    return root


def loaded(folders: Path, name: str | None) -> nn.Module:
    model = tiny_llama().eval()
    if name is not None:
        load_adapter(model, folders / name)
    return model


def with_all(folders: Path, **options: object) -> AdapterSet:
    adapters = AdapterSet(tiny_llama().eval(), **options)
    for name in CONFIGS:
        adapters.add(name, folders / name)
    return adapters


def ids(rows: int = 6) -> Tensor:
    return torch.randint(0, 64, (rows, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).logits


# --- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["disk", "memory"])
def test_active_adapter_gives_to_the_bit_what_it_gives_alone(folders, held):
    adapters = AdapterSet(tiny_llama().eval())
    for name in CONFIGS:
        adapters.add(name, folders / name, held=held)
    for name in [None, *CONFIGS, "all", None, "few"]:
        adapters.activate(name)
        assert torch.equal(logits(adapters.model, ids()), logits(loaded(folders, name), ids()))
        assert adapters.active == name
        # By the layer of one adapter, which knows nothing of others.
        assert {type(layer) for layer in adapter_layers(adapters.model).values()} == (
            {AdaptedLinear} if name else set()
        )
        assert len(adapters.model._forward_hooks) <= 1  # for the sharing of what is generated


def test_base_is_its_own_modules_again(folders):
    model = tiny_llama().eval()
    before = dict(model.named_modules())
    adapters = AdapterSet(model)
    adapters.add("all", folders / "all")
    adapters.activate("all")
    assert adapter_layers(model)
    adapters.activate(None)
    assert dict(model.named_modules()) == before


def test_switching_back_generates_nothing(folders, monkeypatch):
    adapters = with_all(folders)
    for name in ("all", "again"):
        adapters.activate(name)
    made = []
    name = "genlora_lightning.adapters.genlora.generator.generate_matrices"
    monkeypatch.setattr(name, lambda *args, **kwargs: made.append(args))
    for name in ("all", "again", None, "all"):
        adapters.activate(name)
        logits(adapters.model, ids())
    assert not made


def test_cache_keeps_to_its_bytes_and_forgets_the_least_recently_used(folders):
    adapters = with_all(folders)
    sizes = {}
    for name in CONFIGS:
        before = adapters.cached_bytes
        adapters.activate(name)
        sizes[name] = adapters.cached_bytes - before
    assert all(size > 0 for size in sizes.values())
    adapters.cache_bytes = sizes["all"] + sizes["few"] + sizes["lora"]
    adapters.activate("all")  # "few" is now the oldest
    assert adapters.cached_bytes <= adapters.cache_bytes
    layers = adapter_layers(adapters.model)
    adapters.activate("lora")
    adapters.activate("all")
    assert adapter_layers(adapters.model) == layers  # remembered
    adapters.cache_bytes = 0
    for name in ("few", "all", None):
        adapters.activate(name)
        assert torch.equal(logits(adapters.model, ids()), logits(loaded(folders, name), ids()))
        assert adapters.cached_bytes == (sizes[name] if name else 0)


def test_becoming_active_draws_no_random_numbers(folders):
    adapters = with_all(folders)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    adapters.activate("all")
    assert torch.equal(torch.rand(2), expected)


def test_model_that_is_cast_keeps_its_adapters(folders):
    adapters = with_all(folders)
    adapters.activate("all")
    adapters.model.double()
    adapters.activate(None)
    adapters.activate("all")
    expected = logits(loaded(folders, "all").double(), ids())
    assert torch.allclose(logits(adapters.model, ids()), expected, rtol=0, atol=1e-6)


def test_dropout_follows_the_mode_that_the_model_got_meanwhile(tmp_path):
    adapters = AdapterSet(tiny_llama().eval())
    adapters.add("new", small_config(dropout=0.5))
    adapters.model.train()
    adapters.activate("new")
    assert all(layer.dropout.training for layer in adapter_layers(adapters.model).values())
    adapters.activate(None)
    adapters.model.eval()
    adapters.activate("new")
    assert not any(layer.dropout.training for layer in adapter_layers(adapters.model).values())


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"all": 1.0, "again": 1.0}, {"all": 0.5, "few": -2.0, "lora": 1.5}, {"lora": 3.0}])
def test_weighted_sum_is_the_sum_of_the_updates(folders, weights):
    adapters = with_all(folders)
    adapters.activate(list(weights) if set(weights.values()) == {1.0} else weights)
    assert adapters.active == weights
    adapters.model.double()  # how single precision is rounded depends on torch's release
    expected = tiny_llama().eval().double()
    with torch.no_grad():
        for name, weight in weights.items():
            for place, layer in adapter_layers(loaded(folders, name).double()).items():
                expected.get_submodule(place).weight += weight * layer.delta_weight()
    assert torch.allclose(logits(adapters.model, ids()), logits(expected, ids()), rtol=0, atol=2e-6)
    report = merge_adapters(adapters.model)  # a sum can be merged, too
    assert len(report.rows) == len(adapter_layers(adapters.model))
    assert torch.allclose(logits(adapters.model, ids()), logits(expected, ids()), rtol=0, atol=2e-6)


def test_rows_equal_the_rows_one_by_one(folders):
    adapters, batch = with_all(folders), ids()
    adapters.model.double()
    alone = {}
    for name in (None, *CONFIGS):
        adapters.activate(name)
        alone[name] = logits(adapters.model, batch)
    assert not torch.allclose(alone["all"], alone[None], rtol=0, atol=1e-3)
    for rows in (ROWS, ROWS[::-1], ["all"] * 6, [None] * 6, ["few", "few", "few", "lora", None, "lora"]):
        adapters.activate(rows=rows)
        assert adapters.active == rows
        expected = torch.stack([alone[name][row] for row, name in enumerate(rows)])
        assert torch.allclose(logits(adapters.model, batch), expected, rtol=0, atol=1e-12), rows


def test_rows_equal_the_rows_one_by_one_in_the_bases_precision(folders):
    adapters, batch = with_all(folders), ids()
    for dtype, error in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        adapters.model.to(dtype)
        adapters.activate(rows=ROWS)
        given = logits(adapters.model, batch)
        for row, name in enumerate(ROWS):
            adapters.activate(name)
            assert torch.allclose(given[row], logits(adapters.model, batch[row : row + 1])[0], rtol=0, atol=error)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generated_rows_equal_the_rows_one_by_one(folders, options):
    adapters = with_all(folders)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    adapters.activate(rows=ROWS)
    given = adapters.model.generate(ids(), **settings).view(6, -1, 9)
    for row, name in enumerate(ROWS):
        alone = loaded(folders, name).generate(ids()[row : row + 1], **settings)
        assert torch.equal(given[row], alone), row


def test_using_is_for_one_call_and_also_ends_after_an_error(folders):
    adapters = with_all(folders)
    for before in ("all", {"all": 2.0, "few": 1.0}, ["all", None]):
        adapters.activate(**({"rows": before} if isinstance(before, list) else {"which": before}))
        with pytest.raises(ValueError, match="names 1 adapters, and the batch has 0"), adapters.using(rows=["lora"]):
            logits(adapters.model, ids()[:0])
        assert adapters.active == before
        with adapters.using():
            assert torch.equal(logits(adapters.model, ids()), logits(loaded(folders, None), ids()))


def test_batch_of_another_size_is_refused(folders):
    adapters = with_all(folders)
    adapters.activate(rows=["all", "few", None, "lora"])
    with pytest.raises(ValueError, match="names 4 adapters, and the batch has 6 rows"):
        logits(adapters.model, ids())
    assert logits(adapters.model, ids(4)).shape[0] == 4


def test_positions_that_all_rows_share_are_not_taken_for_the_batch():
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, positions: Tensor, x: Tensor) -> Tensor:
            return self.linear(x) + positions[:, None]

    adapters = AdapterSet(Positioned())
    adapters.add("new", small_config())
    adapters.activate(rows=["new", None])
    adapters.model(torch.arange(5.0), torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="names 2 adapters, and the batch has 3 rows"):
        adapters.model(positions=torch.arange(4.0), x=torch.randn(3, 4, 4))


def test_linear_that_sees_tokens_and_not_rows_is_refused(tmp_path):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(0, 1)).view(x.shape)

    adapters = AdapterSet(Flat())
    adapters.add("new", small_config())
    adapters.activate(rows=["new", None])
    with pytest.raises(ValueError, match="works on tokens of several rows"):
        adapters.model(torch.randn(2, 4, 4))


@pytest.mark.parametrize("active", [{"which": "all"}, {"which": {"all": 2.0, "few": 1.0}}, {"rows": ROWS}])
def test_what_is_made_in_inference_mode_serves_autograd(folders, active):
    adapters = with_all(folders)
    embedded = adapters.model.get_input_embeddings()(ids()).detach()
    with torch.inference_mode():
        adapters.activate(**active)
        expected = adapters.model(ids()).logits
    inputs = embedded.requires_grad_()
    given = adapters.model(inputs_embeds=inputs).logits
    assert torch.allclose(given, expected, rtol=0, atol=5e-6)
    given.sum().backward()
    assert inputs.grad.abs().sum(dim=(1, 2)).all()
    assert not any(parameter.is_inference() for parameter in adapters.model.parameters())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_adapter_of_another_base_is_refused_as_load_adapter_does(folders, tmp_path):
    adapters = AdapterSet(tiny_llama(num_hidden_layers=1))
    with pytest.raises(WrongBaseError, match="was trained on another base"):
        adapters.add("all", folders / "all")
    with pytest.raises(ValueError, match=r"it has no linear model\.layers\.1"):
        adapters.add("all", folders / "all", base_check="off")
    shutil.copytree(folders / "all", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format version"):
        adapters.add("all", tmp_path / "damaged")
    with pytest.raises(ValueError, match="modules trained in full"):
        adapters.add("all", small_config(modules_to_train=["norm"]))
    with pytest.raises(ValueError, match="nonsense"):
        adapters.add("all", small_config(target_modules=["nonsense"]))
    assert adapters.names == []
    assert not adapter_layers(adapters.model)


def test_folder_that_is_damaged_later_leaves_what_was_active(folders, tmp_path):
    adapters = with_all(folders)
    shutil.copytree(folders / "all", tmp_path / "own")
    adapters.add("own", tmp_path / "own")
    adapters.activate("few")
    shutil.rmtree(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        adapters.activate("own")
    assert adapters.active == "few"
    assert torch.equal(logits(adapters.model, ids()), logits(loaded(folders, "few"), ids()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": "none"}, "There is no adapter 'none' in this set; there are 'all', 'few'"),
        ({"which": []}, "names no adapter"),
        ({"which": ["all", "all"]}, "names an adapter twice"),
        ({"which": {"all": float("nan")}}, "weight of all"),
        ({"which": "all", "rows": ["all"]}, "not both"),
        ({"rows": []}, "a name for each row"),
        ({"rows": "all"}, "a name for each row"),
        ({"rows": ["all", "none"]}, "There is no adapter 'none'"),
    ],
)
def test_what_cannot_be_active_is_refused(folders, arguments, message):
    adapters = with_all(folders)
    adapters.activate("few")
    with pytest.raises((ValueError, TypeError), match=message):
        adapters.activate(**arguments)
    assert adapters.active == "few"


def test_names_are_unique_and_active_ones_stay(folders):
    adapters = with_all(folders)
    with pytest.raises(ValueError, match="There is an adapter 'all' already"):
        adapters.add("all", folders / "few")
    with pytest.raises(TypeError, match="name must be a string"):
        adapters.add("", folders / "few")
    adapters.activate({"all": 1.0, "few": 2.0})
    with pytest.raises(ValueError, match="'few' is active"):
        adapters.remove("few")
    adapters.activate(None)
    adapters.remove("few")
    assert adapters.names == ["all", "lora", "again"]
    with pytest.raises(ValueError, match="no adapter 'few'"):
        adapters.activate({"all": 1.0, "few": 2.0})


def test_switching_inside_of_generated_once_is_refused():
    adapters = AdapterSet(tiny_llama())
    adapters.add("new", small_config())
    adapters.activate("new")
    with generated_once(adapters.model), pytest.raises(RuntimeError, match="generated_once"):
        adapters.activate(None)


# --- what knows one adapter -------------------------------------------------------------------------------------------


def test_model_is_one_with_the_active_adapter_for_all_that_knows_one(folders, tmp_path):
    adapters = with_all(folders)
    model, alone = adapters.model, loaded(folders, "all")
    adapters.activate("all")
    assert effective_ranks(model) == effective_ranks(alone)
    save_adapter(model, tmp_path / "saved")
    one, other = read_adapter(tmp_path / "saved"), read_adapter(folders / "all")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert export_lora(model, tmp_path / "lora").rank == 4
    merge_adapters(model)
    merge_adapters(alone)
    assert torch.equal(logits(model, ids()), logits(alone, ids()))
    with pytest.raises(ValueError, match="'all' is merged into the weights"):
        adapters.activate("few")
    unmerge_adapters(model)
    adapters.activate("few")
    assert torch.equal(logits(model, ids()), logits(loaded(folders, "few"), ids()))


def test_what_knows_one_adapter_refuses_several(folders, tmp_path):
    adapters = with_all(folders)
    model = adapters.model
    for arguments in ({"which": ["all", "few"]}, {"rows": ["all", None]}):
        adapters.activate(**arguments)
        for write in (save_adapter, export_lora):
            with pytest.raises(ValueError, match="active at once"):
                write(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="no one update of a weight"):
        merge_adapters(model)
    for arguments in ({"which": None}, {"which": "all"}):
        adapters.activate(**arguments)
        with pytest.raises(ValueError, match="has an AdapterSet"):
            load_adapter(model, folders / "all", replace=True)
        with pytest.raises(ValueError, match="has an AdapterSet"):
            inject_adapters(model, small_config())
        with pytest.raises(ValueError, match="has an AdapterSet"):
            AdapterSet(model)
    assert not (tmp_path / "saved").exists()


def test_each_adapter_is_saved_by_its_name(folders, tmp_path):
    adapters = with_all(folders)
    adapters.activate("few")
    for name in CONFIGS:
        adapters.save(name, tmp_path / name)
        verify_adapter(tmp_path / name)
        assert torch.equal(logits(loaded(tmp_path, name), ids()), logits(loaded(folders, name), ids()))
    assert adapters.active == "few"


def test_what_layers_share_is_saved_once_and_comes_back(tmp_path):
    adapters = AdapterSet(tiny_llama().eval())
    adapters.add("shared", CompacterConfig(rank=4, num_products=2))
    with torch.no_grad():
        for parameter in adapters.parameters_of("shared"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    adapters.activate("shared")
    expected = logits(adapters.model, ids())
    folder = adapters.save("shared", tmp_path / "shared")
    assert len(read_adapter(folder).tensors) == len([*adapters.parameters()])
    alone = tiny_llama().eval()
    load_adapter(alone, folder)
    adapters.add("again", folder)
    adapters.activate("again")
    for model in (alone, adapters.model):
        torch.testing.assert_close(logits(model, ids()), expected)


def test_adapters_of_parameters_are_refused_and_nothing_is_added():
    adapters = AdapterSet(mixture())
    with pytest.raises(ValueError, match="'experts' has `target_parameters`, and a set adapts whole layers"):
        adapters.add("experts", LoRAConfig(target_parameters=PARAMETERS))
    assert adapters.names == []


@pytest.mark.parametrize("active", [None, "all", ["all", None]])
def test_removed_adapters_leave_the_base(folders, active):
    model = tiny_llama().eval()
    before = dict(model.named_modules())
    adapters = AdapterSet(model)
    adapters.add("all", folders / "all")
    adapters.activate(**({"rows": active} if isinstance(active, list) else {"which": active}))
    remove_adapters(model)
    assert dict(model.named_modules()) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="is closed"):
        adapters.activate("all")
    inject_adapters(model, small_config())


def test_closed_set_may_leave_one_adapter(folders):
    adapters = with_all(folders)
    adapters.activate(rows=["all", None])
    adapters.close(keep="all")
    model = adapters.model
    assert torch.equal(logits(model, ids()), logits(loaded(folders, "all"), ids()))
    trainable = {name for name, parameter in loaded(folders, "all").named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    perturb(model)  # what it generates follows its parameters again
    assert not torch.allclose(logits(model, ids()), logits(loaded(folders, "all"), ids()), atol=1e-3)
    load_adapter(model, folders / "all", replace=True)
    assert torch.equal(logits(model, ids()), logits(loaded(folders, "all"), ids()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapters: pickle.loads(pickle.dumps(adapters))])
def test_copy_is_a_set_of_its_own(folders, copied):
    adapters = with_all(folders)
    adapters.activate(rows=["all", None])
    expected = logits(adapters.model, ids(2))
    other = copied(adapters)
    assert torch.allclose(logits(other.model, ids(2)), expected, rtol=0, atol=1e-6)
    other.activate(rows=["few", "lora", "all"])
    assert logits(other.model, ids(3)).shape[0] == 3
    assert torch.equal(logits(adapters.model, ids(2)), expected)
    other.activate("few")
    assert torch.equal(logits(other.model, ids()), logits(loaded(folders, "few"), ids()))
    assert adapters.active == ["all", None]


# --- training ---------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The sum of the rows' losses, so that a row's gradient does not depend on the others."""
    predicted = model(batch).logits[:, :-1]
    return F.cross_entropy(predicted.transpose(1, 2), batch[:, 1:], reduction="sum")


NEW = {name: CONFIGS[name] for name in ("all", "few", "lora")}


def with_new() -> AdapterSet:
    adapters = AdapterSet(tiny_llama())
    for seed, (name, config) in enumerate(NEW.items()):
        adapters.add(name, config, generator=torch.Generator().manual_seed(seed))
    return adapters


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_one_forward_are_those_of_each_adapter_alone(fused):
    adapters, batch = with_new(), ids()
    for name in NEW:
        adapters.activate(name)
        perturb(adapters.model)
    rows = ["all", "few", "lora", None, "few", "all"]
    adapters.activate(rows=rows)
    set_fused(adapters.model, fused)
    loss(adapters.model, batch).backward()
    for name in NEW:
        given = [parameter.grad for parameter in adapters.parameters_of(name)]
        adapters.zero_grad()
        adapters.activate(name)
        loss(adapters.model, batch[[row == name for row in rows]]).backward()
        for gradient, parameter in zip(given, adapters.parameters_of(name), strict=True):
            assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
            assert gradient.any()
        adapters.zero_grad()
        adapters.activate(rows=rows)
        loss(adapters.model, batch).backward()


def test_adapter_that_no_row_names_is_not_touched():
    adapters = with_new()
    optimizer = torch.optim.AdamW([p for name in NEW for p in adapters.parameters_of(name)], lr=0.1, weight_decay=0.1)
    before = {name: [p.clone() for p in adapters.parameters_of(name)] for name in NEW}
    for _ in range(2):
        optimizer.zero_grad()
        with adapters.using(rows=["all", "lora"]):
            loss(adapters.model, ids(2)).backward()
        assert all(parameter.grad is None for parameter in adapters.parameters_of("few"))
        optimizer.step()
    after = {name: adapters.parameters_of(name) for name in NEW}
    assert all(map(torch.equal, before["few"], after["few"]))
    for name in ("all", "lora"):
        assert not any(map(torch.equal, before[name], after[name]))
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())


def test_adapters_trained_together_are_those_trained_alone(tmp_path):
    def steps(adapters: AdapterSet, names: list[str]) -> None:
        optimizers = [torch.optim.SGD(adapters.parameters_of(name), lr=0.05) for name in names]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            batch = torch.stack([ids()[2 * i + step % 2] for i, name in enumerate(NEW) if name in names])
            with adapters.using(rows=names):
                loss(adapters.model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()

    together = with_new()
    steps(together, list(NEW))
    for name in NEW:
        alone = with_new()
        steps(alone, [name])
        together.save(name, tmp_path / "together" / name)
        alone.save(name, tmp_path / "alone" / name)
        one, other = (read_adapter(tmp_path / place / name).tensors for place in ("together", "alone"))
        for key, tensor in one.items():
            assert torch.allclose(tensor, other[key], rtol=1e-4, atol=1e-5), key
        assert not all(map(torch.equal, with_new().parameters_of(name), alone.parameters_of(name)))


def test_folder_is_trained_further(folders, tmp_path):
    adapters = AdapterSet(tiny_llama())
    adapters.add("all", folders / "all", trained=True)
    adapters.add("few", folders / "few")
    with pytest.raises(ValueError, match="'few' is used as it is"):
        adapters.parameters_of("few")
    optimizer = torch.optim.SGD(adapters.parameters_of("all"), lr=0.05)
    with adapters.using(rows=["all", "few"]):
        loss(adapters.model, ids(2)).backward()
    optimizer.step()
    adapters.save("all", tmp_path / "all")
    one, other = read_adapter(tmp_path / "all").tensors, read_adapter(folders / "all").tensors
    assert not all(torch.equal(one[name], other[name]) for name in one)
    with adapters.using("all"):  # what it generates has followed
        given = logits(adapters.model.eval(), ids())
    assert torch.equal(given, logits(loaded(tmp_path, "all"), ids()))


class Several(LightningModule):
    """A module with a set of its own, without the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.adapters = AdapterSet(self.model)
        for name, config in NEW.items():
            self.adapters.add(name, config)

    def training_step(self, batch: dict[str, object]) -> Tensor:
        with self.adapters.using(rows=batch["adapter"]):
            return loss(self.model, batch["ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [{"params": self.adapters.parameters_of(name)} for name in self.adapters.names], lr=0.01
        )


def test_lightning_module_trains_several_and_resumes(tmp_path):
    rows = [{"ids": row, "adapter": name} for row, name in zip(ids(6), [*NEW, *NEW], strict=True)]

    def fit(epochs: int, checkpoint: Path | None = None) -> Several:
        torch.manual_seed(0)
        module = Several()
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(rows, batch_size=3), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    first, whole = fit(1), fit(2)
    resumed = fit(2, tmp_path / "1.ckpt")
    for name in NEW:
        trained = whole.adapters.parameters_of(name)
        assert all(map(torch.equal, trained, resumed.adapters.parameters_of(name)))
        assert not any(map(torch.equal, trained, first.adapters.parameters_of(name)))
        whole.adapters.save(name, tmp_path / name)
        verify_adapter(tmp_path / name)
    assert not adapter_layers(whole)  # between steps the model is the base


def test_rows_are_right_where_weights_are_stored_transposed():
    adapters = AdapterSet(tiny_gpt2().double().eval())
    adapters.add("new", small_config())
    adapters.activate("new")
    perturb(adapters.model, 1.0)
    one = logits(adapters.model, ids())
    adapters.activate(None)
    base = logits(adapters.model, ids())
    assert not torch.allclose(one, base, rtol=0, atol=1e-4)
    adapters.activate(rows=["new", None] * 3)
    expected = torch.where(torch.arange(6).view(6, 1, 1) % 2 == 0, one, base)
    assert torch.allclose(logits(adapters.model, ids()), expected, rtol=0, atol=1e-12)
