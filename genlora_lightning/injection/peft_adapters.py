"""Put adapters of Hugging Face PEFT into a model, by PEFT itself, and keep what the rest of the library asks of them.

PEFT's layers are marked as places (:mod:`genlora_lightning.injection.places`), its copies of modules as trained in
full, and the model remembers its configuration and what each tensor is called in PEFT's files.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.config import AdapterConfig, Described
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.fields import shown
from genlora_lightning.injection.foreign import check_no_foreign_adapters
from genlora_lightning.injection.full_training import train_in_full
from genlora_lightning.injection.held import Held, held_root, remember
from genlora_lightning.injection.inject import adapter_config, adapter_layers, inject_adapters
from genlora_lightning.injection.named import check_no_set, named_updates
from genlora_lightning.injection.places import Place, adapter_places, mark_place, plain_name
from genlora_lightning.injection.report import InjectionReport, InjectionRow
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.overrides import put_on

KIND = "peft"
ADAPTER_NAME = "default"  # PEFT's own, by which its files need not say it

# What differs between two configurations of one adapter: where the base lay, who wrote it, and for what.
_NOT_COMPARED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
_PROMPTS = "it acts in the forward of PEFT's own model, which a LightningModule does not call"
_CHANGES_BASE = "it changes the base's frozen weights, which checkpoints and adapter folders do not hold"
_REFUSED = {
    "ADALORA": "its ranks are allocated by calls after each step, which nobody makes here",
    "ADAPTION_PROMPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "OSF": _CHANGES_BASE,
    "POLY": "its forward takes the task beside the batch",
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "SHADOW": _PROMPTS,
    "XLORA": "it mixes adapters that were trained before",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of Adam, as PEFT's documentation and examples have them.
_USUAL_RATES = {"LORA": (1e-4, 2e-3)}


class PeftConfigLike(Protocol):
    """A ``peft.PeftConfig``, told by what it has, so that PEFT need not be imported."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        ...


