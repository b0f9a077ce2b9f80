"""Kinds and a site that are defined here alone keep every promise: nothing else has to know them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from genlora_lightning import (
    CompacterConfig,
    GenLoRAConfig,
    GenLoRAFinetuning,
    LoRAConfig,
    OptimizerConfig,
    PoLARConfig,
    adapters_disabled,
    convert_checkpoint,
    describe_adapter,
    effective_ranks,
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
from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, Role, WeightUpdate
from genlora_lightning.adapters.config import KINDS, AdapterConfig, ScalingRule
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.sites import SITES
from genlora_lightning.planning.plan import make_plan
from genlora_lightning.planning.traffic import Setup
from genlora_lightning.training.optim import parameter_groups
from tests.conftest import perturb, small_config
from tests.distributed.runs import PlainLlama, SaveAt, fit, llama_loader
from tests.models import tiny_llama


class SinhFactor(Factor):
    """M = sinh(p): a factor that is made of its parameter."""

    ROLES: ClassVar = {"p": Role("toy")}

    def __init__(self, num_entries: int, rank: int, zero: bool, device: Any, generator: Any) -> None:
        super().__init__(rank, num_entries)
        self.zero = zero
        self.p = nn.Parameter(torch.empty(rank, num_entries, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.p.is_meta:
            self.p.zero_() if self.zero else self.p.uniform_(-0.5, 0.5, generator=generator)

    @property
    def first_shape(self) -> tuple[int, ...]:
        return self.rank, self.num_entries

    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        return torch.sinh(self.p).to(dtype or self.p.dtype)

    @classmethod
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        stacked = torch.sinh(torch.stack([factor.p for factor in factors]))
        return stacked.to(dtype or stacked.dtype).unbind()


@dataclass(frozen=True, kw_only=True)
class SinhConfig(AdapterConfig):
    """A kind with two factors."""

    kind: ClassVar[str] = "sinh"
    title: ClassVar[str] = "Sinh"

    rank: int = 2
    alpha: float = 3.0
    scaling: ScalingRule = "rank"
    offset: float = 0.0

    def make(self, shape: MatrixShape, *, device: Any = None, generator: Any = None) -> FactorPair:
        A = SinhFactor(shape.in_features, self.rank, False, device, generator)
        return FactorPair(A, SinhFactor(shape.out_features, self.rank, True, device, generator), self.scaling_factor)

    def count_parameters(self, shape: MatrixShape) -> int:
        return self.rank * sum(shape)


class OuterUpdate(WeightUpdate):
    """ΔW = s · left ⊗ right: an update that says nothing of factors."""

    ROLES: ClassVar = {"left": Role("outer"), "right": Role("outer"), "fixed": Role("outer")}

    def __init__(self, shape: MatrixShape, scale: float, device: Any, generator: Any) -> None:
        super().__init__(shape)
        self.scale = scale
        self.left = nn.Parameter(torch.empty(shape.out_features, dtype=torch.float32, device=device))
        self.right = nn.Parameter(torch.empty(shape.in_features, dtype=torch.float32, device=device))
        self.fixed = nn.Parameter(torch.empty(2, dtype=torch.float32, device=device), requires_grad=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.left.is_meta:
            self.left.zero_()
            self.right.uniform_(-0.5, 0.5, generator=generator)
            self.fixed.fill_(0.5)

    def is_trained(self, name: str) -> bool:
        return name != "fixed"

    @property
    def rank(self) -> int:
        return 1

    def delta_weight(self) -> Tensor:
        return self.scale * self.fixed.sum() * torch.outer(self.left, self.right)


@dataclass(frozen=True, kw_only=True)
class OuterConfig(AdapterConfig):
    """A kind without factors."""

    kind: ClassVar[str] = "outer"
    title: ClassVar[str] = "Outer"

    rank: int = 1
    alpha: float = 2.0
    scaling: ScalingRule = "rank"

    def make(self, shape: MatrixShape, *, device: Any = None, generator: Any = None) -> OuterUpdate:
        return OuterUpdate(shape, self.scaling_factor, device, generator)

    def count_parameters(self, shape: MatrixShape) -> int:
        return sum(shape)


ALL = {
    "genlora": small_config(modules_to_train=["lm_head"]),
    "lora": LoRAConfig(rank=3, alpha=5.0, modules_to_train=["lm_head"]),
    "polar": PoLARConfig(rank=3, alpha=5.0, landing=0.5, modules_to_train=["lm_head"]),
    "compacter": CompacterConfig(rank=4, alpha=3.0, num_products=2, modules_to_train=["lm_head"]),
    "sinh": SinhConfig(modules_to_train=["lm_head"]),
    "outer": OuterConfig(modules_to_train=["lm_head"]),
}
# PEFT asks transformers for it, which is going to rename it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
each = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
IDS = torch.tensor([[3, 5, 7, 2, 9, 4]])


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    # The classes above were put there when this file was imported; another test may look at what the library brings.
    yield
    assert KINDS["sinh"] is SinhConfig


def llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=False).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS).logits
    return output


def adapted(config: AdapterConfig) -> nn.Module:
    model = llama()
    inject_adapters(model, config)
    perturb(model)
    return model


@each
def test_new_adapter_changes_nothing_and_counts_what_it_trains(config):
    model = llama()
    before = logits(model)
    report = inject_adapters(model, config)
    assert torch.equal(logits(model), before)
    trained = sum(p.numel() for p in adapter_parameters(model).values() if p.requires_grad)
    own = sum(config.count_parameters(layer.shape) for layer in adapter_layers(model).values())
    assert trained == own + config.count_shared()
    assert report.adapter_parameters == trained
    assert report.summary().startswith(f"{config.title} adapts 14 linears")
    groups = parameter_groups(model, OptimizerConfig())
    assert sum(p.numel() for g in groups if g["name"] != "head" for p in g["params"]) == trained


@each
def test_gradients_are_those_of_the_update_added_to_the_weight(config):
    model = adapted(config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.requires_grad}
    model.zero_grad()
    from torch.func import functional_call

    # The same model without adapters, whose weights are W + ΔW with ΔW's graph.
    plain, weights = llama(), {}
    for name, layer in adapter_layers(model).items():
        weights[f"{name}.weight"] = layer.base_layer.weight + layer.delta_weight()
    functional_call(plain, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    wanted = {name: p.grad for name, p in adapter_parameters(model).items() if p.requires_grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4)
        assert gradient.abs().max() > 0


@each
def test_merging_saving_loading_and_exporting_give_the_same_model(config, tmp_path):
    model = adapted(config)
    wanted = logits(model)
    assert all(rank > 0 for rank in effective_ranks(model).values())
    merge_adapters(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(logits(model), wanted)
    with adapters_disabled(model):
        assert not torch.allclose(logits(model), wanted)

    save_adapter(model, tmp_path / "adapter")
    verify_adapter(tmp_path / "adapter")
    described = describe_adapter(tmp_path / "adapter")
    assert described.config == config.to_dict()
    assert sum(layer.parameters + layer.fixed for layer in described.layers) == sum(
        p.numel() for p in adapter_parameters(model).values()
    )
    assert str(described).splitlines()[-1].startswith(f"{config.title} adapter for")
    again = llama()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), wanted)

    from peft import PeftModel

    export_lora(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-4)
    remove_adapters(model)
    assert not adapter_parameters(model)


@each
def test_gradients_of_one_generation_per_step_are_those_of_one_per_micro_batch(config):
    model = adapted(config)
    batches = torch.randint(3, 64, (3, 2, 5))
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.requires_grad}
    model.zero_grad()
    with generated_once(model):
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(adapter_parameters(model)[name].grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [ALL["sinh"], ALL["outer"]], ids=["sinh", "outer"])
def test_plan_counts_a_kind_that_it_does_not_know(config):
    config = dataclasses.replace(config, target_modules=r".*(_proj|embed_tokens)")
    plan = make_plan(llama().config, "tiny", "causal-lm", config, Setup(gpus=2, strategy="ddp", batch=1, tokens=8))
    model = llama()
    inject_adapters(model, config)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{config.title} of rank {config.rank} trains" in str(plan)


def run(place: tuple[str, str], folder: Path, config: AdapterConfig, *callbacks: Any, **settings: Any) -> Any:
    strategy, policy = place
    folder = folder / f"{config.kind}-{strategy}-{policy}"
    callback = GenLoRAFinetuning(config, adapter_sharding=policy, adapter_dir=str(folder / "adapter"))
    settings = {"loader": llama_loader(16), **settings}
    return fit(strategy, policy, folder, PlainLlama("init", "adamw"), *callbacks, adapter=callback, **settings)


SINGLE = ("single", "replicate")


# -- ranks, alphas and layers of their own -----------------------------------------------------------------------------

PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {r"^(net\.)?model\.layers\.0\.mlp\.down_proj": 1, "down_proj": 2, r"layers\.1\..*(k|v)_proj": 5},
    "alpha_pattern": {"v_proj": 7.0},
}
RANKS = {"0.q": 3, "0.v": 3, "0.down": 1, "1.q": 3, "1.v": 5, "1.down": 2}
with_ranks = pytest.mark.parametrize(
    "config",
    [
        GenLoRAConfig(rank=3, num_groups_b=2, **PATTERNS),
        LoRAConfig(rank=3, modules_to_train=["lm_head"], **PATTERNS),
        SinhConfig(rank=3, **PATTERNS),
    ],
    ids=["genlora", "lora", "sinh"],
)


def ranks(model: nn.Module) -> dict[str, int]:
    layers = adapter_layers(model).items()
    assert all(layer.update.rank == layer.config.rank for _, layer in layers)
    return {".".join(name.removesuffix("_proj").split(".")[-3::2]): layer.update.rank for name, layer in layers}


@with_ranks
def test_ranks_and_alphas_by_name_are_made_saved_loaded_merged_and_exported(config, tmp_path):
    model = adapted(config)
    wanted, layers = logits(model), adapter_layers(model)
    assert ranks(model) == RANKS
    for name, layer in layers.items():
        alpha = 7.0 if "v_proj" in name else config.alpha
        assert layer.scaling == pytest.approx(
            alpha / layer.update.rank ** (0.5 if config.scaling == "sqrt_rank" else 1)
        )
    trained = sum(p.numel() for p in adapter_parameters(model).values() if p.requires_grad)
    assert trained == sum(layer.config.count_parameters(layer.shape) for layer in layers.values())
    report = inject_adapters(model, config)  # the same configuration: nothing changes
    assert report.adapter_parameters == trained
    assert ", of ranks 1, 2, 3, 5" in report.summary()
    assert report.lora_parameters == sum(layer.update.rank * sum(layer.shape) for layer in layers.values())
    assert torch.equal(logits(model), wanted)
    plan = make_plan(llama().config, "tiny", "causal-lm", config, Setup(batch=1, tokens=8))
    assert plan.trainable_parameters == report.trainable_parameters
    assert "of rank 3 and others by name trains" in str(plan)

    folder = save_adapter(model, tmp_path / "adapter")
    verify_adapter(folder)
    assert sorted(layer.rank for layer in describe_adapter(folder).layers) == sorted(RANKS.values())
    again = llama()
    load_adapter(again, folder)
    assert torch.equal(logits(again), wanted)
    inject_adapters(again, config)  # as a run that goes on with it does
    other = dataclasses.replace(config, alpha_pattern={"v_proj": 8.0})
    with pytest.raises(ValueError, match=r"another configuration \(alpha: 7.0 there, 8.0 asked for; at .*v_proj"):
        inject_adapters(again, other)

    from peft import PeftModel

    export_lora(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-3, atol=1e-4)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@with_ranks
def test_a_run_with_ranks_by_name_goes_on_in_every_bit(config, tmp_path):
    file = tmp_path / "half.ckpt"
    whole = run(SINGLE, tmp_path, config, SaveAt(file, 2))
    resumed = run(SINGLE, tmp_path, config, ckpt_path=file)
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in whole.state.items())
    loaded = load_module(PlainLlama(), file)
    assert ranks(loaded) == RANKS
    assert sorted(layer.rank for layer in describe_adapter(file).layers) == sorted(RANKS.values())
    assert convert_checkpoint(file, PlainLlama(), tmp_path / "converted").is_dir()
    other = dataclasses.replace(config, alpha_pattern={"v_proj": 8.0})  # the shapes are those of the checkpoint
    with pytest.raises(ValueError, match=r"another configuration \(alpha: 7.0 in the checkpoint, 8.0 here\)"):
        run(SINGLE, tmp_path, other, ckpt_path=file)


def test_layers_by_number_are_adapted_alone_and_come_back(tmp_path):
    config = LoRAConfig(rank=2, layers_to_transform=[1])
    model = adapted(config)
    assert {name.split(".")[2] for name in adapter_layers(model)} == {"1"}
    assert len(adapter_layers(model)) == 7
    assert "left alone: model.layers.0" in str(inject_adapters(llama(), config))
    wanted = logits(model)
    folder = save_adapter(model, tmp_path / "adapter")
    for check in ("error", "off"):
        again = llama()
        load_adapter(again, folder, base_check=check)
        assert torch.equal(logits(again), wanted)
    model = llama()
    inject_adapters(model, dataclasses.replace(config, target_modules=["q_proj"], rank_pattern={"q_proj": 3}))
    assert ranks(model) == {"1.q": 3}


@each
def test_files_of_adapters_without_patterns_say_nothing_of_them(config, tmp_path):
    folder = save_adapter(adapted(config), tmp_path / "adapter")
    text = (folder / "adapter_config.json").read_text()
    assert set(json.loads(text)) == {"format", "format_version", "peft_type", "base_model", "config"}
    assert not any(name in text for name in ("layers_to_transform", "rank_pattern", "alpha_pattern"))


@each
def test_configuration_goes_through_a_dictionary_and_is_told_from_other_kinds(config):
    callback = GenLoRAFinetuning(config.to_dict())
    assert callback.config == config
    others = [other for other in ALL.values() if other.kind != config.kind]
    assert all(config.differences(other) == {"kind": (config.kind, other.kind)} for other in others)
    model = llama()
    inject_adapters(model, config)
    with pytest.raises(ValueError, match=rf"another configuration \(kind: '{config.kind}' there, '{others[0].kind}'"):
        inject_adapters(model, others[0])


def test_kind_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match=r"no kind of adapter 'loha'\. The kinds are 'genlora', .*'lora', .*'sinh'"):
        GenLoRAFinetuning({"kind": "loha"})
    with pytest.raises(ValueError, match=r"Unknown SinhConfig fields \['r'\]\. PEFT's `r` is `rank` here"):
        GenLoRAFinetuning({"kind": "sinh", "r": 3})


def test_parameter_without_a_role_is_an_error():
    model = adapted(ALL["sinh"])
    adapter_layers(model)["model.layers.0.mlp.up_proj"].update.A.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="SinhFactor gives no role to its parameter 'extra'"):
        parameter_groups(model, OptimizerConfig())


# -- a site ------------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Rows that are looked up, and nothing else of the library's."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width))
        self.bias = None

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class AdaptedTable(AdaptedLayer):
    """The site: ``W[ids] + (s B A)[ids]`` with W (num_rows, width)."""

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        return MatrixShape(*module.weight.shape) if isinstance(module, Table) else None

    def to_stored(self, delta: Tensor) -> Tensor:
        return delta

    def wanted_dtype(self) -> torch.dtype | None:
        return None  # it makes what it needs by itself

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.base_layer(ids)
        return output + F.embedding(ids, self.update()) if self.is_active else output


@pytest.fixture
def site() -> Iterator[None]:
    SITES.append(AdaptedTable)
    yield
    SITES.remove(AdaptedTable)


def with_table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Table(10, 6), nn.Linear(6, 4))


ROWS = torch.tensor([1, 3, 3, 9])


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        LoRAConfig(rank=2),
        PoLARConfig(rank=2),
        CompacterConfig(rank=4, num_products=2),
        SinhConfig(),
        OuterConfig(),
    ],
    ids=ALL,
)
def test_site_takes_every_kind(config, tmp_path):
    model, ids = with_table(), ROWS
    config = dataclasses.replace(config, target_modules=["0", "1"])
    before = model(ids)
    report = inject_adapters(model, config)
    layers = adapter_layers(model).values()
    assert [type(layer).__name__ for layer in layers] == ["AdaptedTable", "AdaptedLinear"]
    trained = sum(config.count_parameters(layer.shape) for layer in layers) + config.count_shared()
    assert report.adapter_parameters == report.trainable_parameters == trained
    assert torch.equal(model(ids), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    start = float((model(ids).detach() - 1).square().mean())
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(ids) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * start
    wanted = model(ids)
    save_adapter(model, tmp_path / "adapter")
    verify_adapter(tmp_path / "adapter")
    assert describe_adapter(tmp_path / "adapter").parameters == trained
    again = with_table()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids), wanted)
    merge_adapters(model)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(model(ids), wanted)
    remove_adapters(model)
    assert torch.equal(model(ids), before)
