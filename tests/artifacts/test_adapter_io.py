from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genlora_lightning import (
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    verify_adapter,
)
from genlora_lightning.artifacts import adapter_folder, adapter_io
from genlora_lightning.artifacts.adapter_folder import manifest_bytes, read_adapter, read_adapter_config
from genlora_lightning.errors import DamagedFileError, WrongBaseError
from genlora_lightning.injection.inject import adapter_configs, adapter_layers, adapter_parameters
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.storage import atomic
from genlora_lightning.storage.atomic import find_folder
from genlora_lightning.storage.digests import sha256
from tests.conftest import perturb, small_config
from tests.killing import kill_after, kill_before_step
from tests.models import tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.arange(12).view(2, 6)
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]


def trained(**changes: object) -> nn.Module:
    model = tiny_llama().eval()
    inject_adapters(model, small_config(**changes))
    perturb(model)
    return model


def test_saved_adapter_gives_the_same_logits_in_a_fresh_base_bit_for_bit(tmp_path):
    model = trained(modules_to_train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    expected = model(IDS).logits
    folder = save_adapter(model, tmp_path / "deep" / "adapter", training={"global_step": 3})
    fresh = tiny_llama().eval()
    assert not torch.allclose(fresh(IDS).logits, expected, atol=1e-3)
    report = load_adapter(fresh, folder)
    assert torch.equal(fresh(IDS).logits, expected)
    assert len(report.adapted) == 14
    assert sorted(p.name for p in folder.iterdir()) == FILES
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["config"]["modules_to_train"] == ["norm"]
    assert json.loads((folder / "manifest.json").read_text())["training"] == {"global_step": 3}


def test_model_card_states_base_metrics_and_how_to_load(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter", training={"global_step": 3, "metrics": {"val|loss": 1 / 3}})
    card = (folder / "README.md").read_text()
    assert "| global_step | 3 |" in card
    assert "| val\\|loss | 0.333333 |" in card
    assert "| rank | 4 |" in card
    assert "- **Base**: a model without a name (LlamaForCausalLM, 20 tensors of" in card
    assert "model = LlamaForCausalLM.from_pretrained(…)" in card
    (folder / "README.md").write_text("My own words.")
    verify_adapter(folder)


def test_model_card_has_the_licence_that_the_base_states(tmp_path):
    model = trained()
    (tmp_path / "base").mkdir()
    model.name_or_path = str(tmp_path / "base")
    for card, licence in (
        ("---\ntags: [a]\nlicense: 'apache-2.0'\n---\n# A base\n", "apache-2.0"),
        ("# A base\n---\nlicense: mit\n---\n", None),
        ("---\ntags: []\n---\n", None),
    ):
        (tmp_path / "base" / "README.md").write_text(card)
        text = (save_adapter(model, tmp_path / "adapter") / "README.md").read_text()
        front = text.split("---")[1]
        assert (f'license: "{licence}"' in front) is (licence is not None)
        assert (f"that of the base applies: {licence}." in text) is (licence is not None)
        assert "base_model" not in front  # a path says nothing there
    model.name_or_path = "org/base"
    front = (save_adapter(model, tmp_path / "adapter") / "README.md").read_text().split("---")[1]
    assert front.startswith('\nbase_model: "org/base"\nbase_model_relation: adapter\nlibrary_name: genlora-lightning\n')


def test_files_of_others_in_the_folder_are_kept(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "one").write_text("1")
    perturb(model)
    save_adapter(model, folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "notes" / "one").read_text() == "1"
    verify_adapter(folder)


def test_training_facts_that_are_no_json_are_an_error_before_anything_is_written(tmp_path):
    for bad in (float("nan"), object()):
        with pytest.raises(ValueError, match="`training` must hold JSON values, got"):
            save_adapter(trained(), tmp_path / "adapter", training={"x": bad})
    assert not os.listdir(tmp_path)


def test_folder_holds_the_adapter_only(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    values = sum(p.numel() for layer in adapter_layers(model).values() for p in layer.adapter_parameters().values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * values + 16_384
    assert adapter_io.adapter_bytes(folder) == sum(f.stat().st_size for f in folder.iterdir())


def test_merged_model_saves_the_same_adapter(tmp_path):
    model = trained()
    plain = save_adapter(model, tmp_path / "plain")
    merge_adapters(model)
    merged = save_adapter(model, tmp_path / "merged")
    assert (plain / "adapter_model.safetensors").read_bytes() == (merged / "adapter_model.safetensors").read_bytes()


def test_saving_again_replaces_an_adapter_and_never_another_folder(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    first = (folder / "adapter_model.safetensors").read_bytes()
    perturb(model)
    save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert os.listdir(tmp_path) == ["adapter"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis exists and is not an adapter folder"):
        save_adapter(model, other)
    assert (other / "chapter1.txt").read_text() == "years of work"


def test_full_disk_leaves_the_older_adapter_and_nothing_else(tmp_path, monkeypatch):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    perturb(model)
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"bytes\) could not be saved to .*No space left on device.*check that there is"):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_adapter_with_nan_is_not_saved_over_a_good_one(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    good = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).update.A.latent[0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 112 tensors hold NaN or infinite values \(model.layers.0"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == good


# -- damage ----------------------------------------------------------------------------------------------------------


def path_of(folder, kind):
    name = {"config": "adapter_config.json", "manifest": "manifest.json"}.get(kind, "adapter_model.safetensors")
    return folder / name


def truncate(folder, kind, length=-100):
    path = path_of(folder, kind)
    path.write_bytes(path.read_bytes()[:length])


def edit(folder, **changes):
    path = path_of(folder, "config")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder, **changes):
    config = json.loads(path_of(folder, "config").read_text())["config"]
    edit(folder, config=config | changes)


def edit_manifest(folder, sealed=True, **changes):
    path = path_of(folder, "manifest")
    values = json.loads(path.read_text())
    own = values.pop("sha256")
    values |= changes
    path.write_bytes(manifest_bytes(values) if sealed else json.dumps({**values, "sha256": own}, indent=1).encode())


def exchange_a_tensor(folder):
    path = path_of(folder, "weights")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("latent"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})


def mix(folder, kind):
    """Put a file of another adapter into a folder."""
    other = save_adapter(trained(rank=6), folder.parent / "other")
    shutil.move(path_of(other, kind), path_of(folder, kind))
    shutil.rmtree(other)


CHANGED = "is damaged: it has another SHA-256 than when it was written"
DAMAGED = [
    (lambda f: truncate(f, "weights"), DamagedFileError, CHANGED + r" \([\d,]+ bytes, and [\d,]+ were written\)"),
    (lambda f: truncate(f, "weights", 0), DamagedFileError, CHANGED + r" \(0 bytes, and [\d,]+ were written\)"),
    (exchange_a_tensor, DamagedFileError, rf"adapter_model\.safetensors {CHANGED}"),
    (lambda f: mix(f, "weights"), DamagedFileError, rf"adapter_model\.safetensors {CHANGED}"),
    (lambda f: mix(f, "config"), DamagedFileError, rf"adapter_config\.json {CHANGED}"),
    (lambda f: mix(f, "manifest"), DamagedFileError, rf"adapter_config\.json {CHANGED}"),
    (lambda f: path_of(f, "weights").unlink(), FileNotFoundError, r"no complete adapter folder: it has no adapter_mod"),
    (lambda f: path_of(f, "manifest").unlink(), FileNotFoundError, r"it has no manifest.json, and nothing in it can"),
    (lambda f: truncate(f, "manifest"), DamagedFileError, r"manifest.json \([\d,]+ bytes\) is damaged or incomplete"),
    (lambda f: edit_manifest(f, sealed=False, training={"a": 1}), DamagedFileError, rf"manifest\.json {CHANGED}"),
    (
        lambda f: edit_manifest(f, format_version=3),
        ValueError,
        r"manifest.json has format version 3; .* update genlora",
    ),
    (lambda f: path_of(f, "config").unlink(), FileNotFoundError, r"it has no adapter_config.json \(it holds README"),
    (lambda f: path_of(f, "config").write_text("{"), DamagedFileError, r"adapter_config.json \(1 bytes\) is damaged"),
    (lambda f: edit(f, format_version=3), ValueError, r"config.json has format version 3; .* update genlora-lightning"),
    (lambda f: edit(f, format=None, peft_type="LORA"), ValueError, r"It is a PEFT adapter of type LORA"),
    (lambda f: edit_config(f, rank=5), DamagedFileError, rf"adapter_config\.json {CHANGED}"),
    (lambda f: edit_config(f, target_modules=["q_proj"]), DamagedFileError, rf"adapter_config\.json {CHANGED}"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGED)
def test_damaged_or_disagreeing_folder_is_a_clear_error_and_leaves_the_model_as_it_was(
    tmp_path, damage, error, message
):
    folder = save_adapter(trained(), tmp_path / "adapter")
    damage(folder)
    with pytest.raises(error, match=message):
        verify_adapter(folder)
    assert_refused_and_untouched(folder, error, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"rank": 0}, "`rank` must be at least 1, got 0"), ({"r": 8}, "Unknown GenLoRAConfig")],
)
def test_configuration_that_is_read_alone_is_validated(tmp_path, config, message):
    folder = save_adapter(trained(), tmp_path / "adapter")
    edit(folder, config=config)
    with pytest.raises(DamagedFileError, match=rf"adapter_config\.json holds no valid configuration: .*{message}"):
        read_adapter_config(folder)


def test_manifest_proves_each_file_by_its_plain_sha256(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter", training={"größe": 1e-7, "none": None})
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (folder / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": sha256(data)}
    own = manifest.pop("sha256")
    assert own == sha256((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    assert read_adapter(folder).training == {"größe": 1e-7, "none": None}


def assert_refused_and_untouched(folder, error, message, fresh=None, **options):
    fresh = tiny_llama().eval() if fresh is None else fresh
    expected, names = fresh(IDS).logits, list(fresh.state_dict())
    fresh.lm_head.weight.requires_grad_(False)
    tied = fresh.lm_head.weight is fresh.model.embed_tokens.weight
    flags = [p.requires_grad for p in fresh.parameters()]
    with pytest.raises(error, match=message):
        load_adapter(fresh, folder, **options)
    assert list(fresh.state_dict()) == names
    assert [p.requires_grad for p in fresh.parameters()] == flags
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) == tied
    assert torch.equal(fresh(IDS).logits, expected)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def bits_of(folder, kind, count, generator):
    """Some bits of one region of a folder's files, the first and the last among them."""
    path = path_of(folder, kind)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if kind in ("header", "weights") else 0
    start, end = {"header": (0, header), "weights": (header, size)}.get(kind, (0, size))
    return [start * 8, end * 8 - 1, *(generator.randrange(start * 8, end * 8) for _ in range(count))]


def check_flips(tmp_path, kind, count):
    folder = save_adapter(trained(), tmp_path / "adapter", training={"loss": 0.5})
    for bit in bits_of(folder, kind, count, random.Random(0)):
        flip(path_of(folder, kind), bit)
        with pytest.raises(ValueError, match=r"adapter_|manifest"):
            verify_adapter(folder)
        flip(path_of(folder, kind), bit)
    verify_adapter(folder)


@pytest.mark.parametrize("kind", ["weights", "header", "config", "manifest"])
def test_every_flipped_bit_is_found(tmp_path, kind):
    check_flips(tmp_path, kind, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "header", "config", "manifest"])
def test_every_flipped_bit_is_found_in_many_places(tmp_path, kind):
    check_flips(tmp_path, kind, 1000)


def test_folder_that_is_replaced_while_it_is_read_is_refused_and_then_read(tmp_path, monkeypatch):
    folder, other = save_adapter(trained(), tmp_path / "adapter"), trained(rank=6)
    parse = adapter_folder._parse_description

    def replaced_meanwhile(path, data):
        save_adapter(other, folder)
        return parse(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(adapter_folder, "_parse_description", replaced_meanwhile)
        with pytest.raises(DamagedFileError, match=r"replaced while it was read\. Read it again"):
            read_adapter(folder)
    tensors = read_adapter(folder).tensors
    for name, parameter in adapter_parameters(other).items():
        assert torch.equal(tensors[name], parameter)


# -- the base --------------------------------------------------------------------------------------------------------


def test_adapter_of_another_base_is_an_error_that_names_both_and_can_be_overridden(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    other = tiny_llama().eval()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    message = (
        r"was trained on another base: on a model without a name \(LlamaForCausalLM, 20 tensors of [\d,]+ values\); "
        r"this one is .*1 of 20 sampled tensors have other values \(model.layers.1.mlp.up_proj.weight\)"
        r".*base_check=\"warn\""
    )
    assert_refused_and_untouched(folder, WrongBaseError, message, other)
    with pytest.warns(UserWarning, match="up_proj.weight.*loaded all the same"):
        load_adapter(copy.deepcopy(other), folder, base_check="warn")
    load_adapter(other, folder, base_check="off")
    for name, parameter in adapter_parameters(other).items():
        assert torch.equal(parameter, adapter_parameters(model)[name])
    with pytest.raises(ValueError, match="`base_check` must be 'error', 'unquantized', 'warn' or 'off', got 'no'"):
        load_adapter(other, folder, base_check="no")


def test_adapter_of_a_base_of_another_shape_is_an_error_that_says_so(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter")
    bigger = tiny_llama(num_hidden_layers=3).eval()
    message = r"`num_hidden_layers` was 2 and is 3; it had 20 tensors of [\d,]+ values and has 29 of"
    assert_refused_and_untouched(folder, WrongBaseError, message, bigger)
    message = r"does not fit this model: .* It was probably trained on another base model"
    assert_refused_and_untouched(folder, ValueError, message, bigger, base_check="off")
    with pytest.raises(WrongBaseError, match=r"on another base: on .*LlamaForCausalLM.*; this one is .*Sequential"):
        load_adapter(nn.Sequential(nn.ReLU()), folder)
    with pytest.raises(ValueError, match=r"does not fit this Sequential: .* It was trained on .*LlamaForCausalLM"):
        load_adapter(nn.Sequential(nn.ReLU()), folder, base_check="off")
    with pytest.raises(WrongBaseError, match=r"`model_type` was 'llama' and is 'gpt2'"):
        load_adapter(tiny_gpt2(), folder)


def test_nothing_is_injected_into_a_wrong_base(tmp_path, monkeypatch):
    folder = save_adapter(trained(modules_to_train=["lm_head"]), tmp_path / "adapter")

    def inject(*_: object) -> None:
        raise AssertionError("adapters were injected into a base that was not proved")

    monkeypatch.setattr("genlora_lightning.artifacts.adapter_io.inject_layers", inject)
    with pytest.raises(WrongBaseError, match="trained on another base"):
        load_adapter(tiny_llama(hidden_act="relu"), folder)
    with pytest.raises(AssertionError, match="not proved"):  # the right one is
        load_adapter(tiny_llama(), folder)


def test_refused_adapter_leaves_tied_weights_tied(tmp_path):
    folder = save_adapter(trained(modules_to_train=["lm_head"]), tmp_path / "adapter")
    other = tiny_llama().eval()
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    assert_refused_and_untouched(folder, WrongBaseError, "model.norm.weight", other)


def test_module_trained_in_full_does_not_count_as_base(tmp_path):
    model = trained(modules_to_train=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    folder = save_adapter(model, tmp_path / "adapter")
    fresh = tiny_llama().eval()
    load_adapter(fresh, folder)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_tied_weights_that_are_trained_in_full_are_saved(tmp_path):
    model = trained(modules_to_train=["lm_head", "embed_tokens"])
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    fresh = tiny_llama().eval()
    load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_adapter_of_a_cast_would_lose_digits_is_an_error(tmp_path):
    model = trained()
    for layer in adapter_layers(model).values():
        layer.update.A.double()
    folder = save_adapter(model, tmp_path / "adapter")
    message = r"56 tensors would lose digits in its dtype \(.*update.A.latent: stored float64, needed float32"
    assert_refused_and_untouched(folder, ValueError, message)


def test_missing_folder_is_an_error(tmp_path):
    for read in (read_adapter_config, verify_adapter, lambda folder: load_adapter(tiny_llama(), folder)):
        with pytest.raises(FileNotFoundError, match="There is no adapter folder"):
            read(tmp_path / "nowhere")


def test_loading_into_a_model_with_adapters_of_another_configuration_is_an_error(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"another configuration \(rank: 6 there, 4 asked for\)"):
        load_adapter(trained(rank=6), folder)


def test_adapter_goes_on_and_off_a_model_that_has_it_already(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    perturb(model)
    load_adapter(model, folder, replace=True)
    assert torch.equal(model(IDS).logits, expected)
    remove_adapters(model)
    assert torch.equal(model(IDS).logits, tiny_llama().eval()(IDS).logits)


def test_second_adapter_does_not_take_the_first_ones_place_unasked(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    perturb(model)
    mine = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    with pytest.raises(
        ValueError, match=r"trained or loaded before, model.layers.0.*`replace=True`, or call `remove_ad"
    ):
        load_adapter(model, folder)
    assert all(torch.equal(parameter, mine[name]) for name, parameter in adapter_parameters(model).items())
    fresh = tiny_llama().eval()
    inject_adapters(fresh, small_config())
    load_adapter(fresh, folder)  # there was nothing to lose
    assert adapter_layers(fresh)["model.layers.0.mlp.up_proj"].acts()


# -- parts that were adapted one by one ------------------------------------------------------------------------------


def adapted_t5(encoder: dict | None, decoder: dict | None) -> nn.Module:
    model = tiny_t5().eval().requires_grad_(False)
    for part, changes in ((model.transformer.encoder, encoder), (model.transformer.decoder, decoder)):
        if changes is not None:
            inject_adapters(part, small_config(**changes))
    perturb(model)
    return model


SEVERAL = {"rank": 8, "target_modules": ["q", "v"], "modules_to_train": ["final_layer_norm"]}


@pytest.mark.parametrize(("encoder", "decoder"), [({}, SEVERAL), ({}, None), (SEVERAL, {}), ({}, {})])
def test_parts_that_were_adapted_one_by_one_are_loaded_from_one_folder(tmp_path, encoder, decoder):
    model = adapted_t5(encoder, decoder)
    ids = torch.tensor([[3, 4, 5, 1]])
    expected = model(input_ids=ids).logits
    folder = save_adapter(model, tmp_path / "adapter")
    fresh = tiny_t5().eval()
    load_adapter(fresh, folder)
    assert torch.equal(fresh(input_ids=ids).logits, expected)
    ranks = [{name: config.rank for name, config in adapter_configs(m).items()} for m in (model, fresh)]
    assert ranks[0] == ranks[1]
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, fresh)]
    assert trainable[0] == trainable[1]
    stored, card = read_adapter(folder), (folder / "README.md").read_text()
    made = {name: layer for name, layer, _ in stored.adapted()}
    for name, layer in adapter_layers(model).items():
        assert torch.equal(made[name].delta_weight(), layer.delta_weight())
        assert f"| rank | {layer.config.rank} |" in card
    again = save_adapter(fresh, tmp_path / "again")
    assert (again / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    load_adapter(fresh, folder, replace=True)
    assert torch.equal(fresh(input_ids=ids).logits, expected)


def test_parameters_that_are_trained_and_not_saved_are_a_warning(tmp_path):
    model = trained()
    model.model.norm.requires_grad_(True)
    with pytest.warns(
        UserWarning,
        match=r"1 trainable parameters, model.norm.weight among .* name their modules in `modules_to_train`",
    ):
        save_adapter(model, tmp_path / "adapter")


def test_adapters_that_could_not_be_loaded_do_not_replace_the_older_folder(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    layer = adapter_layers(model)["model.layers.0.mlp.up_proj"]
    layer.update.A.latent = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(
        ValueError, match=r"could not be loaded from .*, and was not saved: .*up_proj.update.A.latent has another shape"
    ):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_takes_no_random_numbers(tmp_path):
    model, state = trained(), torch.get_rng_state()
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)


# -- killed writers --------------------------------------------------------------------------------------------------


def save_number(model, folder, number):
    """Save an adapter that is all one number, in every tensor and in the manifest."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.fill_(number)
    save_adapter(model, folder, training={"number": number})


def saved_number(folder):
    """The number, after the folder was verified to be one whole adapter of it."""
    stored = read_adapter(folder)
    values = {value for tensor in stored.tensors.values() for value in tensor.unique().tolist()}
    assert values == {float(stored.training["number"])}
    return stored.training["number"]


def check_random_kills(tmp_path, trials):
    folder, model, generator, last = tmp_path / "adapter", trained(), random.Random(0), 0
    moments = []
    for _ in range(trials):
        last = kill_after(generator.uniform(0, 0.1), lambda i: save_number(model, folder, i), last + 1)
        found = saved_number(folder)
        assert found in (last, last + 1)
        moments.append((last, found))
        last = found
    load_adapter(tiny_llama(), folder)
    save_number(model, folder, last + 1)
    assert saved_number(folder) == last + 1
    assert os.listdir(tmp_path) == ["adapter"]
    assert sorted(os.listdir(folder)) == FILES


WAYS = pytest.mark.parametrize("way", ["exchange", "two renames"])


@WAYS
def test_adapter_of_a_writer_killed_at_random_is_the_old_or_the_new_one(tmp_path, monkeypatch, way):
    if way == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    check_random_kills(tmp_path, 4)


@pytest.mark.slow
@WAYS
def test_adapter_of_a_writer_killed_at_random_is_the_old_or_the_new_one_in_60_trials(tmp_path, monkeypatch, way):
    if way == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    check_random_kills(tmp_path, 60)


def check_kills_before_steps(tmp_path, monkeypatch, way, stride):
    if way == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    folder, model = tmp_path / "adapter", trained()
    save_number(model, folder, 1)
    step, seen = 0, []
    while kill_before_step(step, lambda: save_number(model, folder, 2)):
        seen.append(saved_number(folder))
        copied = tmp_path.parent / f"{tmp_path.name}-copy"  # what the next writer finds
        shutil.copytree(tmp_path, copied)
        save_number(model, copied / "adapter", 3)
        assert saved_number(copied / "adapter") == 3
        assert os.listdir(copied) == ["adapter"]
        shutil.rmtree(copied)
        save_number(model, folder, 1)
        step += stride
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)
    assert saved_number(folder) == 2
    assert find_folder(folder) == folder


@WAYS
def test_adapter_of_a_writer_killed_before_some_steps_is_the_old_or_the_new_one(tmp_path, monkeypatch, way):
    check_kills_before_steps(tmp_path, monkeypatch, way, 5)


@pytest.mark.slow
@WAYS
def test_adapter_of_a_writer_killed_before_every_step_is_the_old_or_the_new_one(tmp_path, monkeypatch, way):
    check_kills_before_steps(tmp_path, monkeypatch, way, 1)


def test_loading_into_merged_adapters_is_an_error_that_says_what_to_do(tmp_path):
    from genlora_lightning import merge_adapters

    model = tiny_llama()
    inject_adapters(model, small_config())
    perturb(model)
    folder = save_adapter(model, tmp_path / "adapter")
    merge_adapters(model)
    with pytest.raises(ValueError, match=r"14 adapters of this model are merged .* Call `unmerge_adapters"):
        load_adapter(model, folder)


def test_float64_adapter_loads_exactly_into_a_float64_base(tmp_path):
    model = trained(modules_to_train=["norm"]).double()  # as `precision="64-true"` makes it
    perturb(model)
    folder = save_adapter(model, tmp_path / "adapter")
    fresh = tiny_llama().eval().double()
    load_adapter(fresh, folder)
    assert {p.dtype for p in adapter_parameters(fresh).values()} == {torch.float64}
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(fresh)[name], tensor), name
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_float32_adapter_stays_float32_in_a_float64_base(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter")
    fresh = tiny_llama().double()
    load_adapter(fresh, folder)
    assert {p.dtype for p in adapter_parameters(fresh).values()} == {torch.float32}


def test_advice_of_the_error_for_a_float64_adapter_in_a_float32_base_helps(tmp_path):
    folder = save_adapter(trained().double(), tmp_path / "adapter")
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"cast the base to float64 before \(`model.double\(\)`\)"):
        load_adapter(model, folder)
    load_adapter(model.double(), folder)
