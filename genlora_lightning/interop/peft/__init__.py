"""Make GenLoRA known to Hugging Face PEFT: a tuner like its own, on this library's generator and layers.

::

    from genlora_lightning.interop.peft import GenLoraConfig
    model = peft.get_peft_model(model, GenLoraConfig(target_modules="all-linear"))

Importing this registers the kind ``GENLORA``. PEFT finds no kinds by itself: a program that only loads such an adapter
imports this, too.
"""

from __future__ import annotations

try:
    from peft import __version__ as _peft_version
except ImportError as error:
    raise ImportError(
        f"GenLoRA as a tuner of PEFT needs peft 0.21: pip install 'peft>=0.21,<0.22' ({error})."
    ) from error

# PEFT has no way in for kinds of others: what is used here was read and tested in these releases.
if tuple(_peft_version.split(".")[:2]) != ("0", "21"):
    raise ImportError(
        f"GenLoRA as a tuner of PEFT needs peft 0.21, and {_peft_version} is installed: "
        "pip install 'peft>=0.21,<0.22'. `export_lora` and `import_lora` work with every release."
    )

from genlora_lightning.interop.peft.config import GenLoraConfig
from genlora_lightning.interop.peft.layer import GenLoraLinear
from genlora_lightning.interop.peft.model import GenLoraModel, register

register()

__all__ = ["GenLoraConfig", "GenLoraLinear", "GenLoraModel"]
