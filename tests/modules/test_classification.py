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


@pytest.fixture
def propagating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pytest see what Lightning 2.5 logs."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)


@pytest.mark.usefixtures("propagating")
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


@pytest.mark.usefixtures("propagating")
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
        ({"num_labels": 0, "problem_type": "regression"}, "`num_labels` must be an integer of at least 1, got 0"),
        (
            {"num_labels": 2, "problem_type": "ranking"},
            "`problem_type` must be one of 'single_label_classification', '",
        ),
        ({"num_labels": 2, "class_weights": [1.0]}, r"`class_weights` must be 2 numbers, .*, got \[1\.0\]"),
        ({"num_labels": 2, "class_weights": [1.0, 0]}, r"`class_weights\[1\]` must be .* greater than 0, got 0"),
        ({"num_labels": 1, "problem_type": "regression", "class_weights": [1.0]}, "`class_weights` are for classes"),
        ({"label_names": ["a", "b"], "num_labels": 3}, "`num_labels` is 3, but there are 2 `label_names`"),
    ],
)
def test_classes_must_be_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule("nowhere", **arguments)


# Several labels, and numbers


def several(rows: list[list[float]]) -> dict[str, torch.Tensor]:
    """Texts that have the token 10 + j where label j is 1 (or where the value is above 0)."""
    texts = [([20, *(10 + j if value > 0 else 30 for j, value in enumerate(row))], 0) for row in rows]
    return {**labelled(texts), "labels": torch.tensor(rows, dtype=torch.float32)}


