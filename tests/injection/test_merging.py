from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from genlora_lightning import (
    GenLoRAConfig,
    adapters_merged,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    save_merged,
    unmerge_adapters,
)
from genlora_lightning.errors import MergeReadWeightWarning, MergeRoundingWarning
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import perturb, small_config
from tests.interop.test_lora_export import MODELS, adapted, logits
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


def slow_drift(weight: torch.Tensor, delta: torch.Tensor, merged: torch.Tensor) -> tuple[float, float]:
    """Relative error and share of unchanged weights, from the definition."""
    lost = (merged.double() - weight.double()) - delta.double()
    return float(lost.norm() / delta.double().norm()), float((merged == weight).double().mean())


# --- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::genlora_lightning.errors.MergeRoundingWarning")
def test_reported_drift_equals_a_slow_computation(kind, dtype, monkeypatch):
    monkeypatch.setattr("genlora_lightning.injection.merging._CHUNK", 40)  # parts of two or three rows
    model = adapted(kind).to(dtype)
    before = {name: layer.weight.clone() for name, layer in adapter_layers(model).items()}
    report = merge_adapters(model)
    assert [row.module for row in report.rows] == list(before)
    for row in report.rows:
        layer = adapter_layers(model)[row.module]
        delta = layer.delta_weight().detach()
        delta = delta.T if kind == "gpt2" else delta
        error, unchanged = slow_drift(before[row.module], delta, layer.weight)
        assert row.relative_error == pytest.approx(error, rel=1e-6)
        assert row.unchanged == pytest.approx(unchanged)
        assert row.dtype == dtype
        assert row.relative_error < 1e-4 or dtype != torch.float32
    assert report.worst.module in str(report)
    assert report.worst.relative_error == max(row.relative_error for row in report.rows)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Untouched(nn.Linear):
    """Computes what ``nn.Linear`` does, in its own words, as FalconLinear does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def replaced(factor: float):
    def make(inputs: int, outputs: int) -> nn.Module:
        linear = nn.Linear(inputs, outputs)
        original = linear.forward
        linear.forward = lambda x: factor * original(x)
        return linear

    return make


def hooked(inputs: int, outputs: int) -> nn.Module:
    linear = nn.Linear(inputs, outputs)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


class Rounded(nn.Linear):
    """Rounds its weight in each forward, as BitNet's linears do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs().mean()
        return nn.functional.linear(x, scale * (self.weight / scale).round().clamp(-1, 1), self.bias)


