"""Find runs on disk, and read what each has left: its configuration, curves, versions and adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, MANIFEST_FILE, stored_facts
from genlora_lightning.artifacts.adapter_io import adapter_bytes
from genlora_lightning.artifacts.checkpoint import CHECKPOINT_KEY
from genlora_lightning.artifacts.inspection import describe_adapter
from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.artifacts.peft_folder import is_peft_folder
from genlora_lightning.fields import shown
from genlora_lightning.interop.peft_report import describe_peft
from genlora_lightning.reports.curves import METRICS_FILE, Curve, join_curves, read_curves
from genlora_lightning.reports.record import cost_of, read_starts

FINISHED = "finished"
INTERRUPTED = "interrupted"
NO_ADAPTER = "no adapter"

_CONFIG = "config.yaml"
_SETTINGS = (_CONFIG, "hparams.yaml")  # which Lightning writes when a run begins
_ADAPTER, _AFTER_ERROR = "adapter", "adapter-interrupted"
_FIT_RATE, _FIT_SECONDS, _RATE = "fit_tokens_per_second", "fit_seconds", "tokens_per_second"
_OF_FIT = (_FIT_RATE, _FIT_SECONDS)
_SPLIT = re.compile(r"^(?P<split>train|val|valid|validation|test)[_/]")
_LOSS = re.compile(r"^(?:[a-z]+[_/])?loss(?:_step|_epoch)?$")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has left on disk.

    Args:
        folder: Its own folder, such as ``runs/support/logs/version_0``; of a restarted run the last one.
        folders: Those of all its starts, oldest first.
        run: The name by which it knows its files; ``None`` where it was not looked up or nothing says it.
        state: ``finished``, ``interrupted`` (or still running), or ``no adapter`` if it finished without one.
        date: When it last wrote something.
        config: Its resolved configuration; empty if it was not run from the command line.
        curves: What it logged.
        steps: Optimizer steps that it made, as far as they are known.
        seconds: That training took.
        seconds_exact: Whether all of these were measured; else some were taken from the files' times.
        adapter: The folder of its adapter, or ``None``.
        adapter_config: The kind of that and its fields, or what the configuration says of it.
        num_bytes: Size of the adapter's folder.
        base: Name or class of the base that the adapter says it was trained on.
        versions: Of Python and the libraries.
        starts: What each start has noted of itself (``run.json``), oldest first.
        notes: What could not be read, in sentences.
    """

    folder: Path
    folders: tuple[Path, ...]
    run: str | None
    state: str
    date: datetime
    config: dict[str, Any]
    curves: dict[str, Curve]
    steps: int
    seconds: float | None
    seconds_exact: bool
    adapter: Path | None
    adapter_config: dict[str, Any]
    num_bytes: int | None
    base: str | None
    versions: dict[str, str]
    starts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def model(self) -> str:
        """Name of the base, or the class of the module."""
        section = _mapping(self.config.get("model"))
        arguments = _mapping(section.get("init_args"))
        found = arguments.get("model") or self.base or str(section.get("class_path", "")).rpartition(".")[2]
        return str(found or "unknown")

    @property
    def kind(self) -> str:
        """Kind of the adapter; PEFT's own name for one of PEFT."""
        return str(self.adapter_config.get("peft_type") or self.adapter_config.get("kind") or "unknown").lower()

    @property
    def rank(self) -> int | None:
        """Rank of the adapter, if its kind has one."""
        rank = self.adapter_config.get("rank", self.adapter_config.get("r"))
        return rank if isinstance(rank, int) else None

    @property
    def best_val_loss(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step."""
        return next((self.curves[name].lowest for name in self._losses(validation=True)), None)

    @property
    def last_train_loss(self) -> float | None:
        """The training loss that was logged last."""
        return next((self.curves[name].values[-1] for name in self._losses(validation=False)), None)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole last start, or else what was logged last."""
        found = (self.curves[name].values for name in (_FIT_RATE, _RATE) if name in self.curves)
        return next((values[-1] for values in found if values), None)

    @property
    def learning_rate(self) -> float | None:
        """The rate that was asked for."""
        arguments = _mapping(_mapping(self.config.get("model")).get("init_args"))
        places = [(_mapping(arguments.get("optimizer")), "lr"), (arguments, "lr"), (arguments, "learning_rate")]
        found = (place.get(name) for place, name in places)
        return next((float(rate) for rate in found if isinstance(rate, (int, float))), None)

    @property
    def shown_curves(self) -> dict[str, Curve]:
        """The curves that have points, without the figures of a whole fit."""
        return {name: one for name, one in self.curves.items() if name not in _OF_FIT and one.values}

    def to_dict(self) -> dict[str, Any]:
        """The run in figures, as JSON values."""
        loss = self.best_val_loss
        return {
            "folder": str(self.folder),
            "starts": len(self.folders),
            "run": self.run,
            "date": self.date.isoformat(timespec="seconds"),
            "state": self.state,
            "model": self.model,
            "kind": self.kind,
            "rank": self.rank,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "best_val_loss": None if loss is None else loss[0],
            "best_val_step": None if loss is None else loss[1],
            "last_train_loss": self.last_train_loss,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "adapter": None if self.adapter is None else str(self.adapter),
            "adapter_bytes": self.num_bytes,
            "notes": list(self.notes),
        }

    def _losses(self, *, validation: bool) -> list[str]:
        names = [name for name, one in self.curves.items() if _LOSS.match(name) and one.values]
        splits = {name: (found["split"] if (found := _SPLIT.match(name)) else "train") for name in names}
        return sorted(name for name in names if splits[name].startswith("val") == validation and splits[name] != "test")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The effective rank of one adapted linear.

    Args:
        module: Its name.
        rank: Highest rank that its update can have.
        effective: Entropy effective rank of its update.
    """

    module: str
    rank: int
    effective: float


@dataclass(frozen=True, kw_only=True)
class AdapterSizes:
    """What an adapter weighs, and how much of its rank each update uses.

    Args:
        parameters: Values that were trained.
        lora_parameters: What LoRA of the same rank has for the same linears; ``None`` for kinds without a rank.
        lora_8_parameters: What LoRA of rank 8 has for them; ``None`` where their shapes are not known.
        ranks: Of the linears that have one.
    """

    parameters: int
    lora_parameters: int | None
    lora_8_parameters: int | None
    ranks: tuple[Rank, ...]


def find_runs(root: Path) -> list[Run]:
    """Read all runs below a folder, oldest first; folders of restarts of one run are joined.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r}. Runs go to `runs/` where `genlora fit` was called.")
    groups: dict[Path, list[Path]] = {}
    for folder in _run_folders(root):
        groups.setdefault(folder.parent, []).append(folder)
    runs = [_read(parts, name) for folders in groups.values() for name, parts in _joined(folders)]
    return sorted((run for run in runs if run is not None), key=lambda run: (run.date, str(run.folder)))


