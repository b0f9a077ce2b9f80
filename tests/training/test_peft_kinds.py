"""Runs with adapters of PEFT: what ours promise holds for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning import (
    AdapterFinetuning,
    GenLoRAFinetuning,
    LoRAConfig,
    OptimizerConfig,
    SequenceClassificationModule,
    convert_checkpoint,
    describe_adapter,
    inject_adapters,
    load_adapter,
    load_module,
    remove_adapters,
    save_adapter,
)
from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.artifacts.peft_folder import read_peft_folder
from genlora_lightning.errors import DamagedFileError, NonFiniteGradientError, WrongBaseError
from genlora_lightning.injection.inject import adapter_config
from genlora_lightning.injection.peft_adapters import PeftAdapter, held_root, inject_peft
from genlora_lightning.injection.places import adapter_places
from genlora_lightning.training.optim import parameter_groups
from tests.models import tiny_bert, tiny_llama
from tests.plain import PlainEncoder, encoder_loader, trainer

# PEFT's own use of transformers, where the tests call it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # PEFT before 0.21 says so of any copy of a head.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]

LINEARS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, lora_dropout=0.1),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True),
    "VeRA": lambda: peft.VeraConfig(r=8, target_modules=LINEARS, vera_dropout=0.1),
    "IA3": lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEARS),
}


class Decoder(LightningModule):
    """A language model in a module that knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = tiny_llama(tie_word_embeddings=False)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.lm(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.02)


def loader() -> DataLoader[Any]:
    ids = torch.randint(3, 64, (24, 6), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(ids), batch_size=4, shuffle=True)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(folder: Path, config: Any, *callbacks: Callback, ckpt: Path | None = None, **settings: Any) -> Decoder:
    module = Decoder()
    torch.manual_seed(5)
    fit = trainer(folder, AdapterFinetuning(config), *callbacks, max_epochs=2, **settings)
    fit.fit(module, loader(), ckpt_path=ckpt)
    return module


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_run_of_a_peft_kind_resumes_exactly_and_peft_loads_its_folder(tmp_path, kind):
    file = tmp_path / "middle.ckpt"
    whole = run(tmp_path / "whole", KINDS[kind](), SaveAt(8, file))  # in the second epoch
    resumed = run(tmp_path / "resumed", KINDS[kind](), ckpt=file)
    assert resumed.losses == whole.losses[8:]
    assert trained(whole)
    assert all(torch.equal(tensor, trained(resumed)[name]) for name, tensor in trained(whole).items())
    base = Decoder().lm.eval()
    ids = torch.arange(12).view(2, 6)
    before = base(ids).logits
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "whole" / "adapter").eval()
    expected = whole.eval().lm(ids).logits
    assert not torch.equal(before, expected)
    assert torch.equal(loaded(ids).logits, expected)

    # And by this library, from the folder and from the checkpoint at its end.
    other = load_module(Decoder(), tmp_path / "whole" / "adapter")
    assert torch.equal(other.lm(ids).logits, expected)
    middle = load_module(Decoder(), file)
    assert not torch.equal(middle.lm(ids).logits, expected)
    remove_adapters(other)
    assert torch.equal(other.lm(ids).logits, before)
    assert list(other.state_dict()) == list(Decoder().state_dict())


def test_checkpoint_holds_what_is_trained_and_nothing_of_the_base(tmp_path):
    file = tmp_path / "run.ckpt"
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    module = run(tmp_path, config, SaveAt(2, file), max_steps=2)
    content = read_checkpoint(file)
    names = set(content["state_dict"])
    assert names == set(trained(module))
    assert {name.rpartition("lm.")[2] for name in names} == {
        "lm_head.modules_to_save.default.weight",
        *(f"model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight" for i in (0, 1) for x in "AB"),
    }
    described = content["genlora"]
    assert described["config"] == {"kind": "peft", **PeftAdapter.of(config).values}
    assert described["prefix"] == "lm."
    assert described["trained_modules"] == {"lm.lm_head": ["lm.lm_head.modules_to_save.default.weight"]}
    assert set(content["optimizer_states"][0]["state"]) == names


