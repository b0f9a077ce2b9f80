"""Run ``fit``, ``validate``, ``test``, ``predict``, ``find_lr`` from YAML and flags, with errors one can act on."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ActionYesNo
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero, rank_zero_only, rank_zero_warn
from typing_extensions import override

from genlora_lightning.artifacts.adapter_folder import is_adapter_folder
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.callbacks.predictions import PredictionWriter
from genlora_lightning.callbacks.progress import default_progress_bar
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.cli.adapter import AdapterOptions, config_of
from genlora_lightning.cli.commands import TRAINING
from genlora_lightning.cli.configs import with_paths
from genlora_lightning.cli.errors import find_user_error, leave, one_line
from genlora_lightning.cli.log import LogFile, LogFormat, LogLevel, RunLogs, run_logs
from genlora_lightning.cli.runs import write_report
from genlora_lightning.cli.trainer import CommandTrainer
from genlora_lightning.data import (
    ImageClassificationDataModule,
    InstructionDataModule,
    TextClassificationDataModule,
)
from genlora_lightning.modules import (
    CausalLMModule,
    GenLoRAModule,
    ImageClassificationModule,
    SequenceClassificationModule,
)
from genlora_lightning.storage.checkpoint_file import verify_checkpoint
from genlora_lightning.storage.paths import is_remote, local_path
from genlora_lightning.training.callback import AdapterFinetuning
from genlora_lightning.training.last_checkpoint import last_good_checkpoint
from genlora_lightning.training.record import RunRecord
from genlora_lightning.training.run_folder import logs_folder
from genlora_lightning.training.samples import DEFAULT_COUNT, AnswerSamples
from genlora_lightning.training.spectra import UpdateSpectra

_log = rank_zero_logger(__name__)

# A class is known by its short name once its module is imported.
SHORT_NAMES = (
    CausalLMModule,
    SequenceClassificationModule,
    ImageClassificationModule,
    InstructionDataModule,
    TextClassificationDataModule,
    ImageClassificationDataModule,
)
_MADE_FROM_MODEL = ("tokenizer", "image_processor")  # arguments of the data that lie beside the model
TRACEBACK_VARIABLE = "GENLORA_TRACEBACK"
AUTO = "auto"
# The callback's arguments that are settings of the command line; types and defaults are the callback's own.
_CALLBACK_HELP = {
    "adapter_dir": "Where fit saves the adapter folder; `adapter` in the run's log directory if not given.",
    "overwrite": "Let fit replace the adapter of another run in `adapter_dir`.",
    "base_check": "What to do with a checkpoint of another base: refuse it, warn, or do not look.",
    "save_adapter": "Whether fit saves the adapter folder.",
    "train_mode": "Whether fit puts the whole model into train mode, in which its dropout acts.",
    "check_finite_every_n_steps": "Check the gradients for NaN and infinity this often, in optimizer steps; 0: never.",
    "adapter_sharding": "On several GPUs: whole adapters on each of them, or sharded with the base.",
    "check_ranks_every_n_steps": "For debugging: compare the adapters of all processes this often; 0: at the end only.",
    "stop_if_diverged": "Stop with an error when the loss has risen far over where it started; the best is kept.",
    "generate": "With accumulate_grad_batches: generate the adapters' matrices in each forward, or once per step.",
    "adapters": "Names of several adapters to train at once, on the rows that name them, or names with settings each.",
}
_CALLBACK_DEFAULTS = {
    name: inspect.signature(AdapterFinetuning.__init__).parameters[name].default for name in _CALLBACK_HELP
}
_SPECIAL_CHECKPOINTS = (AUTO, "last", "hpc", "registry")
_USAGE_ERROR = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


_OF_A_CHECKPOINT = "--config support.yaml --ckpt_path runs/support/logs/version_0/checkpoints/NAME.ckpt"
_EXAMPLES = {
    "fit": "genlora fit --config support.yaml --adapter.rank 32",
    "find_lr": "genlora find_lr --config support.yaml",
    **{name: f"genlora {name} {_OF_A_CHECKPOINT}" for name in ("validate", "test", "predict")},
}


class GenLoRACLI(LightningCLI):
    """LightningCLI with what fine-tuning wants by default.

    - Any LightningModule and LightningDataModule by ``class_path``; those of this package by their names alone.
    - ``tokenizer``, ``image_processor``, ``label_names`` and ``problem_type`` of the data, where the class has them and
      they are not set, are the model's ``model``, ``label_names`` and ``problem_type``; with the model's tokenizer or
      image processor go its ``trust_remote_code`` and ``revision``.
    - A checkpoint gives weights, not settings: the configuration and the command line always win over the
      hyperparameters stored in it.
    - ``fit --ckpt_path auto`` goes on from the newest good checkpoint of the run's directory, or starts a new run.
    - Metrics go to CSV files below ``trainer.default_root_dir``; the configuration is saved beside them.
    - A progress bar on a terminal, lines elsewhere; tokens per second; ``predict`` writes JSON lines.
    - ``fit`` ends with a report of the run beside its metrics, unless there is ``--report false``; the run's folder
      has what the report is made of: where it ran, effective ranks over time, and answers before and after.

    Args:
        args: The command line as a list; ``sys.argv`` if ``None``.
        run: Whether there are subcommands, of which one is run.
        logs: Takes what is said to the terminal and to the run's folder; ``None`` leaves logging alone.
    """

    def __init__(self, args: list[str] | None = None, *, run: bool = True, logs: RunLogs | None = None) -> None:
        self._logs = logs
        given = sys.argv[1:] if args is None else args
        self._asked = given[0] if given and given[0] in self.subcommands() else None
        super().__init__(
            run=run,
            trainer_class=CommandTrainer,
            parser_class=_Parser,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            auto_configure_optimizers=False,
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.epilog = (
            "More help: `--adapter.help` lists the adapter's settings, `--model.help CLASS` and `--data.help CLASS` "
            "those of a class, `--trainer.callbacks.help CLASS` those of a callback."
        )
        parser.add_argument(
            "--adapter",
            type=AdapterOptions | None,
            default=None,
            help="Kind of adapter, and what to adapt, in any model; for this package's modules GenLoRA if not given.",
        )
        types = get_type_hints(AdapterFinetuning.__init__)
        for name, text in _CALLBACK_HELP.items():
            kind: dict[str, Any] = {"type": types[name]}
            if types[name] is bool:  # `--overwrite`, `--overwrite false` and `--no_overwrite`
                kind = {"action": ActionYesNo, "nargs": "?"}
            parser.add_argument(f"--{name}", default=_CALLBACK_DEFAULTS[name], help=text, **kind)
        parser.add_argument(
            "--report",
            action=ActionYesNo,
            nargs="?",
            default=True,
            help="Whether fit ends with a report of the run, report.html beside its metrics.",
        )
        parser.add_argument(
            "--spectra",
            action=ActionYesNo,
            nargs="?",
            default=True,
            help="Whether fit records the effective rank and the singular values of each update over time.",
        )
        parser.add_argument(
            "--samples",
            type=NonNegativeInt,
            default=DEFAULT_COUNT,
            help="How many prompts of the validation data fit answers before and after; 0: none.",
        )
        parser.add_argument(
            "--log_format", "--log-format", type=LogFormat, default="text", help="Messages as text or as JSON lines."
        )
        parser.add_argument(
            "--log_level", "--log-level", type=LogLevel, default="info", help="The least level of messages."
        )
        linked = [(name, name) for name in ("label_names", "problem_type")]
        for source, target in [*(("model", name) for name in _MADE_FROM_MODEL), *linked]:
            parser.link_arguments(
                (f"model.init_args.{source}", "data"),
                f"data.init_args.{target}",
                compute_fn=_named("given or the model's", partial(_given_or_linked, target)),
            )
        for name in ("trust_remote_code", "revision"):  # of the model, so of what lies beside it, too
            parser.link_arguments(
                (f"model.init_args.{name}", "model", "data"),
                f"data.init_args.{name}",
                compute_fn=_named("given or the model's", partial(_given_or_linked_beside, name)),
            )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "find_lr": {"model", "datamodule"}}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._asked not in (None, subcommand):  # to be named in messages alone: the arguments of each take a while
            return self.init_parser(**kwargs)
        about = {"description": f"{TRAINING[subcommand].capitalize()}."}
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs | about)
        parser.epilog = f"Example: `{_EXAMPLES[subcommand]}`. {parser.epilog}"
        if subcommand == "predict":
            parser.add_argument(
                "--predictions_path",
                type=str | None,
                default=None,
                help="JSON-lines file for the predictions; predictions.jsonl in the log directory if not given.",
            )
            parser.set_defaults({"return_predictions": False})
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # the original warns where a program with a command line gives `args`
        if self._logs is not None:
            settings = self.config[self.config.subcommand]
            self._logs.begin(settings.log_format, settings.log_level)

    @override
    def _parse_ckpt_path(self) -> None:
        """Not done: the hyperparameters in a checkpoint would replace what the user gave, and need not be arguments."""

    @override
    def before_instantiate_classes(self) -> None:
        path = self.config[self.subcommand].get("ckpt_path")
        if self.subcommand != "fit" and str(path) == AUTO:
            raise ValueError(f"`--ckpt_path {AUTO}` is for `fit`; for `{self.subcommand}` give a checkpoint.")
        _check_checkpoint_path(path)

    def before_fit(self) -> None:
        """Called by Lightning before it fits: find what ``ckpt_path: auto`` stands for, and what lies in the way."""
        settings = self.config_init["fit"]
        if str(settings.ckpt_path) == AUTO:
            settings.ckpt_path = self._newest_checkpoint()
        own = [c for c in self.trainer.callbacks if isinstance(c, AdapterFinetuning)]  # type: ignore[attr-defined]
        if not own and isinstance(self.model, GenLoRAModule):
            own = [AdapterFinetuning()]  # as the module will bring one along
        # On other ranks the first may have made the folder already.
        if own and settings.ckpt_path is None and getattr(rank_zero_only, "rank", 0) == 0:
            own[0].check_new_run(self.trainer)

    def after_fit(self) -> None:
        """Called by Lightning after it has fitted: write the report of the run."""
        if not self.config_init["fit"].report or self.trainer.fast_dev_run or not self.trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = next((log.log_dir for log in self.trainer.loggers if isinstance(log, CSVLogger)), None)
        if folder is None or is_remote(folder):
            return
        try:
            _log.info(f"The report is {write_report(folder)}.")
        except Exception as error:  # a run that has trained for days does not fail by a picture of it
            rank_zero_warn(f"No report of the run was written: {' '.join(str(error).split()) or repr(error)}")

    def _newest_checkpoint(self) -> Path | None:
        path, skipped = last_good_checkpoint(checkpoint_folders(self.trainer))
        for line in skipped:
            rank_zero_warn(line)
        _log.info(f"Going on from {path}." if path else f"`ckpt_path: {AUTO}`: no checkpoint yet, a new run.")
        return path

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        settings = config.trainer
        root = settings.default_root_dir
        if root is not None and not is_remote(root):
            settings.default_root_dir = str(local_path(root, "`default_root_dir`"))  # of `file://…`, too
        callbacks: list[Callback] = settings.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks += self._adapter_callback(config, [c for c in callbacks if isinstance(c, AdapterFinetuning)])
        if self.subcommand == "predict" and (config.predictions_path or not _any(BasePredictionWriter, callbacks)):
            callbacks.append(PredictionWriter(config.predictions_path))
        if not settings.barebones:
            if self.subcommand == "fit":
                callbacks += self._recorders(config, callbacks)
            if settings.enable_progress_bar is not False and not _any(ProgressBar, callbacks):
                logs = self._logs
                callbacks.append(default_progress_bar(prints=logs is None, lines=logs is not None and logs.as_json))
            kwargs.setdefault("logger", _default_logger(settings.logger, settings.default_root_dir))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _recorders(self, config: Any, given: list[Callback]) -> list[Callback]:
        """What keeps in the run's folder how it went, but for what the user has given already."""
        recorders: list[Callback] = [TokensPerSecond(), RunRecord()]
        recorders += [UpdateSpectra()] if config.spectra else []
        recorders += [AnswerSamples(config.samples)] if config.samples else []
        if self._logs is not None:
            recorders.append(LogFile(self._logs))
        return [one for one in recorders if not _any(type(one), given)]

    def _adapter_callback(self, config: Any, own: list[AdapterFinetuning]) -> list[Callback]:
        """The callback that the `adapter…` settings ask for; without them the trainer's or the module's own does."""
        settings = {name: config[name] for name in _CALLBACK_DEFAULTS}
        chosen = {name for name, value in settings.items() if value != _CALLBACK_DEFAULTS[name]}
        if config.adapter is None and chosen == {"overwrite"}:  # which by itself asks for no adapters
            for callback in own:
                callback.overwrite = True
            if own or not isinstance(self.model, GenLoRAModule):
                return []
        if config.adapter is None and not chosen:
            return []
        adapter = self.model.adapter if isinstance(self.model, GenLoRAModule) else None
        if config.adapter is not None:
            adapter = config_of(config.adapter)
        return [AdapterFinetuning(adapter, **settings)]


