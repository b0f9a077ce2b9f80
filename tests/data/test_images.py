"""Pictures become batches: from folders, tables and the Hub; odd ones are right, or one clear line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genlora_lightning.data import DataFileError, ImageClassificationDataModule
from genlora_lightning.data._pictures import augmented, decoded
from tests.pictures import COLOURS, SIDE, picture, save_folders, save_processor

Write = Callable[..., str]


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from genlora_lightning.backbone.pretrained import load_image_processor

    folder = tmp_path_factory.mktemp("processor")
    save_processor(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return load_image_processor(str(folder))


@pytest.fixture
def module(processor: Any) -> Callable[..., ImageClassificationDataModule]:
    def make(train: str, **options: Any) -> ImageClassificationDataModule:
        return ImageClassificationDataModule(processor, train, **{"num_workers": 0, **options})

    return make


Make = Callable[..., ImageClassificationDataModule]


def set_up(data: ImageClassificationDataModule, stage: str | None = "fit") -> ImageClassificationDataModule:
    data.prepare_data()
    data.setup(stage)
    return data


def png(colour: str, number: int = 0) -> bytes:
    target = io.BytesIO()
    picture(colour, number).save(target, "PNG")
    return target.getvalue()


def test_folders_of_classes_become_batches(module: Make, tmp_path: Path) -> None:
    data = set_up(module(save_folders(tmp_path / "all", 5), val_fraction=0.2, batch_size=4))
    assert data.label_names == ["blue", "green", "red"]
    assert data.summary()["train"] == {"examples": 12, "classes": 3}
    assert data.summary()["val"] == {"examples": 3, "classes": 3, "also_in_train": 0}
    batches = list(data.train_dataloader())
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, SIDE, SIDE)] * 3
    for batch in batches:
        assert set(batch) == {"pixel_values", "labels"}
        # the largest channel of a picture is its colour's
        assert data.label_names == list(COLOURS)
        channel = batch["pixel_values"].mean((2, 3)).argmax(1)
        assert torch.equal(2 - channel, batch["labels"])


def test_folders_of_splits_are_found_and_named_ones_go_before_them(module: Make, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        save_folders(tmp_path / "all" / split, 2 + number, first=10 * number)
    data = set_up(module(str(tmp_path / "all")), None)
    assert {split: counts["examples"] for split, counts in data.summary().items()} == {
        "train": 6,
        "val": 9,
        "test": 12,
        "predict": 12,
    }
    other = save_folders(tmp_path / "other", 1, first=40)
    data = set_up(module(str(tmp_path / "all"), test_file=other), "test")
    assert data.summary()["test"]["examples"] == 3
    data = set_up(module(str(tmp_path / "all"), val_fraction=0.5))
    assert data.summary()["val"]["examples"] == 3


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_tables_name_pictures_beside_them(module: Make, write: Write, tmp_path: Path, name: str) -> None:
    save_folders(tmp_path / "pictures", 2)
    rows = [{"image": f"pictures/{c}/00{n}.png", "label": c} for c in COLOURS for n in range(2)]
    rows[0]["image"] = str(tmp_path / rows[0]["image"])
    data = set_up(module(write(name, rows)))
    assert data.summary()["train"] == {"examples": 6, "classes": 3}
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 6


def test_tables_may_hold_the_pictures(module: Make, write: Write) -> None:
    rows = [{"image": {"bytes": png(c, n), "path": f"{n}.png"}, "label": c} for c in COLOURS for n in range(2)]
    data = set_up(module(write("t.parquet", rows), predict_file=write("p.parquet", rows)), None)
    assert data.summary()["train"] == {"examples": 6, "classes": 3}
    (batch,) = data.predict_dataloader()
    assert batch["image"][0].endswith("p.parquet:record 1")


def test_data_sets_of_the_hub_are_read_by_row_and_their_classes_have_names(
    module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    rows = {"image": [{"bytes": png(c, n)} for c in COLOURS for n in range(2)], "label": [0, 0, 1, 1, 2, 2]}
    table = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    data = set_up(module("hf://org/colours:train"))
    assert data.label_names == ["blue", "green", "red"]
    channels = [(b["pixel_values"].mean((2, 3)).argmax(1), b["labels"]) for b in data.train_dataloader()]
    assert all(torch.equal(2 - channel, labels) for channel, labels in channels)


def test_equal_files_stay_on_one_side_and_are_counted(module: Make, tmp_path: Path) -> None:
    root = Path(save_folders(tmp_path / "all", 6))
    for copy in range(5):
        (root / "red" / f"copy{copy}.png").write_bytes((root / "red" / "000.png").read_bytes())
    data = set_up(module(str(root), val_fraction=0.3))
    assert data.summary()["val"]["also_in_train"] == 0
    assert sum(data.summary()[split]["examples"] for split in ("train", "val")) == 23
    found = [*data.duplicates("train"), *data.duplicates("val")]
    assert [(Path(name).name, count) for name, count in found] == [("all:red", 6)] or found[0][1] == 6
    assert found[0][0].endswith("all:red/000.png")


def _exif(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_grey_transparent_animated_turned_and_deep_pictures_are_right(tmp_path: Path) -> None:
    def seen(name: str) -> np.ndarray:
        return np.asarray(decoded(str(tmp_path / name), name))

    Image.new("L", (4, 3), 77).save(tmp_path / "grey.png")
    assert (seen("grey.png") == 77).all()
    Image.fromarray(np.full((3, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert (seen("deep.png") == 40000 // 257).all()
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (seen("clear.png") == (10, 20, 30)).all()
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    assert (seen("palette.png") == (9, 8, 7)).all()
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert (seen("two.gif") == (255, 0, 0)).all()
    Image.new("CMYK", (4, 3), (0, 255, 255, 0)).save(tmp_path / "print.tiff")
    assert seen("print.tiff").shape == (3, 4, 3)
    wide = Image.new("RGB", (8, 4), "black")
    wide.paste((255, 255, 255), (0, 0, 4, 4))
    _exif(wide, tmp_path / "turned.png", 6)  # to be turned by 90° clockwise
    turned = seen("turned.png")
    assert turned.shape == (8, 4, 3)
    assert turned[0].min() == 255
    assert turned[-1].max() == 0


def test_sizes_are_those_that_are_seen(module: Make, tmp_path: Path) -> None:
    root = Path(save_folders(tmp_path / "all", 1))
    _exif(Image.new("RGB", (8, 4), "red"), root / "red" / "turned.png", 6)
    data = set_up(module(str(root)))
    row = next(row for row in data.rows("train") if row["where"].endswith("turned.png"))
    assert (row["width"], row["height"], row["mode"]) == (4, 8, "RGB")


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 3), 0.5).save(tmp_path / "f.tiff")
    with pytest.raises(DataFileError, match=r"f\.tiff: the picture cannot be decoded: its values are floating point"):
        decoded(str(tmp_path / "f.tiff"), "f.tiff")


def test_what_is_no_picture_is_said_before_training(module: Make, tmp_path: Path) -> None:
    root = Path(save_folders(tmp_path / "all", 2))
    (root / "red" / "text.png").write_text("no picture")
    with pytest.raises(DataFileError, match=r"red/text\.png: is no picture that can be read: cannot identify"):
        module(str(root)).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_is_one_line_with_its_name(module: Make, tmp_path: Path, workers: int) -> None:
    root = Path(save_folders(tmp_path / "all", 1))
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    (root / "red" / "cut.png").write_bytes(whole.getvalue()[:2000])
    data = set_up(module(str(root), num_workers=workers))

    def moved() -> list[Any]:
        return [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]

    with pytest.raises(DataFileError, match=r"^.*red/cut\.png: the picture cannot be decoded: [^\n]+$"):
        moved()


def _stray(root: Path) -> None:
    picture("red").save(root / "stray.png")


def _empty_class(root: Path) -> None:
    (root / "violet").mkdir()


def _one_class(root: Path) -> None:
    for name in ("blue", "green"):
        for file in (root / name).iterdir():
            file.unlink()
        (root / name).rmdir()


def _nothing(root: Path) -> None:
    _one_class(root)
    for file in (root / "red").iterdir():
        file.unlink()
    (root / "red").rmdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_stray, r"all:stray\.png: lies in no folder of a class; train_file must have a folder per class"),
        (_empty_class, r"violet: train_file has a folder for this class, but no picture in it"),
        (_one_class, r"all: all records have the label 'red'; there is nothing to tell apart"),
        (_nothing, r"all: train_file holds no pictures"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_one_line(
    module: Make, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    root = Path(save_folders(tmp_path / "all", 2))
    change(root)
    with pytest.raises(DataFileError, match=message):
        module(str(root)).setup("fit")


def test_a_class_that_training_lacks_is_told_with_the_picture(module: Make, tmp_path: Path) -> None:
    train = save_folders(tmp_path / "train", 2, ("red", "green"))
    val = save_folders(tmp_path / "val", 2, ("red", "blue"))
    with pytest.raises(DataFileError, match=r"val:blue/000\.png: unknown label 'blue'; known are green, red"):
        module(train, val_file=val).setup("fit")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "label": "red"}, r"t\.jsonl:3: there is no picture 'none\.png' \(looked for"),
        ({"image": 3, "label": "red"}, r"t\.jsonl:3: field 'image' must be the path of a picture, got 3"),
        ({"picture": "x", "label": "red"}, r"t\.jsonl:3: field 'image' is missing; fields found: 'picture', 'label'"),
        ({"image": "all/red/000.png"}, r"t\.jsonl:3: field 'label' must be a string or a whole number, got None"),
    ],
)
def test_unusable_records_are_refused_with_their_line(
    module: Make, write: Write, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    save_folders(tmp_path / "all", 2)
    good = [{"image": f"all/{c}/000.png", "label": c} for c in ("red", "green")]
    with pytest.raises(DataFileError, match=message):
        module(write("t.jsonl", [*good, row])).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "turn"}, r"`augmentation` must be one of 'none', 'flip', 'crop-flip', got 'turn'"),
        ({"label_names": ["a"]}, r"label_names must be at least two distinct names"),
        ({"image_column": "label"}, "image_column and label_column are both 'label'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(module: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("nowhere", **options)


def test_prediction_needs_no_folders_of_classes(module: Make, tmp_path: Path) -> None:
    train = save_folders(tmp_path / "train", 2)
    (tmp_path / "new").mkdir()
    picture("red").save(tmp_path / "new" / "a.png")
    data = set_up(module(train, predict_file=str(tmp_path / "new")), "predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"pixel_values", "image"}
    assert batch["image"] == [str(tmp_path / "new" / "a.png")]
    data = set_up(module(train, test_file=train), "predict")
    (batch,) = data.predict_dataloader()
    assert batch["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_sizes_that_a_processor_leaves_different_are_one_line(tmp_path: Path) -> None:
    from genlora_lightning.backbone.pretrained import load_image_processor

    save_processor(tmp_path / "p", do_resize=False)
    (tmp_path / "p" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    train = save_folders(tmp_path / "all", 3)
    data = ImageClassificationDataModule(load_image_processor(str(tmp_path / "p")), train, num_workers=0)
    data.setup("fit")
    with pytest.raises(DataFileError, match=r"the image processor makes \(3, 1\d, 2\d\) of it and .* resize to one"):
        list(data.train_dataloader())


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_and_augmentation_go_on_in_the_middle_of_an_epoch_and_in_the_next(
    module: Make, tmp_path: Path, augmentation: str, num_workers: int
) -> None:
    root = tmp_path / "all"
    for colour in ("red", "blue"):
        (root / colour).mkdir(parents=True)
        for number in range(5):
            noise = np.random.default_rng(number).integers(0, 255, (12, 18, 3), np.uint8)
            Image.fromarray(noise).save(root / colour / f"{number}.png")

    def loader() -> Any:
        data = module(str(root), batch_size=3, augmentation=augmentation, num_workers=num_workers)
        data.setup("fit")
        return data.train_dataloader()

    def pixels(batches: Any) -> list[Any]:
        return [batch["pixel_values"].tolist() for batch in batches]

    whole = loader()
    first = pixels(whole)
    iterator = iter(whole)
    for _ in range(2):
        next(iterator)
    state = whole.state_dict()
    rest, third = pixels(iterator), pixels(whole)
    assert len(first) == 4
    assert first != third
    fresh = loader()
    fresh.load_state_dict(state)
    torch.manual_seed(99)
    assert pixels(fresh) == rest
    assert pixels(fresh) == third


def test_augmentation_mirrors_and_crops_and_nothing_else() -> None:
    image = Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3))
    whole, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    flips = [np.asarray(augmented(image, "flip", draw)) for draw in range(20)]
    assert {bool((flip == mirrored).all()) for flip in flips} == {True, False}
    assert all((flip == whole).all() or (flip == mirrored).all() for flip in flips)
    sizes = {augmented(image, "crop-flip", draw).size for draw in range(20)}
    assert len(sizes) > 5
    assert all(0.4 * 12 * 16 <= width * height <= 12 * 16 for width, height in sizes)
    assert augmented(image, "none", 3) is image
    assert augmented(Image.new("RGB", (400, 1)), "crop-flip", 0).size == (400, 1)
