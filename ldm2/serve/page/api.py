"""The page's way to the API: the same requests that any client sends, handed to the application in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from fastapi import FastAPI

Job = dict[str, Any]                       # as GET /v1/jobs/{id} returns it
LIVE = ("queued", "in_progress")
_SECONDS_BETWEEN = 0.15                    # of looking after a job


class Failed(Exception):
    """What the API answered instead: one line for people, and the option that is at fault, where one is."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Api:
    """Calls of the API of `app`, with its key where it wants one. Each raises Failed with the API's own line."""

    def __init__(self, app: FastAPI, key: str | None):
        self.app = app
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def submit(self, fields: Iterable[tuple[str, str]], audio: Path | None, request: Any) -> Job:
        """A new job of options as words, and of the sound to edit. request: the browser's."""
        form: list[tuple[str, Any]] = [(name, (None, word)) for name, word in fields]
        if audio is not None:
            form.append(("audio", (audio.name, audio.read_bytes())))
        return (await self._call("POST", "/v1/jobs", request, files=form)).json()

    async def follow(self, job: Job) -> AsyncIterator[Job]:
        """The job each time that it has changed, until it has ended."""
        while True:
            yield job
            if job["status"] not in LIVE:
                return
            last = job
            while (job := await self.job(job["id"])) == last:
                await asyncio.sleep(_SECONDS_BETWEEN)

    async def job(self, name: str) -> Job:
        """A job as it is now."""
        return (await self._call("GET", f"/v1/jobs/{name}")).json()

    async def cancel(self, name: str) -> None:
        """Stop a job; one that is not there is none that runs."""
        with suppress(Failed):
            await self._call("DELETE", f"/v1/jobs/{name}")

    async def content(self, name: str, n: int) -> bytes:
        """The file of a candidate, which count from 1."""
        return (await self._call("GET", f"/v1/jobs/{name}/content?n={n}")).content

    async def settings(self, path: Path) -> dict[str, Any]:
        """The settings in a file."""
        return (await self._call("POST", "/v1/settings", files={"file": (path.name, path.read_bytes())})).json()

    async def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        return (await self._call("GET", "/health")).json()

    async def _call(self, method: str, url: str, request: Any = None, **content: Any) -> httpx.Response:
        """An answer of the API. request: the browser's, whose address counts as the client's."""
        address = getattr(getattr(request, "client", None), "host", None) or "page"
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=(address, 0))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            answer = await client.request(method, url, headers=self.headers, **content)
        if answer.is_success:
            return answer
        try:
            error = answer.json()["error"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise Failed(f"the server answered {answer.status_code}") from None
        raise Failed(error["message"], error.get("param"))
