"""The application: routes, errors in one shape, and the gate in front of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ldm2 import __version__
from ldm2.fields import flat
from ldm2.serve import compatible, reference
from ldm2.serve.api import JSON, Api, router
from ldm2.serve.errors import Refused
from ldm2.serve.gate import Gate

logger = logging.getLogger(__name__)

_SWEEP = 15.0                              # seconds
_THREADS = 8                               # that read uploads and files: each keeps memory of its own


def application(api: Api, *, key: str | None = None, hosts: tuple[str, ...] | None = None,
                origins: tuple[str, ...] = (), at_end: Callable[[], object] = lambda: None) -> FastAPI:
    """The server as an ASGI application. key, hosts, origins: see `Gate`; at_end: called when it has ended."""
    app = FastAPI(title="ldm2", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan,
                  generate_unique_id_function=lambda route: route.name,
                  description="Text to sound effects, music and speech, and edits of sound.")
    app.state.api, app.state.at_end = api, at_end
    app.state.stopping = []                                # called when the server is being stopped
    app.include_router(router)
    app.include_router(compatible.router)
    app.add_api_route("/health", health, methods=["GET"], tags=["server"])
    app.add_api_route("/metrics", metrics, methods=["GET"], tags=["server"], response_class=Response)
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    for kind, handler in {Refused: _refused, HTTPException: _http, RequestValidationError: _invalid,
                          ClientDisconnect: _gone, Exception: _broken}.items():
        app.add_exception_handler(kind, handler)           # type: ignore[arg-type]
    app.add_middleware(Gate, key=key, hosts=hosts, origins=origins, upload_bytes=api.limits.upload_bytes,
                       metrics=api.metrics)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"],
                           expose_headers=["X-Job-Id", "X-Seed", "X-Score", "X-Settings", "Retry-After"])
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Old results go while the server runs."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            app.state.api.jobs.sweep()

    current_default_thread_limiter().total_tokens = _THREADS
    task = asyncio.create_task(sweep())
    yield
    task.cancel()
    await run_in_threadpool(app.state.at_end)


async def health(request: Request) -> Response:
    """Whether the server takes jobs; needs no key."""
    api: Api = request.app.state.api
    return JSON({"status": "ok", "model": api.about.origin["model"], "version": __version__,
                 "queue": api.jobs.waiting(), "running": len(api.jobs.running())})


async def metrics(request: Request) -> Response:
    """Counters and times in the text format of Prometheus."""
    api: Api = request.app.state.api
    api.metrics.queue.set(api.jobs.waiting())
    api.metrics.running.set(len(api.jobs.running()))
    api.metrics.kept.set(sum(job.size for job in api.jobs.all()))
    return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def docs(request: Request) -> Response:
    """The API for people."""
    return Response(reference.page(request.app.openapi()), media_type="text/html")


def told(refused: Refused) -> Response:
    """A refusal as an answer."""
    return JSON({"error": refused.told()}, status_code=refused.status, headers=refused.headers)


async def _refused(request: Request, error: Refused) -> Response:
    return told(error)


async def _http(request: Request, error: HTTPException) -> Response:
    """What the framework refuses: unknown paths, methods, broken forms."""
    words = {404: f"there is nothing at {request.url.path!r:.200}",
             405: f"{request.method:.20} is not what {request.url.path!r:.200} takes"}
    message = words.get(error.status_code, flat(error.detail, 500))
    headers = dict(error.headers or {})
    if error.status_code == 405:                           # the framework names the methods of one route only
        headers["Allow"] = ", ".join(_methods(request))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return told(Refused(error.status_code, message, code, headers=headers))


def _methods(request: Request) -> list[str]:
    """The methods that a path takes."""
    routes = [*request.app.routes, *router.routes, *compatible.router.routes]
    return sorted({method for route in routes if route.matches(request.scope)[0] is not Match.NONE
                   for method in getattr(route, "methods", None) or ()})


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """A parameter of an address that is not what it must be."""
    first: dict[str, Any] = error.errors()[0]
    name = str(first["loc"][-1])
    return told(Refused(400, f"{name}: {first['msg']}, got {first.get('input')!r:.100}", "invalid_value", name[:100]))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


async def _broken(request: Request, error: Exception) -> Response:
    """Our own mistakes: in the log, and a line for the client."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return told(Refused(500, f"the server failed: {type(error).__name__}", "internal"))
