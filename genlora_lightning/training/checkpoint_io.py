"""Write Lightning's checkpoints atomically, and verify them when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from genlora_lightning.storage.checkpoint_file import read_checkpoint, write_checkpoint
from genlora_lightning.training.lightning_internals import is_local_file_protocol


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints on local disks: written beside their place, flushed, renamed; with a SHA-256 compared on loading.

    Lightning's own writing takes a temporary folder that may lie on another disk, so that the last step is a copy, and
    flushes nothing; a bit flipped in a file loads silently. The files are in torch's format, and load with Lightning
    and torch; files of theirs load here. Remote paths (``s3://…``) are left to Lightning.

    :class:`~genlora_lightning.GenLoRAFinetuning` installs it if the trainer has Lightning's default; without the
    callback: ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint; see :func:`~genlora_lightning.storage.checkpoint_file.write_checkpoint`."""
        local = _local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, local)

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify and load a checkpoint; see :func:`~genlora_lightning.storage.checkpoint_file.read_checkpoint`."""
        local = _local_path(path)
        if local is None or local.is_dir():
            # Lightning before 2.6 has no such argument.
            chosen = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(path, map_location, **chosen)
        loaded: dict[str, Any] = read_checkpoint(local, map_location, weights_only)
        return loaded


def install_atomic_checkpoints(trainer: Trainer) -> None:
    """Give a trainer :class:`AtomicCheckpointIO` in the place of Lightning's default; a plugin of the user's stays."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _local_path(path: Any) -> Path | None:
    if not is_local_file_protocol(path):
        return None
    # `file://…` is a local path, too.
    return Path(get_filesystem(path)._strip_protocol(str(path)))
