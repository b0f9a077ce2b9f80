from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genlora_lightning import LoRAConfig, export_lora, import_lora, inject_adapters, save_adapter, save_merged
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.interop.lora_export import write_stored_lora
from genlora_lightning.interop.lora_sites import unlike_peft
from genlora_lightning.interop.peft_folders import export_peft
from tests.conftest import perturb, small_config
from tests.layers.test_convolution import CASES, Standardised
from tests.layers.test_embedding import Scaled, Shifted
from tests.models import tiny_llama

IDS, IMAGE = torch.tensor([[3, 5, 1, 2, 5]]), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
# PEFT asks transformers for it, which is going to rename it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# PEFT before 0.21 warns of tied embeddings that it adapts.
TIED = pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning")
NAMES = ["table", "scaled", "conv", "wide", "deep", "flat", "head"]


class Parts(nn.Module):
    """One layer of each site that PEFT takes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.scaled = nn.Embedding(9, 6, padding_idx=2), Scaled(9, 6)
            self.conv, self.wide = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv1d(4, 6, 3, padding="same")
            self.deep, self.flat = nn.Conv3d(4, 3, (1, 2, 2)), nn.Conv2d(4, 6, 1)
            self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        rows = self.head(self.table(ids) + self.scaled(ids))
        parts = [rows, self.conv(image), self.wide(image[..., 0]), self.deep(image[..., None, :, :]), self.flat(image)]
        return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    output: Tensor = model(IDS, IMAGE)
    return output


def loaded_by_peft(folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of tensors that are missing
        return PeftModel.from_pretrained(Parts(), folder).eval()


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("make", [small_config, LoRAConfig], ids=["genlora", "lora"])
def test_peft_gives_the_same_outputs_with_the_export_and_it_comes_back(make, rank, tmp_path):
    model = Parts()
    before = outputs(model)
    inject_adapters(model, make(rank=3, target_modules=NAMES))
    perturb(model)
    wanted = outputs(model)
    report = export_lora(model, tmp_path / "lora", rank=rank)
    assert report.server_hint() == "LoRA servers take linears, and not table: load it with PEFT, or merge it."
    theirs, again = loaded_by_peft(tmp_path / "lora"), Parts()
    import_lora(again, tmp_path / "lora")
    torch.testing.assert_close(outputs(theirs), outputs(again), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(again), before, atol=1e-2)
    if rank is None:
        torch.testing.assert_close(outputs(theirs), wanted, rtol=1e-4, atol=1e-5)
        export_lora(again, tmp_path / "back")
        first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_of_peft_on_every_site_comes_in_with_every_bit(tmp_path):
    model = get_peft_model(Parts(), LoraConfig(r=2, lora_alpha=6, target_modules=NAMES)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.base_model.model.table.lora_embedding_A["default"][:, 2] = 0  # training leaves the padding's as it is
    model.save_pretrained(tmp_path / "peft")
    ours = Parts()
    import_lora(ours, tmp_path / "peft")
    torch.testing.assert_close(outputs(ours), outputs(model), rtol=1e-4, atol=1e-5)
    export_lora(ours, tmp_path / "lora")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "lora"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:.*`ensure_weight_tying` is not set to True")
@TIED
def test_embedding_that_peft_has_saved_itself_is_compared_with_the_base(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).eval()
    nn.init.normal_(model.base_model.model.model.embed_tokens.lora_embedding_A["default"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    ours = tiny_llama().eval()
    import_lora(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    save_file({**tensors, key: tensors[key] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens: PEFT saved the embedding itself, too, and its values are"):
        import_lora(tiny_llama(), tmp_path)


def tiny_gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)).eval()


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=6, patch_size=3, num_channels=4, **sizes)).eval()


@TIED
@pytest.mark.parametrize(
    ("make", "target", "given"),
    [(tiny_gemma, "embed_tokens", {"input_ids": IDS}), (tiny_vit, "projection", {"pixel_values": IMAGE})],
    ids=["gemma", "vit"],
)
@torch.no_grad()
def test_model_of_transformers_with_another_site_goes_to_peft_and_is_merged(make, target, given, tmp_path):
    model = make()
    before = model(**given).logits
    query = next(
        name for name, _ in model.named_modules() if name.endswith(("q_proj", "query"))
    )  # transformers 4: query
    inject_adapters(model, small_config(target_modules=[target, query.rpartition(".")[2]]))
    perturb(model)
    wanted = model(**given).logits
    assert not torch.allclose(wanted, before, atol=1e-3)
    export_lora(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(**given).logits, wanted, rtol=1e-4, atol=1e-5)
    save_merged(model, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**given).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"{target} is no linear, and the GENLORA of PEFT adapts linears alone"):
        export_peft(model, tmp_path / "genlora")
    assert not (tmp_path / "genlora").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (CASES["groups"](), r"PEFT's LoRA of a convolution with groups \(2\) has another A"),
        (CASES["dilated"](), r"PEFT leaves out its dilation \(2, 2\) and padding mode 'zeros'"),
        (CASES["reflect"](), r"PEFT leaves out its dilation \(1, 1\) and padding mode 'reflect'"),
        (Standardised(4, 6, 3), "Standardised has a forward of its own, beside which PEFT adds"),
        (Shifted(9, 6), "the forward of Shifted gives other rows than PEFT takes"),
    ],
    ids=["groups", "dilation", "padding", "own", "shifted"],
)
def test_layer_that_peft_computes_otherwise_is_not_exported(base, message, tmp_path):
    model = nn.ModuleDict({"layer": base})
    inject_adapters(model, small_config(target_modules=["layer"]))
    with pytest.raises(ValueError, match=f"what the adapter of layer does: {message}"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("make", [Parts().table, Parts().scaled, Parts().conv, nn.Linear(2, 3)], ids=str)
def test_layer_that_peft_computes_the_same_is_none_of_these(make):
    assert unlike_peft(make) is None


def test_lora_of_another_site_or_with_a_row_for_padding_is_refused(tmp_path):
    for name, change in {"site": {"conv": nn.Linear(36, 6)}, "padding": {}}.items():
        model = Parts()
        inject_adapters(model, LoRAConfig(rank=2, target_modules=["conv", "table"]))
        perturb(model)
        export_lora(model, tmp_path / name)
        other = Parts()
        for own, module in change.items():
            setattr(other, own, module)
        file = tmp_path / name / "adapter_model.safetensors"
        key = "base_model.model.table.lora_embedding_A"
        if name == "padding":
            save_file({**load_file(file), key: torch.ones(2, 9)}, file, metadata={"format": "pt"})
        said = {
            "site": "conv: it is of the kind linear here, and the LoRA is for the kind conv",
            "padding": "table: it updates the row",
        }
        with pytest.raises(ValueError, match=said[name]):
            import_lora(other, tmp_path / name)


def test_servers_are_not_given_what_they_do_not_take_and_the_folder_says_what_it_is(tmp_path):
    model = tiny_llama()
    inject_adapters(model, small_config(target_modules=["embed_tokens", "q_proj"]))
    folder = save_adapter(model, tmp_path / "adapter")
    assert json.loads((folder / "manifest.json").read_text())["sites"] == {"model.embed_tokens": "embedding"}
    stored = read_adapter(folder)
    with pytest.raises(ValueError, match=r"servers do not take: model.embed_tokens is no linear, but of"):
        write_stored_lora(stored, tmp_path)
    linears = tiny_llama()
    inject_adapters(linears, small_config())
    assert "sites" not in json.loads((save_adapter(linears, tmp_path / "other") / "manifest.json").read_text())
