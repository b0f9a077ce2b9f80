"""Tiny vision models, and pictures of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"blue": (20, 30, 200), "green": (20, 190, 40), "red": (210, 30, 20)}
SIDE = 16


def tiny_vit(**changes: Any):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return ViTForImageClassification(ViTConfig(**{**sizes, **changes}))


def save_processor(folder: Path, **changes: Any) -> None:
    """Write what a picture becomes before the model sees it: sides of 16 pixels, values from -1 to 1."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))


def save_vit(folder: Path, model: Any = None) -> str:
    """Save a model with its image processor."""
    (tiny_vit() if model is None else model).save_pretrained(folder)
    save_processor(folder)
    return str(folder)


def picture(colour: str, number: int = 0, size: tuple[int, int] = (20, 14)) -> Image.Image:
    """A picture of a colour with some noise, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8))


def save_folders(root: Path, each: int = 4, colours: tuple[str, ...] = tuple(COLOURS), first: int = 0) -> str:
    """Write a folder for each colour, with so many different pictures of different sizes in it."""
    for colour in colours:
        (root / colour).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            picture(colour, number, (20 + number % 3, 14 + number % 2)).save(root / colour / f"{number:03}.png")
    return str(root)
