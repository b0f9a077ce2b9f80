from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genlora_lightning import GenLoRAConfig, compress_lora, export_lora, inject_adapters, load_adapter, save_adapter
from genlora_lightning.full_training import trained_modules
from genlora_lightning.injection import adapter_layers
from genlora_lightning.lora_files import read_lora
from genlora_lightning.lora_fit import GeneratorFit
from tests.conftest import perturb, small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.test_lora_export import adapted, logits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def unsigned(**changes: object) -> GenLoRAConfig:
    """Generators that can be fitted."""
    return small_config(**{"entry_signs": False, **changes})


def write_lora(folder: Path, layers: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, (A, B) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rank = next(iter(layers.values()))[0].shape[0]
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}))
    return folder


def random_lora(rank: int, sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (torch.randn(rank, i), torch.randn(o, rank)) for name, (i, o) in sizes.items()}


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def peft_lora(base: nn.Module, folder: Path, steps: int, seed: int = 0, **config: object) -> nn.Module:
    """A LoRA that PEFT trains for a few steps to classify, or continue, sequences of one token."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**config)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        ids, labels = toy_data(32)
        outputs = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(outputs if outputs.dim() == 2 else outputs[:, -1], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def toy_data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 63, (n,))
    return tokens.unsqueeze(1).expand(n, 6), tokens // 21


def accuracy(model: nn.Module) -> float:
    torch.manual_seed(99)
    ids, labels = toy_data(400)
    with torch.no_grad():
        outputs = model(input_ids=ids).logits
    outputs = outputs if outputs.dim() == 2 else outputs[:, -1]
    return float((outputs[:, :3].argmax(1) == labels).double().mean())


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_reported_error_equals_that_of_the_formed_matrices(tmp_path):
    lora = random_lora(3, {"a": (20, 24), "b": (20, 24), "c": (24, 9)})
    folder = write_lora(tmp_path / "lora", lora, lora_alpha=6)
    result = compress_lora(folder, unsigned(), steps=20)
    model = nn.ModuleDict({"a": nn.Linear(20, 24), "b": nn.Linear(20, 24), "c": nn.Linear(24, 9)})
    result.apply(model)
    lost = total = 0.0
    for row in result.rows:
        A, B = lora[row.module]
        exact = 2.0 * B.double() @ A.double()
        error = adapter_layers(model)[row.module].delta_weight().detach().double() - exact
        assert row.relative_error == pytest.approx(float(error.norm() / exact.norm()), rel=1e-5)
        assert row.update_norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert row.lora_bytes == 4 * (A.numel() + B.numel())
        parameters = adapter_layers(model)[row.module].adapter_parameters().values()
        assert row.bytes == 4 * sum(p.numel() for p in parameters)
        values = torch.linalg.svdvals(exact).square()
        rank = row.bytes // (4 * (A.shape[1] + B.shape[0]))
        assert 0 < rank < 3
        assert row.cut_error == pytest.approx(float((values[rank:].sum() / values.sum()).sqrt()), rel=1e-4)
        lost, total = lost + float(error.square().sum()), total + float(exact.square().sum())
    assert result.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert "3 linears" in str(result)


@pytest.mark.parametrize("changes", [{}, {"num_groups": 1}, {"num_centers": 3}, {"alpha": -1.0}, {"rank": 1}])
@pytest.mark.parametrize("kernel", ["gaussian", "inverse_quadratic"])
def test_lora_of_rank_one_is_met_almost_exactly(tmp_path, changes, kernel):
    folder = write_lora(tmp_path / "lora", random_lora(1, {"a": (40, 50), "b": (40, 50)}))
    result = compress_lora(folder, unsigned(**{"width": 30.0, "kernel": kernel, **changes}), steps=200)
    assert all(row.relative_error < 0.05 for row in result.rows)


def test_block_structured_lora_of_high_rank_is_met_where_one_of_equal_singular_values_is_not(tmp_path):
    groups, n = 4, 32
    vectors = torch.randn(2, n)
    blocks = torch.eye(groups).repeat_interleave(n // groups, 1)  # (G, n)
    structured = (blocks * vectors[0], (blocks * vectors[1]).T @ torch.linalg.qr(torch.randn(groups, groups))[0])
    unstructured = (torch.linalg.qr(torch.randn(n, groups))[0].T, torch.linalg.qr(torch.randn(n, groups))[0])
    errors = {}
    for name, (A, B) in {"structured": structured, "unstructured": unstructured}.items():
        folder = write_lora(tmp_path / name, {"a": (A, B.clone())})
        config = unsigned(rank=8, num_groups=groups, width=30.0)
        errors[name] = compress_lora(folder, config, steps=300).rows[0].relative_error
    assert errors["structured"] < 0.05
    assert 0.5 < errors["unstructured"] < 1


def test_descent_improves_the_guess_and_never_ends_above_it(tmp_path):
    folder = write_lora(tmp_path / "lora", random_lora(4, {f"m{i}": (48, 40) for i in range(3)}))
    config = unsigned(rank=16, num_groups=8, num_centers=2)
    errors = [[row.relative_error for row in compress_lora(folder, config, steps=steps).rows] for steps in (0, 3, 600)]
    assert all(few <= guess for guess, few in zip(errors[0], errors[1], strict=True))
    assert all(many < guess - 0.02 for guess, many in zip(errors[0], errors[2], strict=True))


def test_more_latents_are_used_by_the_fit(tmp_path):
    folder = write_lora(tmp_path / "lora", random_lora(2, {"a": (40, 50), "b": (40, 50)}))
    few, more = (
        compress_lora(folder, unsigned(num_groups=1, num_latents_a=q, num_latents_b=q, width=30.0), steps=400)
        for q in (1, 2)
    )
    # One latent per factor where the functions are straight is rank 1; two hold a LoRA of rank 2.
    assert few.relative_error > 0.5
    assert more.relative_error < 0.1


def test_fixed_centers_and_widths_stay_and_learned_ones_move(tmp_path):
    A, B = torch.randn(1, 3, 20), torch.randn(1, 24, 3)
    for learned in (False, True):
        config = unsigned(learn_centers=learned, learn_widths=learned)
        fit = GeneratorFit(A, B, config, torch.Generator().manual_seed(0))
        before = {name: tensor.clone() for name, tensor in fit.parameters().items()}
        fit.run(30, _Bar())
        for name, tensor in fit.parameters().items():
            fixed = not learned and name.rsplit(".", 1)[1] in {"centers", "log_widths"}
            assert torch.equal(tensor, before[name]) == fixed, name


class _Bar:
    def update(self) -> None: ...
    def set_postfix(self, **values: object) -> None: ...


def test_update_of_zero_becomes_a_fresh_adapter_that_can_be_trained(tmp_path):
    lora = random_lora(2, {"a": (16, 12), "b": (16, 12)})
    lora["a"] = (lora["a"][0], torch.zeros(12, 2))
    result = compress_lora(write_lora(tmp_path / "lora", lora), unsigned(), steps=30)
    assert result.rows[0].relative_error == 0.0
    assert result.rows[0].update_norm == 0.0
    assert result.rows[1].relative_error < 1
    model = nn.ModuleDict({"a": nn.Linear(16, 12), "b": nn.Linear(16, 12)})
    result.apply(model)
    layer = adapter_layers(model)["a"]
    assert torch.equal(layer.delta_weight(), torch.zeros(12, 16))
    layer(torch.randn(4, 16)).square().sum().backward()
    assert layer.generator_B.latent.grad.abs().min() > 0


def test_fit_is_the_same_for_the_same_seed(tmp_path):
    folder = write_lora(tmp_path / "lora", random_lora(2, {"a": (16, 12)}))
    states = [compress_lora(folder, unsigned(), steps=10, seed=seed).state for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


# --- whole adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_lora_that_peft_trained_keeps_its_task_and_trains_on(tmp_path):
    lora = peft_lora(
        tiny_bert(), tmp_path / "lora", 150, r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules="all-linear",
        exclude_modules=["classifier"],
    )  # fmt: skip
    original = accuracy(lora)
    assert original > 0.8
    assert accuracy(tiny_bert().eval()) < 0.5
    result = compress_lora(tmp_path / "lora", unsigned(rank=8, num_groups=8), steps=300)
    assert result.config.modules_to_train == ["classifier"]
    model = tiny_bert().eval()
    result.apply(model)
    assert list(trained_modules(model)) == ["classifier"]
    compressed = accuracy(model)
    assert compressed > original - 0.15
    assert result.relative_error < 0.3
    saved = save_adapter(model, tmp_path / "adapter")
    fresh = tiny_bert().eval()
    load_adapter(fresh, saved)
    assert torch.equal(logits(fresh), logits(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    for _ in range(60):
        ids, labels = toy_data(32)
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model) > max(0.8, compressed - 0.05)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_every_kind_of_scaling_is_that_of_peft(tmp_path):
    from peft import PeftModel

    settings = {
        "plain": {"r": 3, "lora_alpha": 12},
        "rank stabilised": {"r": 3, "lora_alpha": 12, "use_rslora": True},
        "patterns": {"r": 3, "rank_pattern": {"c_fc": 5}, "alpha_pattern": {r"h\.1\..*c_proj": 7, "c_fc": 2}},
    }
    for name, values in settings.items():
        peft_lora(
            tiny_gpt2(), tmp_path / name, 2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **values
        )
        merged = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / name).merge_and_unload()
        base = dict(tiny_gpt2().named_parameters())
        layers = read_lora(tmp_path / name).layers
        assert len(layers) == 8
        for module, (A, B) in layers.items():
            delta = dict(merged.named_parameters())[f"{module}.weight"] - base[f"{module}.weight"]
            torch.testing.assert_close((B @ A).T, delta, rtol=1e-3, atol=1e-6)


def test_exported_adapter_can_be_compressed_again(tmp_path):
    model = adapted("llama", entry_signs=False)
    export_lora(model, tmp_path / "lora")
    result = compress_lora(tmp_path / "lora", unsigned(rank=8, num_groups=4), steps=300)
    assert result.relative_error < 0.15
    fresh = tiny_llama().eval()
    result.apply(fresh)
    before = (logits(tiny_llama().eval()) - logits(model)).norm()
    assert (logits(fresh) - logits(model)).norm() < 0.3 * before
    assert result.config.target_modules == sorted(adapter_layers(model))


def test_applying_to_another_model_changes_nothing(tmp_path):
    export_lora(adapted("llama"), tmp_path / "lora")
    result = compress_lora(tmp_path / "lora", unsigned(), steps=0)
    for other in (tiny_gpt2().eval(), tiny_llama(hidden_size=32).eval()):
        before = logits(other)
        with pytest.raises(ValueError, match=r"target_modules|does not fit this model"):
            result.apply(other)
        assert not adapter_layers(other)
        assert all(p.requires_grad for p in other.parameters())
        assert torch.equal(logits(other), before)
    model = tiny_llama()
    inject_adapters(model, unsigned())
    perturb(model)
    with pytest.raises(ValueError, match="already has adapters"):
        result.apply(model)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, r"describes a PEFT adapter of type IA3, not a LoRA"),
        ({"peft_type": None}, r"describes no PEFT adapter, not a LoRA"),
        ({"use_dora": True}, r"has `use_dora`: DoRA's magnitudes cannot be compressed"),
        ({"bias": "all"}, r"has `bias` 'all': trained biases cannot be kept"),
        ({"lora_bias": True}, r"has `lora_bias`"),
        ({"init_lora_weights": "pissa_niter_4"}, r"'pissa_niter_4', whose A and B belong to changed base weights"),
        ({"trainable_token_indices": [1]}, r"has `trainable_token_indices`"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, config, message):
    folder = write_lora(tmp_path / "lora", random_lora(2, {"a": (8, 8)}), **config)
    with pytest.raises(ValueError, match=message):
        compress_lora(folder, unsigned())


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        key = f"base_model.model.{name.replace('__', '.')}"
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, r"no LoRA adapter folder: it has no adapter_model"),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, r"it has no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, r"adapter_config.json is damaged"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ValueError, r"damaged or incomplete"),
        (lambda f: edit_tensors(f, a__lora_B__weight=None), ValueError, r"no matching A and B for a"),
        (lambda f: edit_tensors(f, a__lora_B__weight=torch.ones(8, 3)), ValueError, r"no matching A and B for a"),
        (
            lambda f: edit_tensors(f, a__lora_A__weight=torch.ones(2, 8, 3, 3)),
            ValueError,
            r"a.lora_A.weight \(2, 8, 3, 3\), which is no LoRA of a linear",
        ),
        (lambda f: edit_tensors(f, e__lora_embedding_A=torch.ones(2, 9)), ValueError, r"no LoRA of a linear"),
        (
            lambda f: edit_tensors(f, head__weight=torch.ones(2, 9)),
            ValueError,
            r"head.weight, which is of no module in",
        ),
        (
            lambda f: edit_tensors(f, a__lora_B__weight=torch.full((8, 2), torch.nan)),
            ValueError,
            r"of a in .* holds NaN",
        ),
    ],
)
def test_damaged_folder_is_an_error_that_says_how(tmp_path, damage, error, message):
    folder = write_lora(tmp_path / "lora", random_lora(2, {"a": (8, 8)}))
    compress_lora(folder, unsigned(), steps=0)
    damage(folder)
    with pytest.raises(error, match=message):
        compress_lora(folder, unsigned(), steps=0)


def test_impossible_settings_are_errors(tmp_path):
    folder = write_lora(tmp_path / "lora", random_lora(2, {"a": (8, 6)}))
    with pytest.raises(ValueError, match=r"`num_groups_b` is 7, but a has only 6 outputs to divide"):
        compress_lora(folder, unsigned(num_groups=7))
    with pytest.raises(ValueError, match=r"`entry_signs` is true, but .* Set `entry_signs=False`"):
        compress_lora(folder, small_config())
    with pytest.raises(ValueError, match=r"`steps` must be at least 0, got -1"):
        compress_lora(folder, unsigned(), steps=-1)
    with pytest.raises(FileNotFoundError, match="no LoRA adapter folder"):
        compress_lora(tmp_path / "nothing", unsigned())
    assert os.listdir(tmp_path) == ["lora"]
