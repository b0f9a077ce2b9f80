"""Tell one base model from another: its name, its configuration and a cheap fingerprint of its weights.

The fingerprint holds the number and a digest of all names and shapes, and a few values of each tensor, at fixed places.
It reads some thousand numbers, whatever the model's size. It is the same with and without adapters, merged or not, and
on every device; what the adapter trains in full is left out.

Values and not a digest of them, because the same weights are loaded as float32 by one and as bfloat16 by another:
values agree if they are equal, or if those of one side are bfloat16 or float16 numbers and those of the other differ
from them by no more than the rounding to that dtype. No tolerance is given otherwise: two bases of the same dtype that
differ in the last bit are different ones. Integers and 8-bit floats are codes of quantized weights, not values: a base
that is quantized here and was not there is another base, since its adapted layers give other outputs. What a quantized
weight counts for is the matrix that it stands for, and its codes as they were loaded, however a kernel has packed them
since; so the base that was quantized is known in its unquantized form, by all that was not quantized.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genlora_lightning.backbone.low_memory import WeightSource, weight_source
from genlora_lightning.backbone.quantization import quantization_of
from genlora_lightning.errors import WrongBaseError
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.places import adapter_places, base_name
from genlora_lightning.layers.quantized import codes, is_quantized, matrix_size
from genlora_lightning.storage.digests import dtype_name, sha256

BaseCheck = Literal["error", "unquantized", "warn", "off"]

SAMPLES_PER_TENSOR = 8
_MOST_TENSORS = 512
_GOLDEN = 0.6180339887498949
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
)
_VALUES = ("float64", "float32", "bfloat16", "float16")
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # largest relative error of rounding to the dtype
_FLOAT16_SUBNORMAL_ROUNDING = 2.0**-25  # the absolute one below float16's normal range
_SHOWN = 3


def base_parameters(model: nn.Module, without: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters by the names they have without adapters, merged weights as they were, tied ones once.

    Modules trained in full belong to the adapter and are left out. A weight that one of them is tied to, elsewhere in
    the model, is the base's: training in full unties it.

    Args:
        model: The model, with adapters or without.
        without: Names of modules that are going to be trained in full; what the model has not is passed over.
    """
    places = adapter_places(model)
    own = {id(p) for place in places.values() for p in place.adapter_parameters().values()}
    originals: dict[int, Tensor] = {id(layer.weight): layer.base_weight for layer in adapter_layers(model).values()}
    wanted = set(without)
    trained = [*trained_modules(model).values(), *(part for name, part in plain_modules(model) if name in wanted)]
    trained += [place.module for place in places.values() if place.is_copy]
    trained_in_full = {id(inner) for module in trained for inner in module.modules()}
    seen = set()
    for place, module in plain_modules(model):
        if id(module) in trained_in_full:
            continue
        for name, parameter in module.named_parameters(prefix=place, recurse=False):
            tensor = originals.get(id(parameter), parameter)
            if id(parameter) not in own and id(tensor) not in seen:
                seen.add(id(tensor))
                # What a quantized one knows of itself is lost by `detach`.
                yield base_name(name, places), tensor if is_quantized(tensor) else tensor.detach()


