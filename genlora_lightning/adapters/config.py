"""Configure an adapter: what all kinds have in common, and what each kind must say."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from typing_extensions import Self

from genlora_lightning.adapters.base import MatrixShape, WeightUpdate
from genlora_lightning.fields import check_choice, check_fields, check_flag, check_integer, check_number, is_text, shown

ScalingRule = Literal["sqrt_rank", "rank"]

ALL_LINEAR = "all-linear"
# Marks a field that is a matter of the run: an adapter that was made with another value is the same adapter.
RUN_ONLY = {"run_only": True}
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LISTS = ("target_modules", "exclude_modules", "modules_to_train")
_LEFT_OUT_IF_EMPTY = (
    "elastic",
    "keep_zeros",
    "layers_to_transform",
    "target_parameters",
    "target_rows",
    "tokens_to_train",
    "share_over_experts",
    *_PATTERNS,
)
Tokens = list[int | str]


class Described(Protocol):
    """A configuration of whatever kind, of another library's, too."""

    def to_dict(self) -> dict[str, Any]:
        """The kind and the fields as plain values."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """What is adapted, and what all kinds of adapters have in common.

    The update of a weight ``W (out, in)`` is ``ΔW (out, in)``, of a rank of at most ``rank``. What it is made of is the
    matter of a kind: a subclass with a ``kind`` of its own, its fields, and the methods below. Importing the subclass
    makes its name known to :func:`~genlora_lightning.adapters.kinds.read_config`.

    A configuration is frozen: what was validated stays so. ``dataclasses.replace(config, rank=32)`` gives another one.
    Lists are copied, here and by ``replace``, so that no two configurations share one.

    Args:
        rank: The highest rank ΔW can have.
        alpha: Numerator of the scaling ``s`` of ΔW.
        scaling: ``"sqrt_rank"``: ``s = alpha / √rank``; ``"rank"``: ``s = alpha / rank``.
        dropout: Probability of dropping an entry of the adapter's input while training.
        target_modules: Layers to adapt: ``"all-linear"`` (each linear but the output head), a list of module names or
            their last parts (``["q_proj", "v_proj"]``), or a regular expression that must match the whole module name.
            Embeddings, convolutions and ``nn.MultiheadAttention`` are adapted where they are named. It may be empty
            beside ``target_parameters``.
        target_parameters: Parameters to adapt that hold a stack of matrices, such as the experts of a mixture
            (``["experts.gate_up_proj", "experts.down_proj"]``): names, last parts of names, or regular expressions of
            either, as in ``rank_pattern``. Each matrix gets an update of its own.
        exclude_modules: Names, or last parts of names, of layers not to adapt; all in a named module are left out.
        modules_to_train: Names, or last parts of names, of modules trained in full beside the adapters and saved
            with them, such as a classification head.
        tokens_to_train: Tokens whose rows of the input embedding are trained in full, as new ones need it: ids, or
            strings that a text module's tokenizer looks up. A head that is tied to the embedding has the same rows.
            Or such lists by names of embeddings and linears: ``{"embed_tokens": [7, 8], "lm_head": [7, 8]}``.
        layers_to_transform: Numbers of the layers to adapt, of those that ``target_modules`` gives: the first number in
            a linear's name. All if ``None``.
        rank_pattern: Ranks of linears that are to have another one than ``rank``, by a name, a last part of a name, or
            a regular expression of either, as in PEFT: it must match the name to its end, from its start or from
            after a dot (``^…`` from its start alone). The first that matches counts.
        alpha_pattern: Likewise for ``alpha``.
        target_rows: Outputs to adapt of linears that are adapted in part, such as a fused projection's queries and
            values: ranges ``[[start, end], …]``, rising, the end left out, by names as in ``rank_pattern``. The update
            of all other outputs is zero.
        elastic: Ranks to train for, rising, the last of them ``rank``: in each step each layer computes with the first
            rows of A and B alone, of a number that is drawn from these. Afterwards the adapter may be used, and cut, at
            any of them. A layer that has another rank by name has those of them that are below it, and its own.
        keep_zeros: Update the weights alone that are not 0 in the base, ``W + ΔW ⊙ (W ≠ 0)``, so that a pruned base is
            as sparse when the adapter is merged. Layers form ΔW then.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    kind: ClassVar[str]
    title: ClassVar[str]  # the kind's name in texts
    usual_rates: ClassVar[tuple[float, float] | None] = None  # of Adam, for the parameters that learn slowest
    #: Whether the first rows of A and B are an adapter of a lower rank: what `elastic` needs.
    can_be_elastic: ClassVar[bool] = False
    #: Whether it follows from another configuration at some of the layers, and is no user's to give.
    is_derived: ClassVar[bool] = False

    rank: int
    alpha: float
    scaling: ScalingRule
    dropout: float = field(default=0.0, metadata=RUN_ONLY)
    target_modules: str | list[str] = ALL_LINEAR
    target_parameters: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    modules_to_train: list[str] = field(default_factory=list)
    tokens_to_train: Tokens | dict[str, Tokens] = field(default_factory=list)
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_rows: dict[str, list[list[int]]] = field(default_factory=dict)
    elastic: list[int] | None = None
    keep_zeros: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind = vars(cls).get("kind")
        if kind is not None and not cls.is_derived:
            KINDS[kind] = cls

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, least=1)
        _check_alpha("alpha", self.alpha)
        check_choice("scaling", self.scaling, get_args(ScalingRule))
        check_number("dropout", self.dropout, least=0.0, below=1.0)
        self._check_module_names()
        self._check_parameter_names()
        self._check_tokens()
        self._check_layers()
        for name in _PATTERNS:
            self._check_patterns(name)
        self._check_rows()
        self._check_elastic()
        check_flag("keep_zeros", self.keep_zeros)

    def _check_elastic(self) -> None:
        ranks = self.elastic
        if ranks is None:
            return
        if not self.can_be_elastic:
            able = " and ".join(kind.title for kind in KINDS.values() if kind.can_be_elastic)
            raise ValueError(
                f"`elastic` is {shown(ranks)}, and the first rows of {self.title}'s matrices are no adapter of a lower "
                f"rank: leave it out, or take {able}."
            )
        if not isinstance(ranks, (list, tuple)):
            raise TypeError(f"`elastic` must be a list of ranks, got {shown(ranks)}.")
        for rank in ranks:
            check_integer("elastic", rank, least=1)
        if len(ranks) < 2 or list(ranks) != sorted(set(ranks)) or ranks[-1] != self.rank:
            raise ValueError(
                f"`elastic` must be two or more rising ranks, the last of them `rank`, which is {self.rank}; got "
                f"{shown(list(ranks))}."
            )
        object.__setattr__(self, "elastic", list(ranks))

    def _check_layers(self) -> None:
        numbers = self.layers_to_transform
        if numbers is None:
            return
        if not isinstance(numbers, (list, tuple)):
            raise TypeError(f"`layers_to_transform` must be a list of layer numbers, got {shown(numbers)}.")
        if not numbers:
            raise ValueError("`layers_to_transform` is an empty list. Give layer numbers, or leave it out for all.")
        for number in numbers:
            check_integer("layers_to_transform", number, least=0)
        object.__setattr__(self, "layers_to_transform", list(numbers))

    def _check_parameter_names(self) -> None:
        names = self.target_parameters
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"`target_parameters` must be a list of parameter names, got {shown(names)}.")
        for name in names:
            if not isinstance(name, str) or not name or not is_text(name):
                raise TypeError(f"`target_parameters` must hold non-empty parameter names, got {shown(name)}.")
            _check_expression("target_parameters", name)
        object.__setattr__(self, "target_parameters", list(names))

    def _check_tokens(self) -> None:
        given = self.tokens_to_train
        for where, tokens in (given if isinstance(given, Mapping) else {"": given}).items():
            if not isinstance(where, str) or not is_text(where) or not isinstance(tokens, (list, tuple)):
                raise TypeError(
                    "`tokens_to_train` must be a list of tokens, or such lists by names of modules; got "
                    f"{shown(given)}."
                )
            for token in tokens:
                if not isinstance(token, str):
                    check_integer("tokens_to_train", token, least=0)
                elif not token or not is_text(token):
                    raise ValueError(f"`tokens_to_train` must hold ids or strings of tokens, got {shown(token)}.")
            if len(set(tokens)) < len(tokens) or (where and not tokens):
                raise ValueError(f"`tokens_to_train` must name a token once, got {shown(given)}.")
        own = {name: list(tokens) for name, tokens in given.items()} if isinstance(given, Mapping) else list(given)
        object.__setattr__(self, "tokens_to_train", own)

    def _check_shared(self, given: str | None, allowed: Sequence[str]) -> None:
        """Check a kind's ``share_over_experts``."""
        if given is None:
            return
        check_choice("share_over_experts", given, allowed)
        if not self.target_parameters:
            raise ValueError(
                f"`share_over_experts` is {given!r}, and no experts are adapted: name their parameters in "
                "`target_parameters`, or leave it out."
            )

    def _check_patterns(self, field_name: str) -> None:
        patterns = getattr(self, field_name)
        if not isinstance(patterns, Mapping):
            raise TypeError(f"`{field_name}` must be a dictionary by names of linears, got {shown(patterns)}.")
        for pattern, value in patterns.items():
            if not isinstance(pattern, str) or not pattern or not is_text(pattern):
                raise TypeError(f"`{field_name}` must have non-empty names of linears as keys, got {shown(pattern)}.")
            _check_expression(field_name, pattern)
            where = f"{field_name}[{shown(pattern)}]"
            if field_name == "rank_pattern":
                check_integer(where, value, least=1)
            else:
                _check_alpha(where, value)
        object.__setattr__(self, field_name, dict(patterns))

    def _check_rows(self) -> None:
        given = self.target_rows
        if not isinstance(given, Mapping):
            raise TypeError(f"`target_rows` must be a dictionary by names of linears, got {shown(given)}.")
        for pattern, ranges in given.items():
            if not isinstance(pattern, str) or not is_text(pattern):
                raise TypeError(f"`target_rows` must have names of linears as keys, got {shown(pattern)}.")
            _check_expression("target_rows", pattern)
            pairs = ranges if isinstance(ranges, (list, tuple)) else None
            bounds = [bound for pair in pairs or () for bound in (pair if isinstance(pair, (list, tuple)) else (None,))]
            integers = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
            if not pairs or not integers or not all(len(pair) == 2 for pair in pairs):
                raise TypeError(
                    f"`target_rows` must give ranges of outputs, [[start, end], …], got {shown(ranges)} for "
                    f"{shown(pattern)}. Where queries, keys and values lie is the architecture's matter: in thirds in "
                    "GPT-2's c_attn, head by head in GPT-NeoX's query_key_value."
                )
            if bounds[0] < 0 or any(a > b or (i % 2 == 0 and a == b) for i, (a, b) in enumerate(pairwise(bounds))):
                raise ValueError(
                    f"`target_rows` must give rising ranges of outputs that are not empty, got {shown(ranges)}."
                )
        copied = {pattern: [list(pair) for pair in ranges] for pattern, ranges in given.items()}
        object.__setattr__(self, "target_rows", copied)

    def _check_module_names(self) -> None:
        if isinstance(self.target_modules, str):
            if not self.target_modules or not is_text(self.target_modules):
                raise ValueError(
                    f"`target_modules` is empty or no valid text. Give {ALL_LINEAR!r}, a list of module names, or a "
                    "regular expression."
                )
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"`target_modules` is {shown(self.target_modules)}, which is neither {ALL_LINEAR!r} nor a valid "
                    f"regular expression ({error}). For several module names give a list."
                ) from error
        for name in _LISTS:
            value = getattr(self, name)
            if name == "target_modules" and isinstance(value, str):
                continue
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise TypeError(f"`{name}` must be a list of module names, got {shown(value)}.")
            for item in value:
                if not isinstance(item, str) or not item or not is_text(item):
                    raise TypeError(
                        f"`{name}` must hold non-empty module names, got {shown(item)} in {shown(list(value))}."
                    )
            object.__setattr__(self, name, list(value))  # a copy: the caller's list may change
        if isinstance(self.target_modules, str):
            return
        if not self.target_modules and not self.target_parameters:
            raise ValueError(f"`target_modules` is an empty list. Give module names, or {ALL_LINEAR!r}.")
        both = sorted(set(self.exclude_modules) & set(self.target_modules))
        if both:
            raise ValueError(f"{both} stand both in `target_modules` and in `exclude_modules`.")

    # -- what a kind says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> WeightUpdate:
        """Make the update of one matrix, which changes nothing yet.

        Args:
            shape: The matrix's.
            device: Where the parameters are made.
            generator: Random number generator for the initial values; torch's default one if ``None``.
        """

    @abstractmethod
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of the update of one matrix."""

    @property
    def shared_over_experts(self) -> tuple[Collection[str], Collection[str]]:
        """The parameters of A, and of B, that all matrices of a stack have together, by their names in the factor."""
        return (), ()

    def count_shared_over_experts(self, shape: MatrixShape) -> int:
        """Count those of :meth:`count_parameters` that all matrices of a stack have together."""
        return 0

    def count_all(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one layer: of a matrix, or of all matrices of a stack."""
        shape = self.chosen(shape)
        shared = self.count_shared_over_experts(shape) if shape.num_matrices > 1 else 0
        return shape.num_matrices * (self.count_parameters(shape) - shared) + shared

    def count_shared(self) -> int:
        """Count the trainable parameters that all matrices of an adapter have together, beside their own."""
        return 0

    @property
    def rank_unit(self) -> int:
        """What each rank must be a multiple of."""
        return 1

    def check_shape(self, shape: MatrixShape, name: str) -> None:
        """Check that a matrix can be adapted, before anything is changed.

        Args:
            shape: The matrix's.
            name: The layer's, for the message.

        Raises:
            ValueError: It cannot; the message says why and what to do.
        """
        return

    def lora_settings(self) -> dict[str, Any] | None:
        """What PEFT's ``LoraConfig`` calls the scaling, if the update is a LoRA's in PEFT's own terms; else ``None``.

        Without it an exported LoRA has the scaling multiplied into B.
        """
        return None

    # -- what follows from the fields ---------------------------------------------------------------------------------

    @property
    def scaling_factor(self) -> float:
        """The factor ``s`` on ΔW."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "sqrt_rank" else self.rank)

    @property
    def rows(self) -> list[list[int]] | None:
        """Of the configuration of one linear (:meth:`of`) the ranges of outputs that are adapted; ``None`` for all."""
        return self.target_rows.get("")

    def chosen(self, shape: MatrixShape) -> MatrixShape:
        """The sizes of what is adapted of a matrix: fewer outputs, if rows are chosen.

        Raises:
            ValueError: The matrix has not as many outputs.
        """
        if not self.rows:
            return shape
        if self.rows[-1][1] > shape.out_features:
            raise ValueError(f"`target_rows` has {self.rows[-1]}, and there are {shape.out_features} outputs.")
        return MatrixShape(sum(end - start for start, end in self.rows), shape.in_features)

    def of(self, *names: str) -> Self:
        """The configuration of one linear: it has the rank and the alpha that the patterns give, and no patterns.

        Args:
            names: The linear's names, one for each place it stands in.
        """
        if not (self.rank_pattern or self.alpha_pattern or self.target_rows) or self.rows:
            return self
        values: dict[str, Any] = {name: {} for name in _PATTERNS}
        for field_name, patterns in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            found = [value for pattern, value in patterns.items() if matches(pattern, *names)]
            values |= {field_name: found[0]} if found else {}
        rows = [ranges for pattern, ranges in self.target_rows.items() if matches(pattern, *names)]
        values["target_rows"] = {"": rows[0]} if rows else {}
        return dataclasses.replace(self, **values, elastic=self._elastic_up_to(values.get("rank", self.rank)))

    def of_first_rows(self, rank: int) -> Self:
        """The configuration of the adapter that the first rows of this one's A and B are; it has the same scaling.

        Args:
            rank: How many rows.
        """
        if rank == self.rank:
            return self
        scaling, root = self.scaling_factor, math.sqrt(rank) if self.scaling == "sqrt_rank" else rank
        near = scaling * root
        # Of the numbers beside the product one mostly gives the scaling in every bit.
        candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
        alpha = next((alpha for alpha in candidates if alpha / root == scaling), near)
        values: dict[str, Any] = {name: {} for name in _PATTERNS}
        return dataclasses.replace(self, rank=rank, alpha=alpha, elastic=self._elastic_up_to(rank), **values)

    def _elastic_up_to(self, rank: int) -> list[int] | None:
        """The ranks to train for of a layer of a rank; ``None`` if there is but one."""
        ranks = [*(lower for lower in self.elastic or () if lower < rank), rank]
        return ranks if len(ranks) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The kind and the fields as plain numbers, strings and lists, fit for JSON, YAML and safe loading.

        Layers, patterns and elastic ranks are left out where none were given: a file is then one that older releases
        read.
        """
        absent = {name for name in _LEFT_OUT_IF_EMPTY if not getattr(self, name, None)}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in absent}
        return {"kind": self.kind, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration of this kind from :meth:`to_dict`'s values; those that are left out take their defaults.

        Raises:
            ValueError: A key is no field, or the values are of another kind; the message says which.
        """
        kind = values.get("kind", cls.kind)
        if kind != cls.kind:
            raise ValueError(f"The values are of a configuration of kind {kind!r}, not {cls.kind!r}.")
        fields = {name: value for name, value in values.items() if name != "kind"}
        check_fields(cls, fields, cls.field_hints())
        return cls(**fields)

    @classmethod
    def field_hints(cls) -> dict[str, str]:
        """What to say of names that are no fields but are likely to be tried."""
        return {
            "r": "PEFT's `r` is `rank` here.",
            "lora_alpha": "PEFT's `lora_alpha` is `alpha` here.",
            "lora_dropout": "PEFT's `lora_dropout` is `dropout` here.",
            "modules_to_save": "PEFT's `modules_to_save` is `modules_to_train` here.",
            "trainable_token_indices": "PEFT's `trainable_token_indices` is `tokens_to_train` here.",
        }

    def differences(self, other: Described, *, run_only: bool = False) -> dict[str, tuple[Any, Any]]:
        """Find the fields in which another configuration differs: the name, this value and the other's.

        Args:
            other: The other configuration, of whatever kind.
            run_only: Whether fields that are a matter of the run (dropout) count, too.
        """
        here, there = self.to_dict(), other.to_dict()
        if self.kind != there["kind"]:
            return {"kind": (self.kind, there["kind"])}
        left_out = {f.name for f in dataclasses.fields(self) if f.metadata.get("run_only")} if not run_only else set()
        return {
            name: (here.get(name), there.get(name))
            for name in {**here, **there}
            if here.get(name) != there.get(name) and name not in left_out
        }


def matches(pattern: str, *names: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` is for a linear of one of these names."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)


def _check_expression(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{field_name}` has {shown(pattern)}, which is neither a name nor a valid regular expression ({error})."
        ) from error


def _check_alpha(name: str, value: Any) -> None:
    check_number(name, value)
    if value == 0:
        raise ValueError(f"`{name}` must be finite and not zero, got {value}: the update would always be zero.")


C = TypeVar("C", bound=AdapterConfig)


def explain_arguments(cls: type[C]) -> type[C]:
    """Class decorator of a configuration: have it say what an argument is called that it does not know.

    Raises:
        TypeError: From the class, for an argument that is no field; the message lists the fields.
    """
    original = cls.__init__

    @functools.wraps(original)
    def checked(self: C, **fields: Any) -> None:
        try:
            check_fields(cls, fields, cls.field_hints())
        except ValueError as error:
            raise TypeError(str(error)) from None
        original(self, **fields)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


# Every kind of adapter whose module was imported, by name.
KINDS: dict[str, type[AdapterConfig]] = {}
