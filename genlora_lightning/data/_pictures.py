"""Find, check and decode pictures: in a folder per class, in a data table, or in a data set on the Hub.

A picture's source is its path, its bytes, or its row in a data set of the Hub, from which it is read when it is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from genlora_lightning.data._files import iterate_records
from genlora_lightning.data._formats import Record
from genlora_lightning.data._hub import PREFIX, load_hub_dataset
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import shown

#: How training pictures are varied.
Augmentation = Literal["none", "flip", "crop-flip"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)

#: Folders that hold the other splits beside a folder ``train``.
SPLIT_FOLDERS = {"val": ("val", "valid", "validation"), "test": ("test",)}

_ENDS = 64 * 1024  # bytes at either end of a file that tell it from others of its size
_READERS = 16  # files are mostly waited for
_AREAS, _RATIOS, _TRIES = (0.5, 1.0), (3 / 4, 4 / 3), 10  # of a random crop
_TRANSPOSED = range(5, 9)  # values of EXIF's orientation that swap width and height
_ORIENTATION = 0x0112


class HubRow(NamedTuple):
    """A picture in a data set of the Hub."""

    table: Any
    column: str
    number: int


@dataclass(frozen=True)
class Facts:
    """What is known of a picture without decoding it: an identity of its file, its size as shown, and Pillow's mode."""

    digest: str
    width: int
    height: int
    mode: str


def import_pillow() -> Any:
    """Returns Pillow's module `Image`, or raises an ImportError that says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading pictures needs Pillow: pip install 'genlora-lightning[images]'") from error
    return Image


def split_folders(folder: str) -> dict[str, str]:
    """Returns the folders of the splits in a folder that has one called ``train``; else nothing."""
    root = Path(folder)
    if not (root / "train").is_dir():
        return {}
    found = {"train": "train"}
    for split, names in SPLIT_FOLDERS.items():
        there = [name for name in names if (root / name).is_dir()]
        found |= {split: there[0]} if there else {}
    return {split: str(root / name) for split, name in found.items()}


def picture_records(path: str, argument: str, image_column: str, label_column: str) -> Iterator[Record]:
    """Yields the pictures of a folder, a data table or a data set on the Hub.

    Args:
        path: The folder, the file, or the name on the Hub.
        argument: The argument it was given as, for messages.
        image_column: The field with the picture.
        label_column: The field with the label.

    Yields:
        Records whose field ``image_column`` is a picture's source.

    Raises:
        FileNotFoundError: There is no such file.
        DataFileError: It cannot be read, or a record has no picture.
    """
    if path.startswith(PREFIX):
        yield from _hub_records(path, argument, image_column, label_column)
    elif os.path.isdir(path):
        yield from _folder_records(path, argument, image_column, label_column)
    else:
        folder = Path(path).parent
        for record in iterate_records(path, argument):
            source = _source_in(record, image_column, folder)
            yield Record(record.where, {**record.fields, image_column: source})


def _folder_records(path: str, argument: str, image_column: str, label_column: str) -> Iterator[Record]:
    root = Path(path)
    endings = set(import_pillow().registered_extensions())

    def pictures(folder: Path) -> list[Path]:
        # Hidden ones are copies that a notebook or an operating system has made.
        inside = (file for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file())
        return sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(root).parts))

    for file in pictures(root):
        inner = file.relative_to(root)
        label = {label_column: inner.parts[0]} if len(inner.parts) > 1 else {}
        place = inner.as_posix().replace(":", "%3A")  # what follows the last colon is the place in the source
        yield Record(f"{path}:{place}", {image_column: str(file), **label})
    for folder in sorted(root.iterdir()) if argument == "train_file" else ():
        if folder.is_dir() and not folder.name.startswith(".") and not pictures(folder):
            raise DataFileError(str(folder), f"{argument} has a folder for this class, but no picture in it")


def _hub_records(path: str, argument: str, image_column: str, label_column: str) -> Iterator[Record]:
    table = load_hub_dataset(path, argument)
    if image_column not in table.column_names:
        columns = ", ".join(map(shown, table.column_names))
        raise DataFileError(path, f"column {image_column!r} is missing; columns found: {columns}")
    names = getattr(table.features.get(label_column), "names", None)
    rows = table.with_format("arrow")  # as they are: no picture is decoded
    labels = rows[label_column].to_pylist() if label_column in table.column_names else [None] * len(rows)
    for number, label in enumerate(labels):
        if names is not None and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        fields = {image_column: HubRow(rows, image_column, number)}
        yield Record(f"{path}:record {number + 1}", fields if label is None else {**fields, label_column: label})


def _source_in(record: Record, column: str, folder: Path) -> str | bytes:
    """Returns the source of a picture in a table: a path beside the table, bytes, or what `datasets` makes of both."""
    if column not in record.fields:
        found = ", ".join(map(shown, record.fields)) or "none"
        raise DataFileError(record.where, f"field {column!r} is missing; fields found: {found}")
    value = record.fields[column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataFileError(record.where, f"field {column!r} must be the path of a picture, got {shown(value)}")
    file = folder / Path(value.strip()).expanduser()
    if not file.is_file():
        raise DataFileError(record.where, f"there is no picture {value!r} (looked for {file})")
    return str(file)


def read_facts(sources: Iterable[tuple[Any, str]]) -> list[Facts]:
    """Reads the headers of pictures, several at a time.

    Args:
        sources: Each picture's source, and its place for messages.

    Raises:
        DataFileError: One is no picture.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda picture: _facts(*picture), sources))


