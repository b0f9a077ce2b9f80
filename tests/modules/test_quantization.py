"""Bases that are quantized while they are loaded: trained, resumed, saved, exported, and merged unquantized."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genlora_lightning import (
    CausalLMModule,
    GenLoRAFinetuning,
    LoRAConfig,
    OptimizerConfig,
    SequenceClassificationModule,
    export_lora,
    inject_adapters,
    load_adapter,
    load_module,
    merge_adapters,
    save_merged,
)
from genlora_lightning.backbone.identity import base_identity, compare_bases
from genlora_lightning.backbone.quantization import (
    QUANTIZATIONS,
    quantization_config,
    quantized_bytes,
    quantized_linears,
)
from genlora_lightning.cli.main import main
from genlora_lightning.errors import WrongBaseError
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.quantized import codes, keep_layout, weight_bytes
from tests.distributed.runs import SaveAt
from tests.models import tiny_bert, tiny_llama
from tests.plain import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IDS = torch.tensor([[3, 5, 7, 2, 9, 4]])
LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8-weight-only": "torchao", "float8": "torchao"}


def needs(name: str) -> Any:
    absent = [library for library in (LIBRARIES[name], "accelerate") if find_spec(library) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(absent), reason=f"{absent} not installed (extra quant)"))


each = pytest.mark.parametrize("name", [needs(name) for name in QUANTIZATIONS])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=False, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return str(folder)


def module(source: str, name: str | None, **changes: Any) -> CausalLMModule:
    optimizer = OptimizerConfig(lr=0.02, schedule="constant")
    return CausalLMModule(source, quantization=name, dtype="float32", optimizer=optimizer, **changes)


def loader() -> DataLoader[Any]:
    rows = torch.randint(3, 60, (8, 6), generator=torch.Generator().manual_seed(3))

    def collate(items: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(items)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return DataLoader(rows, batch_size=4, collate_fn=collate)


def fit(folder: Path, made: CausalLMModule, *callbacks: Any, ckpt_path: Path | None = None) -> CausalLMModule:
    adapter = GenLoRAFinetuning(LoRAConfig(rank=4), adapter_dir=str(folder / "adapter"))
    torch.manual_seed(0)
    trainer(folder, adapter, *callbacks, max_epochs=8).fit(made, loader(), ckpt_path=ckpt_path)
    return made.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS).logits
    return output


def stored(model: nn.Module) -> dict[str, Tensor]:
    own = {id(p) for p in adapter_parameters(model).values()}
    parameters = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if id(p) not in own}
    return {name: codes(p).clone() for name, p in parameters.items()}


@each
def test_quantized_base_is_trained_resumed_saved_exported_and_merged_unquantized(name, source, tmp_path, capsys):
    fresh = module(source, name)
    fresh.configure_model()
    base = fresh.adapter_root().eval()
    before, start, identity = stored(base), logits(base), base_identity(base)
    assert identity["quantization"] == name
    assert not torch.allclose(start, logits(plain(source)), atol=1e-6)
    sizes = quantized_linears(base)
    assert sorted(sizes) == sorted(adapter_names(source))

    file = tmp_path / "half.ckpt"
    first = Losses()
    trained = fit(tmp_path / "whole", module(source, name), SaveAt(file, 5), first).adapter_root()
    assert sum(first.values[-2:]) < sum(first.values[:2]) - 0.1  # of the same two batches
    torch.testing.assert_close(first.values[0], first.starts, rtol=0, atol=1e-3)
    after = stored(trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    resumed = fit(tmp_path / "resumed", module(source, name), ckpt_path=file).adapter_root()
    states = [adapter_parameters(model) for model in (trained, resumed)]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    wanted = logits(trained)
    assert not torch.allclose(wanted, start, atol=1e-3)

    folder = tmp_path / "whole" / "adapter"
    load_adapter(base, folder)  # after forwards without gradients, in which kernels may pack weights
    assert torch.equal(logits(base), wanted)
    again = load_module(CausalLMModule, file)
    assert again.quantization == name
    output = base.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 9)

    from peft import PeftModel

    export_lora(trained, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(quantized(source, name), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-2, atol=2e-3)

    with pytest.raises(ValueError, match=r"then merge \(`genlora merge` with the original base\)"):
        merge_adapters(trained)
    with pytest.raises(ValueError, match=r"The base is quantized, .*`genlora merge ADAPTER ORIGINAL OUT`"):
        save_merged(trained, tmp_path / "merged")
    with pytest.raises(WrongBaseError, match=rf"one is quantized .* with `quantization='{name}'`, a module's"):
        load_adapter(plain(source), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["merge", str(folder), source, str(tmp_path / "merged")]) == 0, capsys.readouterr()
    into = plain(source)
    load_adapter(into, folder, base_check="unquantized")
    torch.testing.assert_close(logits(plain(str(tmp_path / "merged"))), logits(into), rtol=1e-4, atol=1e-5)
    other = plain(source)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(WrongBaseError, match=r"1 of \d+ sampled tensors have other values \(model.embed_tokens"):
        load_adapter(other, folder, base_check="unquantized")


class Losses(SaveAt):
    """Notes the loss of each batch."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.starts = 0.0

    def on_train_start(self, trainer, pl_module):
        batch = next(iter(loader()))
        with torch.no_grad():
            self.starts = float(quantized(pl_module.source, pl_module.quantization).train()(**batch).loss)

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.values.append(float(outputs["loss"]))


