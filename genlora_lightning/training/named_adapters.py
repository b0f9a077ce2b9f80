"""Train several named adapters of one model in a run: put them in, let rows find theirs, keep their gradients apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_set import AdapterSet
from genlora_lightning.artifacts.checkpoint import adapter_root
from genlora_lightning.backbone.low_memory import weight_source
from genlora_lightning.fields import shown
from genlora_lightning.injection.named import set_of
from genlora_lightning.injection.peft_adapters import AnyConfig, PeftAdapter, read_any_config
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.training.lightning_internals import find_unused_parameters
from genlora_lightning.training.step_generation import Generate
from genlora_lightning.training.strategies import shards_base

#: The key of a batch that names the adapter of each row, and the attribute of the module that is the set.
ROWS_KEY = "adapter"
SET_ATTRIBUTE = "adapters"


def read_adapters(adapters: Any, config: AnyConfig) -> dict[str, AnyConfig]:
    """Read the names of a run's adapters, each with its configuration.

    Args:
        adapters: Names; or names with configurations, of which ``None`` stands for the common one; or ``None`` for one
            adapter without a name.
        config: The common configuration.

    Raises:
        TypeError: It is something else.
        ValueError: There is none, or a name is not one of a folder and of a part of a module.
    """
    if adapters is None:
        return {}
    if isinstance(adapters, str) or not isinstance(adapters, (Mapping, Sequence)):
        raise TypeError(f"`adapters` must be a list of names, or names with configurations, got {shown(adapters)}.")
    if not isinstance(adapters, Mapping):
        if len(set(map(str, adapters))) < len(adapters):
            raise ValueError(f"`adapters` names one twice: {shown(list(adapters))}.")
        adapters = dict.fromkeys(adapters)
    if not adapters:
        raise ValueError("`adapters` names none. Leave it out to train one adapter without a name.")
    for name in adapters:
        if not isinstance(name, str) or re.fullmatch(r"[\w-]+", name) is None:
            raise ValueError(
                "The names in `adapters` must be of letters, digits, `_` and `-`, as they name folders, got "
                f"{shown(name)}."
            )
    return {name: config if given is None else read_any_config(given) for name, given in adapters.items()}


class NamedTraining:
    """The named adapters of a run.

    Args:
        configs: The configuration of each, by its name.
    """

    def __init__(self, configs: Mapping[str, AnyConfig]) -> None:
        self.configs = dict(configs)
        self._batch = ExitStack()

    # -- before the training ------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, *, generate: Generate) -> None:
        """Find out, before anything is loaded, what cannot work, and have DDP expect batches that do not name all.

        Raises:
            ValueError: Something cannot; in one line, with what to do instead.
        """
        for name, config in self.configs.items():
            reason = _obstacle(config)
            if reason is not None:
                raise ValueError(f"`adapters` cannot train {name!r} beside others: {reason}.")
        if generate != "forward":
            raise ValueError(
                f'`generate="{generate}"` does not work with `adapters`: each micro-batch may name others, and it '
                'would hold what was generated for the first. Set `generate="forward"`.'
            )
        strategy = trainer.strategy
        if shards_base(strategy):
            raise ValueError(
                f"`adapters` does not work with {type(strategy).__name__}: each batch exchanges layers of the model, "
                'which that has cut up before. Set `strategy="ddp"`, or train one adapter at a time.'
            )
        if isinstance(strategy, DDPStrategy):
            find_unused_parameters(strategy)

    def put_in(self, module: LightningModule, configs: Mapping[str, AnyConfig]) -> dict[str, InjectionReport]:
        """Give a module the set of adapters, as ``module.adapters``; one that it has of the same adapters stays.

        Args:
            module: The module, whose model is built.
            configs: What :attr:`configs` have become by the module's own choices.

        Returns:
            What was adapted, by the adapters' names.

        Raises:
            ValueError: A configuration does not fit the model, or the module has other adapters. It is as it was then.
        """
        found = set_of(module)
        if found is not None:
            self._check_same(found, configs)
            return {}
        if hasattr(module, SET_ATTRIBUTE):
            raise ValueError(
                f"{type(module).__name__} has an attribute `{SET_ATTRIBUTE}`, which is to be the set of named "
                "adapters: give it another name."
            )
        if weight_source(module) is not None:
            raise ValueError("`adapters` needs the base's weights when they are put in: leave `low_memory` out.")
        reports: dict[str, InjectionReport] = {}
        adapters = AdapterSet(adapter_root(module))
        try:
            for name, config in configs.items():
                report = adapters.add(name, _own(config))
                assert report is not None
                reports[name] = report
            with adapters.using(rows=[*configs]):
                pass  # which says whether all layers can be computed by row
        except BaseException:
            adapters.close()
            raise
        module.add_module(SET_ATTRIBUTE, adapters)
        return reports

    def _check_same(self, found: Any, configs: Mapping[str, AnyConfig]) -> None:
        names, wanted = found.trained_names, list(configs)
        if sorted(names) != sorted(wanted) or not isinstance(found, AdapterSet):
            raise ValueError(
                f"The module has a set of other adapters ({', '.join(names) or 'none that is trained'}) than "
                f"`adapters` names ({', '.join(wanted)}): close it first (`close()`), or name those."
            )
        for name, config in configs.items():
            for place, there in found.configs_of(name).items():
                differences = there.differences(_own(config).of(place))
                if differences:
                    listed = ", ".join(f"{key}: {a!r} there, {b!r} asked for" for key, (a, b) in differences.items())
                    raise ValueError(
                        f"The module has an adapter {name!r} made with another configuration ({listed}; at {place}): "
                        "close its set first (`close()`)."
                    )

    # -- in a run -----------------------------------------------------------------------------------------------------

    def begin_batch(self, module: LightningModule, batch: Any, *, training: bool = False) -> None:
        """Take the rows' names out of a batch, if it has them, and have those adapters act until :meth:`end_batch`.

        Raises:
            ValueError: They are no list of names, not as many as there are rows, or unknown, or in training all
                ``None``.
        """
        self.end_batch()
        if not isinstance(batch, MutableMapping) or ROWS_KEY not in batch:
            return
        rows = batch.pop(ROWS_KEY)
        if not isinstance(rows, (list, tuple)) or not all(name is None or isinstance(name, str) for name in rows):
            raise ValueError(
                f'`batch["{ROWS_KEY}"]` must be a list with the name of an adapter for each row (None: the base), got '
                f"{shown(rows)}."
            )
        sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        if sizes and len(rows) not in sizes:
            raise ValueError(
                f'`batch["{ROWS_KEY}"]` has {len(rows)} names, and the batch has {sizes[0]} rows: give one for each.'
            )
        if training and all(name is None for name in rows):
            raise ValueError(f'`batch["{ROWS_KEY}"]` names no adapter, so that the batch would train nothing.')
        self._batch.enter_context(adapters_of(module).using(rows=rows))

    def end_batch(self) -> None:
        """Have what acted before the batch act again."""
        self._batch.close()

    def check_loss(self, loss: Tensor) -> None:
        """Check that some adapter has a part in a loss.

        Raises:
            ValueError: None has.
        """
        if not loss.requires_grad:
            raise ValueError(
                "No named adapter has a part in the loss of this batch. Let the batch be a dictionary whose entry "
                f'"{ROWS_KEY}" is a list with a name for each row, or let `training_step` compute in '
                f"`with self.{SET_ATTRIBUTE}.using(rows=names)`."
            )


def adapter_names(module: nn.Module) -> list[str]:
    """The names of the adapters that a module trains; ``""`` stands for the only one, which has none."""
    found = set_of(module)
    return [""] if found is None else found.trained_names


def adapters_of(module: nn.Module) -> AdapterSet:
    """The set of named adapters of a module that has one."""
    found = set_of(module)
    assert isinstance(found, AdapterSet), "the set was closed in the middle of a run"
    return found


def each_apart(module: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Show an optimizer the gradients of one named adapter after another, and then those of all else, for clipping.

    Args:
        module: The module.
        optimizer: The optimizer.
    """
    adapters = adapters_of(module)
    owners = {id(p): name for name in adapters.trained_names for p in adapters.parameters_of(name)}
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    try:
        for owner in dict.fromkeys(owners.get(id(p)) for p in gradients):
            for parameter, gradient in gradients.items():
                parameter.grad = gradient if owners.get(id(parameter)) == owner else None
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _own(config: AnyConfig) -> AdapterConfig:
    assert isinstance(config, AdapterConfig), "PEFT's are refused before"
    return config


def _obstacle(config: AnyConfig) -> str | None:
    if isinstance(config, PeftAdapter):
        return f"it is {config.title}, and they are of this library's kinds (for LoRA: LoRAConfig)"
    if config.elastic:
        return "`elastic` draws ranks for the layers of one adapter; train it alone"
    if config.modules_to_train:
        return f"it trains modules in full ({', '.join(config.modules_to_train)}), of which a model has one set"
    if config.target_parameters:
        return "it has `target_parameters`, and rows find their adapters in whole linears alone"
    return None
