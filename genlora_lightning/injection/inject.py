"""Put adapters into a model and freeze the rest; switch them off, or remove them again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from genlora_lightning.adapters.base import adapter_modules
from genlora_lightning.adapters.config import ALL_LINEAR, AdapterConfig
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.adapters.low_rank import RankKind
from genlora_lightning.injection.foreign import check_no_foreign_adapters
from genlora_lightning.injection.full_training import stop_training_in_full, train_in_full, trained_modules
from genlora_lightning.injection.heads import UNTIED_HEAD, last_if_new
from genlora_lightning.injection.held import held_root, remove_held
from genlora_lightning.injection.named import check_no_set, end_set, set_of
from genlora_lightning.injection.names import plain_modules, plain_name
from genlora_lightning.injection.places import adapter_parameters as adapter_parameters
from genlora_lightning.injection.report import BESIDE_PARTS, TRAINED_IN_FULL, InjectionReport, InjectionRow
from genlora_lightning.injection.targets import all_names, configurations, match_modules, select_targets
from genlora_lightning.injection.token_rows import token_rows, untied_heads
from genlora_lightning.injection.uncalled import read_layers
from genlora_lightning.injection.widening import forget_dtypes, restore_dtypes
from genlora_lightning.layers.adapted import AdaptedLayer, is_place
from genlora_lightning.layers.experts import AdaptedExperts, AdaptedStack, stack_of_matrices
from genlora_lightning.layers.quantized import is_quantized, keep_layout
from genlora_lightning.layers.sharing import share_generation, stop_sharing_generation
from genlora_lightning.layers.sites import adapt, is_linear, matrix_shape, obstacle
from genlora_lightning.layers.ties import tie_modules
from genlora_lightning.overrides import forget, note, noted, put_on, take_off

# What torch's transformer layers are to be without their fused inference paths.
_WITHOUT_FAST_PATH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_SKIPPED = "left alone"


def adapter_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a model by name, each once; empty if the model has none."""
    return {name: module for name, module in plain_modules(model) if isinstance(module, AdaptedLayer)}


def count_linears(model: nn.Module) -> int:
    """How many linears a model has, adapted or not: what tells it from a larger one of the same kind."""
    return sum(is_linear(module) for module in model.modules())


def adapter_config(model: nn.Module) -> AdapterConfig:
    """The configuration the model's adapters were made with; of several (:func:`adapter_configs`) the first.

    Raises:
        ValueError: The model has no adapters.
    """
    return main_config(require_adapters(model).values())


def main_config(layers: Iterable[AdaptedLayer]) -> AdapterConfig:
    """The first configuration of some layers that a user has given."""
    configs = [layer.config for layer in layers]
    return next((config for config in configs if not config.is_derived), configs[0])


def adapter_configs(model: nn.Module) -> dict[str, AdapterConfig]:
    """The configuration of each adapted layer by its name; parts that were adapted one by one have their own."""
    return {name: layer.config for name, layer in adapter_layers(model).items()}


