"""Files out of Debian's packages."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from . import data


def unpacked(package: str) -> Path:
    """Return the folder with the files of a package, fetched with `apt-get download` unless they are there.

    Raises:
        FileNotFoundError: There is no `apt-get`.
    """
    target = data.DATA_DIR / "debian" / package
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as partial:
            if not shutil.which("apt-get"):
                raise FileNotFoundError(f"{package} is a package of Debian, and there is no apt-get here to fetch it.")
            subprocess.run(["apt-get", "download", "-qq", package], cwd=partial, check=True, stderr=subprocess.DEVNULL)
            (archive,) = Path(partial).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(Path(partial) / "files")], check=True)
            (Path(partial) / "files").replace(target)
    return target
