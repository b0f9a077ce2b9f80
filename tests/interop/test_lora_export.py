from __future__ import annotations

import copy
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genlora_lightning import export_lora, inject_adapters, merge_adapters
from genlora_lightning.adapters.low_rank import truncate_factors
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import perturb, small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.arange(3, 15).view(2, 6)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}


def adapted(kind: str, **changes: object) -> nn.Module:
    """A model with adapters that change its logits by about 1, and with trained heads where it has one."""
    if kind == "bert":
        changes = {"modules_to_train": ["classifier"], **changes}
    model = MODELS[kind]().eval()
    inject_adapters(model, small_config(**changes))
    perturb(model)
    with torch.no_grad():
        for module in trained_modules(model).values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def load_with_peft(base: nn.Module, folder: object) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of tensors that are missing
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        # A trained head of its own beside a tied embedding: PEFT warns of later merges, not of this load.
        warnings.filterwarnings("ignore", message=".*`ensure_weight_tying` is not set to True")
        return PeftModel.from_pretrained(base, folder).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("kind", "task", "changes"),
    [
        ("llama", "CAUSAL_LM", {}),
        ("llama", "CAUSAL_LM", {"modules_to_train": ["lm_head", "norm"]}),
        ("llama", "CAUSAL_LM", {"target_modules": ["q_proj"], "rank": 24, "scaling": "rank", "alpha": 48.0}),
        ("gpt2", "CAUSAL_LM", {}),
        ("bert", "SEQ_CLS", {}),
        ("bert", None, {"modules_to_train": []}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_peft_loads_the_export_into_a_fresh_base_and_computes_the_same_logits(tmp_path, kind, task, changes):
    model = adapted(kind, **changes)
    report = export_lora(model, tmp_path / "lora")
    assert report.task_type == task
    fresh = MODELS[kind]().eval()
    expected = logits(model)
    assert (logits(fresh) - expected).abs().max() > 1e-3
    loaded = load_with_peft(fresh, tmp_path / "lora")
    assert (logits(loaded) - expected).abs().max() <= 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == small_config(**changes).rank
    assert config["target_modules"] == list(adapter_layers(model))
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    assert (config["modules_to_save"] or []) == list(trained_modules(model))


def test_parts_of_several_ranks_are_exported_with_a_rank_each(tmp_path):
    model = tiny_llama().eval()
    inject_adapters(model.model.layers[0], small_config())
    inject_adapters(model.model.layers[1], small_config(rank=6))
    perturb(model)
    export = export_lora(model, tmp_path / "lora")
    assert export.rank == 6
    assert {row.rank for row in export.rows} == {4, 6}
    torch.testing.assert_close(logits(load_with_peft(tiny_llama().eval(), tmp_path / "lora")), logits(model))


def test_merged_model_exports_the_same_adapter(tmp_path):
    model = adapted("llama")
    export_lora(model, tmp_path / "plain")
    merge_adapters(model)
    export_lora(model, tmp_path / "merged")
    plain, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "merged"))
    assert set(plain) == set(merged)
    assert all(torch.equal(plain[name], merged[name]) for name in plain)