def test_folder_is_peft_s_with_a_manifest_and_not_replaced_by_another_run(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    run(tmp_path, config, max_steps=1)
    folder = tmp_path / "adapter"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"}
    stored = read_peft_folder(folder)
    assert stored.manifest is not None
    assert stored.manifest["training"]["global_step"] == 1
    assert stored.manifest["training"]["run"]
    assert stored.config["inference_mode"] is True
    module = Decoder()
    with pytest.raises(FileExistsError, match="holds the adapter of another run"):
        trainer(tmp_path, AdapterFinetuning(config), overwrite=False).fit(module, loader())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    theirs = tmp_path / "theirs"
    peft.get_peft_model(tiny_llama(), config).save_pretrained(theirs)
    with pytest.raises(FileExistsError, match="is no adapter folder"):  # not ours to replace, whatever is allowed
        trainer(tmp_path, AdapterFinetuning(config, adapter_dir=str(theirs))).fit(Decoder(), loader())


def test_damage_and_another_base_are_found_when_a_folder_is_loaded(tmp_path):
    run(tmp_path, peft.VeraConfig(r=2, target_modules=["q_proj"]), max_steps=2)
    folder = tmp_path / "adapter"
    other = Decoder().lm
    with torch.no_grad():
        other.model.layers[0].self_attn.o_proj.weight += 1
    names = list(other.state_dict())
    with pytest.raises(WrongBaseError, match=r"1 of .* other values"):
        load_adapter(other, folder)
    with pytest.warns(UserWarning, match="loaded all the same"):
        load_adapter(other, folder, base_check="warn")
    remove_adapters(other)
    assert list(other.state_dict()) == names
    narrow = tiny_llama(hidden_size=32)
    with pytest.raises(ValueError, match="tensors have another shape"):
        load_adapter(narrow, folder, base_check="off")
    assert not adapter_places(narrow)  # as it was
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedFileError, match="another SHA-256"):
        load_adapter(Decoder().lm, folder)


def test_folder_that_peft_wrote_is_loaded(tmp_path):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    report = load_adapter(model, tmp_path)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model.eval()(ids).logits, theirs.eval()(ids).logits)
    assert "PEFT's LORA adapts 2 linears" in report.summary()
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, replace=True)
    with pytest.raises(ValueError, match="adapters of peft"):
        inject_adapters(model, LoRAConfig(rank=2))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.LoraConfig(target_modules=["nonsense"]), "nonsense"),
        (  # after the embedding's place has been taken
            lambda: peft.LoraConfig(
                target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1], "nonsense": [2]}
            ),
            "nonsense",
        ),
        (
            lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[10**6]),
            "out of bounds",
        ),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], bias="x" * 10**4), "bias: x"),
    ],
)
def test_model_that_peft_cannot_adapt_is_left_as_it_was(config, reason):
    model = tiny_llama(tie_word_embeddings=False)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    refused = rf"PEFT cannot put PEFT's LORA into this LlamaForCausalLM: .*{reason}"
    with pytest.raises(ValueError, match=refused) as raised:
        inject_peft(model, PeftAdapter.of(config()))
    assert len(str(raised.value)) < 1000
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert held_root(model) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "allocated by calls after each step"),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "forward of PEFT's own model"),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "changes the base's frozen"),
    ],
)
def test_kinds_that_cannot_work_are_refused_before_anything_is_changed(tmp_path, config, reason):
    module = Decoder()
    with pytest.raises(ValueError, match=f"cannot be trained with AdapterFinetuning: .*{reason}"):
        trainer(tmp_path, AdapterFinetuning(config())).fit(module, loader())
    assert list(module.state_dict()) == list(Decoder().state_dict())


def test_untested_kinds_run_with_a_warning_and_generation_by_step_is_refused(tmp_path):
    hra = peft.HRAConfig(r=2, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="PEFT's HRA was not tested here with one device"):
        trainer(tmp_path, AdapterFinetuning(hra), max_steps=1).fit(Decoder(), loader())
    lora = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match='`generate="step"` is for adapters that are generated'):
        trainer(tmp_path, AdapterFinetuning(lora, generate="step")).fit(Decoder(), loader())


def test_adapters_and_copies_stay_float32_in_a_base_of_16_bits(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    module = run(tmp_path, config, max_steps=2, precision="bf16-true")
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    assert module.lm.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {t.dtype for t in read_peft_folder(tmp_path / "adapter").tensors.values()} == {torch.float32}


def test_low_rate_and_a_gradient_that_is_not_finite_are_seen(tmp_path):
    class Slow(Decoder):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-6)

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="PEFT's LORA mostly learns at 0.0001 to 0.002"):
        trainer(tmp_path, AdapterFinetuning(config), max_steps=1).fit(Slow(), loader())

    class Broken(Decoder):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    with pytest.raises(NonFiniteGradientError, match=r"step 3.*after 2 steps is saved in .*adapter-interrupted"):
        trainer(tmp_path, AdapterFinetuning(config)).fit(Broken(), loader())
    assert read_peft_folder(tmp_path / "adapter-interrupted").manifest["training"]["global_step"] == 2  # type: ignore[index]


