"""Jobs over HTTP: made, listed, watched, heard and cancelled; and what the server and its model are."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from ldm2.serve import files, schemas, uploads
from ldm2.serve.asked import FORMATS, About, asked, from_words, read_json
from ldm2.serve.errors import Refused, invalid, to_json
from ldm2.serve.jobs import COMPLETED, LIVE, QUEUED, Job, Jobs, Sound, stopping
from ldm2.serve.limits import Limits
from ldm2.serve.metrics import Metrics

router = APIRouter(prefix="/v1")
FIELDS = 200                               # of a form


@dataclass(frozen=True)
class Api:
    """What the routes share."""

    about: About
    jobs: Jobs
    limits: Limits
    metrics: Metrics


async def served(request: Request) -> Api:
    """The Api of an application."""
    return request.app.state.api


Served = Annotated[Api, Depends(served)]
Wait = Annotated[float, Query(ge=0, le=60, allow_inf_nan=False,
                              description="answer when the job has ended, or after this many seconds")]


class JSON(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers of a route beside success, for the document."""
    return {status: {"model": schemas.Error} for status in (*statuses, 400, 401, 403)}


def client_of(request: Request) -> str:
    """Whose request it is."""
    return request.client.host if request.client is not None else ""


@router.post(
    "/jobs", status_code=202, response_model=schemas.Job, responses=errors(404, 413, 429), tags=["jobs"],
    openapi_extra={"requestBody": {"required": True, "content": {
        "application/json": {"schema": schemas.body()}, "multipart/form-data": {"schema": schemas.form()}}}})
async def create_job(request: Request, api: Served, wait: Wait = 0) -> Response:
    """Ask for a sound: JSON with options by their names; for edits a form with the sound as `audio`."""
    api.jobs.check_room(client_of(request))
    name = api.jobs.new_id()
    try:
        job = Job(name, await read_request(request, api, name), client_of(request))
        api.jobs.submit(job)
    except BaseException:
        api.jobs.folder.forget(name)
        raise
    await _ended_within(wait, api.jobs, job)
    told = api.jobs.describe(job)
    return JSON(told, status_code=202, headers={"Location": told["url"]})


