"""Quantize a frozen base while it is loaded, by transformers with bitsandbytes or torchao, and count what it takes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

from torch import nn

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.fields import check_choice
from genlora_lightning.layers.sites import matrix_shape

Quantization = Literal["nf4", "int8", "int8-weight-only", "float8"]

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
_LIBRARIES: dict[str, str] = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8-weight-only": "torchao",
    "float8": "torchao",
}
_NF4_BLOCK, _NF4_OUTER_BLOCK = 64, 256
_NF4_TABLES = 4 * (16 + 256 + 1)  # of each matrix: the 16 values, the 256 of the scales, and their mean


def quantization_config(name: Quantization, skip: list[str] | None = None) -> Any:
    """Make transformers' configuration of a quantization.

    Args:
        name: ``"nf4"``: bitsandbytes' 4 bits with quantized scales, as in QLoRA (arXiv 2305.14314); ``"int8"``: its
            LLM.int8 (arXiv 2208.07339); ``"int8-weight-only"``: torchao's, one scale per row; ``"float8"``: torchao's
            e4m3, one scale per row.
        skip: Names of modules that stay as they are; transformers' choice, the output head, if ``None``.

    Raises:
        ValueError: There is no such quantization.
        ImportError: Its library, or accelerate, is not installed.
    """
    check_choice("quantization", name, QUANTIZATIONS)
    library = _LIBRARIES[name]
    absent = [package for package in (library, "accelerate") if importlib.util.find_spec(package) is None]
    if absent:
        raise ImportError(
            f"`quantization` {name!r} needs {' and '.join(absent)}: `pip install 'genlora-lightning[quant]'`."
        )
    import transformers

    if name == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=skip,
        )
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    from torchao import quantization

    made = quantization.Int8WeightOnlyConfig if name == "int8-weight-only" else quantization.Float8WeightOnlyConfig
    return transformers.TorchAoConfig(made(), modules_to_not_convert=skip)


def quantization_of(config: Any) -> str | None:
    """What a model's configuration says of its quantization: one of our names, else the method's; ``None`` without."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_4bit"):
        return "nf4" if values.get("bnb_4bit_quant_type") == "nf4" else "bitsandbytes 4 bits"
    if values.get("load_in_8bit"):
        return "int8"
    kind = str(values.get("quant_type"))
    names = {"Int8WeightOnlyConfig": "int8-weight-only", "Float8WeightOnlyConfig": "float8"}
    method = values.get("quant_method")
    return next((own for theirs, own in names.items() if f"'{theirs}'" in kind), str(getattr(method, "value", method)))


def quantized_linears(model: nn.Module) -> dict[str, MatrixShape]:
    """The linears that transformers quantizes in a model: all but the output head."""
    from transformers.quantizers.base import HfQuantizer

    kept = HfQuantizer.get_modules_to_not_convert(model)
    found = {}
    for name, module in model.named_modules():
        is_kept = any(f".{name}.".startswith(f".{key}.") or name.endswith(f".{key}") for key in kept)
        if isinstance(module, nn.Linear) and not is_kept:
            shape = matrix_shape(module)
            assert shape is not None
            found[name] = shape
    return found


def quantized_bytes(name: Quantization, shape: MatrixShape) -> int:
    """Count the bytes of one quantized matrix ``(out, in)`` with its scales, exactly.

    n = out · in values take, with ``nf4`` n/2, a byte for each 64 of them, 4 for each 256 of those, and 1,092 for
    tables; with ``int8`` and ``float8`` n and 4 for each row; with ``int8-weight-only`` n and 5 for each row.

    Args:
        name: The quantization.
        shape: The matrix's.
    """
    n = shape.out_features * shape.in_features
    if name == "nf4":
        scales = -(-n // _NF4_BLOCK)
        return -(-n // 2) + scales + 4 * -(-scales // _NF4_OUTER_BLOCK) + _NF4_TABLES
    return n + shape.out_features * (5 if name == "int8-weight-only" else 4)
