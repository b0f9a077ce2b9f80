"""Record a session at a real terminal, and draw it as an animated picture that any page shows.

    python docs/_recording.py record quickstart session.cast                   # minutes, in the repository's root
    python docs/_recording.py record chats session.cast --folder my-folder     # `genlora` on the path
    python docs/_recording.py draw session.cast docs/images/quickstart.svg     # pip install pyte

`record` types a session into a shell and keeps what comes with its times, as asciicast v2. `draw` plays it to a
terminal and makes each screen a picture of a film. Waiting is cut to a third of a second; the clock in the corner shows
the true time. The session `chats` needs in its folder the model `SmolLM2-135M-Instruct` and `reviews.jsonl`: as
messages, the first 100 lines of the quickstart's `train.jsonl`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Iterator
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 100, 30
PROMPT = r"\$ $"
# What is typed, and what the screen shows when it is done.
QUESTIONS = [
    ("/both", "both> $"),
    ("Is this review positive or negative? Answer with one word. I would watch it again tomorrow.", "both> $"),
    ("Is this review positive or negative? Answer with one word. Two hours that I will not get back.", "both> $"),
    ("/quit", PROMPT),
]
SESSIONS = {
    "quickstart": [
        ("make quickstart", PROMPT),
        (".venv/bin/genlora chat $(ls -td runs/quickstart/logs/*/adapter | head -1)", "adapter> $"),
        *QUESTIONS,
    ],
    "chats": [
        ("genlora init --model SmolLM2-135M-Instruct --data reviews.jsonl --name reviews", PROMPT),
        ("genlora fit --config reviews.yaml --trainer.max_epochs 1", PROMPT),
        ("genlora chat runs/reviews/logs/version_0/adapter", "adapter> $"),
        *QUESTIONS,
    ],
}
TYPING, READING = 0.06, 3.0  # seconds a key, and before the next command
LONGEST, SHORTEST = 0.3, 0.08  # of a picture but these
WAIT = 3600.0
MARK, OUTPUT = "m", "o"

CELL, LINE, SIZE, MARGIN, BAR = 8.4, 18, 14, 14, 30  # pixels
COLOURS = {
    "default": "#d7dae0", "black": "#7f848e", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#ffffff",
}  # fmt: skip
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"


def main() -> None:
    """Record, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="type the session, and keep what the terminal shows")
    recording.add_argument("session", choices=SESSIONS)
    recording.add_argument("cast", type=Path)
    recording.add_argument("--folder", type=Path, default=ROOT, help="default: the repository's root")
    drawing = commands.add_parser("draw", help="draw what was kept")
    drawing.add_argument("cast", type=Path)
    drawing.add_argument("picture", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(SESSIONS[options.session], options.folder, options.cast)
    else:
        options.picture.write_text(film(options.cast), encoding="utf-8")


def record(session: list[tuple[str, str]], folder: Path, cast: Path) -> None:
    """Type a session into a shell, and write what comes.

    Args:
        session: What is typed, and the expression that the screen matches when it is done.
        folder: Where the shell is.
        cast: The file to write.

    Raises:
        TimeoutError: What is waited for did not come.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        settings = {"PS1": "$ ", "TERM": "xterm-256color", "INPUTRC": "/dev/null", "HISTFILE": ""}
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, **settings})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    begun = time.monotonic()
    with cast.open("w", encoding="utf-8") as file:

        def write(kind: str, text: str) -> None:
            file.write(json.dumps([round(time.monotonic() - begun, 3), kind, text]) + "\n")
            file.flush()

        def read_until(expected: str | None, seconds: float) -> None:
            seen, end = "", time.monotonic() + seconds
            while expected is None or not re.search(expected, _plain(seen)):
                left = end - time.monotonic()
                if left <= 0:
                    if expected is None:
                        return
                    raise TimeoutError(f"{expected!r} did not come within {seconds:g} seconds.")
                if select.select([terminal], [], [], left)[0]:
                    text = os.read(terminal, 65536).decode(errors="replace")
                    write(OUTPUT, text)
                    seen += text

        file.write(json.dumps({"version": 2, "width": COLUMNS, "height": ROWS}) + "\n")
        read_until(PROMPT, 10)
        for typed, expected in session:
            for key in typed:
                os.write(terminal, key.encode())
                read_until(None, TYPING)
            os.write(terminal, b"\r")
            read_until(rf"\n[\s\S]*{expected}", WAIT)
            write(MARK, typed)
    os.close(terminal)
    os.waitpid(child, 0)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def screens(cast: Path) -> Iterator[tuple[float, float, list[str]]]:
    """Play a session: for each picture the seconds it is shown, the true time, and its lines as SVG.

    Args:
        cast: What :func:`record` wrote.
    """
    import pyte

    header, *events = (json.loads(line) for line in cast.read_text(encoding="utf-8").splitlines())
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    shown = 0.0
    for (at, kind, text), (following, *_) in pairwise([*events, events[-1]]):
        if kind == OUTPUT:
            stream.feed(text)
        shown += READING if kind == MARK else min(following - at, LONGEST)
        if shown >= SHORTEST:
            yield shown, at, [_drawn(screen.buffer[row], screen.columns) for row in range(screen.lines)]
            shown = 0.0


def _drawn(cells: Any, columns: int) -> str:
    """A line of the terminal as a text element; empty if there is nothing in it."""
    line = [cells[column] for column in range(columns)]
    while line and line[-1].data == " ":
        line.pop()
    spans = []
    for style, run in groupby(line, key=lambda cell: (cell.fg, cell.bold)):
        colour = COLOURS.get(
            style[0], COLOURS["default"] if not re.fullmatch("[0-9a-f]{6}", style[0]) else f"#{style[0]}"
        )
        text = escape("".join(cell.data for cell in run), quote=False)
        weight = ' font-weight="bold"' if style[1] else ""
        spans.append(
            text if (colour, weight) == (COLOURS["default"], "") else f'<tspan fill="{colour}"{weight}>{text}</tspan>'
        )
    return f'<text textLength="{len(line) * CELL:.1f}">{"".join(spans)}</text>' if line else ""


def film(cast: Path) -> str:
    """Draw a session as SVG: the pictures lie side by side, and a window moves over them.

    Each line that is ever shown is in the file once. Who asks for less motion sees the last picture.

    Args:
        cast: What :func:`record` wrote.
    """
    header = json.loads(cast.read_text(encoding="utf-8").partition("\n")[0])
    width = round(header["width"] * CELL + 2 * MARGIN)
    height = BAR + header["height"] * LINE + MARGIN
    names: dict[str, str] = {}
    pictures, starts, elapsed = [], [], 0.0
    for number, (seconds, at, lines) in enumerate(screens(cast)):
        clock = (
            f'<text x="{width - MARGIN}" y="20" text-anchor="end" class="c">{int(at) // 60:02}:{int(at) % 60:02}</text>'
        )
        uses = "".join(
            f'<use href="#{names.setdefault(line, f"l{len(names)}")}" y="{BAR + (row + 1) * LINE - 4}"/>'
            for row, line in enumerate(lines)
            if line
        )
        pictures.append(
            f'<g transform="translate({number * width})">{clock}<g transform="translate({MARGIN})">{uses}</g></g>'
        )
        starts.append(elapsed)
        elapsed += seconds
    frames = "".join(
        f"{100 * start / elapsed:.3f}%{{transform:translateX({-number * width}px)}}"
        for number, start in enumerate(starts)
    )
    last = f"transform:translateX({-(len(pictures) - 1) * width}px)"
    drawn = "".join(line.replace("<text", f'<text id="{name}"', 1) for line, name in names.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<style>
text{{font:{SIZE}px {FONT};fill:{COLOURS["default"]};white-space:pre}}
.c{{fill:{COLOURS["black"]}}}
.f{{animation:f {elapsed:.2f}s step-end infinite}}
@keyframes f{{{frames}100%{{{last}}}}}
@media (prefers-reduced-motion:reduce){{.f{{animation:none;{last}}}}}
</style>
<defs>{drawn}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#1e2127" stroke="#5c6370"/>
<circle cx="20" cy="15" r="5" fill="#e06c75"/><circle cx="38" cy="15" r="5" fill="#e5c07b"/>
<circle cx="56" cy="15" r="5" fill="#98c379"/>
<g class="f">{"".join(pictures)}</g>
</svg>
"""


if __name__ == "__main__":
    main()