SEVERAL = [[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]
NUMBERS = [[-1.5], [0.5], [2.0], [1.0], [-0.25]]


def two_batches(rows: list[list[float]]) -> list[dict[str, torch.Tensor]]:
    return [several(rows[:1]), several(rows[1:])]


def logits_of(module: SequenceClassificationModule, rows: list[list[float]]) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        return module.class_logits(several(rows))


def test_several_labels_are_learnt_and_their_metrics_are_those_of_the_whole_split(
    make_trainer: MakeTrainer, model_folders: dict[str, str]
) -> None:
    from torchmetrics.functional.classification import multilabel_f1_score

    module = classifier(model_folders["llama"], problem_type="multi_label_classification")
    make_trainer(max_steps=3, limit_val_batches=0).fit(module, loader([several(SEVERAL)]))
    result = make_trainer().validate(module, loader(two_batches(SEVERAL)), verbose=False)[0]
    logits, labels = logits_of(module, SEVERAL), torch.tensor(SEVERAL)
    right = (logits > 0) == labels.bool()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert result == {
        "val_loss": pytest.approx(float(loss), rel=1e-5),
        "val_accuracy": pytest.approx(float(right.float().mean())),
        "val_exact_match": pytest.approx(float(right.all(1).float().mean())),
        "val_f1": pytest.approx(float(multilabel_f1_score(logits, labels.int(), 3, average="macro"))),
    }
    assert module.model.config.problem_type == "multi_label_classification"
    make_trainer(max_steps=40, limit_val_batches=0).fit(module, loader([several(SEVERAL)]))
    (rows,) = make_trainer().predict(module, loader([several(SEVERAL)]))
    assert [row["labels"] for row in rows] == [[j for j in range(3) if row[j]] for row in SEVERAL]
    assert rows[0]["label_names"] == ["fair", "good"]
    assert max(rows[2]["probabilities"]) < 0.5


@pytest.mark.parametrize("values", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_numbers_are_learnt_and_their_metrics_are_those_of_the_whole_split(
    make_trainer: MakeTrainer, model_folders: dict[str, str], values: int, precision: str
) -> None:
    from torchmetrics.functional import r2_score

    targets = [row + [-number for number in row] * (values - 1) for row in NUMBERS]
    batches = two_batches(targets)
    if values == 1:  # as the data module makes them
        batches = [{**batch, "labels": batch["labels"][:, 0]} for batch in batches]
    module = classifier(model_folders["llama"], label_names=None, num_labels=values, problem_type="regression")
    options = {"precision": precision, "limit_val_batches": 3}
    make_trainer(max_steps=3, **options).fit(module, loader(batches))
    result = make_trainer(**options).validate(module, loader(batches), verbose=False)[0]
    assert module.val_metrics["r2"].sum_error.dtype == torch.float32
    if precision == "32-true":
        predicted, wanted = logits_of(module, targets), torch.tensor(targets)
        assert result == {
            "val_loss": pytest.approx(float((predicted - wanted).square().mean()), rel=1e-4),
            "val_mae": pytest.approx(float((predicted - wanted).abs().mean()), rel=1e-4),
            "val_r2": pytest.approx(float(r2_score(predicted, wanted)), rel=1e-4),
        }
    one = make_trainer(precision=precision).validate(module, loader(batches[:1]), verbose=False)[0]
    assert one["val_r2"] != one["val_r2"], "NaN: a single example has no variance"
    ((first,), _) = make_trainer(precision=precision).predict(module, loader(batches))
    assert isinstance(first["value"], float if values == 1 else list)


def test_regression_fits_its_numbers(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    rows = [[-1.0], [1.0]]
    module = classifier(model_folders["llama"], label_names=["height"], problem_type="regression")
    make_trainer(max_steps=30, limit_val_batches=0).fit(module, loader([several(rows)]))
    result = make_trainer().validate(module, loader([several(rows)]), verbose=False)[0]
    assert result["val_r2"] > 0.9


def test_class_weights_weigh_losses(make_trainer: MakeTrainer, model_folders: dict[str, str]) -> None:
    weights = [0.5, 2.0, 4.0]
    module = classifier(model_folders["llama"], class_weights=weights)
    module.configure_model()
    module.eval()
    split = [labelled(TEXTS[:5]), labelled(TEXTS[5:])]
    whole = labelled(TEXTS)
    with torch.no_grad():
        logits = module.class_logits(whole)
    wanted = torch.nn.functional.cross_entropy(logits, whole["labels"], torch.tensor(weights))
    torch.testing.assert_close(module.training_step(whole, 0).detach(), wanted)
    result = make_trainer().validate(module, loader(split), verbose=False)[0]
    assert result["val_loss"] == pytest.approx(float(wanted), rel=1e-5)

    module = classifier(model_folders["llama"], problem_type="multi_label_classification", class_weights=weights)
    module.configure_model()
    logits, labels = logits_of(module, SEVERAL), torch.tensor(SEVERAL)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    wanted = (losses * torch.where(labels == 1, torch.tensor(weights), torch.tensor(1.0))).mean()
    torch.testing.assert_close(module.training_step(several(SEVERAL), 0).detach(), wanted)


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (
            "single_label_classification",
            [0.0, 1.0],
            r"shape \(2,\) and dtype torch\.float32, but the module takes class",
        ),
        (
            "single_label_classification",
            [[0, 1, 1]],
            r"shape \(1, 3\) .* takes classes.*`problem_type` \(it is 'single",
        ),
        ("multi_label_classification", [0, 1], r"shape \(2,\) .* takes floating point ones of \(2, 3\)"),
        ("multi_label_classification", [[0.0, 1.0]], r"shape \(1, 2\) .* takes floating point ones of \(1, 3\)"),
        ("multi_label_classification", [[0.0, 1.0, 2.0]], "labels that are neither 0 nor 1"),
        ("regression", [[0, 1, 2]], r"dtype torch\.int64, but .* takes floating point ones of \(1, 3\)"),
        ("regression", [[0.0, 1.0, float("nan")]], "labels that are NaN or infinite"),
    ],
)
def test_labels_of_another_kind_of_problem_are_refused(
    model_folders: dict[str, str], problem_type: str, labels: Any, message: str
) -> None:
    module = classifier(model_folders["bert"], problem_type=problem_type)
    batch = {**labelled(TEXTS[: len(labels)]), "labels": torch.tensor(labels)}
    for step in (module.training_step, module.validation_step):
        with pytest.raises(ValueError, match=message):
            step(batch, 0)


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