def find_run(path: Path) -> Run:
    """Read the run whose folder or metrics file this is, or the newest one below it, with its restarts.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: There is no run.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {str(path)!r}. Give a run's folder, such as `runs/support`.")
    place = path.parent if path.is_file() else path
    own = next(_run_folders(place), None) == place
    runs = [run for run in find_runs(place.parent if own else place) if not own or place in run.folders]
    if not runs:
        raise ValueError(
            f"{str(path)!r} holds no run: no folder with a {METRICS_FILE} of Lightning's CSVLogger and steps of "
            "training, and none with checkpoints. `genlora fit` writes them to `<default_root_dir>/logs/version_N`."
        )
    return runs[-1]


def adapter_sizes(folder: Path) -> AdapterSizes:
    """Verify an adapter folder, or one with a folder for each named adapter, and compute sizes and effective ranks.

    Raises:
        ValueError: It is damaged.
        OSError: It cannot be read.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # hundreds of small decompositions: on busy cores more threads wait for each other
    try:
        parts = _adapter_folders(folder)
        return (
            _together({part.name: _adapter_sizes(part) for part in parts})
            if len(parts) > 1
            else _adapter_sizes(parts[0])
        )
    finally:
        torch.set_num_threads(threads)


def _adapter_folders(folder: Path) -> list[Path]:
    """The adapter folders that a run has saved as one, or as several by their names."""
    if stored_facts(folder) is not None or not folder.is_dir():
        return [folder]
    return [place for place in sorted(folder.iterdir()) if stored_facts(place) is not None] or [folder]


def _together(parts: Mapping[str, AdapterSizes]) -> AdapterSizes:
    def total(counts: list[int | None]) -> int | None:
        return None if None in counts else sum(count or 0 for count in counts)

    return AdapterSizes(
        parameters=sum(part.parameters for part in parts.values()),
        lora_parameters=total([part.lora_parameters for part in parts.values()]),
        lora_8_parameters=total([part.lora_8_parameters for part in parts.values()]),
        ranks=tuple(
            Rank(module=f"{name}.{rank.module}", rank=rank.rank, effective=rank.effective)
            for name, part in parts.items()
            for rank in part.ranks
        ),
    )


