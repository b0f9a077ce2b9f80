from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.injection.inject import adapter_parameters, trained_modules
from genlora_lightning.modules import SequenceClassificationModule
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.modules.conftest import PAD, loader

# Most models here are asked before they are trained, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")

MakeTrainer = Callable[..., Trainer]
NAMES = ["bad", "fair", "good"]


def labelled(texts: list[tuple[list[int], int]], length: int = 8, pad: int = PAD) -> dict[str, torch.Tensor]:
    ids = torch.full((len(texts), length), pad)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for index, (tokens, _) in enumerate(texts):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in texts])}


# The class is told by one token of the text.
TEXTS = [([10 + label, *range(20 + index, 22 + index + index % 3)], label) for label in range(3) for index in range(4)]


def classifier(folder: str, **changes: Any) -> SequenceClassificationModule:
    return SequenceClassificationModule(
        folder,
        **{
            "label_names": NAMES,
            "adapter": small_config(rank=8),
            "optimizer": OptimizerConfig(lr=0.02, schedule="constant"),
            **changes,
        },
    )


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_toy_task_is_learnt_by_adapters_and_head(
    make_trainer: MakeTrainer, model_folders: dict[str, str], name: str
) -> None:
    module, data = classifier(model_folders[name]), loader([labelled(TEXTS)])
    trainer = make_trainer(max_steps=40, limit_val_batches=0)
    trainer.fit(module, data)
    result = make_trainer().validate(module, data, verbose=False)[0]
    assert result["val_accuracy"] > 0.9
    assert result["val_f1"] > 0.9
    assert result["val_loss"] < 0.4


