"""A browser without a window, for pages that draw themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
REQUIRED = os.environ.get("REQUIRE_BROWSER", "") not in ("", "0")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED,
    reason=f"no browser: none of {', '.join(NAMES)} is installed, and CHROMIUM is not set",
)


def dom_of(page: Path, folder: Path, script: str = "") -> str:
    """Open a copy of a page, run a script in it when it has drawn itself, and give the document as it is then.

    Anything on the browser's console fails the test.
    """
    assert CHROMIUM is not None, "REQUIRE_BROWSER is set, and there is no browser"
    copy = folder / "opened.html"
    text = page.read_text()
    assert text.count("</body>") == 1
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