def test_checkpoints_of_both_names_of_the_callback_are_the_same_and_kinds_are_not_confused(tmp_path):
    file = tmp_path / "run.ckpt"
    ours = LoRAConfig(rank=2, target_modules=["q_proj"])
    torch.manual_seed(5)
    whole = Decoder()
    trainer(tmp_path, GenLoRAFinetuning(ours), SaveAt(2, file), max_epochs=1).fit(whole, loader())
    resumed = Decoder()
    trainer(tmp_path, AdapterFinetuning(ours), max_epochs=1).fit(resumed, loader(), ckpt_path=file)
    assert resumed.losses == whole.losses[2:]
    with pytest.raises(ValueError, match=r"another configuration .kind: 'lora' in the checkpoint, 'peft' here"):
        run(tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]), ckpt=file)


def test_own_modules_take_peft_s_kinds_and_train_their_heads(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "model")
    values = {"kind": "peft", "peft_type": "VERA", "r": 4, "target_modules": ["query", "value"]}
    rates = OptimizerConfig(lr=0.01, head_lr_factor=0.1)
    module = SequenceClassificationModule(str(tmp_path / "model"), num_labels=3, adapter=values, optimizer=rates)
    given = SequenceClassificationModule(
        str(tmp_path / "model"), num_labels=3, adapter=PeftAdapter.from_dict(values).make()
    )
    assert module.hparams["adapter"]["peft_type"] == given.hparams["adapter"]["peft_type"] == "VERA"
    ids = torch.randint(3, 64, (16, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader(rows, batch_size=4))
    assert [name for name, place in adapter_places(module).items() if place.is_copy] == ["model.classifier"]
    groups = {group["name"]: group for group in parameter_groups(module, rates)}
    assert set(groups) == {"adapter_no_decay", "head", "head_no_decay"}
    assert groups["adapter_no_decay"]["lr"] == 0.01
    assert groups["head"]["lr"] == pytest.approx(0.001)
    again = load_module(SequenceClassificationModule, tmp_path / "adapter", model=str(tmp_path / "model"), num_labels=3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(again.class_logits(batch), module.eval().class_logits(batch))


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="PEFT before 0.21 leaves biases out, of which a run warns"
)
def test_second_fit_of_a_module_goes_on_and_trained_biases_are_saved(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only", modules_to_save=["classifier"])
    module = PlainEncoder()
    trainer(tmp_path, AdapterFinetuning(config), max_steps=2).fit(module, encoder_loader())
    middle = {name: tensor.clone() for name, tensor in trained(module).items()}
    assert sum(name.endswith("base_layer.bias") for name in middle) == 2
    module.requires_grad_(True)  # whatever is done to the flags meanwhile
    trainer(tmp_path, AdapterFinetuning(config), max_steps=2).fit(module, encoder_loader())
    assert set(trained(module)) == set(middle)
    assert all(not torch.equal(tensor, middle[name]) for name, tensor in trained(module).items())
    again = load_module(PlainEncoder(), tmp_path / "adapter")
    batch = next(iter(encoder_loader()))
    assert torch.equal(again.step(batch), module.eval().step(batch))
    with pytest.raises(ValueError, match="has adapters of PEFT, and this is for adapters of this library"):
        adapter_config(module)
    with pytest.raises(ValueError, match=r"made with another configuration .*r: 2 there, 4 asked for"):
        trainer(tmp_path, AdapterFinetuning(peft.LoraConfig(r=4, target_modules=["query"])), max_steps=1).fit(
            module, encoder_loader()
        )


def test_checkpoint_of_a_peft_kind_names_the_way_to_a_folder(tmp_path):
    file = tmp_path / "run.ckpt"
    run(tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]), SaveAt(1, file), max_steps=1)
    for tool in (describe_adapter, lambda path: convert_checkpoint(path, tiny_llama(), tmp_path / "out")):
        with pytest.raises(ValueError, match=r"adapters of PEFT \(LORA\).*`save_adapter\(load_module\("):
            tool(file)
    save_adapter(load_module(Decoder(), file), tmp_path / "out")
    assert set(read_peft_folder(tmp_path / "out").tensors) == set(read_peft_folder(tmp_path / "adapter").tensors)
