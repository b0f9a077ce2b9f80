"""Read LoRA adapters in PEFT's format, with every tensor and every setting accounted for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from genlora_lightning.fields import shown
from genlora_lightning.interop.lora_sites import from_peft
from genlora_lightning.storage.documents import check_document
from genlora_lightning.storage.paths import local_path
from genlora_lightning.text import natural_key

# PEFT's names; that ours are the same is our choice and not a need.
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # values of rows, whatever its name says


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 and value != 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_pattern(item: tuple[Any, Any]) -> bool:
    try:
        re.compile(item[0])
    except (re.error, TypeError):
        return False
    return _is_finite(item[1])


def _are_tokens(value: Any) -> bool:
    """Whether a value is a list of ids, each of them once."""
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        return False
    return len(value) == len({*value})


# Settings that make a LoRA more, or something else, than base + scaling · B · A.
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of B",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "adapters that wait for invocation tokens",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow routing",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "MonteCLoRA's sampling",
}
_SETTINGS_SHAPE: dict[Any, Any] = {
    "lora_alpha?": _is_finite,
    "alpha_pattern?": lambda value: value is None or (isinstance(value, dict) and all(map(_is_pattern, value.items()))),
    "lora_dropout?": lambda value: not value or (_is_finite(value) and 0 <= value < 1),
    "modules_to_save?": lambda value: value is None or (isinstance(value, list) and all(map(_is_name, value))),
    "target_parameters?": lambda value: not value or (isinstance(value, list) and all(map(_is_name, value))),
    "base_model_name_or_path?": (str, type(None)),
    "trainable_token_indices?": lambda value: (
        not value or (all(map(_are_tokens, value.values())) if isinstance(value, dict) else _are_tokens(value))
    ),
}
# These change the base's weights before training; the saved A and B belong to the changed ones.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoRALayer(NamedTuple):
    """The LoRA of one layer, with A and B as they are in this library.

    Args:
        A: ``(r, in)``, in float32; of a stack of E matrices ``(E, r, in)``.
        B: ``(out, r)``, in float32; of a stack ``(E, out, r)``.
        site: ``"linear"``, ``"embedding"``, ``"convolution"`` or ``"stack"``.
    """

    A: Tensor
    B: Tensor
    site: str = "linear"


class TokenRows(NamedTuple):
    """Rows of an embedding or head that are trained in full.

    Args:
        tokens: Their ids, k of them, rising.
        rows: ``(k, D)``, in float32: values, and no update of the base's.
    """

    tokens: list[int]
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class LoRAFiles:
    """A LoRA adapter as it was read.

    Args:
        layers: The LoRA of each layer, by the layer's name in the base model. That of a parameter has the name of
            PEFT's wrapper, and A and B as PEFT has them: the file does not say how many matrices it is for.
        target_parameters: PEFT's names of the parameters.
        alpha: PEFT's ``lora_alpha``.
        alpha_pattern: Those of some layers, by expressions.
        use_rslora: Whether the scalings are rank-stabilised.
        dropout: PEFT's ``lora_dropout``.
        saved: Tensors of the modules that are saved in full, by their names in the base model.
        modules_to_save: The names of those modules.
        base_model: Name or folder of the base model.
        bases: Weights of the base that PEFT has saved beside adapted embeddings, by the embeddings' names.
        token_rows: PEFT's ``trainable_token_indices`` with their rows, by the embedding's or head's name.
    """

    layers: dict[str, LoRALayer]
    target_parameters: tuple[str, ...]
    alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    saved: dict[str, Tensor]
    modules_to_save: tuple[str, ...]
    base_model: str | None
    bases: dict[str, Tensor]
    token_rows: dict[str, TokenRows]

    def alpha_of(self, name: str) -> float:
        """PEFT's ``lora_alpha`` of a layer or parameter."""
        return _first_match(self.alpha_pattern, name, self.alpha)


