"""Read data files, check them, and make tokenized batches: Lightning data modules."""

from genlora_lightning.data._base import FileDataModule
from genlora_lightning.data.classification import TextClassificationDataModule
from genlora_lightning.data.instruction import InstructionDataModule
from genlora_lightning.errors import DataFileError

__all__ = ["DataFileError", "FileDataModule", "InstructionDataModule", "TextClassificationDataModule"]