def with_adapters(make) -> nn.Module:
    model = nn.Sequential(make(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    inject_adapters(model, small_config())
    perturb(model)
    return model


def pruned(linear: nn.Module) -> nn.Module:
    return prune.l1_unstructured(linear, "weight", 0.5)


REMOVED = 'parametrize.remove_parametrizations(base_layer, "weight")'
OTHER = "its forward computes something else than x·Wᵀ"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scaled, f"Cannot merge into this Scaled: {OTHER}"),
        (Rounded, f"Cannot merge into this Rounded: {OTHER}"),
        (replaced(2.0), f"Cannot merge into this Linear: {OTHER}"),
        (hooked, r"this Linear: it has forward hooks \(hooked.<locals>.<lambda>\).* Remove them, merge"),
    ],
)
def test_linear_that_computes_something_else_is_not_merged(make, message, tmp_path):
    model = with_adapters(make)
    x = torch.randn(4, 8)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        merge_adapters(model)
    with pytest.raises(ValueError, match=message), adapters_merged(model):
        pass
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [Untouched, replaced(1.0)])
@pytest.mark.filterwarnings("ignore::genlora_lightning.errors.MergeRoundingWarning")
def test_linear_that_computes_the_same_in_other_words_is_merged(make, dtype):
    model = with_adapters(make).to(dtype)
    x, state = torch.randn(4, 8, dtype=dtype), torch.get_rng_state()
    expected = model(x)
    merge_adapters(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize(
    ("make", "names", "remedy"),
    [
        (weight_norm, "parametrizations.weight.original0", REMOVED),
        (spectral_norm, "parametrizations.weight.original", REMOVED),
        (nn.utils.weight_norm, "weight_g, weight_v", "remove_weight_norm(base_layer)"),
        (nn.utils.spectral_norm, "weight_orig", "remove_spectral_norm(base_layer)"),
        (pruned, "weight_orig", 'prune.remove(base_layer, "weight")'),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_that_is_computed_is_not_merged_before_it_is_one_of_its_own(make, names, remedy):
    model = with_adapters(lambda inputs, outputs: make(nn.Linear(inputs, outputs)))
    with pytest.raises(ValueError, match=re.escape("its weight is computed in each forward, from " + names)) as error:
        merge_adapters(model)
    assert f"`torch.nn.utils.{remedy}`" in str(error.value)
    x = torch.randn(4, 8)
    expected = model(x)
    eval(f"torch.nn.utils.{remedy}", {"torch": torch, "base_layer": model[0].base_layer})
    merge_adapters(model)
    torch.testing.assert_close(model(x), expected)
    unmerge_adapters(model)
    assert torch.equal(model(x), expected)


def test_weight_without_memory_is_not_merged():
    model = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8))
    inject_adapters(model, small_config())
    with pytest.raises(ValueError, match="0: Cannot merge into this Linear: its weight has no memory"):
        merge_adapters(model)


def test_update_that_bfloat16_rounds_away_is_a_warning_and_float32_keeps_it():
    model = tiny_llama().eval().to(torch.bfloat16)
    inject_adapters(model, small_config(alpha=0.001))
    perturb(model)
    bits = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.warns(
        MergeRoundingWarning, match=r"Rounding to bfloat16 changed the update of \d+ of 14 layers by more than 10%"
    ):
        rounded = merge_adapters(model)
    assert rounded.worst.relative_error > 0.1
    assert rounded.worst.unchanged > 0.05
    exact = merge_adapters(model, dtype=torch.float32)  # on top: the sums are computed anew
    assert exact.worst.relative_error < 1e-4
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    merged = logits(model)
    assert torch.isfinite(merged).all()
    unmerge_adapters(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == bits[name].dtype
        assert torch.equal(tensor, bits[name])
    torch.testing.assert_close(logits(model).float(), merged, rtol=0, atol=0.04)
    assert not any(layer.merged for layer in adapter_layers(model).values())


def test_float32_merge_takes_modules_trained_in_full_along_and_back():
    model = tiny_llama().eval().to(torch.bfloat16)
    inject_adapters(model, small_config(modules_to_train=["norm", "lm_head"]))
    perturb(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4 * torch.randn_like(model.lm_head.weight))
    bits = {name: t.clone() for name, t in model.state_dict().items()}
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    merge_adapters(model, dtype=torch.float32)
    assert logits(model).dtype == torch.float32
    torch.testing.assert_close(logits(model), expected.float(), rtol=0, atol=0.04)
    unmerge_adapters(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    merge_adapters(model, dtype=torch.float32)
    remove_adapters(model, keep_merged=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.float32


def test_merged_weights_that_are_kept_leave_nothing_for_a_later_unmerge_to_undo():
    model = tiny_llama().eval().to(torch.bfloat16)
    for target in ("q_proj", "v_proj"):
        inject_adapters(model, small_config(target_modules=[target], modules_to_train=["norm"]))
        perturb(model)
        merge_adapters(model, dtype=torch.float32)
        remove_adapters(model, keep_merged=True)
    inject_adapters(model, small_config(target_modules=["q_proj"]))
    perturb(model)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_adapters(model)
    unmerge_adapters(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, bits[name])


@pytest.mark.parametrize("part", ["whole", "inner"])
def test_removal_takes_a_merge_in_another_dtype_back(part):
    model = tiny_llama().eval().to(torch.bfloat16)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_adapters(model, small_config(modules_to_train=["norm"]))
    perturb(model)
    merge_adapters(model if part == "whole" else model.model, dtype=torch.float32)
    remove_adapters(model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, bits[name])


def test_wider_merge_on_top_of_another_that_fails_leaves_nothing_merged():
    model = adapted("llama").to(torch.bfloat16)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_adapters(model, dtype=torch.float32)
    latent = adapter_layers(model)["model.layers.1.mlp.up_proj"].update.A.latent
    before = latent.detach()[2].clone()
    with torch.no_grad():
        latent[2] = float("nan")
    with pytest.raises(ValueError, match="nothing was merged"):
        merge_adapters(model, dtype=torch.float64)
    with torch.no_grad():
        latent[2] = before
    assert not any(layer.merged for layer in adapter_layers(model).values())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == bits[name].dtype
        assert torch.equal(tensor, bits[name])


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nan_in_an_update_names_the_layer_and_merges_nothing(dtype, tmp_path):
    model = adapted("llama").to(torch.bfloat16)
    bad = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        adapter_layers(model)[bad].update.A.latent[2] = float("nan")
    bits = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{bad}: The update holds NaN or infinite values; nothing was merged"):
        merge_adapters(model, dtype=dtype)
    with pytest.raises(ValueError, match=bad):
        save_merged(model, tmp_path / "merged")
    assert not any(layer.merged for layer in adapter_layers(model).values())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == bits[name].dtype
        assert torch.equal(tensor.nan_to_num(7.0), bits[name].nan_to_num(7.0))
    assert not os.listdir(tmp_path)


def test_sum_that_overflows_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, small_config(alpha=1e6))
    perturb(model)
    model.half()
    with pytest.raises(ValueError, match=r"0: The merged weight in torch.float16 holds NaN or infinite values"):
        merge_adapters(model)


def test_fresh_adapter_merges_without_drift():
    model = tiny_llama().to(torch.bfloat16)
    inject_adapters(model, small_config())
    assert all((row.relative_error, row.unchanged) == (0.0, 1.0) for row in merge_adapters(model).rows)


def test_narrower_dtype_is_refused_in_memory():
    model = adapted("llama")
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"must be torch.float32 or torch.float64.* use `save_merged`"):
            merge_adapters(model, dtype=dtype)
    with pytest.raises(ValueError, match=r"cannot hold the values of .* \(torch.float64\) exactly"):
        merge_adapters(model.double(), dtype=torch.float32)


class Quantized(torch.Tensor):
    """Stands for the tensor subclasses of quantization libraries, which pose as ordinary float matrices."""


def test_quantized_base_is_refused_with_what_to_do(tmp_path):
    model = adapted("llama")
    layer = adapter_layers(model)["model.layers.1.mlp.up_proj"]
    plain = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(plain.detach().as_subclass(Quantized), requires_grad=False)
    for function in (merge_adapters, lambda m: save_merged(m, tmp_path / "merged")):
        with pytest.raises(
            ValueError, match=r"up_proj: Cannot merge .*Quantized.*load the model unquantized and whole"
        ):
            function(model)
    assert not any(layer.merged for layer in adapter_layers(model).values())
    layer.base_layer.weight = plain
    model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ValueError, match=r"base is quantized.*Load the original, unquantized base model"):
        save_merged(model, tmp_path / "merged")
    assert not os.listdir(tmp_path)


def test_adapters_are_merged_inside_of_the_context_and_every_bit_is_back_after_it():
    model = adapted("llama")
    expected, bits = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    with adapters_merged(model) as report:
        assert len(report.rows) == len(adapter_layers(model))
        assert all(layer.merged for layer in adapter_layers(model).values())
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=3e-5)
        with pytest.raises(ValueError, match=r"14 adapters are merged already \(.*\): call `unmerge_adapters"):
            adapters_merged(model).__enter__()
    assert torch.equal(logits(model), expected)
    with pytest.raises(KeyError, match="inside"), adapters_merged(model):
        raise KeyError("inside")
    assert all(torch.equal(t, bits[name]) for name, t in model.state_dict().items())
    assert not any(layer.merged for layer in adapter_layers(model).values())


