"""The numbers in README and docs are those of the reports that the benchmarks wrote, and of the code itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from genlora_lightning import GenLoRAConfig, LoRAConfig
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.planning.budget import fit_budget

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
RESULTS = DOCS["results"]
QUALITY = (ROOT / "benchmarks/quality/REPORT.md").read_text().replace("−", "-").replace("**", "")
SPEED = (ROOT / "benchmarks/speed/REPORT.md").read_text()
# (out, in) of a block of SmolLM2-135M, which has 30
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SMOLLM2 = [MatrixShape(*shape) for shape in BLOCK * 30]


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?:^## |\Z)", RESULTS, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


CLAIMS = section("Quality") + README


@pytest.mark.parametrize("loss", sorted(set(re.findall(r"\d\.\d{4} ± \d\.\d{4}", CLAIMS))))
def test_losses_are_those_of_the_quality_report(loss):
    assert loss in QUALITY


@pytest.mark.parametrize("difference", sorted(set(re.findall(r"[-+]\d\.\d+ ±\s\d\.\d+", CLAIMS))))
def test_differences_are_those_of_the_quality_report(difference):
    value, error = re.split(r" ±\s", difference)
    rounding = 0.501 * 10.0 ** -len(error.split(".")[1])
    found = re.findall(r"([-+]\d\.\d+) ± (\d\.\d+)", QUALITY)
    assert any(abs(float(v) - float(value)) <= rounding and abs(float(e) - float(error)) <= rounding for v, e in found)


MEASURED = re.sub(r".*gradients and optimizer state.*", "", section("Speed"))  # but that: counted, below


@pytest.mark.parametrize("ratio", sorted(set(re.findall(r"(?<![\d.,])[01]\.\d{3}(?!\d)", MEASURED))))
def test_ratios_are_those_of_the_speed_report(ratio):
    assert re.search(rf"(?<![\d.]){re.escape(ratio)}(?!\d)", SPEED)


def total(config: GenLoRAConfig | LoRAConfig) -> int:
    return sum(config.count_parameters(shape) for shape in SMOLLM2)


def test_parameters_are_those_that_the_configurations_count():
    square = MatrixShape(4096, 4096)
    one = GenLoRAConfig(rank=64).count_parameters(square)
    assert f"{LoRAConfig(rank=64).count_parameters(square):,} | {one:,} (1 group for A, 8 for B)" in README
    more = GenLoRAConfig(rank=65).count_parameters(square) - one
    lora = LoRAConfig(rank=65).count_parameters(square) - LoRAConfig(rank=64).count_parameters(square)
    assert f"| one more unit of rank there | {lora:,} | {more} |" in README
    pairs = [f"{total(GenLoRAConfig(rank=r)):,} of {total(LoRAConfig(rank=r)):,}" for r in (16, 64, 256)]
    assert f"| gradient values to exchange | {' | '.join(pairs)} |" in RESULTS
    shares = [total(GenLoRAConfig(rank=r)) / total(LoRAConfig(rank=r)) for r in (16, 64, 256)]
    assert f"| bytes of gradients and optimizer state | {' | '.join(f'{s:.3f}' for s in shares)} |" in RESULTS
    ours, theirs = total(GenLoRAConfig(rank=64)), total(LoRAConfig(rank=64))
    assert f"trainable parameters   {ours:,} of" in DOCS["quickstart"]
    assert f"LoRA of the same rank has {theirs:,} (this is {ours / theirs:.1%} of it)" in DOCS["quickstart"]
    assert f"| values to exchange between GPUs there, rank 64 | {theirs:,} | {ours:,} |" in README


def test_readme_is_short():
    assert len(README.splitlines()) <= 160
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("page", ["README", *DOCS])
def test_links_lead_to_files_and_headings(page):
    place = ROOT if page == "README" else ROOT / "docs"
    text = README if page == "README" else DOCS[page]
    later = {"changelog.md", "reference/commands.md"}  # which the site makes
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        name, _, anchor = target.partition("#")
        path = place / name if name else place / f"{page}.md"
        assert name in later or path.exists(), target
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_budget_is_what_the_search_finds():
    found = fit_budget(GenLoRAConfig(), SMOLLM2, 2 * sum(map(sum, SMOLLM2)))
    assert f"# {found.parameters:,} parameters on 210 linears" in DOCS["plan"]
    sizes = re.search(r"--like-lora-rank 2\nadapter:\n((?:  \w+: \d+\n)+)", DOCS["plan"])[1]  # type: ignore[index]
    for line in sizes.splitlines():
        name, value = line.split(":")
        assert getattr(found.config, name.strip()) == int(value), name
