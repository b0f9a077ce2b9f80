"""Pages that are made when the site is built: the commands' help, the changelog, and `llms.txt`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, text in {"reference/commands.md": commands(), "changelog.md": changelog}.items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "llms.txt", content=llms(config)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the repository's files that lie outside of `docs/`; the site has none of them to lead to."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)


def commands() -> str:
    """The help of every command."""
    from genlora_lightning.cli.main import _parser

    parser = _parser()
    (subparsers,) = (action for action in parser._actions if action.dest == "==SUPPRESS==" or action.choices)
    parts = ["# Commands", "", "`genlora COMMAND --help` shows the same.", ""]
    for name, command in subparsers.choices.items():  # type: ignore[union-attr]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            command.print_help()
        text = (
            shown.getvalue()
            if command._actions
            else f"See `genlora {name} --help`: every setting of a configuration.\n"
        )
        parts += [f"## {name}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(parts)


def llms(config: MkDocsConfig) -> str:
    """The list of pages for language models, as llmstxt.org has it."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for page in sorted(Path(config.docs_dir).rglob("*.md")):
        title = next(
            (line[2:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# ")), page.stem
        )
        lines.append(f"- [{title}]({page.relative_to(config.docs_dir).with_suffix('').as_posix()}/)")
    return "\n".join(lines) + "\n"
