"""Data modules: files in, checked and tokenized batches out."""

from genlora_lightning.data._files import DataFileError
from genlora_lightning.data.classification import TextClassificationDataModule
from genlora_lightning.data.instruction import InstructionDataModule

__all__ = ["DataFileError", "InstructionDataModule", "TextClassificationDataModule"]