# --- folder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"modules_to_train": ["norm"]}),
        ("llama", {"modules_to_train": ["lm_head"]}),
        ("llama", {"modules_to_train": ["embed_tokens"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("gpt2", {}),
        ("bert", {}),
    ],
)
def test_reloaded_folder_computes_what_the_adapted_model_computes(tmp_path, kind, changes):
    from safetensors import safe_open

    model = adapted(kind, **changes)
    expected, bits = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    save_merged(model, tmp_path / "merged")
    assert torch.equal(logits(model), expected)  # the model in memory is as it was
    assert all(torch.equal(t, bits[n]) for n, t in model.state_dict().items())
    assert not any(layer.merged for layer in adapter_layers(model).values())
    reloaded, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(reloaded.eval()) - expected).abs().max() <= 3e-5
    assert (logits(MODELS[kind]().eval()) - expected).abs().max() > 1e-3
    untied = any("lm_head" in str(v) or "embed_tokens" in str(v) for v in changes.values())
    assert reloaded.config.tie_word_embeddings == (kind != "bert" and not untied) or kind == "bert"
    text = (tmp_path / "merged" / "config.json").read_text()
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        text += " ".join(file.keys()) + json.dumps(file.metadata())
        assert ("lm_head.weight" in file.keys()) == untied  # noqa: SIM118
    assert "genlora" not in text.lower()
    assert "update" not in text
    assert "base_layer" not in text


