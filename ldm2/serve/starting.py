"""What a server answers while its model is fetched and read: a page that says so, and 503 to programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from socket import socket
from typing import Any

import uvicorn

from ldm2.checkpoints import known
from ldm2.fields import one_line
from ldm2.serve.errors import Refused, to_json
from ldm2.serve.gate import answer

_LAST_WORD = 3.0                           # seconds in which an open page can still read why there will be no server

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ldm2</title><style>:root{color-scheme:light dark}body{font:16px system-ui,sans-serif;margin:3rem auto;
max-width:40rem;padding:0 1rem}progress{width:100%%;height:1rem}#error{color:#dc2626;white-space:pre-wrap}</style>
<h1>ldm2</h1><p>%s</p><progress id="bar"></progress><p id="told">Reading the model ...</p><p id="error"></p>
<script>
async function look() {
  try {
    const answer = await fetch('health');
    if (answer.ok) return location.reload();
    const now = await answer.json();
    document.getElementById('error').textContent = now.error || '';
    if (now.bytes !== null && now.bytes < now.download) {
      document.getElementById('bar').value = now.bytes / now.download;
      document.getElementById('told').textContent =
        `Downloading: ${(now.bytes / 1e9).toFixed(2)} of ${(now.download / 1e9).toFixed(2)} GB`;
    } else {
      document.getElementById('bar').removeAttribute('value');
      document.getElementById('told').textContent = 'Reading the model ...';
    }
  } catch (error) {
    document.getElementById('told').textContent = 'The server has ended: its window says why. Start it again.';
  }
  setTimeout(look, 1000);
}
look();
</script></html>"""


class Starting:
    """The application until the model is there. model: the name that was asked for"""

    def __init__(self, model: str, cache_dir: str | Path | None = None):
        self.model, self.cache_dir = model, cache_dir
        self.known = known.find(model)
        self.error: str | None = None
        self.asked = 0.0                                   # when somebody last looked

    def state(self) -> dict[str, Any]:
        """How far the model is: bytes that are here of those of the download, where they are known."""
        fetched = self.known is not None and self.known.repo is not None and self.known.download is not None
        return {"status": "starting", "model": self.model, "download": self.known.download if fetched else None,
                "bytes": fetched_bytes(self.known.repo, self.cache_dir) if fetched else None, "error": self.error}

    def about(self) -> str:
        """The model in a line."""
        if self.known is None:
            return f"<b>{escape(self.model)}</b>"
        size = f", {self.known.download / 1e9:.1f} GB to download once" if self.known.download else ""
        return f"<b>{escape(self.known.name)}</b>: {escape(self.known.task)}, {escape(self.known.license)}{size}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        self.asked = time.monotonic()
        headers = dict(scope["headers"])
        if scope["path"] == "/health":
            await _send(send, 503, b"application/json", to_json(self.state()))
        elif b"text/html" in headers.get(b"accept", b""):
            await _send(send, 200, b"text/html; charset=utf-8", (PAGE % self.about()).encode())
        else:
            await answer(send, Refused(503, f"the model {self.model} is being read", "starting",
                                       headers={"Retry-After": "5"}))


async def _send(send: Any, status: int, kind: bytes, body: bytes) -> None:
    """An answer."""
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": body})


def fetched_bytes(repo: str, cache_dir: str | Path | None = None) -> int:
    """Bytes of a repository that are in the hub's cache, unfinished files included."""
    from huggingface_hub import constants

    folder = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except OSError:                                    # finished, and so renamed, in this moment
            continue
    return total


@contextmanager
def answering(place: socket, model: str, cache_dir: str | Path | None = None) -> Iterator[None]:
    """Answer at a socket while the model is loaded inside the block; an open page is told why that fails."""
    app = Starting(model, cache_dir)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off",
                                           server_header=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place.dup()]}, daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        app.error = one_line(error)
        if time.monotonic() - app.asked < _LAST_WORD:
            time.sleep(_LAST_WORD)
        raise
    finally:
        server.should_exit = True
        thread.join()