@pytest.mark.parametrize(
    ("name", "heads"),
    [("bert", {"classifier", "bert.pooler.dense"}), ("llama", {"score"}), ("gpt2", {"score"})],
)
def test_head_and_what_the_checkpoint_lacks_are_trained_in_full(
    make_trainer: MakeTrainer, model_folders: dict[str, str], name: str, heads: set[str]
) -> None:
    module = classifier(model_folders[name])
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, loader([labelled(TEXTS)]))
    assert set(trained_modules(module.model)) == heads
    in_heads = {f"{head}.{n}" for head in heads for n, _ in module.model.get_submodule(head).named_parameters()}
    trainable = {n for n, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert trainable - in_heads == set(adapter_parameters(module.model)) - in_heads
    assert in_heads < trainable
    names = [group["name"] for group in trainer.optimizers[0].param_groups]
    assert names[-1].startswith("head")


def test_modules_that_the_user_names_stay_named(model_folders: dict[str, str]) -> None:
    module = classifier(model_folders["bert"])
    module.configure_model()

    def resolved(*names: str) -> list[str]:
        return module.resolve_adapter_config(GenLoRAConfig(modules_to_train=list(names))).modules_to_train

    assert resolved() == ["classifier", "bert.pooler.dense"]
    assert resolved("classifier", "embeddings.LayerNorm") == ["classifier", "embeddings.LayerNorm", "bert.pooler.dense"]
    assert resolved("dense") == ["dense", "classifier"]
    given = GenLoRAConfig()
    module.resolve_adapter_config(given)
    assert given == GenLoRAConfig()  # the caller's configuration is not changed


def test_new_head_is_told_in_one_line_and_without_alarm(
    model_folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        classifier(model_folders["bert"]).configure_model()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "has no weights that fit classifier, bert.pooler.dense: they start at random and are trained" in message


def test_head_for_another_number_of_classes_is_replaced(model_folders: dict[str, str], tmp_path: Path) -> None:
    first = classifier(model_folders["bert"], label_names=None, num_labels=5)
    first.configure_model()
    first.model.save_pretrained(tmp_path / "five")
    second = classifier(str(tmp_path / "five"))
    second.configure_model()
    assert second.model.classifier.out_features == 3
    assert second.model.config.id2label == dict(enumerate(NAMES))
    torch.testing.assert_close(second.model.bert.pooler.dense.weight, first.model.bert.pooler.dense.weight)


def test_metrics_are_those_of_the_whole_split(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    module = classifier(model_folders["bert"])
    trainer = make_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(module, loader([labelled(TEXTS)]))
    split = [labelled(TEXTS[:1]), labelled(TEXTS[1:8]), labelled(TEXTS[8:11])]
    result = make_trainer().validate(module, loader(split), verbose=False)[0]
    assert make_trainer().test(module, loader(split), verbose=False)[0] == {
        name.replace("val_", "test_"): value for name, value in result.items()
    }

    whole = labelled(TEXTS[:11])
    module.eval()
    with torch.no_grad():
        logits = module.class_logits(whole)
    labels = whole["labels"]
    assert result["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result["val_accuracy"] == pytest.approx(float(multiclass_accuracy(logits, labels, 3, average="micro")))
    assert result["val_f1"] == pytest.approx(float(multiclass_f1_score(logits, labels, 3, average="macro")))


def test_accumulated_gradient_weighs_each_example_the_same(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    def gradient(batches: list[dict[str, torch.Tensor]], accumulate: int) -> torch.Tensor:
        torch.manual_seed(1)
        module = classifier(
            model_folders["gpt2"], model_kwargs={"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0}
        )
        kept = []
        module.configure_gradient_clipping = lambda *_, **__: kept.append(  # type: ignore[method-assign]
            torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None])
        )
        trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
        trainer.fit(module, loader(batches))
        return kept[0]

    whole = gradient([labelled(TEXTS)], 1)
    parts = gradient([labelled(TEXTS[:2]), labelled(TEXTS[2:])], 2)
    assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_decoder_without_a_pad_token_classifies_the_text_whatever_it_is_padded_with(
    model_folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    module = classifier(model_folders["gpt2"])
    with caplog.at_level(logging.INFO):
        module.configure_model()
    assert "has no pad token; its end-of-text token 1 takes the place" in caplog.text
    module.eval()
    alone = module.class_logits(labelled(TEXTS[:1], length=len(TEXTS[0][0])))
    for pad in (PAD, 5):
        padded = module.class_logits(labelled(TEXTS[:1], length=12, pad=pad))
        torch.testing.assert_close(padded, alone)


def test_prediction_names_the_class(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    module = classifier(model_folders["bert"])
    trainer = make_trainer(max_steps=40, limit_val_batches=0)
    trainer.fit(module, loader([labelled(TEXTS)]))
    batch = labelled(TEXTS)
    del batch["labels"]
    (rows,) = trainer.predict(module, loader([batch]))
    assert [row["label"] for row in rows] == [label for _, label in TEXTS]
    assert [row["label_name"] for row in rows] == [NAMES[label] for _, label in TEXTS]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)


@pytest.mark.parametrize(("name", "precision"), [("bert", "bf16-true"), ("llama", "bf16-true"), ("llama", "32-true")])
def test_head_stays_in_float32_over_a_base_of_16_bits(
    make_trainer: MakeTrainer, model_folders: dict[str, str], name: str, precision: str
) -> None:
    module = classifier(model_folders[name], dtype="bfloat16")
    trainer = make_trainer(max_steps=40, limit_val_batches=0, precision=precision)
    trainer.fit(module, loader([labelled(TEXTS)]))
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    result = make_trainer(precision=precision).validate(module, loader([labelled(TEXTS)]), verbose=False)[0]
    assert result["val_accuracy"] > 0.9


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_label_outside_the_classes_is_an_error(
    make_trainer: MakeTrainer, model_folders: dict[str, str], stage: str
) -> None:
    batch = labelled([([10, 11], 0), ([12], 3)])
    with pytest.raises(ValueError, match="labels from 0 to 3, but the module has 3 classes"):
        getattr(make_trainer(max_steps=1), stage)(classifier(model_folders["bert"]), loader([batch]))


def test_labels_are_checked_on_the_cpu_or_else_in_the_step(model_folders: dict[str, str]) -> None:
    module = classifier(model_folders["bert"])
    module.configure_model()
    good, bad = labelled([([10, 11], 0), ([12], 2)]), labelled([([10, 11], -1), ([12], 0)])
    unseen = module.eval().training_step(good, 0)
    moved = module._apply_batch_transfer_handler(good, device=torch.device("cpu"))
    assert module.known_of(moved["labels"])
    assert torch.equal(module.training_step(moved, 0), unseen)
    moved["labels"][0] = 3
    with pytest.raises(ValueError, match="labels from 2 to 3, but the module has 3 classes"):
        module.training_step(moved, 0)
    with pytest.raises(ValueError, match="labels from -1 to 0, but the module has 3 classes"):
        module.training_step(module._apply_batch_transfer_handler(bad, device=torch.device("cpu")), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give `num_labels`, the number of classes, or `label_names`"),
        ({"num_labels": 1}, "`num_labels` must be an integer of at least 2, got 1"),
        ({"label_names": ["a", "a"]}, "`label_names` must be at least 2 different names"),
        ({"label_names": ["a", "b"], "num_labels": 3}, "`num_labels` is 3, but there are 2 `label_names`"),
    ],
)
def test_classes_must_be_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule("nowhere", **arguments)


def test_weights_of_another_kind_of_model_are_refused(model_folders: dict[str, str], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(model_folders["bert"], folder)
    shutil.copy(Path(model_folders["llama"], "model.safetensors"), folder)
    with pytest.raises(ValueError, match=r"lacks most weights of a BertForSequenceClassification, bert\."):
        classifier(str(folder)).configure_model()


def test_hyperparameters_make_the_module_again(model_folders: dict[str, str]) -> None:
    module = classifier(model_folders["bert"])
    again = SequenceClassificationModule(**module.hparams)
    assert again.label_names == NAMES
    assert again.adapter == module.adapter