def _adapter_sizes(folder: Path) -> AdapterSizes:
    if is_peft_folder(folder):
        peft = describe_peft(str(folder))
        peft_lora = [row.rank * sum(row.shape) if row.rank and row.shape else None for row in peft.rows]
        ranks = tuple(
            Rank(module=row.module, rank=row.rank, effective=row.effective_rank)
            for row in peft.rows
            if row.rank is not None and row.effective_rank is not None
        )
        whole = None if None in peft_lora or not peft_lora else sum(count or 0 for count in peft_lora)
        shapes = [row.shape for row in peft.rows]
        lora_8 = 8 * sum(sum(shape) for shape in shapes if shape) if shapes and all(shapes) else None
        return AdapterSizes(parameters=peft.parameters, lora_parameters=whole, lora_8_parameters=lora_8, ranks=ranks)
    ours = describe_adapter(folder)
    in_full = sum(ours.trained_modules.values())
    return AdapterSizes(
        parameters=ours.parameters,
        lora_parameters=sum(layer.rank * (layer.out_features + layer.in_features) for layer in ours.layers) + in_full,
        lora_8_parameters=sum(8 * (layer.out_features + layer.in_features) for layer in ours.layers) + in_full,
        ranks=tuple(Rank(module=one.module, rank=one.rank, effective=one.effective_rank) for one in ours.layers),
    )


# -- folders ----------------------------------------------------------------------------------------------------------


def _run_folders(root: Path) -> Iterator[Path]:
    for place, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if METRICS_FILE in files or ("checkpoints" in names and any(name in files for name in _SETTINGS)):
            yield Path(place)
            names.clear()


def _joined(folders: list[Path]) -> list[tuple[str | None, list[Path]]]:
    """Put the folders of one run together, by the name that its checkpoints and its adapter have.

    Only where a run may have gone on from another one are files opened for that.
    """
    goes_on = [_read_yaml(folder / _CONFIG, []).get("ckpt_path", True) is not None for folder in folders]
    if len(folders) == 1 or not any(goes_on):
        return [(None, [folder]) for folder in folders]
    groups: dict[str, tuple[str | None, list[Path]]] = {}
    for folder in sorted(folders, key=_start):
        name = _run_name(folder)
        groups.setdefault(name or str(folder), (name, []))[1].append(folder)
    return list(groups.values())


def _start(folder: Path) -> tuple[int, str]:
    number = re.search(r"(\d+)$", folder.name)
    return (int(number[1]) if number else -1), folder.name


