"""Pictures on the command line: they are set up, shown, learned and named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from genlora_lightning.cli.main import main
from tests.pictures import save_folders, save_vit


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vit(Path("vit"))


def init(data: str, *more: str) -> int:
    return main(["init", "--model", "./vit", "--data", data, "--name", "mine", *more])


def test_a_folder_of_pictures_is_set_up_shown_learned_and_named(capsys):
    root = Path(save_folders(Path("pictures"), 5))
    (root / "red" / "again.png").write_bytes((root / "red" / "000.png").read_bytes())
    assert init("pictures") == 0
    config = yaml.safe_load(Path("mine.yaml").read_text())
    assert config["model"]["init_args"]["label_names"] == ["blue", "green", "red"]
    assert config["data"]["init_args"]["val_fraction"] == 0.1

    capsys.readouterr()
    assert main(["data", "--config", "mine.yaml", "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert "1 examples have the picture of another one; the most frequent pictures:\n  2 × pictures:red/000.png" in out
    assert "width × height   20 × 14" in out
    assert "Stored as RGB: 14" in out
    assert out.count("--- example") == 2
    assert next(line.split() for line in out.splitlines() if line.startswith("blue "))[:2] in (
        ["blue", "5"],
        ["blue", "4"],
    )

    quick = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    small = ["--adapter.rank", "2", "--data.batch_size", "8", "--data.num_workers", "0"]
    main(["fit", "--config", "mine.yaml", *quick, *small])
    run = Path("runs/mine/logs/version_0")
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    where = ["--ckpt_path", str(checkpoint), "--data.predict_file", "new", "--predictions_path", "out.jsonl"]
    save_folders(Path("new"), 1, ("red",), first=20)
    (Path("new") / "red" / "020.png").rename(Path("new") / "a.png")
    main(["predict", "--config", "mine.yaml", *quick[2:], *small, *where])
    (row,) = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    assert row["image"] == "new/a.png"
    assert row["label_name"] in ("blue", "green", "red")
    assert sum(row["probabilities"]) == pytest.approx(1)
    assert json.loads((run / "adapter" / "manifest.json").read_text())["label_names"] == ["blue", "green", "red"]


def test_folders_of_splits_need_nothing_held_out():
    save_folders(Path("pictures/train"), 2)
    save_folders(Path("pictures/val"), 1, first=10)
    assert init("pictures") == 0
    data = yaml.safe_load(Path("mine.yaml").read_text())["data"]["init_args"]
    assert "val_fraction" not in data
    assert data["train_file"] == "pictures"


def test_a_table_of_pictures_is_told_from_one_of_texts():
    save_folders(Path("pictures"), 1)
    with Path("t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        rows.writerows([f"pictures/{name}/000.png", name] for name in ("red", "blue"))
    assert init("t.csv") == 0
    config = yaml.safe_load(Path("mine.yaml").read_text())
    assert config["model"]["class_path"] == "ImageClassificationModule"
    assert config["model"]["init_args"]["label_names"] == ["blue", "red"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [("empty", "empty: --data holds no pictures"), ("stray", "stray:a.png: has no label; give a folder per class")],
)
def test_folders_without_classes_are_one_line(folder, message, capsys):
    Path("empty").mkdir()
    save_folders(Path("stray"), 1, ("red",))
    (Path("stray") / "red" / "000.png").rename(Path("stray") / "a.png")
    assert init(folder) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_configuration_of_the_package_is_read(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", "genlora:images", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].endswith("ImageClassificationModule")
    assert config["data"]["class_path"].endswith("ImageClassificationDataModule")
    assert config["model"]["init_args"]["label_names"] == ["cat", "dog"]
