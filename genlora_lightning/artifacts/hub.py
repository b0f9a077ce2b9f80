"""Fetch adapter folders from the Hugging Face Hub, and push them there; no file but an adapter's own is fetched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genlora_lightning.storage.atomic import find_folder
from genlora_lightning.storage.paths import local_path

_PREFIX = "hf://"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?")


def local_folder(source: str | os.PathLike[str], what: str, files: list[str]) -> Path:
    """The local path that a path or a name on the Hub means; what is on the Hub is fetched.

    Args:
        source: A path, a ``file://`` URL, or a name on the Hub: ``org/name``, ``org/name@revision``, or either with
            ``hf://`` before it. Without that, a local path of the same name goes before.
        what: What it is the place of, for messages.
        files: The files to fetch; the first must be there. Nothing else is, and none is executed.

    Raises:
        ValueError: It is the URL of another remote store, or no name that the Hub could have.
        FileNotFoundError: There is no such repository or revision, or it holds no adapter.
        OSError: The Hub cannot be reached, or gives no access.
    """
    text = os.fspath(source)
    is_named = isinstance(text, str) and text.startswith(_PREFIX)
    found = _NAME.fullmatch(text.removeprefix(_PREFIX)) if isinstance(text, str) else None
    if is_named and found is None:
        raise ValueError(f"{text!r} is no name on the Hugging Face Hub: it must be hf://org/name or …/name@revision.")
    if found is None or not (is_named or _may_be_name(text)):
        return local_path(source, what)
    where = "" if is_named else f"There is no local {what} {text}, and "
    with _explained(found["repo"], found["revision"], where):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(found["repo"], revision=found["revision"], allow_patterns=files))
        if not (folder / files[0]).is_file():
            raise FileNotFoundError(f"{where}{found['repo']} on the Hugging Face Hub is none: it has no {files[0]}.")
    return folder


def push_folder(
    folder: str | os.PathLike[str],
    repo: str,
    files: list[str],
    *,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload files of a folder to the Hub, in one commit; the repository is made if it is not there.

    Args:
        folder: The folder.
        repo: ``org/name``.
        files: The files to upload.
        private: Whether a new repository is private; the account's default if ``None``.
        revision: The branch; made if it is not there. The main one if ``None``.

    Returns:
        The commit's address.

    Raises:
        ValueError: The name is none that the Hub could have.
        OSError: The Hub cannot be reached, or gives no access.
    """
    found = _NAME.fullmatch(repo)
    if found is None or found["revision"]:
        raise ValueError(f"The name on the Hugging Face Hub must be org/name, got {repo!r}.")
    with _explained(repo, revision, ""):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        added = [CommitOperationAdd(name, Path(folder) / name) for name in files if (Path(folder) / name).is_file()]
        commit = api.create_commit(repo, added, commit_message="Upload a low-rank adapter", revision=revision)
    return str(commit.commit_url)


def _may_be_name(text: str) -> bool:
    is_here = find_folder(text).exists() or Path(text).expanduser().exists()
    return not is_here and not text.startswith((".", "~")) and not text.endswith(".ckpt")


@contextmanager
def _explained(repo: str, revision: str | None, where: str) -> Iterator[None]:
    """Say in one line what the Hub's library says in many, with what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shows_bars = not are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    login = "Log in with `hf auth login`, or set HF_TOKEN."
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{where}{repo} on the Hugging Face Hub is gated: ask for access on its page, with the account whose token "
            f"is used. {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}{repo} on the Hugging Face Hub has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{where}{repo} is not on the Hugging Face Hub, or it is private. {login}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise OSError(
            f"{where}{repo} is not in the Hugging Face Hub's cache here, and the Hub cannot be reached. Check the "
            "network, and that HF_HUB_OFFLINE is not set."
        ) from error
    except errors.HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", None)
        access = f" No access with this token, or none is set. {login}" if status in (401, 403) else ""
        raise OSError(f"{where}{repo}: the Hugging Face Hub answers {_first_line(error)}.{access}") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{where}{repo} is no name on the Hugging Face Hub: {_first_line(error)}.") from error
    except Exception as error:
        # Of the HTTP library, which is another one in another release.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        raise OSError(f"{where}{repo}: the Hugging Face Hub cannot be reached: {_first_line(error)}.") from error
    finally:
        if shows_bars:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
