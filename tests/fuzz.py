"""Give damaged and hostile input to all that reads files and configurations, by machine.

Each input must be read, or be refused with an error that this package raises on purpose; nothing may hang, be executed,
be half-written, or be touched outside of the folder. By hand:

    python -m tests.fuzz --count 20000 --seed 1

A failure prints its target and seed; ``--target NAME --first SEED --count 1`` repeats it. The suite runs a small sample
(``tests/test_fuzz.py``).
"""

from __future__ import annotations

import argparse
import atexit
import copy
import csv
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.artifacts.adapter_folder import is_adapter_folder, manifest_bytes
from genlora_lightning.artifacts.adapter_io import load_adapter, save_adapter
from genlora_lightning.artifacts.inspection import describe_adapter, verify_adapter
from genlora_lightning.artifacts.loading import convert_checkpoint, load_module
from genlora_lightning.cli.errors import find_user_error
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.interop.lora_import import import_lora
from genlora_lightning.interop.peft_folders import import_peft
from genlora_lightning.interop.peft_report import describe_peft
from genlora_lightning.storage.checkpoint_file import write_checkpoint
from genlora_lightning.storage.digests import sha256
from tests.conftest import small_config

SECONDS, MEBIBYTES = 20, 400  # far above what any input needs
CANARY = "GENLORA_FUZZ_CANARY"
DEEP = "@deep@"  # becomes 900 nested lists where it is written as JSON
NAMELESS = ("configs", "resumed_run")  # no file, or the one that was just given
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 10**30, 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "0",
        "lora",
        "../../etc/passwd",
        "/dev/zero",
        "\0",
        "\ud800",
        "(((",
        "(a+)+$",
        "a" * 10**5,
        "é" * 99,
    ),
    *([], [[]], [None], ["x"], [1, 2], [10**9, 10**9], [-1, 3], {}, {"": None}, {"x": [{}]}, {"kind": "lora"}, DEEP),
]


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE))


def as_json(values: Any, **options: Any) -> str:
    """JSON text of hostile values."""
    return json.dumps(values, **options).replace(f'"{DEEP}"', "[" * 900 + "]" * 900)


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of nested JSON values with one to three changes somewhere in it."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, parents = value, []
        while isinstance(place, (dict, list)) and place and (not parents or rng.random() < 0.8):
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            parents.append((place, key))
            place = place[key]
        if not parents:
            return _hostile(rng)
        parent, key = parents[-1]
        what = rng.choice(("replace", "replace", "delete", "add", "retype", "swap"))
        if what == "delete":
            del parent[key]
        elif what == "add" and isinstance(parent, dict):
            name = rng.choice(("x", "", "r", "__class__", "..", f"{key}.x"))
            parent[name] = rng.choice((_hostile(rng), place))
        elif what == "add":
            parent.append(_hostile(rng))
        elif what == "retype":
            parent[key] = rng.choice((str(place)[:99], [place], {"x": place}, None))
        elif what == "swap" and isinstance(parent, dict):
            other = rng.choice(list(parent))
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent[key] = _hostile(rng)
    return value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them flipped, cut, doubled or replaced."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        where = rng.randrange(len(content) + 1)
        what = rng.choice(("flip", "cut", "insert", "drop", "repeat"))
        if what == "flip" and where < len(content):
            content[where] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del content[where:]
        elif what == "insert":
            odd = (
                b"\0",
                b"\r",
                b"\n",
                b'"',
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"{",
                b"\xed\xa0\x80",
                b",",
                b"\\ud800",
                b"[" * 5000,
            )
            content[where:where] = rng.choice(odd)
        elif what == "drop":
            del content[where : where + rng.randrange(1, 40)]
        else:
            content[where:where] = content[max(0, where - rng.randrange(1, 200)) : where]
    return bytes(content)