def read_lora(folder: str | os.PathLike[str]) -> LoRAFiles:
    """Read a LoRA adapter folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the adapter is not a plain LoRA; the message says what is in the way.
    """
    folder = local_path(folder, "LoRA adapter folder")
    config = _read_config(folder)
    try:
        tensors = load_file(_existing(folder / WEIGHTS_FILE))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged or incomplete: {error!s:.500}.") from error
    factors: dict[str, dict[str, Tensor]] = {}
    sites: dict[str, str] = {}
    bases: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        found = from_peft(name, tensor)
        if found is not None and name != key:
            layer, site, letter, matrix = found
            if sites.setdefault(layer, site) != site:
                raise ValueError(f"{folder} holds tensors of {layer} as of a {sites[layer]} and of a {site}.")
            factors.setdefault(layer, {})[letter] = matrix.float().contiguous()
        elif name == key or "lora_" in name:
            raise ValueError(
                f"{folder} holds {key} {tuple(tensor.shape)}, which is no LoRA of a linear, embedding or convolution."
            )
        elif name.endswith(_ROWS_SUFFIX):
            rows[name.removesuffix(_ROWS_SUFFIX)] = tensor.float()
        elif name.endswith(".base_layer.weight"):
            bases[name.removesuffix(".base_layer.weight")] = tensor
        else:
            saved[name] = tensor.float() if tensor.is_floating_point() else tensor
    layers = {}
    for name in sorted(factors, key=natural_key):
        pair = factors[name]
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {letter: tuple(tensor.shape) for letter, tensor in pair.items()}
            raise ValueError(f"{folder} holds no matching A and B for {name}: {shapes}.")
        A, B = pair["A"], pair["B"]
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"The LoRA of {name} in {folder} holds NaN or infinite values.")
        layers[name] = LoRALayer(A, B, sites[name])
    if not layers:
        raise ValueError(f"{folder} holds no LoRA of any layer.")
    return LoRAFiles(
        layers=layers,
        target_parameters=tuple(config.get("target_parameters") or ()),
        alpha=float(config.get("lora_alpha", 8)),
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=bool(config.get("use_rslora")),
        dropout=float(config.get("lora_dropout") or 0.0),
        saved=saved,
        modules_to_save=_saved_modules(config, saved, folder),
        base_model=config.get("base_model_name_or_path") or None,
        bases={name: tensor for name, tensor in bases.items() if name in layers},
        token_rows=_token_rows(config.get("trainable_token_indices") or {}, rows, folder),
    )


def _token_rows(
    given: list[int] | dict[str, list[int]], rows: Mapping[str, Tensor], folder: Path
) -> dict[str, TokenRows]:
    named = given if isinstance(given, dict) else dict.fromkeys(rows or ["the input embedding"], given)
    found: dict[str, TokenRows] = {}
    for name, values in rows.items():
        tokens = next((ids for key, ids in named.items() if name == key or name.endswith(f".{key}")), [])
        if values.ndim != 2 or len(values) != len(tokens):
            raise ValueError(
                f"{folder} holds rows {tuple(values.shape)} of {name}, and its `trainable_token_indices` name "
                f"{len(tokens)} of its tokens: {given!r:.200}."
            )
        if not values.isfinite().all():
            raise ValueError(f"The rows of {name} in {folder} hold NaN or infinite values.")
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        found[name] = TokenRows([tokens[at] for at in order], values[order])
    # PEFT may also name a head that is tied to the embedding, and writes their rows once.
    known = [one.tokens for one in found.values()]
    for name, tokens in named.items():
        if tokens and sorted(tokens) not in known:
            raise ValueError(
                f"{folder} has `trainable_token_indices` for {name}, and holds no rows of {tokens!r:.200}."
            )
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no LoRA adapter folder: it has no {path.name}.")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder / CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(
            f"{path} describes {f'a PEFT adapter of type {kind!s:.40}' if kind else 'no PEFT adapter'}, not a LoRA."
        )
    for name in unsupported_settings(config):
        raise ValueError(f"{path} has `{name}`: {_UNSUPPORTED[name]} are more than a plain LoRA's ΔW = s·B·A.")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path} has `bias` {shown(config['bias'])}: trained biases cannot be kept. Train with bias 'none'."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path} has `init_lora_weights` {start!r}, whose A and B belong to changed base weights. Convert it to a "
            "plain LoRA first (PEFT: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`)."
        )
    assert isinstance(config, dict)
    check_lora_settings(path, config)
    return config


def check_lora_settings(path: Path, config: dict[str, Any]) -> None:
    """Check the settings of a LoRA that are read here.

    Raises:
        DamagedFileError: One of them is something else than PEFT writes.
    """
    check_document(str(path), config, _SETTINGS_SHAPE)


def unsupported_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which a LoRA is more, or something else, than ``ΔW = s·B·A``."""
    return {name: config[name] for name in _UNSUPPORTED if config.get(name)}


def lora_scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor s of a linear's LoRA, by PEFT's configuration.

    Args:
        config: What PEFT's file says.
        name: The linear's name, for ``alpha_pattern``.
        rank: Of its A and B.
    """
    alpha = _first_match(config.get("alpha_pattern") or {}, name, float(config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first_match(pattern: Mapping[str, float], name: str, otherwise: float) -> float:
    """The value of the first expression that PEFT matches with a name."""
    return next((float(value) for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _saved_modules(config: dict[str, Any], saved: dict[str, Tensor], folder: Path) -> tuple[str, ...]:
    """The full names of the modules saved in full, from the names that the configuration gives and the tensors."""
    wanted = config.get("modules_to_save") or []
    modules: dict[str, None] = {}
    for name in saved:
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(1, len(parts))]
        own = [p for p in prefixes if p.endswith(tuple(wanted))]  # as PEFT matches them: parts of a name, too
        if not own:
            raise ValueError(f"{folder} holds {name}, which is of no module in its `modules_to_save` {wanted}.")
        modules[own[0]] = None
    return tuple(modules)


def has_mark(mark: str, folder: Path) -> bool:
    """Whether the tensors' file of a folder says that this library wrote it, by an entry of its metadata."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return mark in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
