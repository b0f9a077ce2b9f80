"""Read data files, check them, and make tokenized batches: Lightning data modules."""

from genlora_lightning.data._files import DataFileError
from genlora_lightning.data.classification import TextClassificationDataModule
from genlora_lightning.data.instruction import InstructionDataModule

__all__ = ["DataFileError", "InstructionDataModule", "TextClassificationDataModule"]
