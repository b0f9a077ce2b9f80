from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genlora_lightning import export_lora, inject_adapters, remove_adapters, save_adapter
from genlora_lightning.interop.serving import AdapterServer
from tests.conftest import perturb, small_config
from tests.interop.test_lora_export import adapted, load_with_peft, logits
from tests.models import tiny_llama


@pytest.fixture
def folders(tmp_path):
    """A folder `adapters` with `team/reviews` in it, the base's folder, and the adapted model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted("llama")
    save_adapter(model, tmp_path / "adapters" / "team" / "reviews")
    return tmp_path, model


def server(root: Path, **changes: object) -> AdapterServer:
    return AdapterServer(root / "adapters", root / "cache", **{"limit": 10**9, **changes})  # type: ignore[arg-type]


def test_expanded_adapter_is_the_exported_one_without_the_base(folders):
    root, model = folders
    expanded = server(root).expand("team/reviews")
    export_lora(model, root / "exported")
    tensors, exported = (load_file(folder / "adapter_model.safetensors") for folder in (expanded, root / "exported"))
    assert tensors.keys() == exported.keys()
    assert all(torch.equal(tensors[name], exported[name]) for name in tensors)
    settings = [json.loads((f / "adapter_config.json").read_text()) for f in (expanded, root / "exported")]
    assert settings[0] == settings[1]
    assert (logits(load_with_peft(tiny_llama().eval(), expanded)) - logits(model)).abs().max() <= 1e-5


def test_parts_with_ranks_of_their_own_are_expanded_too(tmp_path):
    model = tiny_llama().eval().requires_grad_(False)
    inject_adapters(model.model.layers[0], small_config(rank=2))
    inject_adapters(model.model.layers[1], small_config(rank=5))
    perturb(model)
    save_adapter(model, tmp_path / "adapters" / "parts")
    expanded = server(tmp_path).expand("parts")
    assert (logits(load_with_peft(tiny_llama().eval(), expanded)) - logits(model)).abs().max() <= 1e-5


def test_same_files_are_expanded_once_and_changed_ones_anew(folders):
    root, model = folders
    own = server(root)
    first = own.expand("team/reviews")
    shutil.copytree(root / "adapters" / "team" / "reviews", root / "adapters" / "copy")
    assert own.expand("copy") == server(root).expand("team/reviews") == first
    perturb(model)
    save_adapter(model, root / "adapters" / "copy")
    assert own.expand("copy") != first
    assert first.is_dir()


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../adapter", "team/../../adapter", "team/..", "team//reviews", "/", "team/reviews/"),
        *("out", "out/in", "team\\reviews", "te\0am", "\n", "nothing", "team/reviews/manifest.json"),
    ],
)
def test_names_lead_nowhere_but_to_folders_inside(folders, name):
    root, model = folders
    save_adapter(model, root / "adapter")
    save_adapter(model, root / "elsewhere" / "in")
    (root / "adapters" / "out").symlink_to(root / "elsewhere")
    assert server(root).find(name) is None
    assert server(root).find(str(root / "adapters" / "team" / "reviews")) is None
    assert server(root).expand(name) is None


def test_links_that_stay_inside_and_a_linked_root_are_followed(folders):
    root, _ = folders
    (root / "adapters" / "newest").symlink_to("team/reviews")
    assert server(root).find("newest") == root / "adapters" / "team" / "reviews"
    (root / "linked").symlink_to("adapters")
    assert AdapterServer(root / "linked", root / "cache", limit=1).find("team/reviews") is not None


def test_served_model_is_compared_by_name_or_by_configuration(folders):
    root, model = folders
    own = server(root)
    shutil.copytree(root / "base", root / "moved")
    assert own.expand("team/reviews", str(root / "moved")) is not None  # the same configuration
    tiny_llama(hidden_size=32).save_pretrained(root / "wide")
    with pytest.raises(ValueError, match=r"wide is served: `hidden_size` was 16 and is 32"):
        own.expand("team/reviews", str(root / "wide"))
    with pytest.raises(ValueError, match="org/model is served, whose configuration is not at hand"):
        own.expand("team/reviews", "org/model")
    assert server(root, base_check="off").expand("team/reviews", "org/model") is not None
    model.name_or_path = model.config._name_or_path = "org/model"
    save_adapter(model, root / "adapters" / "named")
    assert own.expand("named", "org/model") is not None


def test_what_no_server_takes_is_refused_with_what_to_do(folders):
    root, model = folders
    save_adapter(adapted("bert"), root / "adapters" / "classifier")
    with pytest.raises(ValueError, match=r"trained in full \(classifier\).*genlora merge"):
        server(root).expand("classifier")
    remove_adapters(model)
    outer = nn.ModuleDict({"lm": model})
    inject_adapters(outer, small_config())
    save_adapter(outer, root / "adapters" / "outer")
    with pytest.raises(ValueError, match=r"names of a ModuleDict, which is no model of transformers.*export-lora"):
        server(root).expand("outer")
    (root / "adapters" / "team" / "reviews" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="another SHA-256"):
        server(root).expand("team/reviews")
    assert not [path for path in (root / "cache").glob("*") if path.is_dir()]


def test_folder_of_adapters_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"folder of adapters .* does not exist"):
        server(tmp_path)
    (tmp_path / "adapters").mkdir()
    with pytest.raises(ValueError, match="`base_check` must be one of 'error', 'off', got 'warn'"):
        server(tmp_path, base_check="warn")