def odd_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Tensors of which one is of another shape, dtype, order or name, or holds other values."""
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    change = rng.choice(("shape", "dtype", "empty", "scalar", "values", "name", "transposed", "none", "more"))
    if change == "more":
        tensors["x.update.A.latent"] = tensor.clone()
    made = {
        "shape": lambda: torch.zeros(*tensor.shape, 2),
        "dtype": lambda: tensor.to(rng.choice((torch.int64, torch.float16, torch.bool, torch.float64, torch.bfloat16))),
        "empty": lambda: tensor[:0].clone() if tensor.ndim else torch.zeros(0),
        "scalar": lambda: torch.tensor(1.0),
        "values": lambda: torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 3e38))),
        "transposed": lambda: tensor.flatten().flip(0).reshape(tensor.shape[::-1]),
    }
    if change in made:
        tensors[name] = made[change]()
    elif change != "none":
        tensors[rng.choice(("", "..", "a" * 999, f"{name}.x", "../x"))] = tensor
    return tensors


def odd_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + data[8:]
    text = as_json(mutated(header, rng)).encode()
    return struct.pack("<Q", len(text)) + text + rest


# -- targets: each returns what to call, in a folder of its own -------------------------------------------------------

Call = Callable[[], object]


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class _Experts(nn.Module):
    """Two stacks of matrices, whose results are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ self.up[i].T @ self.down[i].T for i in range(3)) / 3


def _lora_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), _Experts())