def test_names_are_relative_to_the_transformers_model_inside_a_module(tmp_path):
    outer = nn.ModuleDict({"net": nn.ModuleList([tiny_llama().eval()])})
    inject_adapters(outer, small_config())
    perturb(outer)
    export_lora(outer, tmp_path / "lora")
    loaded = load_with_peft(tiny_llama().eval(), tmp_path / "lora")
    assert (logits(loaded) - logits(outer["net"][0])).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_linear_whose_name_ends_like_an_adapted_one_is_not_adapted_by_peft(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["proj"](self.proj(x))

    model = Net()
    inject_adapters(model, small_config(target_modules=["proj"], exclude_modules=["inner"]))
    perturb(model)
    export_lora(model, tmp_path / "lora")
    loaded = load_with_peft(Net(), tmp_path / "lora")
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 1


# --- lower ranks ------------------------------------------------------------------------------------------------------


def test_truncated_export_loses_the_energy_that_it_reports(tmp_path):
    model = adapted("llama", rank=8, num_groups=8)
    exact = {name: layer.delta_weight().detach() for name, layer in adapter_layers(model).items()}
    lost_before = 1.0
    for rank in (1, 3, 7, 8):
        report = export_lora(model, tmp_path / "lora", rank=rank)
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        for row in report.rows:
            A = tensors[f"base_model.model.{row.module}.lora_A.weight"]
            B = tensors[f"base_model.model.{row.module}.lora_B.weight"]
            assert A.shape[0] == B.shape[1] == rank
            delta = exact[row.module]
            values = torch.linalg.svdvals(delta.double()).square()
            assert row.energy_kept == pytest.approx(float(values[:rank].sum() / values.sum()), abs=1e-6)
            lost = float((B @ A - delta).norm() ** 2 / delta.norm() ** 2)
            assert lost == pytest.approx(1 - row.energy_kept, abs=1e-5)
        lost_now = 1 - min(row.energy_kept for row in report.rows)
        assert lost_now < lost_before or rank == 8
        lost_before = lost_now
        assert report.rows[0].bytes == 4 * rank * (16 + 16)
    assert all(row.energy_kept == 1.0 for row in report.rows)  # the full rank is exact
    loaded = load_with_peft(tiny_llama().eval(), tmp_path / "lora")
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5


def test_rank_above_that_of_the_product_is_filled_with_zeros():
    A, B = torch.randn(6, 3), torch.randn(5, 6)
    low_a, low_b, kept = truncate_factors(A, B, 5)
    assert low_a.shape == (5, 3)
    assert low_b.shape == (5, 5)
    torch.testing.assert_close(low_b @ low_a, B @ A)
    assert kept == pytest.approx(1.0)
    assert truncate_factors(A, torch.zeros(5, 6), 2)[2] == 1.0


# --- report and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_report_names_the_flag_of_the_server(tmp_path, rank, served):
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, small_config(rank=rank))
    report = export_lora(model, tmp_path / "lora")
    assert report.served_rank == served
    assert str(report).endswith(f"--max-lora-rank {served}")
    assert f"rank {rank} for 1 layers" in str(report)


def test_report_says_what_a_server_does_not_take(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, small_config(rank=513))
    assert "vLLM serves ranks up to 512, not 513" in str(export_lora(model, tmp_path / "a"))
    assert "no adapter with modules trained in full (classifier)" in str(export_lora(adapted("bert"), tmp_path / "b"))


def test_model_without_adapters_and_impossible_ranks_are_errors(tmp_path):
    with pytest.raises(ValueError, match="has no adapters"):
        export_lora(tiny_llama(), tmp_path / "lora")
    model = adapted("llama")
    for rank in (0, -1, 5, True, 2.0):
        with pytest.raises(ValueError, match=r"`rank` must be an integer from 1 to the adapter's rank 4, got "):
            export_lora(model, tmp_path / "lora", rank=rank)
    assert not os.listdir(tmp_path)


def test_export_replaces_an_export_and_nothing_else(tmp_path):
    model = adapted("llama")
    export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "lora", rank=2)
    assert os.listdir(tmp_path) == ["lora"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FileExistsError, match="foreign exists and is not a LoRA adapter as this library wrote it"):
        export_lora(model, foreign)
    assert os.listdir(foreign) == ["adapter_config.json"]


def test_adapter_with_nan_and_linear_in_two_places_are_not_exported(tmp_path):
    model = adapted("llama")
    with torch.no_grad():
        adapter_layers(model)["model.layers.1.mlp.up_proj"].update.B.latent[3] = float("nan")
    for rank in (None, 2):
        with pytest.raises(ValueError, match=r"update of model.layers.1.mlp.up_proj holds NaN"):
            export_lora(model, tmp_path / "lora", rank=rank)
    shared = nn.Linear(8, 8)
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    inject_adapters(twice, small_config())
    with pytest.raises(ValueError, match="2 and 0 are one adapted linear in two places"):
        export_lora(twice, tmp_path / "lora")
    assert not os.listdir(tmp_path)


def test_linears_that_peft_refuses_are_not_exported(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 4}
    for excluded in ([], ["out_proj"]):
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(**sizes)).eval()
        base = copy.deepcopy(model)
        inject_adapters(model, small_config(exclude_modules=excluded))
        perturb(model)
        if excluded:
            export_lora(model, tmp_path / "lora")
            torch.testing.assert_close(logits(load_with_peft(base, tmp_path / "lora")), logits(model))
        else:
            with pytest.raises(ValueError, match=r"mixer.out_proj\) .* 'mamba', .* `exclude_modules=\['out_proj'\]`"):
                export_lora(model, tmp_path / "lora")
            assert not (tmp_path / "lora").exists()


def test_failed_write_leaves_the_older_export(tmp_path, monkeypatch):
    from genlora_lightning.interop import lora_export

    model = adapted("llama")
    export_lora(model, tmp_path / "lora")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_export, "save_file", full)
    with pytest.raises(OSError, match=r"LoRA adapter could not be written to .*No space left"):
        export_lora(model, tmp_path / "lora", rank=1)
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    assert os.listdir(tmp_path) == ["lora"]
