"""Keep named adapters for one model, thousands if they are small, and have some of them act: on all rows, or by row."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.artifacts.active import Active, CountedBatches, Layers, Made, Which, make_layers
from genlora_lightning.artifacts.adapter_folder import StoredAdapter, adapter_place, read_adapter
from genlora_lightning.artifacts.adapter_io import AdapterRecord, fitted, write_adapter
from genlora_lightning.artifacts.peft_folder import is_peft_folder
from genlora_lightning.backbone.identity import BaseCheck, base_identity, require_same_base
from genlora_lightning.fields import check_choice, check_integer, shown
from genlora_lightning.injection.held import held_root
from genlora_lightning.injection.inject import adapter_layers, inject_adapters, inject_layers, remove_adapters
from genlora_lightning.injection.named import NamedUpdate, check_no_set, forget_set, note_set
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.state import load_adapter_state
from genlora_lightning.layers.accumulation import is_generated_once
from genlora_lightning.layers.factors import FactorStore
from genlora_lightning.layers.sites import matrix_shape


@dataclass(frozen=True)
class _Stored:
    """An adapter that is used as it is, and made when it is used.

    Args:
        folder: Where it lies.
        base_check: How its base is compared.
        configs: The configuration of each linear; adapters that have the same ones share them.
        data: Its tensors, as safetensors' bytes; ``None``: they are read from the folder.
    """

    folder: Path
    base_check: BaseCheck
    configs: dict[str, AdapterConfig]
    data: bytes | None


class AdapterSet(nn.Module):
    r"""Named adapters of one model, of which one acts, or a weighted sum of some, or one for each row of a batch.

    .. math:: y = W x + b + \sum_i w_i \, \Delta W_i x \qquad\text{or}\qquad y_t = W x_t + b + \Delta W_{i(t)} x_t

    They may be of different kinds, ranks and targets. While one is active, the model *is* a model with that adapter,
    and all that knows one adapter works on it: ``merge_adapters``, ``export_lora``, ``save_adapter``. While none is,
    the base's own modules stand in it.

    An adapter from a folder is used as it is. Only its name is kept, or its tensors in memory; what it generates is
    made when it becomes active, and kept for the next time, up to ``cache_bytes``. A new one, or one that is added with
    ``trained=True``, is trained: its parameters are this module's, under its name, and those of no other change with
    them.

    Args:
        model: A model without adapters. It is not part of this module.
        cache_bytes: Most that layers and generated matrices take; the least recently used go, but never active ones.

    Raises:
        ValueError: The model has adapters.
    """

    def __init__(self, model: nn.Module, *, cache_bytes: int = 1 << 30) -> None:
        super().__init__()
        check_integer("cache_bytes", cache_bytes, least=0)
        check_no_set(model)
        if adapter_layers(model) or held_root(model) is not None:
            raise ValueError(
                f"This {type(model).__name__} has an adapter already. Save it (`save_adapter`), call "
                "`remove_adapters(model)`, and add its folder to the set."
            )
        self.cache_bytes = cache_bytes
        self._model = (model,)  # in a tuple, which hides it from `parameters()` and from state dicts
        self._base = {name: module for name, module in plain_modules(model) if matrix_shape(module) is not None}
        self._slots: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._base}
        names = {id(module): name for name, module in self._base.items()}
        for parent in model.modules():
            for child_name, child in parent._modules.items():
                if id(child) in names:
                    self._slots[names[id(child)]].append((parent, child_name))
        self._identity: dict[str, Any] | None = None
        self._stored: dict[str, _Stored] = {}
        self._trained: dict[str, Layers] = {}
        self._made: OrderedDict[tuple[Any, ...], Made] = OrderedDict()
        self._placed: Layers = {}
        self._active = Active()
        self._place = self._current_place()
        self._hooks: list[Any] = []
        self._is_closed = False
        note_set(model, self)

    # -- the adapters -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model[0]

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added, those that are trained last."""
        return [*self._stored, *self._trained]

    @property
    def trained_names(self) -> list[str]:
        """The names of those that are trained, in the order in which they were added."""
        return [*self._trained]

    @property
    def active(self) -> str | dict[str, float] | list[str | None] | None:
        """What is active, as :meth:`activate` takes it: a name, names with weights, or the rows' names."""
        now = self._active
        return list(now.rows) if now.rows is not None else now.one or dict(now.weights) or None

    @property
    def is_one(self) -> bool:
        """Whether the model computes with one adapter as it is, or with none."""
        return self._active == Active() or self._active.one is not None

    @property
    def cached_bytes(self) -> int:
        """What generated matrices and their layers take at present, the active ones' among them."""
        return sum(made.num_bytes for made in self._made.values())

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str] | AdapterConfig | Mapping[str, Any],
        *,
        trained: bool = False,
        held: Literal["disk", "memory"] = "disk",
        base_check: BaseCheck = "error",
        generator: torch.Generator | None = None,
    ) -> InjectionReport | None:
        """Add an adapter; what is active stays active.

        Args:
            name: Its name.
            adapter: An adapter folder, or the name of one on the Hugging Face Hub, which is verified now and whenever
                it is read; or the configuration of a new adapter, which is trained.
            trained: Whether one from a folder is to be trained further.
            held: Where the tensors of one that is not trained are while it is not used.
            base_check: What to do if a folder's base is another one, as in :func:`~genlora_lightning.load_adapter`.
            generator: Random number generator for a new adapter's values.

        Returns:
            What a new one adapts; ``None`` for one from a folder.

        Raises:
            FileNotFoundError: There is no such folder, or a file of it is missing.
            WrongBaseError: The adapter was trained on another base.
            ValueError: The name is taken, a file is damaged, the adapter does not fit the model, or it has modules
                trained in full, of which a model has one set. Nothing is added then.
        """
        is_new = isinstance(adapter, (AdapterConfig, Mapping))
        self._check_new_name(name, trained=trained or is_new)
        check_choice("held", held, ("disk", "memory"))
        if isinstance(adapter, (AdapterConfig, Mapping)):
            config = read_config(adapter)
            _check_nothing_in_full(config.modules_to_train, f"The configuration of {name!r}")
            if config.target_parameters:
                raise ValueError(f"{name!r} has `target_parameters`, and a set adapts whole layers: use it alone.")
            if config.tokens_to_train:
                raise ValueError(_rows_in_full(f"The configuration of {name!r}"))
            with self._bare():
                report = inject_adapters(self.model, config, generator=generator)
                layers = adapter_layers(self.model)
            self._train(name, layers)
            return report
        stored = self._read(adapter, base_check)
        configs = next((s.configs for s in self._stored.values() if s.configs == stored.configs), stored.configs)
        data = safetensors.torch.save(stored.tensors) if held == "memory" and not trained else None
        record = _Stored(stored.folder, base_check, configs, data)
        if trained:
            layers = self._build(record, stored.tensors)
            self._train(name, layers)
        else:
            self._stored[name] = record
        return None

    def add_layers(self, name: str, configs: Mapping[str, AdapterConfig], stored: Collection[str] = ()) -> None:
        """Add a new adapter on exactly the named layers, to be trained, as a file lists them.

        Args:
            name: Its name.
            configs: The configuration of each layer, by its name.
            stored: Names of the tensors that the file has: which layers share what.

        Raises:
            ValueError: The name is taken, or a layer's is not one's that can be adapted. Nothing is added then.
        """
        self._check_new_name(name, trained=True)
        with self._bare():
            inject_layers(self.model, configs, (), stored)
            layers = adapter_layers(self.model)
        self._train(name, layers)

    def _check_new_name(self, name: str, *, trained: bool) -> None:
        self._check_open()
        if not isinstance(name, str) or not name:
            raise TypeError(f"An adapter's name must be a string that is not empty, got {shown(name)}.")
        if name in self._stored or name in self._trained:
            raise ValueError(f"There is an adapter {name!r} already: `remove` it first, or give another name.")
        if trained and "." in name:
            raise ValueError(
                f"The name of an adapter that is trained is part of its tensors', and has no dot: {name!r}."
            )

    def remove(self, name: str) -> None:
        """Forget an adapter; its folder stays.

        Raises:
            ValueError: There is none of this name, or it is active.
        """
        self._check_known(name)
        if name in self._active.names:
            raise ValueError(f"The adapter {name!r} is active: activate another one, or None, first.")
        self._stored.pop(name, None)
        if self._trained.pop(name, None) is not None:
            del self._modules[name]
        for key in [key for key, made in self._made.items() if name in made.names]:
            del self._made[key]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter that are trained: for an optimizer, or to clip their gradients.

        Raises:
            ValueError: There is none of this name, or it is not trained.
        """
        self._check_known(name)
        if name not in self._trained:
            raise ValueError(f"The adapter {name!r} is used as it is: add its folder with `trained=True` to train it.")
        return [parameter for parameter in self._modules[name].parameters() if parameter.requires_grad]  # type: ignore[union-attr]

    def configs_of(self, name: str) -> dict[str, AdapterConfig]:
        """The configuration of each layer of an adapter, by the layers' names.

        Raises:
            ValueError: There is none of this name.
        """
        return {place: layer.config for place, layer in self._layers(name).items()}

    def save(self, name: str, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None) -> Path:
        """Save an adapter to a folder of its own, as :func:`~genlora_lightning.save_adapter` does, active or not.

        Args:
            name: Its name.
            folder: Where to save; replaced if it is an adapter folder already.
            training: Facts to keep with it, such as steps and ``metrics``; JSON values.

        Returns:
            The folder's path.

        Raises:
            ValueError: There is none of this name, or a tensor to save is not finite.
            OSError: It cannot be written.
        """
        return write_adapter(self.record(name), folder, training=training)

    def record(self, name: str) -> AdapterRecord:
        """What :meth:`save` saves of an adapter; the tensors are its own, not copies.

        Raises:
            ValueError: There is none of this name.
        """
        layers = self._layers(name)
        named: dict[nn.Parameter, str] = {}
        for n, layer in layers.items():
            for own, parameter in layer.adapter_parameters().items():
                named.setdefault(parameter, f"{n}.{own}")  # what layers share is the first one's
        return AdapterRecord(
            state={n: parameter.detach() for parameter, n in named.items()},
            configs={n: layer.config for n, layer in layers.items()},
            base=base_identity(self.model),
            layers={n: layer.shape.sizes for n, layer in layers.items()},
            sites={n: layer.noun for n, layer in layers.items() if layer.named_only},
            trained_modules={},
            base_is_transformers=type(self.model).__module__.startswith("transformers."),
        )

    # -- what is active -----------------------------------------------------------------------------------------------

    def activate(self, which: Which = None, *, rows: Sequence[str | None] | None = None) -> None:
        """Have the model compute with some adapters from now on.

        Args:
            which: A name; or names, whose updates are added up; or names with weights, for the weighted sum; or
                ``None``: the base alone.
            rows: Instead, the adapter of each row of the batches to come (``None``: the base alone). The batch must be
                the first dimension. A batch of a multiple of the rows, as a search with beams makes it, has as many of
                each, one after another.

        Raises:
            ValueError: There is no adapter of a name, both are given, the adapters cannot be combined, or the present
                one is merged. What was active stays active then, as after an error in reading a folder.
            RuntimeError: In :func:`~genlora_lightning.layers.accumulation.generated_once`: gradients would be lost.

        Note:
            The adapters' layers are put into the places of the base's modules: what was compiled by ``torch.compile``
            is compiled anew. Activation checkpointing calls layers again in the backward, for which the same must be
            active.
        """
        self._check_open()
        wanted = self._wanted(which, rows)
        if any(layer.merged for layer in self._placed.values()):
            raise ValueError(f"{self.active!r} is merged into the weights: call `unmerge_adapters(model)` first.")
        if wanted.key != self._active.key and is_generated_once(self.model):
            raise RuntimeError("Adapters cannot be exchanged inside of `generated_once(model)`: leave it first.")
        self._follow_model()
        with torch.inference_mode(False):  # what is made may be trained, or used under autograd, another time
            made = self._make(wanted)
        for layer in made.layers.values():
            if layer.training != layer.base_layer.training:
                layer.train(layer.base_layer.training)
        self._put(made.layers)
        self._active = wanted
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if made.routing is not None:
            made.routing.rows = wanted.rows or ()
            self._hooks = CountedBatches(made.routing).put_on(self.model)
        self._forget_oldest()

    @contextmanager
    def using(self, which: Which = None, *, rows: Sequence[str | None] | None = None) -> Iterator[None]:
        """Context manager in which some adapters are active; afterwards those that were before it."""
        before = self._active
        self.activate(which, rows=rows)
        try:
            yield
        finally:
            if not self._is_closed:
                self.activate(dict(before.weights) or None if before.rows is None else None, rows=before.rows)

    def close(self, *, keep: str | None = None) -> None:
        """End the set: the model is the base again, or has one adapter, as after ``load_adapter``.

        Args:
            keep: The adapter that it has.

        Raises:
            ValueError: There is none of this name, or the present one is merged.
        """
        if keep is None:
            self.activate(None)
            remove_adapters(self.model)
            return
        self.activate(keep)
        for layer in self._placed.values():
            layer.store = FactorStore()
            for owner in layer.update.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    parameter.requires_grad_(owner.is_trained(name))  # type: ignore[operator]
        forget_set(self.model)
        self.end()

    def end(self) -> None:
        """Know the model no more: its adapters were taken off."""
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        self._made.clear()
        self._placed, self._hooks, self._active = {}, [], Active()

    # -- how ----------------------------------------------------------------------------------------------------------

    def _wanted(self, which: Which, rows: Sequence[str | None] | None) -> Active:
        wanted = Active.of(which, rows)
        for name in wanted.names:
            self._check_known(name)
        return wanted

    def _make(self, wanted: Active) -> Made:
        """The layers for what is wanted, made or remembered."""
        made = self._made.get(wanted.key)
        if made is not None:
            self._made.move_to_end(wanted.key)
            return made
        is_fixed = not any(name in self._trained for name in wanted.names)
        made = make_layers({name: self._layers(name) for name in wanted.names}, wanted, is_fixed=is_fixed)
        if made.layers:
            self._made[wanted.key] = made
        return made

    def _layers(self, name: str) -> Layers:
        """The layers of one adapter."""
        self._check_known(name)
        if name in self._trained:
            return self._trained[name]
        made = self._made.get(Active(((name, 1.0),)).key)
        if made is not None:
            return made.layers
        stored = self._stored[name]
        if stored.data is not None:
            tensors = safetensors.torch.load(stored.data)
        else:
            again = self._read(stored.folder, stored.base_check)
            tensors, stored = again.tensors, _Stored(stored.folder, stored.base_check, again.configs, None)
        return self._build(stored, tensors)

    def _read(self, folder: str | os.PathLike[str], base_check: BaseCheck) -> StoredAdapter:
        """Read an adapter folder, and prove that it is for this model."""
        place = adapter_place(folder)
        if is_peft_folder(place):
            raise ValueError(f"{folder} is in PEFT's format: `genlora import-lora` makes an adapter folder of a LoRA.")
        stored = fitted(read_adapter(place), self.model)
        _check_nothing_in_full(list(stored.trained_modules), f"The adapter in {folder}")
        if any(config.is_derived for config in stored.configs.values()):
            raise ValueError(_rows_in_full(f"The adapter in {folder}"))
        if base_check != "off":
            if self._identity is None:
                self._identity = base_identity(self.model)
            require_same_base(stored.base, self._identity, f"The adapter in {folder}", base_check)
        for name, shape in stored.layers.items():
            if name not in self._base or matrix_shape(self._base[name]) != shape:
                raise ValueError(
                    f"The adapter in {folder} does not fit this {type(self.model).__name__}: it has no linear {name} "
                    f"of shape {tuple(shape)}."
                )
        return stored

    def _build(self, stored: _Stored, tensors: Mapping[str, Tensor]) -> Layers:
        """Make the layers of a stored adapter."""
        with self._bare():
            cuda = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
            with torch.random.fork_rng(devices=cuda):  # the values that they start with are overwritten
                inject_layers(self.model, stored.configs, (), stored=tensors)
            load_adapter_state(self.model, tensors, str(stored.folder))
            layers = adapter_layers(self.model)
        for layer in layers.values():
            layer.requires_grad_(False)
        return layers

    def _train(self, name: str, layers: Layers) -> None:
        """Take layers for those of an adapter that is trained, and own its parameters, by the names of their places."""
        own = nn.Module()
        for place, layer in layers.items():
            *parents, last = place.split(".")
            holder = own
            for parent in parents:
                if parent not in holder._modules:
                    holder._modules[parent] = nn.Module()
                holder = holder._modules[parent]  # type: ignore[assignment]
            holder._modules[last] = NamedUpdate(name, layer)
            for part in layer.update.modules():
                for parameter_name, parameter in part.named_parameters(recurse=False):
                    parameter.requires_grad_(part.is_trained(parameter_name))  # type: ignore[operator]
        self._modules[name] = own
        self._trained[name] = layers

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Context manager in which the model has no adapters and no set; what is put in is taken out again."""
        before = self._placed
        trainable = {parameter: parameter.requires_grad for parameter in self.parameters()}
        self._put({})
        forget_set(self.model)
        try:
            yield
        finally:
            for parameter, flag in trainable.items():  # frozen, if this set is itself a part of the model
                parameter.requires_grad_(flag)
            self._placed = adapter_layers(self.model)
            self._put(before)
            note_set(self.model, self)

    def _put(self, layers: Layers) -> None:
        """Put layers into the model, and the base's modules where there are none."""
        for name in {**self._placed, **layers}:
            module = layers.get(name, self._base[name])
            for parent, child_name in self._slots[name]:
                parent._modules[child_name] = module
        self._placed = layers

    def _current_place(self) -> Any:
        """Where the model is: its first linear's device and dtype."""
        weight = next((m.weight for m in self._base.values() if isinstance(m.weight, Tensor)), None)
        return None if weight is None else (weight.device, weight.dtype)

    def _follow_model(self) -> None:
        """Make layers anew if the model was moved or cast since, and bring along those that are trained."""
        now = self._current_place()
        if now == self._place:
            return
        self._place = now
        self._made.clear()
        for layers in self._trained.values():
            for layer in layers.values():
                layer.update.to(layer.weight.device)

    def _forget_oldest(self) -> None:
        total = self.cached_bytes
        for key in list(self._made):
            if total <= self.cache_bytes:
                return
            if key != self._active.key:
                total -= self._made.pop(key).num_bytes

    def _check_known(self, name: Any) -> None:
        self._check_open()
        if not isinstance(name, str) or (name not in self._stored and name not in self._trained):
            names = self.names
            listed = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "") if names else "none yet"
            raise ValueError(f"There is no adapter {shown(name)} in this set; there are {listed}.")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("This AdapterSet is closed: its adapters were taken off the model. Make another one.")

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"active={self.active!r}, {len(self._stored)} from folders, {len(self._trained)} trained"


def _rows_in_full(what: str) -> str:
    return (
        f"{what} has rows of tokens trained in full (`tokens_to_train`), of which a model has one set. Use it alone, "
        "with `load_adapter`."
    )


def _check_nothing_in_full(modules: Sequence[str], what: str) -> None:
    if modules:
        raise ValueError(
            f"{what} has modules trained in full ({', '.join(modules)}), of which a model has one set. Use it alone, "
            "with `load_adapter`."
        )