def _facts(source: Any, where: str) -> Facts:
    Image = import_pillow()
    try:
        file = _opened(source)
        with file:
            length = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(f"{length} ".encode() + file.read(_ENDS))
            file.seek(max(_ENDS, length - _ENDS))
            digest.update(file.read())
            file.seek(0)
            image = Image.open(file)
            width, height = image.size
            if _orientation(image) in _TRANSPOSED:
                width, height = height, width
            return Facts(digest.hexdigest(), width, height, image.mode)
    except Exception as error:  # Pillow's readers raise of many kinds
        raise DataFileError(where, f"is no picture that can be read: {_reason(error)}") from error


def _orientation(image: Any) -> Any:
    """Returns how EXIF says that a picture is to be turned, as far as its header tells."""
    if image.format == "TIFF":
        return image.getexif().get(_ORIENTATION)
    if "exif" not in image.info:  # `getexif` of a PNG would decode all of it
        return None
    exif = import_pillow().Exif()
    exif.load(image.info["exif"])
    return exif.get(_ORIENTATION)


def decoded(source: Any, where: str) -> Any:
    """Returns a picture as Pillow's, in RGB and turned as EXIF says; of an animated one the first frame.

    Transparency is dropped, as transformers' pipelines do; 16-bit grey is scaled to 8 bits.

    Raises:
        DataFileError: It cannot be decoded.
    """
    from PIL import ImageOps

    Image = import_pillow()
    try:
        with _opened(source) as file:
            image = ImageOps.exif_transpose(Image.open(file))
            if image.mode == "F":
                raise ValueError("its values are floating point, whose range nobody knows; save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # which Pillow would cut at 255
                image = Image.fromarray((_array(image).clip(0, 65535) // 257).astype("uint8"))
            if "transparency" in image.info:  # of a palette, about which Pillow warns
                image = image.convert("RGBA")
            return image.convert("RGB")
    except Exception as error:
        raise DataFileError(where, f"the picture cannot be decoded: {_reason(error)}") from error


def _array(image: Any) -> Any:
    import numpy as np

    return np.asarray(image)


def augmented(image: Any, augmentation: str, draw: int) -> Any:
    """Returns a picture as training sees it: mirrored or not, and cropped at random for ``"crop-flip"``.

    A crop has 50 to 100 percent of the area, and sides that are stretched by at most 4:3.

    Args:
        image: Pillow's.
        augmentation: One of `AUGMENTATIONS`.
        draw: Decides all that is random.
    """
    from PIL import ImageOps

    if augmentation == "none":
        return image
    rng = random.Random(draw)
    if augmentation == "crop-flip":
        image = image.crop(_box(rng, *image.size))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(_TRIES):
        area, ratio = width * height * rng.uniform(*_AREAS), rng.uniform(*_RATIOS)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height  # too long for any


def _opened(source: Any) -> Any:
    if isinstance(source, HubRow):
        value = source.table[source.number : source.number + 1][source.column][0].as_py()
        source = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _reason(error: Exception) -> str:
    """An error of Pillow in one line, without the address of an object in it."""
    text = " ".join(str(error).split("<_io.", 1)[0].split()).strip()
    return (text or type(error).__name__)[:300]