def test_process_that_never_imported_us_loads_the_folder(tmp_path):
    model = adapted("llama")
    save_merged(model, tmp_path / "merged")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M;"
        f"m = M.from_pretrained({str(tmp_path / 'merged')!r}).eval();"
        "print(m(input_ids=torch.arange(3, 15).view(2, 6)).logits.double().sum().item());"
        "assert not any(n.startswith('genlora') for n in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path
    )
    assert float(done.stdout) == pytest.approx(float(logits(model).double().sum()), abs=1e-3)


@pytest.mark.filterwarnings("ignore:Rounding to")
def test_folder_has_one_dtype_and_each_weight_is_rounded_once(tmp_path):
    from safetensors.torch import load_file

    model = adapted("llama", modules_to_train=["norm"])
    exact = {n: layer.weight + layer.delta_weight() for n, layer in adapter_layers(model).items()}
    report = save_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for row in report.rows:
        assert torch.equal(tensors[f"{row.module}.weight"], exact[row.module].to(torch.bfloat16))
        assert row.dtype == torch.bfloat16
        assert row.relative_error > 1e-4
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    model = tiny_llama().to(torch.bfloat16)
    inject_adapters(model, small_config(modules_to_train=["norm"]))
    perturb(model)
    save_merged(model, tmp_path / "own")
    assert {t.dtype for t in load_file(tmp_path / "own" / "model.safetensors").values()} == {torch.bfloat16}
    wide = save_merged(model, tmp_path / "wide", dtype=torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert wide.worst.relative_error < 1e-4


def test_merged_model_is_saved_with_its_update_once(tmp_path):
    model = adapted("gpt2")
    expected = logits(model)
    merge_adapters(model)
    save_merged(model, tmp_path / "merged")
    reloaded = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (logits(reloaded) - expected).abs().max() <= 1e-5


def test_tokenizer_of_a_local_base_is_copied(tmp_path):
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "notes.txt").write_text("mine")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    inject_adapters(model, small_config())
    report = save_merged(model, tmp_path / "merged")
    assert report.copied == ("tokenizer.json",)
    assert "with the tokenizer (tokenizer.json)" in str(report)
    assert sorted(os.listdir(tmp_path / "merged")) == [
        "config.json",
        "generation_config.json",
        "genlora_merge.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_an_earlier_merge_is_replaced_unless_somebody_has_changed_it(tmp_path):
    folder = tmp_path / "merged"
    model = adapted("llama")
    save_merged(model, folder)
    perturb(model)
    save_merged(model, folder)
    reloaded = type(model).from_pretrained(folder).eval()
    assert (logits(reloaded) - logits(model)).abs().max() <= 1e-5

    def mine() -> None:
        (folder / "notes.txt").write_text("mine")

    def trained() -> None:  # names and sizes stay
        with torch.no_grad():
            reloaded.lm_head.weight.add_(1.0)
        reloaded.save_pretrained(folder)

    for change in (trained, mine, lambda: (folder / "genlora_merge.json").write_text("[]")):
        change()
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(FileExistsError, match="merged exists and is not a merged model as this library wrote it"):
            save_merged(model, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_folder_that_holds_something_and_models_of_other_kinds_are_errors(tmp_path):
    model = adapted("llama")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is not a merged model"):
        save_merged(model, tmp_path / "thesis")
    mlp = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(mlp, GenLoRAConfig())
    with pytest.raises(ValueError, match=r"Sequential holds no transformers model.*`remove_adapters"):
        save_merged(mlp, tmp_path / "mlp")
    with pytest.raises(ValueError, match="has no adapters"):
        save_merged(tiny_bert(), tmp_path / "bert")
    assert os.listdir(tmp_path) == ["thesis"]


def test_tie_that_the_architecture_cannot_undo_is_an_error(tmp_path, monkeypatch):
    model = adapted("llama", modules_to_train=["lm_head"])
    monkeypatch.setattr("genlora_lightning.artifacts.merged_model._head_is_untied", lambda *_: False)
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to another weight in LlamaForCausalLM"):
        save_merged(model, tmp_path / "merged")
    assert not os.listdir(tmp_path)
    assert len(trained_modules(model)) == 1
    assert tiny_gpt2().config.tie_word_embeddings


# --- weights that are read, too ---------------------------------------------------------------------------------------


class TiedInForward(nn.Module):
    """Logits by the embedding's weight, as in many GPTs, and a decoder by the encoder's, as in tied autoencoders."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.enc, self.mid = nn.Embedding(6, 8), nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.mid(nn.functional.linear(self.enc(self.emb(tokens)), self.enc[0].weight.t()))
        return nn.functional.linear(hidden, self.emb.weight)


class AsksOfWeights(nn.Module):
    """Asks weights for facts, in the ways of transformers models, and computes with none."""

    def __init__(self) -> None:
        super().__init__()
        self.wo, self.wi = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.wi.weight
        if isinstance(self.wo.weight, torch.Tensor) and self.wo.weight is not None and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight)
        return self.wo(self.wi(x.to(weight.device, weight.data.dtype))) + self.wo.weight.new_zeros(4)


class Step(nn.Module):
    """As a LightningModule whose step does not go through ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc(x)

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(z, self.enc.weight.t())


def test_merging_a_layer_that_is_called_and_read_warns_and_names_it():
    model = TiedInForward()
    report = inject_adapters(model, small_config(target_modules=["emb", "0", "mid"]))
    assert report.read == {"emb": "TiedInForward", "enc.0": "TiedInForward"}
    assert "TiedInForward reads the weight of emb, enc.0, too" in report.summary()
    perturb(model)
    tokens = torch.arange(6)
    expected = model(tokens)
    message = r"TiedInForward computes with the weight of emb beside calling it \(and so with 1 other layers\)"
    with pytest.warns(MergeReadWeightWarning, match=message):
        merge_adapters(model)
    assert not torch.allclose(model(tokens), expected, atol=1e-3)  # what it warns of
    merge_adapters(model)  # merged already: nothing changes, and nothing is said again
    unmerge_adapters(model)
    assert torch.equal(model(tokens), expected)
    with pytest.warns(MergeReadWeightWarning), adapters_merged(model):
        pass


def test_warning_of_a_read_weight_that_is_made_an_error_leaves_the_model_unmerged():
    model = TiedInForward()
    inject_adapters(model, small_config(target_modules=["emb", "mid"]))
    with pytest.raises(MergeReadWeightWarning):  # in the suite warnings are errors
        merge_adapters(model)
    assert not any(layer.merged for layer in adapter_layers(model).values())


def test_weight_that_is_asked_for_facts_merges_without_a_warning():
    model = AsksOfWeights()
    assert not inject_adapters(model, small_config()).read
    perturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    merge_adapters(model)
    torch.testing.assert_close(model(x), expected)


def test_weight_that_a_step_of_a_module_reads_is_found():
    assert inject_adapters(Step(), small_config()).read == {"enc": "Step"}


def test_folder_of_a_merged_model_whose_weights_are_read_comes_with_a_warning(tmp_path, monkeypatch):
    model = adapted("llama")
    monkeypatch.setattr(
        "genlora_lightning.injection.merging.read_layers", lambda model: {next(iter(adapter_layers(model))): "Reader"}
    )
    with pytest.warns(MergeReadWeightWarning, match="Reader computes with the weight of"):
        save_merged(model, tmp_path / "merged")
