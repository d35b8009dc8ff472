"""A small hub on 127.0.0.1 that the real huggingface_hub client can talk to: revisions, file lists, files, refusals.

    with Hub() as hub:
        hub.add("owner/model", folder)
        ...                                    # HF_ENDPOINT=hub.url in another process: the client reads it at import
        hub.requests                           # ["GET /api/models/owner/model/revision/main", ...]
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository: a folder of files for each commit, names of revisions, and who may read it."""

    commits: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None                   # files need this token: the repository is gated
    private: bool = False                      # without the token it is not even visible


class Hub:
    """The server. `cut`: paths whose first download breaks off near the end; `short`, `wrong`: paths whose content is
    another than the tree of files says, in length or in its first byte.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.cut: set[str] = set()
        self.short: set[str] = set()
        self.wrong: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, folder: Path, revision: str = "main", **options) -> str:
        """Publish the files in `folder` under a revision. Returns the commit."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo(**options))
        repo.commits[commit] = folder
        repo.revisions[revision] = commit
        return commit

    def clear(self) -> None:
        """Forget repositories and requests."""
        for kept in (self.repos, self.requests, self.ranges, self.cut, self.short, self.wrong):
            kept.clear()

    def files(self) -> list[str]:
        """Paths of the files downloaded so far."""
        return sorted(line.split("/resolve/")[1].split("/", 1)[1] for line in self.requests if line.startswith("GET /")
                      and "/resolve/" in line)

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


def _large(file: Path) -> dict:
    """What a hub adds to its list for weights, which it stores apart."""
    if file.suffix != ".safetensors":
        return {}
    content = file.read_bytes()
    return {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Nothing: the requests are kept in `hub.requests`."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        steps = path.removeprefix("/api/models").strip("/").split("/", 4)
        if len(steps) < 4:
            return self.refuse(404, "")
        owner, model, kind, revision, *inside = steps
        repo = self.hub.repos.get(f"{owner}/{model}")
        allowed = repo is not None and self.headers.get("Authorization") == f"Bearer {repo.token}"
        if repo is None or (repo.private and not allowed):
            return self.refuse(401, "RepoNotFound")
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound")
        folder = repo.commits[commit]
        if kind == "revision":
            return self.json({"id": f"{owner}/{model}", "sha": commit, "siblings": []})
        if kind == "tree":
            return self.json([
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
                 "oid": hashlib.sha1(file.read_bytes()).hexdigest()} | _large(file)
                for file in sorted(folder.rglob("*")) if file.is_file()
            ])
        if repo.token is not None and not allowed:
            return self.refuse(403, "GatedRepo")
        if not (folder / inside[0]).is_file():
            return self.refuse(404, "EntryNotFound", commit)
        return self.file(folder / inside[0], inside[0], commit)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit})

    def json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def file(self, path: Path, name: str, commit: str) -> None:
        content = path.read_bytes()
        if name in self.hub.short:
            content = content[:-7]
        if name in self.hub.wrong:
            content = b"?" + content[1:]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.reply(200, content, headers, cut=self.command == "GET" and name in self.hub.cut)
        self.hub.ranges.append(f"{name} {wanted}")
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.reply(206, content[start:], headers)

    def reply(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) * 11 // 12] if cut else content)
        if cut:
            self.hub.cut.clear()
            self.close_connection = True
