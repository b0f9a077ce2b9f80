"""Read data files and pictures, check them, and make batches: Lightning data modules.

Names are imported when they are first used, so that files can be recognized without importing Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genlora_lightning.errors import DataFileError
from genlora_lightning.lazy import names_of

if TYPE_CHECKING:
    from genlora_lightning.data._base import FileDataModule as FileDataModule
    from genlora_lightning.data.classification import TextClassificationDataModule as TextClassificationDataModule
    from genlora_lightning.data.images import ImageClassificationDataModule as ImageClassificationDataModule
    from genlora_lightning.data.instruction import InstructionDataModule as InstructionDataModule

_HOME = {
    "FileDataModule": "_base",
    "ImageClassificationDataModule": "images",
    "InstructionDataModule": "instruction",
    "TextClassificationDataModule": "classification",
}

__all__ = ["DataFileError", *_HOME]

__getattr__, __dir__ = names_of(__name__, _HOME)
