"""A stand-in for the Hugging Face Hub on this machine: what `huggingface_hub` asks to push and to fetch a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories by name: each branch is a dictionary of files.

    Attributes:
        address: Where it is.
        repos: Name to branch to file name to content.
        requests: The method and path of each request.
        closed: Names that answer that they are gated, or private.
        private: Names made private.
    """

    def __init__(self) -> None:
        self.address = ""
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.closed: dict[str, str] = {}
        self.private: set[str] = set()

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any, dict[str, str]]:
        """The status, the content (bytes, or what becomes JSON) and the headers of an answer."""
        self.requests.append((method, path))
        if path == "/":
            return 200, {}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if token != "hf_right":
                return 401, {"error": "Invalid username or password."}, {}
            if name in self.repos:
                return 409, {"error": "exists", "url": f"/{name}"}, {}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            self.repos[name] = {"main": {}}
            return 200, {"url": f"{self.address}/{name}", "name": name}, {}
        found = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.+))?)?", path)
        assert found, path
        name, what, revision, file = found.groups()
        if name in self.closed:
            status = 403 if self.closed[name] == "GatedRepo" else 404
            return status, {"error": "no access"}, {"X-Error-Code": self.closed[name]}
        if name not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        branches = self.repos[name]
        if what == "branch":
            branches[revision] = dict(branches["main"])
            return 200, {}, {}
        revision = next((b for b in branches if commit(branches[b]) == revision), revision or "main")
        if revision not in branches:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        files = branches[revision]
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return 200, {"files": modes}, {}
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{commit(files)}", "commitOid": commit(files)}, {}
        if what == "tree" and file:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}  # there are no folders here
        if what == "tree":
            return 200, [{"type": "file", "path": f, "size": len(c), "oid": oid(c)} for f, c in files.items()], {}
        if what == "resolve":
            if file not in files:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            return 200, files[file], {"ETag": f'"{oid(files[file])}"', "X-Repo-Commit": commit(files)}
        siblings = [{"rfilename": file} for file in files]
        return 200, {"id": name, "modelId": name, "sha": commit(files), "siblings": siblings, "tags": []}, {}


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1("".join(f"{name} {oid(content)}\n" for name, content in files.items()).encode()).hexdigest()


@contextmanager
def _serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, content, headers = hub.answer(self.command, self.path.partition("?")[0], body, token)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = _answer  # noqa: N815 - names of the standard library

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reset_connections() -> None:
    """Forget open connections, with which older releases also remember whether they are offline."""
    import huggingface_hub.utils

    reset = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    reset()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that is reached instead of the real one, with an empty cache and a token that may write."""
    from huggingface_hub import constants, hf_api

    made = Hub()
    with _serving(made) as made.address:
        template = made.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(hf_api.api, "endpoint", made.address)
        # transformers keeps a client of its own, of the Hub that the first test asked; older releases do not.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Releases before 1.0 have a copy of it.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        reset_connections()
        yield made
        reset_connections()  # or the server waits for them