def plain(folder: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized(folder: str, name: str) -> Any:
    import transformers

    loaded = transformers.AutoModelForCausalLM
    return loaded.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization_config(name)).eval()


def quantized_bert(folder: Path) -> Any:
    import transformers

    loaded = transformers.AutoModelForSequenceClassification
    return loaded.from_pretrained(folder, quantization_config=quantization_config("nf4", ["classifier"]))


def adapter_names(folder: str) -> list[str]:
    model = plain(folder)
    inject_adapters(model, LoRAConfig())
    return list(adapter_layers(model))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_exactly(name, dtype, source):
    import transformers

    base = plain(source).to(dtype)
    sizes = quantized_linears(base)
    linears = sum(base.get_submodule(linear).weight.nbytes for linear in sizes)
    counted = weight_bytes(base) - linears + sum(quantized_bytes(name, size) for size in sizes.values())
    config = quantization_config(name)
    made = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    assert counted == weight_bytes(made)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)")
def test_identity_is_that_of_the_loaded_weights_after_a_kernel_has_packed_them(source):
    from bitsandbytes import functional

    base = quantized(source, "nf4")
    before = base_identity(base)
    loaded = base.model.layers[0].mlp.up_proj.weight.data.clone()
    for part in base.modules():
        if type(part).__name__ == "Linear4bit":  # what it does in a forward without gradients, on some CPUs
            state = part.weight.quant_state
            part.weight.data, part.weight.quant_state = functional._convert_weight_packed_for_cpu(
                part.weight.data, state
            )
    packed = base.model.layers[0].mlp.up_proj.weight
    assert packed.shape == (128, 32)
    assert base_identity(base) == before
    assert compare_bases(before, base_identity(quantized(source, "nf4"))) == []
    with pytest.MonkeyPatch.context() as older:
        older.delattr(functional, "_convert_weight_packed_for_cpu_inverse")
        with pytest.raises(RuntimeError, match="adapt it before its first forward"):
            keep_layout(base)
    for part in base.modules():  # nothing was unpacked in part
        if hasattr(part, "support_avx512bf16_for_cpu"):
            assert part.weight.quant_state.packing_format_for_cpu
    keep_layout(base)
    assert not any(getattr(part, "support_avx512bf16_for_cpu", False) for part in base.modules())
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, loaded)  # unpacked: it can be trained and merged


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)")
def test_plain_loop_learns_below_the_last_layer_after_an_evaluation(source):
    model = quantized(source, "nf4")
    parts = [part for part in model.modules() if hasattr(part, "support_avx512bf16_for_cpu")]
    for part in parts:
        part.support_avx512bf16_for_cpu = True  # as on a CPU with bfloat16 arithmetic, whatever this one is
    inject_adapters(model, LoRAConfig(rank=2))
    assert parts
    assert not any(part.support_avx512bf16_for_cpu for part in parts)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith(".B.matrix")}
    assert gradients
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)")
def test_head_of_a_classifier_is_trained_in_full_beside_a_quantized_base(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    made = SequenceClassificationModule(str(tmp_path / "bert"), num_labels=3, quantization="nf4", dtype="float32")
    batch = {
        "input_ids": IDS.repeat(4, 1),
        "attention_mask": torch.ones(4, 6).long(),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    adapter = GenLoRAFinetuning(LoRAConfig(rank=2), adapter_dir=str(tmp_path / "adapter"))
    trainer(tmp_path, adapter, max_epochs=2).fit(made, DataLoader([batch], batch_size=None))
    head = made.adapter_root().classifier
    assert head.weight.requires_grad
    assert head.weight.is_floating_point()
    fresh = quantized_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"bert.pooler is quantized, and cannot be trained in full: leave it out"):
        inject_adapters(fresh, LoRAConfig(rank=2, modules_to_train=["pooler"]))
    assert not adapter_layers(fresh)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int4"}, r"`quantization` must be one of 'nf4', 'int8', 'int8-weight-only', 'float8', got"),
        ({"quantization": "nf4", "low_memory": True}, "`low_memory` reads weights as they are. Leave one out"),
        ({"quantization": "nf4", "model_kwargs": {"quantization_config": {}}}, "say the same thing: give one"),
    ],
)
def test_quantizations_that_cannot_be_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLMModule("x", **arguments)


def test_sharded_strategies_refuse_a_quantized_base_before_it_is_loaded(monkeypatch):
    from types import SimpleNamespace

    from lightning.pytorch.strategies import ModelParallelStrategy

    from genlora_lightning.training.strategies import GenLoRAFSDPStrategy

    made = CausalLMModule("a/model", quantization="nf4")
    for strategy in (GenLoRAFSDPStrategy(), ModelParallelStrategy()):
        monkeypatch.setattr(made, "_trainer_or_none", lambda strategy=strategy: SimpleNamespace(strategy=strategy))
        with pytest.raises(ValueError, match=rf"'nf4', and {type(strategy).__name__} cannot shard .*strategy=\"ddp\""):
            made.configure_model()


def test_absent_library_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"'float8' needs torchao and accelerate: `pip install 'genlora-lightning\[quant"
    ):
        quantization_config("float8")