class DataCLI(GenLoRACLI):
    """The same settings, of which nothing but the data module is made.

    Args:
        args: The command line as a list, without a subcommand.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__(with_paths(args), run=False)

    @override
    def before_instantiate_classes(self) -> None:
        """Not done: no checkpoint is read."""

    @override
    def instantiate_classes(self) -> None:
        self.datamodule = self.parser.instantiate_classes(self.config).get("data")


def main(args: list[str] | None = None) -> GenLoRACLI:
    """Run the command line; Python code may give it as a list, ``main(["fit", "--config", "my.yaml"])``.

    Args:
        args: The arguments; ``sys.argv`` if ``None``.

    Returns:
        The finished command line, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: Code 0 after ``--help`` and ``--print_config``, 2 for arguments that do not parse, 1 for an error
            that this package or Lightning raised to tell the user something, 130 after Ctrl-C. The message is then
            one line; with ``GENLORA_TRACEBACK=1`` in the environment errors are raised as they are.
        Exception: Any other error is raised as it is: its traceback is needed to find the fault.
    """
    with _quiet(), run_logs() as logs:
        try:
            return GenLoRACLI(with_paths(sys.argv[1:] if args is None else args), logs=logs)
        except KeyboardInterrupt:
            logs.leave("interrupted", _INTERRUPTED)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # the trainer handled it, and saved what there was
                raise SystemExit(_INTERRUPTED) from None
            raise
        except Exception as error:
            user_error = find_user_error(error)
            if user_error is None or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
                logs.failed(error)
                raise
            logs.leave(f"error: {user_error} (set {TRACEBACK_VARIABLE}=1 for the traceback)", 1, error)


# What users of this command line can do nothing about.
_IRRELEVANT_WARNINGS = (
    ".*treespec, LeafSpec",  # Lightning's use of torch
    ".*does not have many workers",  # our data are tokenized before training starts
    "The dirpath has changed from",  # each run has a log directory, and checkpoints, of its own
)
_TIP = "💡 Tip"  # Lightning's, which name other products of its makers


@contextmanager
def _quiet() -> Iterator[None]:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
    tips = logging.getLogger(rank_zero.__name__)
    tips.addFilter(_is_no_tip)
    try:
        with warnings.catch_warnings():
            for message in _IRRELEVANT_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        tips.removeFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_TIP)


class _Parser(LightningArgumentParser):
    """A parser whose errors are one line each, and whose dumps hold all that a later run needs."""

    @override
    def dump(self, *args: Any, **kwargs: Any) -> str:
        # A value that is linked to the model's may have been given by the user all the same.
        text: str = super().dump(*args, **{**kwargs, "skip_link_targets": False})
        return text

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        trainer = [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
        options = [
            *(action.dest for action in parser._actions),
            *trainer,
            "model",
            "data",
            "adapter",
            *_CALLBACK_DEFAULTS,
            "report",
            "spectra",
            "samples",
            "log_format",
            "log_level",
        ]
        text = one_line(message, [short.__name__ for short in SHORT_NAMES], options)
        leave(f"error: {text} See `{program} --help`.", _USAGE_ERROR, ex)


def _any(kind: type[Callback], callbacks: list[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _named(name: str, function: Any) -> Any:
    """A partial function with a name, which the help shows."""
    function.__name__ = name
    return function


def _given_or_linked(name: str, linked: Any, data: Any) -> Any:
    """What ``data.init_args.<name>`` becomes: what the user gave, or else the model's."""
    given = data.get("init_args", {}).get(name) if data else None
    return linked if given is None else given


