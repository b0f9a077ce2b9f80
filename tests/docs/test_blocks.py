"""What README.md and the pages of docs/ tell readers to type works: each fenced block is run, page by page.

A page's blocks run in order, in one folder that has what the pages speak of: a small model that chats, its data, a run.
Real models and long trainings are replaced (`STAND_INS`, `SHORT`); what a test cannot run is named with the reason.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from genlora_lightning import GenLoRAConfig, GenLoRAFinetuning, LoRAConfig
from genlora_lightning.cli.main import main
from tests.docs.conftest import MODEL, NAME, SHORT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# Commands that are not run, by how they begin, and why.
NOT_RUN = {
    "make ": "targets of the Makefile, which a test of their own looks up",
    "pip install": "changes the environment",
    "vllm ": "a server that needs a GPU",
    "python -m sglang": "a server that needs a GPU",
    "docker ": "a server that needs a GPU",
    "curl ": "asks a server",
    "export ": "sets a variable for a server",
    "sbatch ": "asks a cluster; tests/examples runs the script",
    "MASTER=": "two machines; tests/examples runs the script",
    "python examples/": "minutes; tests/examples runs the scripts",
}
# Only the configuration is read: these want several GPUs.
ONLY_READ = (
    "genlora fit --config genlora:llama-70b",
    "genlora fit --config genlora:llama-8b --config genlora:strategy",
)
# What a page's words stand for here.
STAND_INS = {
    "BASE": NAME,
    "ADAPTER": "runs/reviews/adapter",
    "CKPT": "last.ckpt",
}

# Models that are planned, where no figures are shown: those take seconds.
SMALLER = dict.fromkeys(("llama-8b", "llama-70b"), "llama-1b")


class Block(NamedTuple):
    """A fenced block: its page, the line it begins at, its language, its text."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.fullmatch(r" *```(\w*)", line)
        if fence is None:
            lines.append(line)
        elif language is None:
            language, start, lines = fence[1], number, []
        else:
            indent = min((len(row) - len(row.lstrip()) for row in lines if row.strip()), default=0)
            found.append(Block(page.name, start, language, "\n".join(row[indent:] for row in lines)))
            language = None
    return found


def commands(block: Block) -> Iterator[str]:
    """The commands of a block; in a console they follow `$`."""
    text = re.sub(r"\\\n\s*", "", block.text)
    for line in text.splitlines():
        if block.language == "sh":
            if line.strip():
                yield line
        elif line.startswith("$ "):
            yield line[2:]


class YourModule(LightningModule):
    """A reader's own module: a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # a backbone that was trained before
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.classifier = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.classifier(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class ShortTrainer(Trainer):
    """A trainer that stops after two steps, whatever the page says."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "max_steps": 2, "logger": False})


def your_data() -> Any:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(12) % 3), batch_size=4)


def names_of_several() -> dict[str, Any]:
    """What the page on several adapters takes for granted."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(NAME)
    batch = {"input_ids": torch.tensor([[6, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    four = {name: tensor.repeat(4, 1) for name, tensor in batch.items()}
    names = ["reviews", "support", "legal", "reviews"]
    rows = [{"prompt": f"w{n}", "completion": "w6 w7", "adapter": names[n % 2]} for n in range(6, 22)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "torch": torch,
        "GenLoRAConfig": GenLoRAConfig,
        "LoRAConfig": LoRAConfig,
        "model": model,
        "batch": batch,
        "batch_of_four": four,
        "batches": [{"adapter": names, **four}],
        "loss_of": lambda model, batch: model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss,
    }


def run_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **stand_ins: str
) -> str:
    """Run `genlora …` as a reader would, and return what it prints."""
    words = [{**STAND_INS, **stand_ins}.get(word, word) for word in shlex.split(command.split(" | ")[0], comments=True)]
    assert words.pop(0) == "genlora", f"{command}: neither run nor in NOT_RUN"
    words = [
        next(iter(sorted(Path().glob(word.replace("…", "*")))), word) if "/….ckpt" in word else word for word in words
    ]
    words = [str(word) for word in words]
    if any(part in command for part in ONLY_READ):
        words.append("--print_config")
    elif words[0] == "fit" and "--print_config" not in words:
        words += SHORT
    monkeypatch.setattr("sys.stdin", io.StringIO("w6 w7\n/both\nw8\n/reset\n"))
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:  # as `--print_config` and errors of the command line end
        code = stop.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert not code, f"{command}\n{shown.err}"
    return shown.out


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(page, folder, request, monkeypatch, capsys):
    namespace: dict[str, Any] = {
        "__name__": "reader",
        "GenLoRAFinetuning": GenLoRAFinetuning,
        "Trainer": ShortTrainer,
        "YourModule": YourModule,
        "config": GenLoRAConfig(rank=4, modules_to_train=["classifier"]),
        "your_data": your_data(),
    }
    if page.stem == "images":
        request.getfixturevalue("pictures")
    if page.stem == "several":
        namespace |= names_of_several()
    if page.stem == "plan":  # which shows figures of the real model, from its configuration alone
        (folder / MODEL / "config.json").write_text(json.dumps(SMOLLM2))
    for block in blocks(page):
        where = f"{block.page}:{block.line}"
        if block.language in ("console", "sh"):
            for command in commands(block):
                if not command.startswith(tuple(NOT_RUN)):
                    run_command(command, monkeypatch, capsys, **SMALLER)
        elif block.language == "python":
            if "AdapterSet(model)" in block.text and "adapters" in namespace:
                namespace["adapters"].close()  # the page begins anew
            source = re.sub("|".join(map(re.escape, STAND_INS)), lambda word: STAND_INS[word[0]], block.text)
            exec(compile(source, where, "exec"), namespace)
        elif block.language == "yaml":
            name = re.match(r"# ([\w.]+\.yaml)\n", block.text)
            Path(name[1] if name else "block.yaml").write_text(block.text)
            if name is None:
                run_command("genlora fit --config my_task.yaml --config block.yaml --print_config", monkeypatch, capsys)
        elif block.text.startswith("$ "):  # commands and what they print
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block.text, re.MULTILINE):
                printed = run_command(command, monkeypatch, capsys)
                if page.stem == "plan":  # the others show a real model's
                    assert printed.strip() == shown.strip(), where
        else:
            assert block.language == "text", f"{where}: a block of an unknown language {block.language!r}"


@pytest.mark.parametrize("how", sorted(NOT_RUN))
def test_what_is_not_run_is_in_a_page(how):
    found = [
        c for page in PAGES for block in blocks(page) if block.language in ("console", "sh") for c in commands(block)
    ]
    assert any(command.startswith(how) for command in found)


def test_make_targets_that_pages_name_exist():
    named = {name for page in PAGES for name in re.findall(r"(?:`|^\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE)}
    assert "test" in named
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
