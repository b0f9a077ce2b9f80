from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning.callbacks.predictions import PredictionWriter
from tests.plain import trainer


class Squares(LightningModule):
    """Predicts the squares of 0 to 6, in the form that is asked for."""

    def __init__(self, form: str = "list") -> None:
        super().__init__()
        self.form = form

    def predict_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        squares = batch[0] ** 2
        columns = {"square": squares, "word": ["é\n"] * len(squares)}
        rows = [{"square": int(value), "tensor": value} for value in squares]
        return {"tensor": squares, "list": squares.tolist(), "columns": columns, "rows": rows, "none": None}[self.form]

    def predict_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(7)), batch_size=2)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predict(root: Path, model: LightningModule, **settings: Any) -> Trainer:
    runner = trainer(root, PredictionWriter(str(root / "out.jsonl")), **settings)
    runner.predict(model, return_predictions=False)
    return runner


def test_url_is_refused_and_makes_no_local_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The file of the predictions 's3://bucket/p\.jsonl' is a URL"):
        PredictionWriter("s3://bucket/p.jsonl")
    with pytest.raises(ValueError, match=r"'memory://bucket/run/predictions\.jsonl' is a URL"):
        trainer("memory://bucket/run", PredictionWriter()).predict(Squares())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["tensor", "list", "columns", "rows"])
def test_each_example_becomes_one_line(tmp_path: Path, form: str) -> None:
    predict(tmp_path, Squares(form))
    expected = {
        "columns": [{"index": i, "square": i * i, "word": "é\n"} for i in range(7)],
        "rows": [{"index": i, "square": i * i, "tensor": i * i} for i in range(7)],
    }
    assert read(tmp_path / "out.jsonl") == expected.get(form, [{"index": i, "prediction": i * i} for i in range(7)])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_default_place_is_the_log_directory(tmp_path: Path) -> None:
    trainer(tmp_path, PredictionWriter()).predict(Squares(), return_predictions=False)
    assert len(read(tmp_path / "predictions.jsonl")) == 7


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # then their order counts
def test_texts_of_the_batch_are_copied_and_numbers_are_not(tmp_path: Path) -> None:
    class Texts(Squares):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"generated": [prompt.upper() for prompt in batch["prompt"]]}

        def predict_dataloader(self) -> Any:
            batch = {"prompt": ["a", "b"], "completion": ["c", None], "ids": torch.zeros(2, 3), "one": ["too few"]}
            return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    predict(tmp_path, Texts())
    assert read(tmp_path / "out.jsonl") == [
        {"index": 0, "prompt": "a", "completion": "c", "generated": "A"},
        {"index": 1, "prompt": "b", "completion": None, "generated": "B"},
    ]


def test_several_loaders_keep_their_order_and_are_told_apart(tmp_path: Path) -> None:
    class Two(Squares):
        def predict_dataloader(self) -> Any:
            return [DataLoader(TensorDataset(torch.arange(n)), batch_size=2) for n in (3, 2)]

    predict(tmp_path, Two())
    assert [(row.get("dataloader", 0), row["index"]) for row in read(tmp_path / "out.jsonl")] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]


def test_two_processes_write_one_file_in_the_order_of_the_data(tmp_path: Path) -> None:
    predict(tmp_path, Squares(), strategy="ddp_fork", devices=2)
    assert read(tmp_path / "out.jsonl") == [{"index": i, "prediction": i * i} for i in range(7)]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_failed_prediction_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    class Fails(Squares):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().predict_step(batch, batch_idx)

    (tmp_path / "out.jsonl").write_text("earlier")
    with pytest.raises(RuntimeError, match="out of luck"):
        predict(tmp_path, Fails())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.jsonl", "earlier")]


def test_prediction_must_have_an_entry_for_each_example(tmp_path: Path) -> None:
    class Short(Squares):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return [1]

    class Uneven(Squares):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"a": [1, 2], "b": [1]}

    with pytest.raises(ValueError, match="Short returned 1 predictions for a batch of 2 examples"):
        predict(tmp_path, Short())
    with pytest.raises(ValueError, match=r"differ in length: \{'a': 2, 'b': 1\}"):
        predict(tmp_path, Uneven())


@pytest.mark.filterwarnings("ignore:predict returned None")
def test_no_prediction_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`predict_step` returned None"):
        predict(tmp_path, Squares("none"))