def _adapted(config: Any, make: Callable[[], nn.Module] = _net) -> nn.Module:
    net = make()
    inject_adapters(net, config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    return net


@cache
def _folder_files(kind: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "peft lora":
            from genlora_lightning.interop.lora_export import export_lora

            lora = LoRAConfig(rank=2, tokens_to_train=[1, 5], target_parameters=["4.up", "4.down"])
            export_lora(_adapted(lora, _lora_net), folder + "/a")
        elif kind == "peft genlora":
            from genlora_lightning.interop.peft_folders import export_peft

            export_peft(_adapted(small_config(rank=2)), folder + "/a")
        elif kind == "format 1":
            shutil.copytree(Path(__file__).parent / "fixtures" / "format1" / "adapter", folder + "/a")
        else:
            config: Any = LoRAConfig(rank=2) if kind == "lora" else small_config(rank=2, modules_to_train=["2"])
            if kind != "lora":
                config = small_config(rank=2)
            save_adapter(_adapted(config), folder + "/a", training={"steps": 3, "metrics": {"loss": 0.5}})
        return {path.name: path.read_bytes() for path in Path(folder, "a").iterdir()}


def _write_folder(folder: Path, kind: str, rng: random.Random) -> None:
    files = dict(_folder_files(kind))
    names = sorted(name for name in files if name.endswith((".json", ".safetensors")))
    name = rng.choice(names)
    way = rng.random()
    if way < 0.15:
        files[name] = damaged(files[name], rng)
    elif name.endswith(".json"):
        values = mutated(json.loads(files[name]), rng)
        files[name] = as_json(values).encode()
        if name == "manifest.json" and isinstance(values, dict) and rng.random() < 0.9:
            values.pop("sha256", None)
            with suppress(ValueError):
                files[name] = manifest_bytes(values)
    elif way < 0.5:
        files[name] = odd_header(files[name], rng)
    else:
        files[name] = safetensors.torch.save(odd_tensors(safetensors.torch.load(files[name]), rng))
    if name != "manifest.json" and "manifest.json" in files and rng.random() < 0.9:  # whoever changes one changes both
        manifest = json.loads(files["manifest.json"])
        manifest.pop("sha256", None)
        if kind != "format 1":
            manifest["files"][name] = {"bytes": len(files[name]), "sha256": sha256(files[name])}
            files["manifest.json"] = manifest_bytes(manifest)
    if rng.random() < 0.03:
        files.pop(rng.choice(names))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if rng.random() < 0.03:  # a link in place of a file
        victim = folder / rng.choice(names)
        victim.unlink(missing_ok=True)
        victim.symlink_to(rng.choice(("/nowhere", "/dev/null", ".", victim.name)))


def adapter_folder(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Adapter folders of this library."""
    kind = rng.choice(("genlora", "lora", "format 1"))
    place = folder / "a"
    place.mkdir()
    _write_folder(place, kind, rng)
    model = _net()
    if rng.random() < 0.3:
        inject_adapters(model, LoRAConfig(rank=2) if kind == "lora" else small_config(rank=2))
    check = rng.choice(("error", "off"))
    yield lambda: verify_adapter(place)
    yield lambda: str(describe_adapter(place)) + json.dumps(describe_adapter(place).to_dict())
    yield _changes_nothing_if_refused(model, lambda: load_adapter(model, place, base_check=check))
    yield lambda: is_adapter_folder(place)


def _changes_nothing_if_refused(model: nn.Module, load: Call) -> Call:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def checked() -> None:
        try:
            load()
        except BaseException:
            after = model.state_dict()
            assert after.keys() == before.keys(), "a refused adapter has changed the model"
            assert all(torch.equal(after[name], before[name]) for name in before), (
                "a refused adapter has changed weights"
            )
            raise

    return checked


def peft_folder(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Adapter folders as PEFT writes them: LoRA with rows of tokens and stacks of matrices, and GenLoRA."""
    kind = rng.choice(("peft lora", "peft genlora"))
    place = folder / "a"
    place.mkdir()
    _write_folder(place, kind, rng)
    if kind == "peft lora":
        ours, theirs = _lora_net(), _lora_net()
        yield _changes_nothing_if_refused(ours, lambda: import_lora(ours, place))
        yield _changes_nothing_if_refused(theirs, lambda: load_adapter(theirs, place))
    else:
        net = _net()
        yield _changes_nothing_if_refused(net, lambda: import_peft(net, place))
    yield lambda: str(describe_peft(str(place))) + json.dumps(describe_peft(str(place)).to_dict())


class _Evil:
    """Runs a command where a pickle of it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ[CANARY]}",)


def _fit(folder: Path | str, **settings: Any) -> Any:
    from lightning.pytorch import LightningModule, Trainer

    from genlora_lightning.training.callback import GenLoRAFinetuning

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()
            self.register_buffer("seen", torch.zeros(2))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            self.seen += 1  # type: ignore[operator]
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(6, 6), batch_size=2)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[GenLoRAFinetuning(small_config(rank=2), save_adapter=False)],
        **{"max_steps": 5, **settings.pop("trainer", {})},
    )
    trainer.fit(Module(), **settings)
    return trainer


@cache
def _checkpoint() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _fit(folder, trainer={"max_steps": 3}).save_checkpoint(folder + "/c.ckpt")
        return Path(folder, "c.ckpt").read_bytes()


class _Holder(nn.Module):
    """What the checkpoint was written of, without its training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()
        self.register_buffer("seen", torch.zeros(2))


def _write_checkpoint(path: Path, rng: random.Random) -> None:
    way = rng.random()
    if way < 0.2:
        path.write_bytes(damaged(_checkpoint(), rng))
    elif way < 0.25:
        path.write_bytes(rng.choice((b"", b"PK\3\4", pickle.dumps(_Evil()), b"\x80\x02.", os.urandom(99))))
    else:
        content = torch.load(io.BytesIO(_checkpoint()), weights_only=True)
        if way < 0.3:
            content["callbacks"] = {"x": _Evil()}
        elif way < 0.5:
            content["state_dict"] = odd_tensors(content["state_dict"], rng)
        elif way < 0.7:
            content["genlora"] = mutated(content["genlora"], rng)
        else:
            content = mutated(content, rng)
        if rng.random() < 0.5 and isinstance(content, dict):
            write_checkpoint(content, path)
        else:
            torch.save(content, path)


def checkpoint(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Checkpoints of Lightning."""
    path = folder / "c.ckpt"
    _write_checkpoint(path, rng)
    yield lambda: str(describe_adapter(path))
    yield lambda: load_module(_Holder(), path)
    to = folder / "converted"

    def convert() -> None:
        try:
            convert_checkpoint(path, _net(), to)
        except BaseException:
            assert not to.exists(), "a refused checkpoint has left a folder"
            raise
        verify_adapter(to)

    yield convert


def resumed_run(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Checkpoints that a run is to go on from."""
    path = folder / "c.ckpt"
    _write_checkpoint(path, rng)

    def fit() -> None:
        try:
            _fit(folder, ckpt_path=path)
        except Exception as error:
            # What an optimizer or a scheduler keeps is its own affair, and shows when it makes a step.
            if not any("/torch/optim/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
                raise

    yield fit


@cache
def _model_folder(kind: str) -> dict[str, bytes]:
    from tests.models import tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(folder, max_shard_size="4KB")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def sharded_base(folder: Path, rng: random.Random) -> Iterator[Call]:
    """The weights of a base in several files, and the index that says where each tensor is."""
    from genlora_lightning.backbone.low_memory import build_without_weights, weight_source

    place = folder / "model"
    place.mkdir()
    files = dict(_model_folder("sharded"))
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    index = "model.safetensors.index.json"
    way = rng.random()
    if way < 0.15:
        files[index] = damaged(files[index], rng)
    elif way < 0.5:
        files[index] = as_json(mutated(json.loads(files[index]), rng)).encode()
    elif way < 0.75:  # another place, such as one outside of the folder
        values = json.loads(files[index])
        (folder.parent / "secret.safetensors").write_bytes(files[shards[0]])
        odd = ("../../secret.safetensors", str(folder.parent / "secret.safetensors"), "..", ".", "x" * 300, *shards)
        values["weight_map"][rng.choice(list(values["weight_map"]))] = rng.choice((*odd, "config.json", _hostile(rng)))
        files[index] = as_json(values).encode()
    else:
        name = rng.choice(shards)
        files[name] = rng.choice((damaged, odd_header))(files[name], rng)
    for name, data in files.items():
        (place / name).write_bytes(data)
    if rng.random() < 0.1:
        victim = place / rng.choice((index, *shards))
        victim.unlink()
        victim.symlink_to(rng.choice(("/nowhere", "/dev/null", ".", victim.name)))

    def load() -> None:
        model = build_without_weights("AutoModelForCausalLM", str(place))
        source = weight_source(model)
        assert source is not None
        for path in source.files.files.values():
            assert path.absolute().is_relative_to(place), f"{path} is outside of the folder"
        source.load("cpu")

    yield load


@cache
def _merged() -> tuple[nn.Module, Path]:
    from genlora_lightning.artifacts.merged_model import save_merged
    from tests.models import tiny_llama

    model = tiny_llama(num_hidden_layers=1)
    inject_adapters(model, LoRAConfig(rank=2))
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_merged(model, folder / "m")
    return model, folder / "m"


def merged_folder(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Folders of merged models that are to be replaced."""
    from genlora_lightning.artifacts.merged_model import save_merged

    model, whole = _merged()
    place = folder / "m"
    shutil.copytree(whole, place)  # with the files' times, which the record holds
    record, untouched = place / "genlora_merge.json", False
    way = rng.random()
    if way < 0.25:
        record.write_bytes(damaged(record.read_bytes(), rng))
    elif way < 0.75:
        record.write_text(as_json(mutated(json.loads(record.read_text()), rng)), encoding="utf-8")
    elif way < 0.8:
        untouched = True
    else:
        name = rng.choice(("model.safetensors", "config.json", "genlora_merge.json", "mine.txt"))
        (place / name).unlink(missing_ok=True)
        if rng.random() < 0.5:
            (place / name).symlink_to(rng.choice(("/nowhere", "/dev/null", ".", name, str(whole / "config.json"))))
        else:
            (place / name).mkdir()
    was = _listing(place)

    def replace() -> None:
        claimed = _files_claimed(record)
        try:
            save_merged(model, place)
        except BaseException:
            assert not untouched, "a folder as it was written is not replaced"
            assert _listing(place) == was, "a refused folder was changed"
            raise
        assert untouched or claimed == {n: v for n, v in was.items() if n != record.name}, "what is no merge is gone"

    for call in (verify_adapter, describe_adapter, lambda p: load_adapter(_net(), p)):
        yield partial(call, place)
    yield replace


def _listing(folder: Path) -> dict[str, Any]:
    found = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
    kept = {name: status for name, status in found.items() if not stat.S_ISDIR(status.st_mode)}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in kept.items()}


def _files_claimed(record: Path) -> Any:
    with suppress(Exception):
        return json.loads(record.read_text(encoding="utf-8"))["files"]
    return None


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}], "tools": None},
    {"prompt": "q", "completion": "a"},
    {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]},
    {"instruction": "q", "input": "i", "output": "a", "system": "s"},
    {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}],
        "tools": [{"a": 1}],
    },
    {"text": "one two three " * 9},
    {"question": "q", "answer": "a"},
]
_ENDINGS = ("jsonl", "csv", "json", "jsonl.gz", "parquet", "arrow")
TEXTS: dict[str, list[dict[str, Any]]] = {
    "single_label_classification": [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
        {"text": "c", "label": 3},
    ],
    "multi_label_classification": [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}],
    "regression": [{"text": "a", "label": 0.5}, {"text": "b", "label": [1]}, {"text": "b", "label": [1]}],
}


def _as_file(path: Path, records: list[Any], rng: random.Random) -> None:
    if path.suffix == ".csv":
        out = io.StringIO(newline="")
        names = list(dict.fromkeys(str(key) for record in records if isinstance(record, dict) for key in record)) or [
            "x"
        ]
        writer = csv.writer(
            out, quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), escapechar=rng.choice((None, "\\"))
        )
        rows = [[record.get(name, "") for name in names] for record in records if isinstance(record, dict)]
        with suppress(csv.Error):
            writer.writerows([names, *([v if isinstance(v, str) else as_json(v) for v in row] for row in rows)])
        text = out.getvalue()
    elif path.suffix == ".json":
        text = as_json(rng.choice((records, {"data": records})), indent=rng.choice((None, 1)))
    else:
        text = "".join(as_json(record, ensure_ascii=rng.random() < 0.7) + "\n" for record in records)
    if rng.random() < 0.1:
        text = text.replace("\n", rng.choice(("\r\n", "\r", "\n\n", "\u2028\n")))
    encoding = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "utf-32"))
    data = text.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace")
    if rng.random() < 0.02:
        data += data.rstrip(b"}\n") + b"x" * 10**6 + b'"}\n'
    if path.suffix in (".parquet", ".arrow"):
        data = _as_table(path, records)
    elif path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=1)
    path.write_bytes(damaged(data, rng) if rng.random() < 0.4 else data)


def _as_table(path: Path, records: list[Any]) -> bytes:
    """The records as a table, as far as they fit into one."""
    import pyarrow

    from tests.data.conftest import write_table

    kept: list[Any] = []
    table = pyarrow.table({})
    for record in records:
        with suppress(pyarrow.ArrowException, AttributeError, ValueError, TypeError, OverflowError):
            table = pyarrow.Table.from_pylist([*kept, record])
            kept.append(record)
    with suppress(pyarrow.ArrowException):
        write_table(path, table)
    return path.read_bytes() if path.exists() else b"PAR1"


@cache
def _tokenizer() -> Any:
    from tests.data.conftest import CHAT_TEMPLATE, _byte_level_tokenizer

    return _byte_level_tokenizer("{{ tools|string if tools else '' }}" + CHAT_TEMPLATE)


def _read_data(data: Any, split: str, rng: random.Random) -> None:
    if rng.random() < 0.02:  # slow, for the rest is that of another library
        data.setup("fit")
        next(iter(data.train_dataloader()))
        return
    encode = data._encoder(split)
    for example in data._examples("train", split):
        data._duplicate_key(example), data._stratum(example)
        json.dumps(example).encode()
        encode(example)


def conversations(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Data files of conversations."""
    from genlora_lightning.data import InstructionDataModule

    records = [mutated(rng.choice(CHATS), rng) if rng.random() < 0.6 else rng.choice(CHATS) for _ in range(3)]
    path = folder / f"d.{rng.choice(_ENDINGS)}"
    _as_file(path, records, rng)
    options = rng.choice(
        ({}, {"max_length": 20}, {"chat_template": "none"}, {"train_on": "last", "system_prompt": "s"})
    )
    data = InstructionDataModule(_tokenizer(), str(path), **options)
    yield lambda: _read_data(data, rng.choice(("train", "predict")), rng)


def texts(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Data files of labelled texts."""
    from genlora_lightning.data import TextClassificationDataModule

    kind = rng.choice(list(TEXTS))
    records = [mutated(record, rng) if rng.random() < 0.4 else record for record in TEXTS[kind] * 2]
    path = folder / f"d.{rng.choice(_ENDINGS)}"
    _as_file(path, records, rng)
    names = rng.choice((None, ["x", "y"], ["x"] if kind == "regression" else None))
    data: Any = TextClassificationDataModule(_tokenizer(), str(path), problem_type=kind, label_names=names)
    yield lambda: _read_data(data, rng.choice(("train", "predict")), rng)


def configs(folder: Path, rng: random.Random) -> Iterator[Call]:
    """Configurations of adapters and of the optimizer."""
    from genlora_lightning.adapters.genlora.config import GenLoRAConfig
    from genlora_lightning.training.optim import OptimizerConfig

    cls: Any = rng.choice((GenLoRAConfig, LoRAConfig, OptimizerConfig))
    read: Any = OptimizerConfig.from_dict if cls is OptimizerConfig else read_config
    values: Any = cls().to_dict()
    values = {**values, rng.choice(list(values)): _hostile(rng)} if rng.random() < 0.6 else mutated(values, rng)

    def check() -> None:
        config = read(values)
        json.dumps(config.to_dict(), ensure_ascii=False).encode()
        assert read(config.to_dict()).to_dict() == config.to_dict()

    yield check


_SHARES = {
    adapter_folder: 3,
    peft_folder: 3,
    checkpoint: 3,
    resumed_run: 2,
    sharded_base: 2,
    merged_folder: 1,
    conversations: 5,
    texts: 4,
    configs: 4,
}
TARGETS: dict[str, Callable[[Path, random.Random], Iterator[Call]]] = {target.__name__: target for target in _SHARES}
SHARES = {target.__name__: share for target, share in _SHARES.items()}


# -- the bars ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """An input took too long."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fault_of(target: str, seed: int) -> str | None:
    """Run one input; what is wrong with how it was taken, or None."""
    rng = random.Random(f"{target} {seed}")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outside, folder = Path(name, "outside"), Path(name, "inside")
        for place in (outside, folder):
            place.mkdir()
        os.environ[CANARY] = str(outside / "executed")
        calls = list(TARGETS[target](folder, rng))
        before, peak = sorted(folder.rglob("*")), _peak()
        for number, call in enumerate(calls):
            what = f"{target} {seed} call {number}"
            try:
                with _time_limit():
                    call()
            except (Exception, Hang) as error:
                meant = None if isinstance(error, Hang) else find_user_error(error)
                if meant is None or not isinstance(meant, (ValueError, TypeError, OSError, RuntimeError)):
                    return f"{what}: {''.join(traceback.format_exception(error)[-9:])}"
                if len(str(meant)) > 5000:
                    return f"{what}: a message of {len(str(meant))} characters: {str(meant)[:300]}"
                if target not in NAMELESS and not any(part in str(meant) for part in (str(folder), folder.name)):
                    return f"{what}: the message names no file: {meant}"
            if any(outside.iterdir()):
                return f"{what}: something was executed, or written outside of the folder"
        left = [
            path
            for path in sorted(folder.rglob("*"))
            if path not in before and folder / "converted" not in (path, *path.parents)
        ]
        if left:
            return f"{target} {seed}: left behind {left}"
        if _peak() - peak > MEBIBYTES:
            return f"{target} {seed}: took {_peak() - peak:.0f} MiB"
    return None


def main() -> None:
    """Run many inputs and count the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    options = parser.parse_args()
    shares = {options.target: 1} if options.target else SHARES
    order = [name for name, share in shares.items() for _ in range(share)]
    faults, counts, start = 0, Counter[str](), time.monotonic()
    for index in range(options.count):
        target = order[index % len(order)]
        counts[target] += 1
        fault = fault_of(target, options.first + index)
        if fault is not None:
            faults += 1
            print(f"FAULT {fault}\n", flush=True)
    print(
        f"{options.count} inputs ({dict(counts)}), {faults} faults, {time.monotonic() - start:.0f} s, {_peak():.0f} MiB"
    )
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
