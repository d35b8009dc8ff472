"""What every request passes first: who may ask, from which page, and how much may be sent. Plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ldm2.serve.errors import Refused, to_json
from ldm2.serve.limits import BODY_BYTES
from ldm2.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)                        # without a key
_SLOWEST = 30.0                            # seconds between two pieces of a body
_DRAIN = 10.0                              # seconds that too large a body is read on, so that its answer is read


class Gate:
    """The way in to an application.

    key:     what clients must know, or None
    hosts:   names of this machine that a request may be for, or None for any: a page of another site whose name leads
             here must not reach a server that has no key
    origins: sites whose pages may send requests, beside our own
    upload_bytes: the longest form
    """

    def __init__(self, app: App, *, key: str | None, hosts: tuple[str, ...] | None, origins: tuple[str, ...],
                 upload_bytes: int, metrics: Metrics):
        self._app, self._key, self._hosts, self._origins = app, key, hosts, origins
        self._upload_bytes, self._metrics = upload_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
        except Refused as refused:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await answer(send, refused)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, _bounded(receive, headers, self._most(scope, headers)), sent)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(scope["method"], path, status, time.perf_counter() - start)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises Refused for a request that must not come in."""
        host = headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            raise Refused(403, f"this server answers as {' and '.join(self._hosts)} only, got {host!r:.100}", "host")
        origin = headers.get("origin")
        if origin is not None and scope.get("method") not in ("GET", "HEAD", "OPTIONS"):
            ours = urlsplit(origin).netloc == host
            if not ours and origin not in self._origins and "*" not in self._origins:
                raise Refused(403, f"pages of {origin!r:.100} may not send requests here", "origin")
        if self._key is not None and scope["path"] not in OPEN and not _knows(headers, self._key):
            way = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
            raise Refused(401, "a key is needed: Authorization: Bearer KEY", "key",
                          headers={"WWW-Authenticate": f'{way} realm="ldm2"'})

    def _most(self, scope: Scope, headers: dict[str, str]) -> int:
        """Bytes that a body may have."""
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        return self._upload_bytes if form or not scope["path"].startswith("/v1/") else BODY_BYTES


def _knows(headers: dict[str, str], key: str) -> bool:
    """Whether the key stands in a request: as a bearer's, as a password, or as clients of other servers send it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    given = value.encode("latin-1")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except binascii.Error:
            given = b""
    elif scheme.lower() != "bearer":
        given = (headers.get("xi-api-key") or headers.get("x-api-key", "")).encode("latin-1")
    return hmac.compare_digest(given, key.encode())


def _bounded(receive: Receive, headers: dict[str, str], most: int) -> Receive:
    """`receive` that raises Refused for a body that is too large, or does not come."""
    stated = headers.get("content-length", "")
    had, complete = 0, False

    async def bounded() -> Message:
        nonlocal had, complete
        if complete:
            return await receive()
        if stated.isdecimal() and int(stated) > most:
            await _drain(receive)
            raise _too_large(most)
        try:
            message = await asyncio.wait_for(receive(), _SLOWEST)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {_SLOWEST:g} s", "timeout") from None
        had += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if had > most:
            if not complete:
                await _drain(receive)
            raise _too_large(most)
        return message

    return bounded


async def _drain(receive: Receive) -> None:
    """Read what is still coming and drop it: a client that is cut off while it sends does not read its answer."""
    try:
        async with asyncio.timeout(_DRAIN):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body may have {most:,} bytes", "too_large")


async def answer(send: Send, refused: Refused) -> None:
    """Send a refusal."""
    body = to_json({"error": refused.told()})
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    await send({"type": "http.response.start", "status": refused.status,
                "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
