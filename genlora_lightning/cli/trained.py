"""Find out what a path or a name of something trained stands for, and put an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genlora_lightning.modules import GenLoRAModule


class Trained:
    """What a path or a name stands for.

    Attributes:
        name: As it was given.
        kind: ``"adapter"`` folder of ours, ``"lora"`` folder in PEFT's format, ``"checkpoint"`` or ``"model"``.
        path: Where it lies, but for a model.
        base: Name of the base; of a model itself.
        revision: Commit of the base on the Hub.
        class_name: Name of the class that it was trained on, if that is known.
        label_names: Names of a classifier's classes, as far as its files say them.
        quantization: What the base was quantized by when it was trained on, if the modules can do that.
    """

    def __init__(self, name: str) -> None:
        from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, read_adapter
        from genlora_lightning.artifacts.checkpoint import describe
        from genlora_lightning.artifacts.loading import read_checkpoint
        from genlora_lightning.artifacts.peft_folder import is_peft_folder
        from genlora_lightning.backbone.quantization import QUANTIZATIONS
        from genlora_lightning.interop.lora_files import read_lora

        self.name = name
        self.path = _place_of(name)
        self.label_names: list[str] = []
        base: dict[str, Any] = {}
        if self.path.is_file():
            self.kind = "checkpoint"
            content = read_checkpoint(self.path)
            described = describe(content, str(self.path))
            self.label_names = _label_names(content.get("hyper_parameters", {}))
            base = described.get("base", {"name": described.get("base_model")})
        elif is_peft_folder(self.path):
            self.kind = "lora"
            base = {"name": read_lora(self.path).base_model}
        elif (self.path / CONFIG_FILE).is_file():
            self.kind = "adapter"
            stored = read_adapter(self.path)
            base, self.label_names = stored.base, stored.label_names
        else:
            self.kind = "model"
            base = {"name": name}
        self.base: str | None = base.get("name")
        self.revision: str | None = base.get("revision")
        quantization = base.get("quantization")
        self.quantization: Any = quantization if quantization in QUANTIZATIONS else None
        self.class_name: str | None = base.get("class")


def attach(module: GenLoRAModule, found: Trained, base_check: Any) -> None:
    """Load an adapter into a module whose model is loaded and has none.

    Args:
        module: The module; it is in evaluation mode afterwards, where it was.
        found: The adapter.
        base_check: What to do if the base is not the one that was trained on.

    Raises:
        ValueError: It cannot be used, or does not fit the base.
        OSError: It is not there.
    """
    from genlora_lightning.artifacts.adapter_io import load_adapter
    from genlora_lightning.artifacts.loading import convert_checkpoint
    from genlora_lightning.interop.lora_import import import_lora

    model = module.adapter_root()
    device = next(model.parameters()).device
    if found.kind == "checkpoint":
        # By way of a folder: there its names are the base's, whatever module it was trained in.
        with TemporaryDirectory() as scratch:
            convert_checkpoint(found.path, model, Path(scratch) / "adapter", base_check=base_check)
    elif found.kind == "lora":
        import_lora(model, found.path)
    else:
        load_adapter(model, found.path, base_check=base_check)
    module.to(device).eval()


def _label_names(arguments: dict[str, Any]) -> list[str]:
    """The names of the classes that a module was made with."""
    names, number = arguments.get("label_names"), arguments.get("num_labels")
    if isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    return [f"LABEL_{index}" for index in range(number)] if isinstance(number, int) else []


def _place_of(name: str) -> Path:
    from genlora_lightning.artifacts.adapter_folder import adapter_place

    try:
        return adapter_place(name).expanduser()
    except OSError:
        if name.startswith("hf://"):
            raise
        return Path(name)  # of a base, perhaps, whose loading says what is wrong otherwise
