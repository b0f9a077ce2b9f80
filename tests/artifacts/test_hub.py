from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

from genlora_lightning import describe_adapter, load_adapter, load_module, save_adapter, verify_adapter
from genlora_lightning.artifacts.adapter_io import push_adapter
from tests.hub import Hub, reset_connections
from tests.interop.test_lora_export import adapted, logits
from tests.models import tiny_llama

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]


@pytest.fixture
def pushed(hub: Hub, tmp_path):
    """A Hub with the adapter `me/reviews`, and the adapted model."""
    model = adapted("llama")
    folder = save_adapter(model, tmp_path / "adapter")
    (folder / "secret.txt").write_text("not for others")
    push_adapter(folder, "me/reviews")
    return hub, model


def test_pushed_adapter_is_its_own_files_in_one_commit_and_loads_by_name(pushed, tmp_path):
    hub, model = pushed
    files = hub.repos["me/reviews"]["main"]
    assert sorted(files) == FILES
    assert all(content == (tmp_path / "adapter" / name).read_bytes() for name, content in files.items())
    assert len([path for _, path in hub.requests if "/commit/" in path]) == 1
    for name in ("me/reviews", "me/reviews@main", "hf://me/reviews"):
        fresh = tiny_llama().eval()
        load_adapter(fresh, name)
        assert (logits(fresh) - logits(model)).abs().max() == 0
    assert (logits(load_module(tiny_llama(), "me/reviews")) - logits(model)).abs().max() == 0
    assert describe_adapter("me/reviews").folder == "me/reviews"
    assert verify_adapter("me/reviews").num_tensors == verify_adapter(tmp_path / "adapter").num_tensors


def test_only_the_files_of_an_adapter_are_fetched(pushed):
    hub, _ = pushed
    hub.repos["me/reviews"]["main"] |= {
        "evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "a/manifest.json": b"",
    }
    verify_adapter("me/reviews")
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert sorted(fetched) == FILES


def test_revisions_are_branches_of_their_own(pushed, tmp_path):
    _, model = pushed
    changed = adapted("llama", rank=2)
    push_adapter(save_adapter(changed, tmp_path / "changed"), "me/reviews", revision="small")
    for name, wanted in (("me/reviews", model), ("me/reviews@small", changed)):
        fresh = tiny_llama().eval()
        load_adapter(fresh, name)
        assert (logits(fresh) - logits(wanted)).abs().max() == 0
    with pytest.raises(FileNotFoundError, match="me/reviews on the Hugging Face Hub has no revision 'large'"):
        verify_adapter("me/reviews@large")


def test_local_folder_of_the_same_name_goes_before(pushed, tmp_path, monkeypatch):
    hub, _ = pushed
    local = adapted("llama", rank=2)
    save_adapter(local, tmp_path / "me" / "reviews")
    monkeypatch.chdir(tmp_path)
    before = len(hub.requests)
    assert describe_adapter("me/reviews").config["rank"] == 2
    assert len(hub.requests) == before
    assert describe_adapter("hf://me/reviews").config["rank"] == 4


def test_cache_serves_where_there_is_no_network(pushed, monkeypatch):
    verify_adapter("me/reviews")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_connections()
    verify_adapter("me/reviews")
    with pytest.raises(
        OSError, match=r"no local adapter folder me/other, and me/other is not in .* cache here.*HF_HUB_OFF"
    ):
        verify_adapter("me/other")


def test_damage_on_the_way_is_found(pushed):
    hub, _ = pushed
    files = hub.repos["me/reviews"]["main"]
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1] + b"\0"
    with pytest.raises(ValueError, match="has another SHA-256 than when it was written"):
        load_adapter(tiny_llama(), "me/reviews")


def test_what_the_hub_refuses_is_said_with_what_to_do(pushed, tmp_path, monkeypatch):
    hub, _ = pushed
    hub.closed = {"me/gated": "GatedRepo", "me/hidden": "RepoNotFound"}
    hub.repos["me/base"] = {"main": {"config.json": b"{}", "README.md": b""}}
    for name, error, reason in (
        ("me/gated", OSError, "me/gated on the Hugging Face Hub is gated: ask for access.*hf auth login"),
        ("me/hidden", FileNotFoundError, "me/hidden is not on the Hugging Face Hub, or it is private. Log in"),
        ("hf://me/nothing", FileNotFoundError, "^me/nothing is not on the Hugging Face Hub"),
        ("me/base", FileNotFoundError, "me/base on the Hugging Face Hub is none: it has no adapter_config.json"),
        ("hf://me", ValueError, "'hf://me' is no name on the Hugging Face Hub"),
        ("hf://me/..", ValueError, r"me/\.\. is no name on the Hugging Face Hub"),
    ):
        with pytest.raises(error, match=reason):
            verify_adapter(name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        OSError, match=r"me/new: the Hugging Face Hub answers .*No access with this token.*hf auth login"
    ):
        push_adapter(tmp_path / "adapter", "me/new")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="me/new: the Hugging Face Hub cannot be reached"):
        push_adapter(tmp_path / "adapter", "me/new")


def test_nothing_is_pushed_but_a_whole_adapter_to_a_whole_name(pushed, tmp_path):
    hub, _ = pushed
    before = len(hub.requests)
    for name in ("reviews", "me/reviews@main", "a/b/c"):
        with pytest.raises(ValueError, match=f"must be org/name, got '{name}'"):
            push_adapter(tmp_path / "adapter", name)
    with pytest.raises(FileNotFoundError, match="There is no adapter folder"):
        push_adapter("me/reviews", "me/copy")  # a local one is meant
    shutil.copytree(tmp_path / "adapter", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="another SHA-256"):
        push_adapter(tmp_path / "damaged", "me/damaged")
    assert len(hub.requests) == before
