"""Build a model without weights, and read of its files what each process keeps once it is sharded.

1. :func:`build_without_weights` makes a transformers model whose parameters are on the meta device. Its buffers are
   real: rotary frequencies, for example, are computed and not stored.
2. Adapters are injected; :meth:`WeightSource.start_trained` makes them, and modules trained in full, real. They are
   small, and whole.
3. The strategy shards the model (FSDP2), or will (FSDP1).
4. :meth:`WeightSource.load` reads the base: of each sharded parameter the rows that this rank keeps, nothing else.
   FSDP1 makes its pieces out of whole units: what :meth:`WeightSource.for_fsdp1` returns is its ``param_init_fn``, by
   which one unit at a time is whole.

Nothing here needs Lightning or a process group.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from genlora_lightning.adapters.base import adapter_modules
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.token_rows import AdaptedRows
from genlora_lightning.overrides import forget, note, noted
from genlora_lightning.storage.documents import check_document

_MAPPED_BYTES = 32 * 2**20
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# On a model whose weights are still in files.
_SOURCE = "weight source"


class WeightFiles:
    """The safetensors files of a checkpoint.

    Args:
        files: The file that holds each tensor, by the tensor's name.
        source: The checkpoint's folder or name, for messages.
    """

    def __init__(self, files: dict[str, Path], source: str) -> None:
        self.files = files
        self.source = source

    @classmethod
    def find(cls, source: str, **options: Any) -> WeightFiles:
        """The files of a model folder or a name on the Hugging Face Hub, which are fetched if need be.

        Raises:
            DamagedFileError: The index or a file is not as it was written.
            FileNotFoundError: There are none in the safetensors format.
        """
        from transformers.utils import cached_file

        def locate(name: str) -> Path | None:
            found = cached_file(
                source, name, _raise_exceptions_for_missing_entries=False, revision=options.get("revision")
            )
            return None if found is None else Path(found)

        index = locate(_INDEX)
        if index is not None:
            by_tensor = _read_index(index)
            paths = {name: locate(name) for name in sorted(set(by_tensor.values()))}
            absent = [name for name, path in paths.items() if path is None]
            if absent:
                raise FileNotFoundError(f"{source!r} lacks {shown(absent[0])}, which {index} names.")
            return cls({tensor: cast("Path", paths[name]) for tensor, name in by_tensor.items()}, source)
        single = locate(_SINGLE)
        if single is None:
            raise FileNotFoundError(
                f"{source!r} has neither {_INDEX} nor {_SINGLE}, and `low_memory` reads safetensors only. Save the "
                "model in that format (`save_pretrained`), or leave `low_memory` out."
            )
        with _opened(single) as file:
            return cls(dict.fromkeys(file.keys(), single), source)

    @contextmanager
    def open(self, path: Path) -> Iterator[Any]:
        """A file, mapped into memory while it is open.

        Raises:
            DamagedFileError: It is no safetensors file, or lacks a tensor that the index has in it.
        """
        with _opened(path) as file:
            yield file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors. Where they are is what the files say, should an index say something else."""
        found: dict[str, tuple[int, ...]] = {}
        places: dict[str, Path] = {}
        for path in dict.fromkeys(self.files.values()):
            with self.open(path) as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                places |= dict.fromkeys(file.keys(), path)
        self.files = places
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path} is no readable safetensors file, or not the one that the others go with: {error!s:.500}. Fetch or "
            "copy the model again."
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name; all of them lie where the index does."""

    def is_file_name(name: Any) -> bool:
        return isinstance(name, str) and name not in ("", ".", "..") and len(name) < 256 and not set(name) & {*"/\\\0"}

    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error!s:.500}. Fetch or copy the model again.") from error
    check_document(str(path), index, {"weight_map": {str: is_file_name}})
    found: dict[str, str] = index["weight_map"]
    return found


class WeightSource:
    """Where a model's weights come from, and where they go.

    Args:
        model: A model of :func:`build_without_weights`, before anything is injected into it.
        files: Its checkpoint.
    """

    def __init__(self, model: nn.Module, files: WeightFiles) -> None:
        self.files = files
        self.model = model
        shapes = files.shapes()
        # What was read for a parameter without values, while it is in use: FSDP1 takes it apart, and it must go then.
        self._filled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # By module and not by name: an adapter or FSDP puts modules around modules, but leaves them what they are.
        self._keys: dict[tuple[int, str], str] = {}
        self._names: dict[str, tuple[str, torch.dtype]] = {}
        self.absent: list[str] = []
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        for module_name, module in model.named_modules():
            for own_name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                name = f"{module_name}.{own_name}" if module_name else own_name
                names = aliases.get(id(tensor), [name])
                # A checkpoint of the body lacks the prefix that a model with a head has, and the other way round.
                tried = [n for alias in names for n in (alias, alias.removeprefix(prefix), prefix + alias)]
                key = next((n for n in tried if shapes.get(n) == tuple(tensor.shape)), None)
                if key is not None:
                    self._keys[id(module), own_name] = key
                    self._names[name] = (key, tensor.dtype)
                elif own_name in module._parameters and name == names[0]:
                    self.absent.append(name)
        note(model, _SOURCE, self)

    # -- what is trained --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_trained(self, device: torch.device | str = "cpu") -> None:
        """Make the adapters and the modules trained in full real, whole, with their initial values.

        Adapters, and what a module trained in full has and the checkpoint lacks, are drawn from torch's random numbers:
        ranks must agree on the seed, or broadcast afterwards.
        """
        for own in adapter_modules(self.model):
            if own.is_meta:
                own.to_empty(device=device, recurse=False)  # one inside of it may have its values already
                own.reset_parameters()
        for layer in adapter_layers(self.model).values():
            if isinstance(layer, AdaptedRows) and layer.weight.is_meta:
                key = self._keys[id(layer.base_layer), layer.parameter]
                with self.files.open(self.files.files[key]) as file:
                    part = file.get_slice(key)
                    rows = torch.cat([part[token : token + 1] for token in layer.tokens])
                layer.start_from(rows.to(layer.weight.dtype))
        for trained in trained_modules(self.model).values():
            for module in trained.modules():
                self._fill_module(module, device)

    # -- the base -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, device: torch.device | str) -> None:
        """Read what is still on the meta device: of sharded parameters the part that this rank keeps.

        Raises:
            ValueError: A tensor is still on the meta device afterwards; the message names it.
        """
        by_file: dict[Path, dict[int, list[tuple[nn.Module, str]]]] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta and (id(module), name) in self._keys:
                    path = self.files.files[self._keys[id(module), name]]
                    # Tied weights stay tied: one parameter in several places.
                    by_file.setdefault(path, {}).setdefault(id(parameter), []).append((module, name))
        for path, places in by_file.items():
            waiting = list(places.values())
            while waiting:
                # Pages of a mapped file stay as long as it is mapped: it is opened again now and then.
                with self.files.open(path) as file:
                    size = 0
                    while waiting and size < _MAPPED_BYTES:
                        size += self._load_one(file, waiting.pop(), device)
        self._load_buffers()
        forget(self.model, _SOURCE)
        check_none_on_meta(self.model, source=self.files.source)

    def _load_one(self, file: Any, users: list[tuple[nn.Module, str]], device: torch.device | str) -> int:
        """Read one parameter and put it in all its places; returns the bytes of this rank's part."""
        module, name = users[0]
        parameter = module._parameters[name]
        assert parameter is not None
        values = _read(file.get_slice(self._keys[id(module), name]), parameter, device)
        loaded = nn.Parameter(values, requires_grad=parameter.requires_grad)
        for module, name in users:
            module._parameters[name] = loaded
        local: Tensor = cast("Any", values).to_local() if hasattr(values, "to_local") else values
        return local.numel() * local.element_size()

    def for_fsdp1(self, device: torch.device | str) -> Callable[[nn.Module], None]:
        """A function that makes a module's own parameters real, whole, on a device: FSDP1's ``param_init_fn``.

        Raises:
            ValueError: The checkpoint lacks a parameter of the base; the message names it.
        """
        unknown = {
            id(parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta and (id(module), name) not in self._keys
        }
        check_none_on_meta(self.model, unknown, source=self.files.source)
        self._load_buffers()
        forget(self.model, _SOURCE)
        return partial(self._fill_module, device=device)

    @torch.no_grad()
    def _fill_module(self, module: nn.Module, device: torch.device | str) -> None:
        """Read a module's own parameters, whole; a tied weight that was read for another module is that module's."""
        fresh = False
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            earlier = self._filled.get(parameter)  # type: ignore[no-untyped-call]
            filled: nn.Parameter | None = None if earlier is None else earlier()
            if filled is None:
                key = self._keys.get((id(module), name))
                if key is None:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    fresh = True
                else:
                    with self.files.open(self.files.files[key]) as file:
                        values = _read(file.get_slice(key), parameter, device)
                filled = nn.Parameter(values, requires_grad=parameter.requires_grad)
                self._filled[parameter] = weakref.ref(filled)
            module._parameters[name] = filled
        if fresh:
            cast("Any", self.model)._init_weights(module)

    def _load_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                key = self._keys.get((id(module), name))
                if key is not None and buffer is not None:
                    with self.files.open(self.files.files[key]) as file:
                        module._buffers[name] = file.get_tensor(key).to(device=buffer.device, dtype=buffer.dtype)

    # -- for the base's fingerprint -----------------------------------------------------------------------------------

    def values_at(self, name: str, places: Tensor) -> Tensor | None:
        """Single values of a parameter, by their places in its flat sequence of values, as the model has them."""
        if name not in self._names:
            return None
        key, dtype = self._names[name]
        with self.files.open(self.files.files[key]) as file:
            part = file.get_slice(key)
            shape = part.get_shape()
            width = 1
            for size in shape[1:]:
                width *= size
            rows = [part[int(p) // width : int(p) // width + 1].reshape(-1)[int(p) % width] for p in places]
        return torch.stack(rows).to(dtype).float()


def weight_source(module: nn.Module) -> WeightSource | None:
    """The source of the weights of a model that was built without them; ``None`` if there is none in a module."""
    return next((found for m in module.modules() if (found := noted(m, _SOURCE)) is not None), None)


def build_without_weights(auto_class: str, source: str, *, dtype: Any = "auto", **options: Any) -> Any:
    """A transformers model as ``from_pretrained`` gives, but with its parameters on the meta device.

    Args:
        auto_class: Name of transformers' class, such as ``"AutoModelForCausalLM"``.
        source: Local folder or name on the Hugging Face Hub.
        dtype: Of the weights; ``"auto"``: the one that the configuration names.
        options: As ``from_pretrained`` takes them; those that concern weights (``device_map``, …) are refused.

    Returns:
        The model in evaluation mode; :func:`weight_source` of it says which parameters its checkpoint lacks.

    Raises:
        ValueError: The model is quantized, or wants some weights in float32, or an option is not for it.
        FileNotFoundError: There are no safetensors files.
    """
    import transformers

    attention = options.pop("attn_implementation", None)
    options.pop("ignore_mismatched_sizes", None)  # what does not fit is absent here
    trust = bool(options.get("trust_remote_code", False))
    config, unused = transformers.AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
    unused = {name for name, value in unused.items() if value is not None} - {"trust_remote_code", "revision"}
    if unused:
        raise ValueError(f"`low_memory` builds the model from its configuration, which does not take {sorted(unused)}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source!r} is quantized, and `low_memory` is for weights as they are. Leave it out.")
    files = WeightFiles.find(source, **options)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    config.dtype = dtype  # as `from_pretrained` does, and `from_config` only since transformers 5
    built: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust}
    if attention is not None:
        built["attn_implementation"] = attention
    with torch.device("cpu"), _EmptyOnMeta():
        model = getattr(transformers, auto_class).from_config(config, **built)
    _move_parameters_to_meta(model)
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(model._keep_in_fp32_modules_strict or ())}
    if kept and dtype != torch.float32:
        raise ValueError(
            f"A {type(model).__name__} keeps {', '.join(sorted(kept))} in float32, which `low_memory` does not: leave "
            "it out, or load the model in float32."
        )
    if model.can_generate():
        with suppress(OSError):  # where there is none, the one made from the configuration stays
            revision = options.get("revision") or "main"
            model.generation_config = transformers.GenerationConfig.from_pretrained(source, revision=revision)
    WeightSource(model, files)
    return model.eval()


def check_none_on_meta(module: nn.Module, among: set[int] | None = None, source: str = "the checkpoint") -> None:
    """Check that every parameter and buffer has values.

    Args:
        module: The module.
        among: Parameters by id: look at no others, which will get theirs later.
        source: Where the values should have come from, for the message.

    Raises:
        ValueError: One is on the meta device; the message names it.
    """
    parameters = [(name, p) for name, p in module.named_parameters() if among is None or id(p) in among]
    left = [name for name, tensor in (*parameters, *module.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(
            f"{len(left)} tensors of this {type(module).__name__} have no values yet (they are on the meta device), "
            f"{', '.join(left[:3])} among them: {source} lacks them, or names them in another way than the model does. "
            "Load the model without `low_memory`."
        )


class _EmptyOnMeta(TorchFunctionMode):
    """Has ``torch.empty``, which layers make their weights with, allocate nothing; all else is as ever."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _move_parameters_to_meta(model: nn.Module) -> None:
    """What was made in another way than with ``torch.empty``, such as a norm's ones."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                moved.setdefault(id(parameter), nn.Parameter(parameter.to("meta"), parameter.requires_grad))
                module._parameters[name] = moved[id(parameter)]


def _read(stored: Any, parameter: Tensor, device: torch.device | str) -> Tensor:
    """The part of a stored tensor that this rank keeps of a parameter: a DTensor for a DTensor, else all of it."""
    if not hasattr(parameter, "placements"):
        return cast("Tensor", stored[:]).to(device=device, dtype=parameter.dtype, copy=True)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("Any", parameter)
    mesh, placements = sharded.device_mesh, sharded.placements
    shape, offset = compute_local_shape_and_global_offset(sharded.shape, mesh, placements)
    local = torch.empty(shape, dtype=parameter.dtype, device=device)
    if local.numel():
        local.copy_(stored[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=sharded.shape, stride=sharded.stride())