async def read_request(request: Request, api: Api, job: str) -> Any:
    """The request in a body of JSON or in a form. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        given = read_json(await request.body())
        return await run_in_threadpool(asked, given, api.about, api.limits)
    async with request.form(max_files=1, max_fields=FIELDS) as form:
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        for name, _ in files:
            if name != "audio":
                raise invalid(f"the file must be called audio, got {name!r:.100}", name[:100])
        words = from_words((name, value) for name, value in form.multi_items() if isinstance(value, str))
        if "audio" in words:
            raise invalid("audio must be a file: no paths, no addresses", "audio")
        upload = None
        if files:
            upload = await run_in_threadpool(uploads.keep, files[0][1], api.jobs.folder.of(job), api.limits)
        return await run_in_threadpool(asked, words, api.about, api.limits, upload)


@router.get("/jobs", response_model=schemas.JobList, responses=errors(), tags=["jobs"])
async def list_jobs(api: Served) -> Response:
    """All jobs that wait, run or are kept, the newest first."""
    return JSON({"object": "list", "data": [api.jobs.describe(job) for job in api.jobs.all()]})


@router.get("/jobs/{id}", response_model=schemas.Job, responses=errors(404), tags=["jobs"])
async def get_job(id: str, api: Served, wait: Wait = 0) -> Response:
    """A job: where it stands, and its results."""
    job = api.jobs.get(id)
    await _ended_within(wait, api.jobs, job)
    return JSON(api.jobs.describe(job))


@router.delete("/jobs/{id}", response_model=schemas.Job, responses=errors(404), tags=["jobs"])
async def cancel_job(id: str, api: Served) -> Response:
    """Cancel a job: one that waits at once, one that runs at its next step. A finished one and its files go."""
    job = api.jobs.get(id)
    api.jobs.cancel(job)
    return JSON(api.jobs.describe(job))


@router.get("/jobs/{id}/events", response_class=StreamingResponse, tags=["jobs"], responses={
    **errors(404), 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})
async def watch_job(id: str, api: Served) -> Response:
    """Server-sent events: `queued`, `progress`, and at last `done`, each with the job as its data."""
    job = api.jobs.get(id)

    async def events() -> AsyncIterator[bytes]:
        async for changed in api.jobs.changes(job):
            if not changed:
                yield b": still here\n\n"
                continue
            told = api.jobs.describe(job)
            live = told["status"] in LIVE
            kind = b"done" if not live else b"queued" if told["status"] == QUEUED else b"progress"
            yield b"event: " + kind + b"\ndata: " + to_json(told) + b"\n\n"
            if not live:
                return

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/jobs/{id}/content", response_class=Response, tags=["jobs"], responses={
    **errors(404, 409), 200: {"content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}}}})
async def get_content(
    id: str, api: Served, request: Request, n: Annotated[int, Query(ge=1)] = 1, format: str | None = None,
) -> Response:
    """The sound file of a finished job: of several candidates the n-th best; converted where a format is asked for."""
    job = api.jobs.get(id)
    path = sound_of(job, n).path
    if format is not None and format not in FORMATS:
        raise invalid(f"unknown format {format!r:.100}, choose from {', '.join(FORMATS)}", "format")
    if format is not None:
        path = await run_in_threadpool(files.converted, path, format)
    return await sound(job, path, span=request.headers.get("range"))


@router.get("/jobs/{id}/spectrogram", response_class=Response, tags=["jobs"], responses={
    **errors(404, 409), 200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}})
async def get_spectrogram(id: str, api: Served, n: Annotated[int, Query(ge=1)] = 1) -> Response:
    """A picture of the n-th sound of a finished job."""
    picture = await run_in_threadpool(files.picture, sound_of(api.jobs.get(id), n).path)
    return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def sound_of(job: Job, n: int) -> Sound:
    """The n-th sound of a job, from 1. Raises Refused."""
    if job.status != COMPLETED:
        raise Refused(409, f"job {job.id} is {job.status}: it has no sound", "no_sound")
    if n > len(job.sounds):
        raise Refused(404, f"n must be from 1 to {len(job.sounds)}, got {n}", "no_sound", "n")
    return job.sounds[n - 1]


async def sound(job: Job, path: Path, headers: dict[str, str] | None = None, span: str | None = None) -> Response:
    """A file as an answer. span: the part that is asked for, as of the header Range: players jump with it."""
    try:
        content = await run_in_threadpool(path.read_bytes)
    except FileNotFoundError:                              # removed in this moment
        raise Refused(404, f"there is no job {job.id!r} any more", "job_not_found", "id") from None
    name = f"{job.id}{path.stem.removeprefix('sound')}{path.suffix}"
    told = {"Content-Disposition": f'inline; filename="{name}"', "Accept-Ranges": "bytes", **(headers or {})}
    part = files.part(span, len(content))
    if part is None:
        return Response(content, media_type=media_type(path.suffix), headers=told)
    told["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(content)}"
    return Response(content[part.start:part.stop], 206, media_type=media_type(path.suffix), headers=told)


def media_type(suffix: str) -> str:
    """What a file of a suffix is called in HTTP."""
    return {".wav": "audio/wav", ".flac": "audio/flac", ".opus": "audio/ogg", ".mp3": "audio/mpeg"}.get(
        suffix, mimetypes.types_map.get(suffix, "audio/ogg"))


async def made(request: Request, api: Api, job: Job) -> Response:
    """Have a job made while the client waits; a client that goes away cancels it. Raises Refused."""
    api.jobs.submit(job)
    ended = asyncio.ensure_future(_ended(api.jobs, job))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([ended, gone], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise ClientDisconnect
        if job.error is not None:
            raise job.error
        if job.status != COMPLETED:
            raise stopping() if api.jobs.closed else Refused(409, f"job {job.id} was cancelled", "cancelled")
        return await sound(job, job.sounds[0].path, about(job))
    finally:
        ended.cancel()
        gone.cancel()
        api.jobs.drop(job)


async def _ended(jobs: Jobs, job: Job) -> None:
    """Wait for the end of a job."""
    async for _ in jobs.changes(job):
        pass


async def _ended_within(seconds: float, jobs: Jobs, job: Job) -> None:
    """Wait for the end of a job, for some time."""
    if seconds:
        with suppress(TimeoutError):
            await asyncio.wait_for(_ended(jobs, job), seconds)


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def about(job: Job) -> dict[str, str]:
    """Headers that say how a sound was made. What does not fit into a header stands in the file alone."""
    best = job.sounds[0]
    headers = {"X-Job-Id": job.id, "X-Seed": str(best.seed)}
    if best.score is not None:
        headers["X-Score"] = f"{best.score:.6f}"
    told = json.dumps(job.asked.told | {"seed": best.seed})
    return headers | ({"X-Settings": told} if len(told) <= 6000 else {})


@router.post("/settings", responses=errors(413), tags=["server"], openapi_extra={"requestBody": {
    "required": True, "content": {"multipart/form-data": {"schema": schemas.file("a sound file of ldm2, or settings as "
                                                                                 "JSON or TOML")}}}})
async def read_settings(request: Request, api: Served) -> Response:
    """The settings in a file that ldm2 wrote, by the names of today: a job of them makes the same sound again."""
    async with request.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("a form with the file as `file` is needed", "file")
        with tempfile.TemporaryDirectory(dir=api.jobs.folder.path) as folder:
            path = Path(folder) / uploads.file_name(file.filename)
            path.write_bytes(await file.read())
            return JSON(await run_in_threadpool(files.settings_in, path))


@router.get("/models", responses=errors(), tags=["server"])
async def list_models(api: Served) -> Response:
    """The model that is served."""
    return JSON({"object": "list", "data": [schemas.model(api.about)]})


@router.get("/capabilities", responses=errors(), tags=["server"])
async def capabilities(api: Served) -> Response:
    """What can be asked for: kinds, options with their limits and defaults, formats, and the limits of the server."""
    return JSON(schemas.capabilities(api.about, api.limits))
