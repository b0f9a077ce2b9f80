from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from genlora_lightning import ImageClassificationDataModule, load_adapter, load_module, save_adapter
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.injection.inject import adapter_parameters, trained_modules
from genlora_lightning.modules import ImageClassificationModule
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.modules.conftest import loader
from tests.pictures import COLOURS, SIDE, save_folders, save_vit, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")

MakeTrainer = Callable[..., Trainer]
NAMES = list(COLOURS)


def tiny_models() -> dict[str, Any]:
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        Dinov2Config,
        Dinov2Model,
        SwinConfig,
        SwinForImageClassification,
    )

    torch.manual_seed(0)
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    convnext = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": SIDE, "patch_size": 4}
    swin = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    return {
        "vit": tiny_vit(),
        "dinov2": Dinov2Model(Dinov2Config(**vit, mlp_ratio=2)),  # a backbone without a head
        "swin": SwinForImageClassification(SwinConfig(**swin, window_size=2, num_labels=3)),
        "convnext": ConvNextForImageClassification(ConvNextConfig(**convnext, num_labels=3)),
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vision")
    return {name: save_vit(root / name, model) for name, model in tiny_models().items()}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_folders(tmp_path_factory.mktemp("pictures") / "all", 4)


def classifier(folder: str, **changes: Any) -> ImageClassificationModule:
    given = {
        "label_names": NAMES,
        "adapter": small_config(rank=8),
        "optimizer": OptimizerConfig(lr=0.02, schedule="constant"),
    }
    return ImageClassificationModule(folder, **{**given, **changes})


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "convnext"])
def test_colours_are_learnt_by_adapters_and_head(
    make_trainer: MakeTrainer, folders: dict[str, str], pictures: str, name: str
) -> None:
    module = classifier(folders[name])
    data = ImageClassificationDataModule(folders[name], pictures, val_file=pictures, batch_size=12, num_workers=0)
    rate = TokensPerSecond()
    make_trainer(max_steps=20, limit_val_batches=0, callbacks=[rate]).fit(module, datamodule=data)
    assert rate.tokens == 0  # pictures have none
    result = make_trainer().validate(module, datamodule=data, verbose=False)[0]
    assert result["val_accuracy"] > 0.9
    assert result["val_f1"] > 0.9
    assert set(trained_modules(module.model)) == {"classifier"}
    assert any(not n.startswith("classifier") for n in adapter_parameters(module.model))
    rows = module.predict_step(next(iter(loader([{"pixel_values": torch.rand(2, 3, SIDE, SIDE)}]))), 0)
    assert [sorted(row) for row in rows] == [["label", "label_name", "probabilities"]] * 2
    assert rows[0]["label_name"] in NAMES


def test_a_head_for_as_many_classes_is_kept_and_another_is_replaced(folders: dict[str, str]) -> None:
    swin = tiny_models()["swin"]
    kept, new = classifier(folders["swin"]), classifier(folders["swin"], label_names=None, num_labels=5)
    for module in (kept, new):
        module.configure_model()
    assert torch.equal(kept.model.classifier.weight, swin.classifier.weight)
    assert new.model.classifier.weight.shape[0] == 5
    assert kept.model.config.id2label == dict(enumerate(NAMES))


def test_a_base_in_bfloat16_takes_float32_pictures(folders: dict[str, str]) -> None:
    module = classifier(folders["vit"], dtype="bfloat16")
    module.configure_model()
    logits = module.class_logits({"pixel_values": torch.rand(2, 3, SIDE, SIDE)})
    assert logits.shape == (2, 3)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "found"),
    [({}, "NoneType"), ({"pixel_values": torch.zeros(3, SIDE, SIDE)}, r"\(3, 16, 16\)"), ([1], "NoneType")],
)
def test_a_batch_without_pictures_is_refused(folders: dict[str, str], batch: Any, found: str) -> None:
    module = classifier(folders["vit"])
    module.configure_model()
    with pytest.raises(ValueError, match=rf"`pixel_values` must be a tensor \(pictures, .*, got {found}\."):
        module.class_logits(batch)


def test_an_adapter_folder_brings_its_labels_back(
    make_trainer: MakeTrainer, folders: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    module = classifier(folders["dinov2"])
    batch = {"pixel_values": torch.rand(6, 3, SIDE, SIDE), "labels": torch.arange(6) % 3}
    make_trainer(max_steps=3, limit_val_batches=0).fit(module, loader([batch]))
    expected = module.eval().class_logits(batch)
    save_adapter(module.model, tmp_path / "adapter")

    again = load_module(ImageClassificationModule, tmp_path / "adapter", model=folders["dinov2"])
    assert again.label_names == NAMES
    torch.testing.assert_close(again.class_logits(batch), expected)

    plain = AutoModelForImageClassification.from_pretrained(folders["dinov2"], num_labels=3)
    load_adapter(plain, tmp_path / "adapter")
    assert plain.config.id2label == dict(enumerate(NAMES))
    assert plain.config.label2id == {name: index for index, name in enumerate(NAMES)}

    named = AutoModelForImageClassification.from_pretrained(folders["dinov2"], id2label={0: "x", 1: "y", 2: "z"})
    load_adapter(named, tmp_path / "adapter")
    assert named.config.id2label == {0: "x", 1: "y", 2: "z"}  # a name of the user's stays


def test_a_resumed_run_equals_one_without_a_stop(
    make_trainer: MakeTrainer, folders: dict[str, str], pictures: str, tmp_path: Path
) -> None:
    def run(steps: int, ckpt: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        module = classifier(folders["vit"], adapter=small_config(rank=4, dropout=0.2))
        data = ImageClassificationDataModule(
            folders["vit"], pictures, batch_size=4, augmentation="crop-flip", num_workers=0
        )
        saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=4, save_top_k=-1)
        options = {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": True, "callbacks": [saver]}
        make_trainer(**options).fit(module, datamodule=data, ckpt_path=ckpt)
        return {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}

    whole = run(7)  # of three batches an epoch
    resumed = run(7, str(tmp_path / "at-step=4.ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
