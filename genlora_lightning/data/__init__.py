"""Read data files and pictures, check them, and make batches: Lightning data modules."""

from genlora_lightning.data._base import FileDataModule
from genlora_lightning.data.classification import TextClassificationDataModule
from genlora_lightning.data.images import ImageClassificationDataModule
from genlora_lightning.data.instruction import InstructionDataModule
from genlora_lightning.errors import DataFileError

__all__ = [
    "DataFileError",
    "FileDataModule",
    "ImageClassificationDataModule",
    "InstructionDataModule",
    "TextClassificationDataModule",
]
