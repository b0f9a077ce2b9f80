"""Hand adapter folders to LoRA servers: find one by the name in a request, and expand it to a standard LoRA adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, read_adapter
from genlora_lightning.backbone.identity import describe_base
from genlora_lightning.fields import check_choice, shown
from genlora_lightning.interop.lora_export import write_stored_lora
from genlora_lightning.storage.cache import FolderCache
from genlora_lightning.storage.digests import sha256

_FORMAT = 1  # of what is written; another one has keys of its own


class AdapterServer:
    """Adapters of one folder, by name, as LoRA adapters that any server reads.

    An adapter is expanded when it is first asked for: A and B are generated and written into a cache, under a key made
    of its files' digests. The base's weights are not needed.

    Args:
        adapters: The folder that holds the adapter folders; ``team/reviews`` is a name, too.
        cache: Where expanded adapters are kept.
        limit: Bytes that these may take together; see :class:`~genlora_lightning.storage.cache.FolderCache`.
        base_check: ``"error"``: refuse an adapter of another base than the served one, as far as names and
            configurations tell; ``"off"``: do not look.

    Raises:
        ValueError: ``adapters`` is no folder, or ``base_check`` is neither.
    """

    def __init__(
        self,
        adapters: str | os.PathLike[str],
        cache: str | os.PathLike[str],
        *,
        limit: int,
        base_check: str = "error",
    ) -> None:
        check_choice("base_check", base_check, ("error", "off"))
        self.adapters = Path(adapters)
        if not self.adapters.is_dir():
            raise ValueError(f"The folder of adapters {str(adapters)!r} does not exist.")
        self.cache = FolderCache(cache, limit)
        self.base_check = base_check

    def find(self, name: str) -> Path | None:
        """The folder that a name means; ``None`` if there is none, or if the name leads out of the folder of adapters.

        Args:
            name: Anything; it comes from a request.
        """
        parts = name.split("/")
        if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
            return None
        root = Path(os.path.realpath(self.adapters))
        folder = Path(os.path.realpath(root.joinpath(*parts)))
        return folder if folder.is_dir() and folder.is_relative_to(root) and folder != root else None

    def expand(self, name: str, served: str | None = None) -> Path | None:
        """The folder of a LoRA adapter in PEFT's format that does what the adapter of this name does.

        It stays where it is for as long as this process lives.

        Args:
            name: The adapter's name.
            served: Name or folder of the model that is served; ``None``: not known, nothing is compared.

        Returns:
            The folder, or ``None`` if there is no adapter of this name.

        Raises:
            ValueError: The adapter is damaged, of another base, or holds what a LoRA server cannot take.
            OSError: It cannot be read, or the cache cannot be written.
        """
        folder = self.find(name)
        if folder is None:
            return None
        stored = read_adapter(folder)
        if served is not None and self.base_check == "error":
            check_served_base(stored.base, served, f"The adapter {name!r}")
        files = [(stored.folder / file).read_bytes() for file in (CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE)]
        key = f"{sha256(''.join(map(sha256, files)).encode())}-{_FORMAT}"
        return self.cache.get(key, lambda staging: write_stored_lora(stored, staging))


def check_served_base(base: dict[str, Any], served: str, what: str) -> None:
    """Refuse a served model that is not an adapter's base, by name or else by configuration; no weight is read.

    Args:
        base: The identity of the base that was trained on.
        served: Name or folder of the model that is served.
        what: What was trained, for the message.

    Raises:
        ValueError: It is another model, or nothing says that it is the same.
    """
    config = _served_config(served)
    differences = [
        f"`{key}` was {value!r} and is {config[key]!r}"
        for key, value in base["config"].items()
        if key in config and config[key] != value
    ]
    if differences:
        raise ValueError(f"{what} was trained on {describe_base(base)}, and {served} is served: {differences[0]}.")
    if base["name"] != served and not any(key in config for key in base["config"]):
        raise ValueError(
            f"{what} was trained on {describe_base(base)}, and {served} is served, whose configuration is not at hand: "
            "nothing says that they are one model. Serve it by the same name, or switch this check off."
        )


def _served_config(served: str) -> dict[str, Any]:
    """A model's configuration, of a folder or of the Hub's cache; empty if it is in neither."""
    path: Any = Path(served) / "config.json"
    if not Path(served).is_dir():
        import huggingface_hub

        try:
            path = huggingface_hub.try_to_load_from_cache(served, "config.json")
        except ValueError:  # no name that the Hub could have
            path = None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, (str, Path)) else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"The configuration of {served} cannot be read: {shown(str(error))}.") from error
    return values if isinstance(values, dict) else {}