@dataclass(frozen=True)
class PeftAdapter:
    """A configuration of PEFT, for all that reads configurations here.

    Args:
        values: PEFT's ``peft_type`` and fields, as JSON values.
        given: PEFT's object, if there is one.
    """

    kind: ClassVar[str] = KIND
    values: dict[str, Any]
    given: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, config: Any) -> PeftAdapter:
        """Take a ``peft.PeftConfig``."""
        return cls(_plain(config.to_dict()), copy.deepcopy(config))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftAdapter:
        """Make a configuration from ``peft_type`` and PEFT's fields.

        Raises:
            ValueError: There is no such type, or a field is not one of it.
            ImportError: PEFT is not installed.
        """
        fields = {name: value for name, value in values.items() if name != "kind"}
        types = _peft().mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        known = {str(getattr(kind, "value", kind)): made for kind, made in types.items()}
        name = str(getattr(fields.get("peft_type"), "value", fields.get("peft_type"))).upper()
        if name not in known:
            raise ValueError(
                f"`peft_type` must be one of PEFT's ({', '.join(sorted(known))}), got {shown(fields.get('peft_type'))}."
            )
        try:
            return cls.of(known[name](**{**fields, "peft_type": name}))
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"PEFT cannot make a configuration of type {name}: {error!s:.500}.") from error

    @property
    def peft_type(self) -> str:
        """PEFT's name of the kind: ``"LORA"``."""
        return str(self.values["peft_type"])

    @property
    def title(self) -> str:
        """The kind's name in texts."""
        return f"PEFT's {'DoRA' if self.values.get('use_dora') else self.peft_type}"

    @property
    def usual_rates(self) -> tuple[float, float] | None:
        """The rates at which Adam mostly trains it, where that is known."""
        return _USUAL_RATES.get(self.peft_type)

    def make(self) -> Any:
        """Make PEFT's own object, to be trained."""
        config = self.from_dict(self.values).given if self.given is None else copy.deepcopy(self.given)
        config.inference_mode = False
        return config

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, fit for JSON, YAML and safe loading."""
        return {"kind": self.kind, **copy.deepcopy(self.values)}

    def differences(self, other: Described, *, run_only: bool = False) -> dict[str, tuple[Any, Any]]:
        """Find the fields in which another configuration differs, as :meth:`AdapterConfig.differences` does."""
        here, there = self.to_dict(), other.to_dict()
        if here["kind"] != there["kind"]:
            return {"kind": (here["kind"], there["kind"])}
        # Releases of PEFT add fields; what one of them does not know has the value that changes nothing.
        return {
            name: (value, there[name])
            for name, value in here.items()
            if name in there
            and value != there[name]
            and name not in _NOT_COMPARED
            and (run_only or not name.endswith("dropout"))
        }

    def replace(self, **changes: Any) -> PeftAdapter:
        """Another configuration, with some fields changed."""
        return self.from_dict({**self.values, **changes})

    def check(self) -> None:
        """Refuse what cannot be trained here.

        Raises:
            ValueError: With the kind, and why.
        """
        reason = _REFUSED.get(self.peft_type)
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            reason = f"`init_lora_weights` is {start!r}: {_CHANGES_BASE}"
        if reason is None and self.given is not None:
            reason = _PROMPTS if self.given.is_prompt_learning or self.given.is_adaption_prompt else None
        if reason is not None:
            raise ValueError(f"{self.title} cannot be trained with AdapterFinetuning: {reason}.")


AnyConfig = AdapterConfig | PeftAdapter


def read_any_config(values: Any) -> AnyConfig:
    """Make a configuration of ours or of PEFT's from an object or a dictionary; ``kind: peft`` says that it is PEFT's.

    Raises:
        TypeError: It is something else.
        ValueError: There is no such kind, or a field is not one of it.
        ImportError: It is PEFT's, and PEFT is not installed.
    """
    if isinstance(values, PeftAdapter):
        return values
    if isinstance(values, Mapping) and values.get("kind") == KIND:
        return PeftAdapter.from_dict(values)
    if hasattr(values, "peft_type") and hasattr(values, "to_dict"):
        return PeftAdapter.of(values)
    return read_config(values)


def present_config(model: nn.Module) -> AnyConfig:
    """The configuration the model's adapters were made with; of several of ours, or of named ones, the first.

    Raises:
        ValueError: The model has no adapters.
    """
    found = held_root(model)
    if found is not None:
        return found[1].adapter  # type: ignore[no-any-return]
    named = next(iter(named_updates(model).values()), None)
    return adapter_config(model) if named is None else named.layer.config


def peft_root(module: nn.Module) -> nn.Module:
    """The part of a module that PEFT's adapters go into: its only transformers model, else all of it.

    Names in PEFT's files are relative to it.
    """
    found = held_root(module)
    if found is not None:
        return found[0]
    outermost: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if hasattr(part, "base_model_prefix") and hasattr(getattr(part, "config", None), "model_type"):
            if id(part) not in inside:
                outermost.append(part)
            inside |= {id(inner) for inner in part.modules()}
    return outermost[0] if len(outermost) == 1 else module


def put_adapters(model: nn.Module, config: AnyConfig) -> InjectionReport:
    """Put adapters of ours or of PEFT's into a model, in place; adapters of the same configuration stay.

    Raises:
        ValueError: The configuration does not fit the model, or other adapters are already there.
    """
    return inject_adapters(model, config) if isinstance(config, AdapterConfig) else inject_peft(model, config)


def inject_peft(model: nn.Module, adapter: PeftAdapter) -> InjectionReport:
    """Have PEFT put its adapters into a model (:func:`peft_root`), in place; all else in it is frozen.

    Raises:
        ValueError: The kind cannot be trained here, the configuration does not fit the model, or other adapters are
            already there.
    """
    adapter.check()
    present = held_root(model)
    if present is not None:
        root, held = present
        differences = held.adapter.differences(adapter)
        if differences:
            listed = ", ".join(f"{key}: {a!r} there, {b!r} asked for" for key, (a, b) in differences.items())
            raise ValueError(
                f"The model already has adapters made with another configuration ({listed}). "
                "Call `remove_adapters(model)` first."
            )
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(plain_name(name) in held.trainable)
        return _report(root, held)
    if adapter_layers(model):
        raise ValueError("The model already has adapters of this library. Call `remove_adapters(model)` first.")
    check_no_foreign_adapters(model)
    check_no_set(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{adapter.title} needs the base's weights when it is put in: leave `low_memory` out.")
    root = peft_root(model)
    config = adapter.make()
    config.base_model_name_or_path = None  # PEFT sets it, and warns where it was another
    places = [(module, dict(module._modules)) for module in root.modules()]
    with restored_after_error(root), warnings.catch_warnings():
        # Of PEFT's use of transformers; nobody can do anything about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            wrapper = _peft().get_peft_model(root, config, adapter_name=ADAPTER_NAME)
        except Exception as error:  # PEFT checks little of a configuration, so that it fails anywhere
            for module, children in places:
                module._modules.clear()
                module._modules.update(children)
            vars(root).pop("peft_config", None)
            refused = f"PEFT cannot put {adapter.title} into this {type(root).__name__}: {error!s:.500}"
            raise ValueError(refused) from error
    _mark(root)
    held = Held(
        adapter=adapter,
        config=config,
        keys=_keys(wrapper, root),
        trainable=frozenset(plain_name(name) for name, p in root.named_parameters() if p.requires_grad),
    )
    remember(root, held)
    return _report(root, held)


# -- what PEFT has made ------------------------------------------------------------------------------------------------


def _mark(root: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    copies: list[nn.Module] = []
    for module in list(root.modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            is_copy = isinstance(module, ModulesToSaveWrapper)
            mark_place(Place(module, "original_module", is_copy))
            copies += [module.modules_to_save[ADAPTER_NAME]] if is_copy else []
        elif isinstance(module, BaseTunerLayer):
            mark_place(Place(module))
    train_in_full(root, copies)
    for place in adapter_places(root).values():
        if not place.is_copy:
            for name, part in place.module._modules.items():
                if part is not None and name != place.base:
                    put_on(part, _apply=partial(_apply_but_keep_float32, part))


def _apply_but_keep_float32(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move an adapter's part, but do not cast it to 16 bits, in whose few bits an optimizer's small steps are lost."""

    def keep_float32(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        is_cast = tensor.dtype == torch.float32 and result.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(result.device) if is_cast else result

    type(module)._apply(module, keep_float32, recurse)  # type: ignore[no-untyped-call]
    return module


def _keys(wrapper: Any, root: nn.Module) -> dict[str, str]:
    """What each tensor of the adapter is called in PEFT's files, and in the model."""
    names: dict[int, str] = {}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        names.setdefault(id(tensor), plain_name(name))
    state = wrapper.state_dict(keep_vars=True)
    stored = _peft().get_peft_model_state_dict(
        wrapper, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return {key: names[id(tensor)] for key, tensor in stored.items()}


def _report(root: nn.Module, held: Held) -> InjectionReport:
    adapted: list[InjectionRow] = []
    trained: list[InjectionRow] = []
    for name, place in adapter_places(root).items():
        weight = getattr(place.base_module, "weight", None)
        row = InjectionRow(
            module=name,
            kind=type(place.base_module).__name__,
            shape="trained in full" if place.is_copy else str(tuple(weight.shape)) if weight is not None else "-",
            trainable_parameters=sum(p.numel() for p in place.adapter_parameters().values() if p.requires_grad),
            lora_parameters=0,
        )
        (trained if place.is_copy else adapted).append(row)
    if not adapted:
        raise ValueError(f"{held.adapter.title} was put into no module of this {type(root).__name__}.")
    own = sum(row.trainable_parameters for row in adapted)
    return InjectionReport(
        title=held.adapter.title,
        adapted=tuple(adapted),
        trained=tuple(trained),
        skipped={},
        trainable_parameters=sum(p.numel() for p in root.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in root.parameters()),
        lora_parameters=own,  # not compared
    )


def _plain(values: Any) -> Any:
    """A configuration of PEFT as JSON values; sets become sorted lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if hasattr(value, "value"):  # an enumeration
            return value.value
        return str(value)

    return json.loads(json.dumps(_listed(values), default=convert))


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(getattr(key, "value", key)): _listed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(item) for item in value]
    return value


def _peft() -> Any:
    try:
        import peft
        import peft.mapping
    except ImportError as error:
        raise ImportError("Adapters of kind 'peft' need PEFT: `pip install peft`.") from error
    return peft