def _given_or_linked_beside(name: str, linked: Any, model: Any, data: Any) -> Any:
    """As :func:`_given_or_linked`, as long as the tokenizer or image processor is the model's and not another one."""
    given = data.get("init_args", {}) if data else {}
    own = (None, model.get("init_args", {}).get("model") if model else None)
    other = any(given.get(beside) not in own for beside in _MADE_FROM_MODEL)
    return given.get(name) if other else _given_or_linked(name, linked, data)


def _check_checkpoint_path(path: str | Path | None) -> None:
    name = str(path or "")
    if name == "best":
        raise ValueError(
            "`--ckpt_path best` means the best checkpoint of a run in this process, and none has run yet. Give the "
            "file: it lies in `checkpoints` of that run's log directory."
        )
    if not name or name.partition(":")[0] in _SPECIAL_CHECKPOINTS or is_remote(name):
        return
    file = local_path(name, "checkpoint")
    if not file.exists():
        raise FileNotFoundError(f"There is no checkpoint {name!r} (`--ckpt_path`).")
    if is_adapter_folder(file):
        raise ValueError(
            f"`--ckpt_path` {name!r} is an adapter folder; a checkpoint is a file, such as last.ckpt. To use the "
            "folder, load it in Python with `load_module` or `load_adapter`."
        )
    if file.is_file():
        verify_checkpoint(file)


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where a run and those before it with the same directories have put their checkpoints.

    Raises:
        ValueError: One of them is a URL, where nobody here can look.
    """
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    given = [str(saver.dirpath) for saver in savers if saver.dirpath is not None]
    logs = logs_folder(trainer, trainer.loggers[0]) if trainer.loggers else trainer.default_root_dir
    own = [] if given and len(given) == len(savers) and is_remote(logs) else [logs]  # nothing was put there then
    try:
        folders = [local_path(folder, "folder of checkpoints") for folder in given]
        places = [local_path(folder, "folder of checkpoints") for folder in own]
    except ValueError as error:
        raise ValueError(
            f"`ckpt_path: {AUTO}` looks for checkpoints in local folders only. {error} Or give `ckpt_path` the "
            "checkpoint itself, which may be a URL."
        ) from None
    if not trainer.loggers:
        return [*folders, *(place / "checkpoints" for place in places)]
    return [*folders, *(found for place in places for found in sorted(place.glob("*/checkpoints")))]


def _default_logger(logger: Any, root: Any) -> Logger | list[Logger] | bool:
    """CSV files unless something is chosen: they need no further package, and any tool reads them."""
    return CSVLogger(save_dir=root or os.getcwd(), name="logs") if logger in (None, True) else logger


if __name__ == "__main__":
    main()