def _run_name(folder: Path) -> str | None:
    facts = _facts_of(folder / _ADAPTER) or _facts_of(folder / _AFTER_ERROR)
    if facts:
        return facts.get("run")
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    for file in reversed(files):
        try:
            name = read_checkpoint(file)[CHECKPOINT_KEY]["run"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return name if isinstance(name, str) else None
    return None


def _facts_of(folder: Path) -> dict[str, Any] | None:
    """:func:`~genlora_lightning.artifacts.adapter_folder.stored_facts` of an adapter, of several of the first."""
    return stored_facts(_adapter_folders(folder)[0])


# -- one run ----------------------------------------------------------------------------------------------------------


def _read(folders: list[Path], name: str | None) -> Run | None:
    """Read a run; ``None`` if nothing was trained in its folder."""
    notes: list[str] = []
    folder = folders[-1]
    parts = [_read_curves(part / METRICS_FILE, notes) for part in folders]
    config = _read_yaml(folder / _CONFIG, notes)
    adapter = _adapter_of(folder, config, name)
    facts = (_facts_of(adapter) or {}) if adapter else {}
    logged = [one for part in parts for column, one in part.items() if not column.startswith(("val", "test"))]
    if not (logged or adapter or any((part / "checkpoints").is_dir() for part in folders)):
        return None  # `validate` and `test` log to such folders, too
    finished = any(column in parts[-1] for column in _OF_FIT) or (adapter is not None and adapter.name == _ADAPTER)
    curves = join_curves([{n: c for n, c in part.items() if n not in _OF_FIT} for part in parts])
    steps = [last for one in curves.values() for last in (*one.steps[-1:], *one.not_finite[-1:])]
    seconds = [_seconds(part, curves_of) for part, curves_of in zip(folders, parts, strict=True)]
    starts = read_starts(folders)
    first = _adapter_folders(adapter)[0] if adapter else None
    manifest = _read_json(first / MANIFEST_FILE) if first else {}
    stored = _read_json(first / CONFIG_FILE) if first else {}
    base = _mapping(manifest.get("base"))
    state = INTERRUPTED if not finished else FINISHED if adapter else NO_ADAPTER
    return Run(
        folder=folder,
        folders=tuple(folders),
        run=name or facts.get("run"),
        state=state,
        date=_written(folder, facts),
        config=config,
        curves={**curves, **{n: parts[-1][n] for n in _OF_FIT if n in parts[-1]}},
        steps=facts.get("global_step") or max(steps, default=-1) + 1,
        seconds=sum(one[0] for one in seconds if one) if any(seconds) else None,
        seconds_exact=all(one is not None and one[1] for one in seconds),
        adapter=adapter,
        adapter_config=_mapping(stored.get("config")) or stored or _adapter_settings(config),
        num_bytes=adapter_bytes(adapter) if adapter else None,
        base=base.get("name") or base.get("class"),
        versions={str(name): str(version) for name, version in _mapping(manifest.get("versions")).items()}
        or {str(name): str(version) for name, version in _mapping(starts[-1].get("versions") if starts else {}).items()}
        or _version_in(folder / _CONFIG),
        starts=tuple(starts),
        notes=tuple(notes),
    )


def _adapter_of(folder: Path, config: Mapping[str, Any], name: str | None) -> Path | None:
    """The folder of a run's adapter: its own, or the one that was asked for, if no other run has written that."""
    given = config.get("adapter_dir") or next(
        (found["adapter_dir"] for found in _callbacks(config) if found.get("adapter_dir")), None
    )
    places = [folder / _ADAPTER, folder / _AFTER_ERROR]
    if given:
        roots = [Path(), *_started_in(folder, config)]
        places += [root / f"{given}{suffix}" for root in roots for suffix in ("", "-interrupted")]
        name = name or _run_name(folder)
    for place in places:
        facts = _facts_of(place)
        if facts is not None and name in (None, facts.get("run", name)):
            return place
    return None


def _started_in(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The folder in which a command was given, if the configuration's relative paths tell it."""
    root = Path(str(_mapping(config.get("trainer")).get("default_root_dir") or ""))
    logs = folder.resolve().parent.parent  # <root>/logs/version_N
    if root.is_absolute() or not root.parts or logs.parts[-len(root.parts) :] != root.parts:
        return []
    return [logs.parents[len(root.parts) - 1]]


def _adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of its adapter."""
    arguments = _mapping(_mapping(config.get("model")).get("init_args"))
    places = [config.get("adapter"), arguments.get("adapter"), *(found.get("config") for found in _callbacks(config))]
    for found in places:
        if isinstance(found, dict) and found:
            settings = {**_mapping(found.get("init_args")), **found}
            return {**settings, "kind": settings.get("kind") or "genlora"}
    return {}


def _callbacks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    callbacks = _mapping(config.get("trainer")).get("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return [_mapping(_mapping(one).get("init_args")) for one in listed]


def _seconds(folder: Path, curves: Mapping[str, Curve]) -> tuple[float, bool] | None:
    """How long one start took, and whether that was measured."""
    if _FIT_SECONDS in curves:
        return curves[_FIT_SECONDS].values[-1], True
    noted = cost_of(read_starts([folder])).get("seconds")
    if noted is not None:  # it failed, and said when
        return noted, True
    times = [path.stat().st_mtime for name in _SETTINGS if (path := folder / name).is_file()]
    file = folder / METRICS_FILE
    if not times or not file.is_file() or file.stat().st_mtime <= min(times):
        return None
    return file.stat().st_mtime - min(times), False


def _written(folder: Path, facts: Mapping[str, Any]) -> datetime:
    try:
        return datetime.fromisoformat(facts["created"]).astimezone(timezone.utc)
    except (KeyError, TypeError, ValueError):
        places = (folder / name for name in (METRICS_FILE, *_SETTINGS, "checkpoints"))
        newest = max(place.stat().st_mtime for place in places if place.exists())
        return datetime.fromtimestamp(newest, timezone.utc)


def _read_curves(file: Path, notes: list[str]) -> dict[str, Curve]:
    try:
        return read_curves(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"No curves: {error}")
        return {}


def _read_yaml(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"The configuration {file} cannot be read: {shown(str(error))}.")
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _version_in(file: Path) -> dict[str, str]:
    """The version that Lightning writes to the first line of a configuration."""
    try:
        with open(file, encoding="utf-8") as lines:
            found = re.match(r"# lightning\.pytorch==(\S+)", lines.readline())
    except (OSError, ValueError):
        return {}
    return {"lightning": found[1]} if found else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