def base_identity(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """What tells one base from another, as JSON values; what is not known is left out or ``None``.

    Args:
        model: The model, with adapters or without.
        without: Names of modules that are going to be trained in full, and belong to the adapter then.
    """
    parameters = sorted(base_parameters(model, without), key=lambda item: item[0])
    # Where rows are trained in full, those of new tokens are others whenever a base is resized for them.
    rows = {f"{name}.{layer.parameter}" for name, layer in adapter_layers(model).items() if layer.config.is_derived}
    stride = max(1, -(-len(parameters) // _MOST_TENSORS))
    config = next((c for m in model.modules() if hasattr(c := getattr(m, "config", None), "model_type")), None)
    values = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    source = weight_source(model)
    rope = getattr(config, "rope_parameters", None)  # transformers 5 has the angle's base there
    if values["rope_theta"] is None and isinstance(rope, dict):
        values["rope_theta"] = rope.get("rope_theta")
    quantization = quantization_of(config)
    return {
        **({} if quantization is None else {"quantization": quantization}),
        "name": base_model_name(model),
        "revision": getattr(config, "_commit_hash", None),
        "class": type(model).__name__,
        "config": {key: value for key, value in values.items() if isinstance(value, (str, int, float))},
        "fingerprint": {
            "num_tensors": len(parameters),
            "num_values": sum(matrix_size(tensor).numel() for _, tensor in parameters),
            "structure_sha256": _structure((name, matrix_size(tensor)) for name, tensor in parameters),
            "samples": {
                name: [_dtype_name(tensor), list(matrix_size(tensor)), _sample(tensor, name, source)]
                for name, tensor in islice(parameters, 0, None, stride)
                if name not in rows
            },
        },
    }


def _is_sample(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        return False
    if not isinstance(value[1], list) or not all(isinstance(size, int) for size in value[1]):
        return False
    try:
        return value[2] is None or len(base64.b64decode(value[2], validate=True)) % 4 == 0
    except (ValueError, TypeError):
        return False


#: What :func:`base_identity` gives, for :func:`~genlora_lightning.storage.documents.check_document`.
IDENTITY_SHAPE: dict[Any, Any] = {
    "quantization?": str,
    "name": (str, type(None)),
    "revision": (str, type(None)),
    "class": str,
    "config": {str: (str, int, float, bool)},
    "fingerprint": {"num_tensors": int, "num_values": int, "structure_sha256": str, "samples": {str: _is_sample}},
}


def compare_bases(stored: dict[str, Any], present: dict[str, Any], *, unquantized: bool = False) -> list[str]:
    """How two identities differ, in phrases for a message; empty if they are one base.

    Names and revisions are not compared: the same weights lie in many folders.

    Args:
        stored: Identity of the base that was trained on.
        present: Identity of the base at hand.
        unquantized: Whether the base at hand may have numbers where the other one had codes of them.
    """
    problems = [
        f"`{key}` was {value!r} and is {present['config'][key]!r}"
        for key, value in stored["config"].items()
        if key in present["config"] and present["config"][key] != value
    ]
    then, now = stored["fingerprint"], present["fingerprint"]
    structures = {then["structure_sha256"], now["structure_sha256"]}
    if None not in structures and len(structures) > 1:
        shapes = [
            f"{name} is {tuple(now['samples'][name][1])}, was {tuple(entry[1])}"
            for name, entry in then["samples"].items()
            if name in now["samples"] and now["samples"][name][1] != entry[1]
        ]
        absent = [f"{name} is not there" for name in then["samples"] if name not in now["samples"]]
        details = (shapes + absent)[:_SHOWN]
        problems.append(
            f"it had {then['num_tensors']} tensors of {then['num_values']:,} values and has {now['num_tensors']} of "
            f"{now['num_values']:,}, or they have other names or shapes"
            + (f" ({'; '.join(details)})" if details else "")
        )
    both = [name for name, e in then["samples"].items() if name in now["samples"] and now["samples"][name][1] == e[1]]
    if None in structures and then["samples"] and not both:
        problems.append("none of its sampled tensors is there under its name and with its shape")
    dtypes = [name for name in both if not _comparable(then["samples"][name][0], now["samples"][name][0])]
    if unquantized and "quantization" in stored and "quantization" not in present:
        both = [name for name in both if name not in dtypes or now["samples"][name][0] not in _VALUES]
        dtypes = [name for name in dtypes if name in both]
    if dtypes:
        was, is_ = (side["samples"][dtypes[0]][0] for side in (then, now))
        problems.append(
            f"{len(dtypes)} of {len(both)} tensors were {was} and are {is_} ({dtypes[0]}): one is quantized or packed"
            + _remedy(stored, present)
        )
    different = [
        name for name in both if name not in dtypes and not _agree(then["samples"][name], now["samples"][name])
    ]
    if different:
        shown = ", ".join(different[:_SHOWN]) + (", …" if len(different) > _SHOWN else "")
        problems.append(f"{len(different)} of {len(both)} sampled tensors have other values ({shown})")
    return problems


def _remedy(stored: dict[str, Any], present: dict[str, Any]) -> str:
    there, here = stored.get("quantization"), present.get("quantization")
    if there == here:
        return ""
    if here is not None:
        return f" (`quantization` {there!r} then, {here!r} now)"
    return (
        f". Load the base with `quantization={there!r}`, a module's argument, as then; to merge into the unquantized "
        'one, use `genlora merge`, or give base_check="unquantized"'
    )


def require_same_base(stored: dict[str, Any], present: dict[str, Any], what: str, base_check: BaseCheck) -> bool:
    """Refuse another base than the one that was trained on, or warn of it.

    Args:
        stored: Identity of the base that was trained on.
        present: Identity of the base at hand.
        what: What was trained, for the message: ``"The adapter in runs/a"``.
        base_check: ``"error"``, ``"warn"``, or ``"off"``: do not look; ``"unquantized"``: an error, but for the
            unquantized form of a quantized base.

    Returns:
        Whether it is proved to be the same.

    Raises:
        WrongBaseError: It is another base; the message names both and how they differ.
        ValueError: ``base_check`` is none of the four.
    """
    if base_check not in ("error", "unquantized", "warn", "off"):
        raise ValueError(f"`base_check` must be 'error', 'unquantized', 'warn' or 'off', got {base_check!r}.")
    is_form = base_check == "unquantized"
    problems = [] if base_check == "off" else compare_bases(stored, present, unquantized=is_form)
    if not problems:
        return base_check != "off"
    message = (
        f"{what} was trained on another base: on {describe_base(stored)}; this one is {describe_base(present)}. "
        f"{'; '.join(problems)}."
    )
    if base_check == "warn":
        warnings.warn(f"{message} It is loaded all the same.", stacklevel=3)
        return False
    raise WrongBaseError(
        f"{message} Nothing was loaded. Load it into the base it was trained on; if you know that this one is right, "
        'give base_check="warn" or "off" (--base-check on the command line).'
    )


def without_samples(identity: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """An identity that does not look at the values of some parameters, because a run trains them."""
    left_out = set(names)
    fingerprint = identity["fingerprint"]
    samples = {name: entry for name, entry in fingerprint["samples"].items() if name not in left_out}
    return {**identity, "fingerprint": {**fingerprint, "samples": samples}}


def identity_of_part(identity: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The identity of a base that lies in a larger module, whose names begin with a prefix there.

    Where the module holds more than that base, or too many tensors to have each of them in its samples, the number and
    digest of all names are not known; they are not compared then.
    """
    if not prefix:
        return identity
    fingerprint = identity["fingerprint"]
    samples = {n.removeprefix(prefix): e for n, e in fingerprint["samples"].items() if n.startswith(prefix)}
    whole = len(samples) == fingerprint["num_tensors"]
    structure = _structure((name, entry[1]) for name, entry in samples.items()) if whole else None
    return {**identity, "fingerprint": {**fingerprint, "structure_sha256": structure, "samples": samples}}


def describe_base(identity: dict[str, Any]) -> str:
    """An identity in a few words for messages: ``'name' (class, revision, 272 tensors of 134,515,008 values)``."""
    fingerprint = identity["fingerprint"]
    facts = [identity["class"]]
    if identity.get("quantization"):
        facts.append(f"quantized: {identity['quantization']}")
    if identity["revision"]:
        facts.append(f"revision {identity['revision']}")
    facts.append(f"{fingerprint['num_tensors']} tensors of {fingerprint['num_values']:,} values")
    return f"{identity['name'] or 'a model without a name'} ({', '.join(facts)})"


def base_model_name(model: nn.Module) -> str | None:
    """The name a transformers model was loaded by (Hub id or folder), of the model itself or of its only such part."""
    names = {
        name for module in model.modules() if isinstance(name := getattr(module, "name_or_path", None), str) and name
    }
    return names.pop() if len(names) == 1 else None


def _structure(shapes: Iterable[tuple[str, Iterable[int]]]) -> str:
    return sha256("".join(f"{name} {tuple(shape)}\n" for name, shape in shapes).encode())


def _dtype_name(tensor: Tensor) -> str:
    stored = codes(tensor) if is_quantized(tensor) else tensor
    return dtype_name((tensor if stored is None else stored).dtype)


def _sample(tensor: Tensor, name: str, source: WeightSource | None) -> str | None:
    """A few values as base64 of little-endian float32; ``None`` if there are none to be had (no memory, or packed).

    Values that were not read yet are taken from the file in which they are.
    """
    if is_quantized(tensor) and not tensor.is_meta:
        stored_codes = codes(tensor)
        if stored_codes is None:
            return None
        tensor = stored_codes
    size = tensor.numel()
    if not size or (tensor.is_meta and source is None):
        return None
    # Multiples of the golden ratio lie evenly, but in step with no row length.
    places = torch.tensor([int(size * ((k + 0.5) * _GOLDEN % 1)) for k in range(SAMPLES_PER_TENSOR)])
    if tensor.is_meta and source is not None:
        stored = source.values_at(name, places)
        return None if stored is None else _encoded(stored)
    try:
        places = places.to(tensor.device)
        flat = tensor.view(-1)[places] if tensor.is_contiguous() else tensor[torch.unravel_index(places, tensor.shape)]
        values = flat.to("cpu", torch.float32)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):  # a tensor class with a layout of its own
        return None
    return _encoded(values)


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _values(entry: list[Any]) -> Tensor | None:
    if entry[2] is None:
        return None
    return torch.frombuffer(bytearray(base64.b64decode(entry[2])), dtype=torch.float32)


def _comparable(a: str, b: str) -> bool:
    return a == b or (a in _VALUES and b in _VALUES)


def _agree(a: list[Any], b: list[Any]) -> bool:
    x, y = _values(a), _values(b)
    if x is None or y is None:
        return True
    if x.numel() != y.numel():
        return False
    (relative, rounded), (relative_y, rounded_y) = _rounding(x), _rounding(y)
    bound = torch.zeros_like(x) if rounded == rounded_y else (relative + relative_y) * torch.maximum(x.abs(), y.abs())
    if a[0] != b[0] and "float16" in (a[0], b[0]):
        bound += _FLOAT16_SUBNORMAL_ROUNDING
    return bool((((x - y).abs() <= bound) | (x == y) | (x.isnan() & y.isnan())).all())


def _rounding(values: Tensor) -> tuple[float, torch.dtype | None]:
    """By how much, relatively, rounding can have moved values that are all numbers of a 16-bit dtype, and which."""
    for dtype, relative in _ROUNDING.items():
        if torch.equal(values.to(dtype).float(), values):
            return relative, dtype
    return 0.0, None
