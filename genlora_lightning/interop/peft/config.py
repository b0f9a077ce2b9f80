"""Configure GenLoRA as a tuner of PEFT, by the names that PEFT's users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from typing_extensions import Self

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.adapters.genlora.generator import Init
from genlora_lightning.interop.peft_folders import PEFT_TYPE, from_peft_fields, peft_fields

_DEFAULTS = GenLoRAConfig()


def _extend_peft_types() -> PeftType:
    """Add the member that PEFT wants of every kind to its enumeration, which has no way to do it."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_ = PEFT_TYPE
        member._value_ = PEFT_TYPE
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, PEFT_TYPE, member)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
    return PeftType(PEFT_TYPE)


_TYPE = _extend_peft_types()


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, list) else names


@dataclass
class GenLoraConfig(PeftConfig):  # type: ignore[misc]  # PEFT's classes are untyped
    """Configure GenLoRA for PEFT: ``ΔW = s · B · A``, of which A and B are generated.

    The names are those of PEFT's ``LoraConfig`` where it has the thing, and :class:`~genlora_lightning.GenLoRAConfig`'s
    otherwise; the defaults are that one's. With Adam it learns at rates of 1e-3 to 8e-3.

    Args:
        r: Number of generated basis vectors, the highest rank ΔW can have; ``rank`` in a ``GenLoRAConfig``.
        lora_alpha: Numerator of the scaling s; ``alpha``.
        use_rslora: ``s = lora_alpha / √r``; else ``s = lora_alpha / r``; ``scaling``.
        lora_dropout: Probability of dropping an entry of the adapter's input while training; ``dropout``.
        target_modules: Names, or last parts of names, of linears to adapt; a regular expression; or ``"all-linear"``.
            ``None``: what PEFT's LoRA takes in models of this type.
        exclude_modules: Names, or a regular expression, of modules not to adapt.
        modules_to_save: Modules trained in full and saved with the adapter; ``modules_to_train``.
        bias: ``"none"``, ``"all"`` or ``"genlora_only"``: which biases of the base are trained, too.
        layers_to_transform: Numbers of the model's layers to adapt; all if ``None``.
        layers_pattern: Name of the list of these layers.
        init_weights: Start at ΔW = 0. ``False`` is for tests: B starts at random.
        num_latents_a: As in ``GenLoRAConfig``; so are all that follow.
        num_latents_b: ″
        num_groups_a: ″
        num_groups_b: ″
        entry_signs: ″
        weight_gain: ″
        num_centers: ″
        width: ″
        learn_centers: ″
        learn_widths: ″
        init: ″
        kernel: ″

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    r: int = _DEFAULTS.rank
    lora_alpha: float = _DEFAULTS.alpha
    use_rslora: bool = _DEFAULTS.scaling == "sqrt_rank"
    lora_dropout: float = _DEFAULTS.dropout
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = field(default=True, metadata={"help": "Start at ΔW = 0."})
    num_latents_a: int = _DEFAULTS.num_latents_a
    num_latents_b: int = _DEFAULTS.num_latents_b
    num_groups_a: int = _DEFAULTS.num_groups_a
    num_groups_b: int = _DEFAULTS.num_groups_b
    entry_signs: bool = _DEFAULTS.entry_signs
    weight_gain: float | None = _DEFAULTS.weight_gain
    num_centers: int = _DEFAULTS.num_centers
    width: float = _DEFAULTS.width
    learn_centers: bool = _DEFAULTS.learn_centers
    learn_widths: bool = _DEFAULTS.learn_widths
    init: Init = _DEFAULTS.init
    kernel: str = _DEFAULTS.kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _TYPE
        # As PEFT's own configurations do; its code takes lists of names for sets.
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.bias not in ("none", "all", "genlora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'genlora_only', got {self.bias!r}.")
        self.generation()

    def generation(self) -> GenLoRAConfig:
        """How matrices are generated: all of a ``GenLoRAConfig`` but what is adapted.

        Raises:
            ValueError: A value is out of its range.
            TypeError: A value has the wrong type.
        """
        what = ("target_modules", "exclude_modules", "modules_to_save", "bias", "layers_to_transform", "layers_pattern")
        return from_peft_fields({name: value for name, value in vars(self).items() if name not in what})

    @classmethod
    def from_adapter_config(cls, config: GenLoRAConfig, **fields: Any) -> Self:
        """Make the configuration that adapts the same modules in the same way.

        Args:
            config: This library's.
            fields: Of PEFT, such as ``task_type``.
        """
        return cls(**{**peft_fields(config), **fields})

    def to_adapter_config(self) -> GenLoRAConfig:
        """Make this library's configuration that adapts the same modules in the same way.

        Raises:
            ValueError: It cannot say this: no or empty ``target_modules``, trained biases, ``layers_to_transform``, a
                regular expression in ``exclude_modules``.
        """
        if not self.target_modules:
            raise ValueError(
                f"`target_modules` is {self.target_modules!r}; without PEFT it must say what is adapted, such as "
                "'all-linear'."
            )
        return from_peft_fields(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, the gain as decided: weights in a file mean nothing without it."""
        return {**super().to_dict(), "weight_gain": self.generation().gain}