def require_adapters(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Like :func:`adapter_layers`, but a model without adapters is an error."""
    layers = adapter_layers(model)
    if not layers and held_root(model) is not None:
        raise ValueError(
            f"This {type(model).__name__} has adapters of PEFT, and this is for adapters of this library. Save them "
            "(`save_adapter`), and use PEFT, or `genlora inspect`, `verify` and `merge`, on the folder."
        )
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no adapters. Call `inject_adapters(model, config)` first; with "
            "Lightning the GenLoRAFinetuning callback does so when `trainer.fit` starts."
        )
    return layers


def check_configuration(model: nn.Module, config: AdapterConfig | Mapping[str, AdapterConfig]) -> None:
    """Check that a model's adapters, if it has any, were made with a configuration; their dropout may differ.

    Args:
        model: A model, with adapters or without.
        config: The configuration, or that of each adapted layer by name; other layers are not compared then.

    Raises:
        ValueError: With another one; the message says how they differ.
    """
    present = adapter_configs(model)
    several = len({id(there) for there in present.values()}) > 1
    names = all_names(model)
    layers = adapter_layers(model)
    for name, there in present.items():
        if there.is_derived and isinstance(config, AdapterConfig):
            continue  # the others' says what it follows from
        if isinstance(config, AdapterConfig):
            wanted = config.of(*map(plain_name, names[id(layers[name])]))
        else:
            wanted = config.get(name, there)
        differences = there.differences(wanted)
        if differences:
            listed = ", ".join(
                f"{key}: {here!r} there, {asked!r} asked for" for key, (here, asked) in differences.items()
            )
            where = f"; at {name}: not all linears have the same one" if several else ""
            raise ValueError(
                f"The model already has adapters made with another configuration ({listed}{where}). "
                "Call `remove_adapters(model)` first."
            )


@torch.no_grad()
def effective_ranks(model: nn.Module, kind: RankKind = "entropy") -> dict[str, float]:
    """Measure the effective rank of the update of each adapted layer, by module name.

    Raises:
        ValueError: The model has no adapters.
    """
    return {name: layer.effective_rank(kind) for name, layer in require_adapters(model).items()}


def inject_adapters(
    model: nn.Module, config: AdapterConfig | Mapping[str, Any], *, generator: torch.Generator | None = None
) -> InjectionReport:
    """Freeze a model and put an adapter on each layer that the configuration names, in place.

    Nothing is changed if an error is raised. A second call with an equal configuration changes nothing and reports
    again. A linear that stands in several places gets one adapter; weights that are tied stay tied. Parts of a model
    may be adapted one by one, each with a configuration of its own.

    Args:
        model: Any module whose linears are ``nn.Linear`` or transformers' ``Conv1D``. ``nn.Embedding`` and convolutions
            are adapted where ``target_modules`` names them.
        config: Which linears are adapted, and how; also as a dictionary. ``"all-linear"`` leaves out output heads (what
            a transformers model has outside its ``base_model``, linears beside such a model or tied to an embedding,
            and linears with the values that they were made with while most others were trained), modules trained in
            full, and linears whose module reads their weight without calling them (``nn.MultiheadAttention``'s
            ``out_proj``, Mamba's ``dt_proj``).
        generator: Random number generator for the initial values; torch's default one if ``None``.

    Returns:
        What was adapted, trained in full, and left alone.

    Raises:
        ValueError: A name matches nothing (the message lists names that are near), the model has no linear at all, a
            named module cannot be adapted, there are more groups than entries, or other adapters are already there,
            ours or another library's.

    Note:
        In a process group, every rank must start from the same values: use the same seed, or broadcast afterwards
        (the GenLoRAFinetuning callback sees to it).
    """
    config = read_config(config)
    if config.is_derived:
        raise ValueError(f"{config.title} are no kind of adapter: give `tokens_to_train` to one.")
    check_no_set(model)
    existing = adapter_layers(model)
    if existing:
        check_configuration(model, config)
        return _go_on(model, dict.fromkeys(existing, config))
    if matrix_shape(model) is not None:
        what = "a linear layer" if is_linear(model) else f"a layer ({type(model).__name__})"
        raise ValueError(f"The model is itself {what}, which cannot be replaced in place: put it into a module.")

    _check_initialized(model)
    check_no_foreign_adapters(model)
    can_be_adapted = is_linear if config.target_modules == ALL_LINEAR else matrix_shape
    linears = {name: module for name, module in plain_modules(model) if can_be_adapted(module)}
    if not linears and not config.target_parameters:
        raise ValueError(
            f"This {type(model).__name__} has no nn.Linear or Conv1D to adapt{_other_sites(model)}. If its backbone is "
            "built later (`configure_model`), inject after that."
        )
    trained = match_modules(model, config.modules_to_train, "modules_to_train")
    targets, skipped = select_targets(model, linears, config, trained)
    # A copy: the caller may go on to change the lists of theirs.
    configs = configurations(model, targets, replace(config), skipped)
    layers = {name: (module, configs[name]) for name, module in targets.items()}
    taken = {id(module): "adapted, too: leave it out of `target_modules`" for module, _ in layers.values()}
    in_full = {id(inner): "trained in full" for module in trained.values() for inner in module.modules()}
    rows = token_rows(model, config, taken | in_full)
    skipped = {name: reason for name, reason in skipped.items() if name not in rows}
    skipped |= dict.fromkeys(untied_heads(model, {*layers, *rows, *trained}) if rows else (), UNTIED_HEAD)
    layers |= rows
    return _put_in(model, layers, trained, skipped, generator)


def inject_layers(
    model: nn.Module, configs: Mapping[str, AdapterConfig], trained: Iterable[str], stored: Collection[str] = ()
) -> InjectionReport:
    """Put adapters on exactly the named layers, as a file lists them, whatever their configurations would choose.

    Args:
        model: A model, with the same adapters or without.
        configs: The configuration of each layer, by its name.
        trained: Names of the modules that are trained in full.
        stored: Names of the tensors that the file has: which layers share what (:mod:`~genlora_lightning.layers.ties`).

    Returns:
        What was adapted and trained in full.

    Raises:
        ValueError: A name is not that of a linear, or of a module, or other adapters are already there. Nothing is
            changed then.
    """
    check_no_set(model)
    if adapter_layers(model):
        check_configuration(model, configs)
        return _go_on(model, configs)
    check_no_foreign_adapters(model)
    modules = dict(plain_modules(model))
    for name in configs:
        holder, _, own = name.rpartition(".")
        if name not in modules and holder in modules and (stack := stack_of_matrices(modules[holder], own)) is not None:
            modules[name] = stack
    absent = [name for name in configs if name not in modules or matrix_shape(modules[name]) is None]
    absent += [name for name in trained if name not in modules]
    if absent:
        raise ValueError(f"It has no place for {len(absent)} of the modules, {absent[0]} among them.")
    layers = {name: (modules[name], config) for name, config in configs.items()}
    return _put_in(model, layers, {name: modules[name] for name in trained}, {}, None, stored)


def _other_sites(model: nn.Module) -> str:
    names = [name for name, module in plain_modules(model) if matrix_shape(module) is not None]
    return f"; name its other layers in `target_modules` ({', '.join(names[:3])})" if names else ""


def _check_initialized(model: nn.Module) -> None:
    lazy = next((name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if lazy is not None:
        raise ValueError(
            f"{lazy} has no shape yet, as its module is lazy. Run one forward of the model on a batch first, with "
            "Lightning in `configure_model`."
        )


def _put_in(
    model: nn.Module,
    layers: dict[str, tuple[nn.Module, AdapterConfig]],
    trained: dict[str, nn.Module],
    skipped: dict[str, str],
    generator: torch.Generator | None,
    stored: Collection[str] = (),
) -> InjectionReport:
    for name, (module, config) in layers.items():
        shape, reason = matrix_shape(module), obstacle(module)
        assert shape is not None
        if reason is not None:
            raise ValueError(f"{name} cannot be adapted: {reason}.")
        own = module.parameters(recurse=False)
        if config.keep_zeros and any(is_quantized(p) or p.element_size() < 2 for p in own):
            raise ValueError(
                f"`keep_zeros` is set, and {name} is quantized, which leaves no zeros that could be told from others: "
                "load the base as it is, or leave `keep_zeros` out."
            )
        if config.rows and not is_linear(module):
            raise ValueError(f"`target_rows` is for linears, and {name} is a {type(module).__name__}.")
        try:
            config.check_shape(config.chosen(shape), name)
        except ValueError as error:
            if module is not last_if_new(model):
                raise
            raise ValueError(
                f"{error} If it is a new head, name it in `modules_to_train`, and it is trained in full."
            ) from error
    for name, module in trained.items():
        if any(is_quantized(parameter) for parameter in module.parameters()):
            raise ValueError(
                f"{name} is quantized, and cannot be trained in full: leave it out of `modules_to_train`, or load the "
                "base with it as it is."
            )
    keep_layout(model)
    model.requires_grad_(False)
    adapted = {name: adapt(module, config, generator) for name, (module, config) in layers.items()}
    tie_modules(adapted, stored)
    _replace(model, _replacements(adapted, layers))
    train_in_full(model, list(trained.values()))
    _disable_fast_paths(model)
    share_generation(model)
    note(model, _SKIPPED, skipped)
    return _report(model, skipped)


def _replacements(
    adapted: Mapping[str, AdaptedLayer], layers: Mapping[str, tuple[nn.Module, AdapterConfig]]
) -> dict[int, nn.Module]:
    """What is to stand in the place of each module (by id): its adapted layer, or the one around its parameters'."""
    replacements: dict[int, nn.Module] = {}
    stacks: dict[int, tuple[nn.Module, dict[str, AdaptedStack]]] = {}
    for name, layer in adapted.items():
        if isinstance(layer, AdaptedStack):
            holder, own = layer.weight_place
            stacks.setdefault(id(holder), (holder, {}))[1][own] = layer
        else:
            replacements[id(layers[name][0])] = layer
    return replacements | {key: AdaptedExperts(holder, own) for key, (holder, own) in stacks.items()}


def _go_on(model: nn.Module, configs: Mapping[str, AdapterConfig]) -> InjectionReport:
    """Take the adapters that are there, with the dropout of the configurations: a matter of this run, not of theirs."""
    changed: dict[tuple[int, float], AdapterConfig] = {}
    for name, layer in adapter_layers(model).items():
        present = layer.config
        dropout = configs[name].dropout if name in configs else present.dropout
        if present.dropout != dropout:
            layer.set_dropout(changed.setdefault((id(present), dropout), replace(present, dropout=dropout)))
    _set_trainable(model)
    skipped = noted(model, _SKIPPED)
    if skipped is None:  # a part of it was adapted, or each of some
        taken = {id(layer.base_layer) for layer in adapter_layers(model).values()}
        taken |= {id(inner) for module in trained_modules(model).values() for inner in module.modules()}
        linears = {name: m for name, m in plain_modules(model) if is_linear(m)}
        skipped = {name: BESIDE_PARTS for name, module in linears.items() if id(module) not in taken}
    return _report(model, skipped)


def remove_adapters(model: nn.Module, *, keep_merged: bool = False) -> None:
    """Take the adapters off a model, in place: its linears are the ones it had. All parameters stay frozen.

    PEFT's, which AdapterFinetuning or :func:`~genlora_lightning.load_adapter` has put in, are taken off, too, and so is
    an AdapterSet.

    Modules trained in full keep what they learned, rounded to the dtype they had. If :func:`merge_adapters` has cast
    the model to another dtype, that is taken back with the merge, or kept with it.

    Args:
        model: A model with adapters.
        keep_merged: Leave merged weights in the model (what one wants after :func:`merge_adapters`), instead of
            restoring the original ones.

    Raises:
        ValueError: The model has no adapters, or ``keep_merged`` is asked for and a layer is not merged.
    """
    if held_root(model) is not None:
        if keep_merged:
            raise ValueError("`keep_merged` is for adapters of this library; PEFT's are merged by PEFT.")
        remove_held(model)
        return
    layers = require_adapters(model) if keep_merged or set_of(model) is None else adapter_layers(model)
    unmerged = [name for name, layer in layers.items() if not layer.merged]
    if keep_merged and unmerged:
        raise ValueError(
            f"`keep_merged` needs merged adapters, but {len(unmerged)} are not merged, {unmerged[0]} among them. "
            "Call `merge_adapters(model)` first."
        )
    if keep_merged:
        forget_dtypes(model)
    else:
        for layer in layers.values():
            layer.unmerge()
        restore_dtypes(model)
    stop_sharing_generation(model)
    _replace(model, {id(module): module.base_layer for module in model.modules() if is_place(module)})
    for module in trained_modules(model).values():
        stop_training_in_full(module)
    for module in model.modules():
        take_off(module, *(name for _, name, _ in _WITHOUT_FAST_PATH))
        forget(module, _SKIPPED)  # also of a part that the adapters were put into
    end_set(model)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model computes as if it had no adapters, merged ones included.

    Modules trained in full keep their trained weights.

    Raises:
        ValueError: The model has no adapters.
    """
    layers = list(require_adapters(model).values())
    before = [(layer.enabled, layer.merged) for layer in layers]
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        yield
    finally:
        for layer, (enabled, merged) in zip(layers, before, strict=True):
            layer.enabled = enabled
            if merged:
                layer.merge()


def _set_trainable(model: nn.Module) -> None:
    """Freeze all but the adapters and the modules trained in full, whatever was done to the flags meanwhile."""
    model.requires_grad_(False)
    for owner in adapter_modules(model):
        for name, parameter in owner.named_parameters(recurse=False):
            parameter.requires_grad_(owner.is_trained(name))
    for module in trained_modules(model).values():
        module.requires_grad_(True)


def _replace(model: nn.Module, replacements: dict[int, Any]) -> None:
    """Put modules in the place of others (by id), wherever they stand, also in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def _disable_fast_paths(model: nn.Module) -> None:
    """Make torch's transformer layers call their linears.

    In evaluation they hand the linears' weights to one fused kernel, which would leave out the adapters, silently.
    """
    for module in model.modules():
        off = {name: value for kind, name, value in _WITHOUT_FAST_PATH if isinstance(module, kind)}
        if off and adapter_layers(module):
            put_on(module, **off)


def _possible_head(model: nn.Module) -> str | None:
    own = {name: layer for name, layer in adapter_layers(model).items() if not layer.config.is_derived}
    name, layer = [*own.items()][-1] if own else ("", None)
    last = last_if_new(model)
    return name if layer is not None and last is not None and last is layer.base_layer else None


def _report(model: nn.Module, skipped: dict[str, str]) -> InjectionReport:
    layers = adapter_layers(model)
    own = {name: [*layer.adapter_parameters().values()] for name, layer in layers.items()}
    owners: dict[nn.Parameter, str] = {}  # what layers share counts at the first of them
    for name, parameters in own.items():
        for parameter in parameters:
            owners.setdefault(parameter, name)
    adapted = tuple(
        InjectionRow(
            module=name,
            kind=type(layer.weight_place[0]).__name__,
            shape=f"({', '.join(map(str, layer.shape.sizes))})",
            trainable_parameters=sum(p.numel() for p in own[name] if p.requires_grad and owners[p] == name),
            lora_parameters=layer.shape.num_matrices * layer.config.rank * sum(layer.shape),
            matrices=layer.shape.num_matrices,
            rank=layer.config.rank,
            is_linear=not layer.named_only,
        )
        for name, layer in layers.items()
        if not layer.config.is_derived
    )
    rows = tuple(
        InjectionRow(
            module=name,
            kind=type(layer.base_layer).__name__,
            shape=f"{layer.config.rank} of {layer.out_features} rows",
            trainable_parameters=sum(p.numel() for p in own[name] if owners[p] == name),
            lora_parameters=0,
        )
        for name, layer in layers.items()
        if layer.config.is_derived
    )
    trained = tuple(
        InjectionRow(
            module=name,
            kind=type(module).__name__,
            shape=TRAINED_IN_FULL,
            trainable_parameters=sum(p.numel() for p in module.parameters()),
            lora_parameters=0,
        )
        for name, module in trained_modules(model).items()
    )
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return InjectionReport(
        title=adapter_config(model).title,
        adapted=adapted,
        trained=(*rows, *trained),
        skipped=skipped,
        trainable_parameters=sum(size for size, is_trained in sizes if is_trained),
        total_parameters=sum(size for size, _ in sizes),
        lora_parameters=sum(row.lora_parameters for row in adapted),
        possible_head=_possible_head(model),
        kept_zeros=_share_of_zeros(model),
        read=read_layers(model),
    )


def _share_of_zeros(model: nn.Module) -> float | None:
    """The share of zeros in the weights whose zeros are kept; ``None`` without such, or where they are not there."""
    weights = [layer.base_weight for layer in adapter_layers(model).values() if layer.config.keep_zeros]
    if not weights or any(type(weight.data) is not Tensor or weight.is_meta for weight in weights):
        return None
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
