"""Format tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of columns with a header; the first ``left`` columns are aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, rule, *rows)
    )


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
