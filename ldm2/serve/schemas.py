"""What clients are told of options and answers: JSON Schema made from `Settings`, and the models of the answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from ldm2.options import Option, default_value
from ldm2.serve.asked import DEFAULT_FORMAT, FORMATS, OPTIONS, OUTPUT, About
from ldm2.serve.jobs import STATES
from ldm2.serve.limits import Limits
from ldm2.settings import GENERATE, PRESETS, RESULTS, Output, Settings


class ErrorInfo(BaseModel):
    """What went wrong, in one line."""

    message: str
    type: str
    param: str | None = Field(description="the option or field that is at fault, if it is one")
    code: str


class Error(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorInfo


class Sound(BaseModel):
    """A file of a finished job; of several candidates the first is the best."""

    n: int
    seed: int
    score: float | None = Field(description="CLAP similarity with the prompt, of several candidates")
    seconds: float
    sample_rate: int
    bytes: int
    url: str


class Job(BaseModel):
    """A job and what has become of it. Times are seconds since 1970."""

    id: str
    kind: str
    status: Literal[STATES]                                # type: ignore[valid-type]
    queue_position: int | None = Field(description="from 1; null when it does not wait")
    created: float
    started: float | None
    finished: float | None
    stage: str | None
    step: int = Field(description="parts of the stage that are done")
    total: int
    seconds_left: float | None = Field(description="until the last step")
    settings: dict[str, Any] = Field(description="all options; they make the same sound again")
    output: dict[str, Any]
    results: list[Sound]
    error: ErrorInfo | None
    url: str


class JobList(BaseModel):
    """Jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[Job]


def options(about: About, limits: Limits) -> list[dict[str, Any]]:
    """All options of requests, for pages and programs that show them."""
    settings = [_option(name, each, Settings, about, limits) for name, each in OPTIONS.items() if name != "task"]
    return settings + [_option(name, each, Output, about, limits) for name, each in OUTPUT.items()]


def _option(name: str, each: Option, cls: type, about: About, limits: Limits) -> dict[str, Any]:
    """One option: where it applies, what it takes, and what it is where it is not given."""
    kinds = [kind for kind in RESULTS if each.applies_to(kind)]
    given = default_value(cls, name)
    fixed = given if given not in (None, ()) else None
    defaults = {kind: each.default_for(kind) if fixed is None else fixed for kind in kinds}
    if each.of_checkpoint and name in about.defaults:
        defaults = {kind: value if kind in each.per_task else about.defaults[name] for kind, value in defaults.items()}
    return {"name": name, "group": each.group, "help": each.help, "unit": each.kind.unit or None,
            "schema": schema(name, each, about, limits), "kinds": kinds, "default": next(iter(defaults.values()), None),
            "defaults": defaults, "flag": each.kind.schema.get("type") == "boolean"}


def schema(name: str, each: Option, about: About | None = None, limits: Limits | None = None) -> dict[str, Any]:
    """What an option takes, within the limits of a server."""
    found = dict(each.kind.schema)
    if "enum" in found:
        found = {"type": "string", **found}
    if limits is not None and about is not None:
        most = {"seconds": limits.max_seconds, "num_waveforms": limits.max_waveforms, "steps": about.max_steps}
        if name == "lora":
            found["items"] = {"type": "array", "prefixItems": [{"enum": list(about.loras)}, {"type": "number"}],
                              "minItems": 1, "maxItems": 3}
        if name in most:
            found["maximum"] = min(most[name], found.get("maximum", most[name]))
    return found


def capabilities(about: About, limits: Limits) -> dict[str, Any]:
    """What the server can do."""
    return {
        "model": model(about), "kinds": list(RESULTS), "formats": list(FORMATS), "default_format": DEFAULT_FORMAT,
        "options": options(about, limits), "presets": PRESETS, "loras": list(about.loras),
        "limits": {name: getattr(limits, name) for name in limits.__dataclass_fields__},
    }


def model(about: About) -> dict[str, Any]:
    """The model that is served, as lists of models have it."""
    return {"id": about.origin["model"], "object": "model", "owned_by": "ldm2", "sample_rate": about.sample_rate,
            "speech": about.is_speech_model, "ranks": about.ranks, "max_steps": about.max_steps, **about.origin}


def body(kinds: tuple[str, ...] = RESULTS, foreign: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON Schema of a request's body. foreign: properties by other names."""
    found: dict[str, Any] = {
        name: schema(name, each) | {"description": each.help}
        for name, each in (OPTIONS | OUTPUT).items() if name != "task" and any(map(each.applies_to, kinds))
    }
    found |= {"model": {"type": "string", "description": "the model of the server, if anything"}}
    found |= foreign or {}
    if kinds != (GENERATE,):
        found["kind"] = {"type": "string", "enum": list(kinds), "default": GENERATE}
    found.setdefault("format", {"type": "string", "enum": list(FORMATS), "default": DEFAULT_FORMAT})
    return {"type": "object", "properties": found, "additionalProperties": False}


def form(kinds: tuple[str, ...] = RESULTS) -> dict[str, Any]:
    """JSON Schema of a form: a sound, and options whose values are words, lists as JSON."""
    found = {name: {"type": "string", "description": about.get("description", "")}
             for name, about in body(kinds)["properties"].items()}
    found["audio"] = {"type": "string", "format": "binary", "description": "the sound file to edit"}
    return {"type": "object", "properties": found, "required": ["audio"]}


def file(about: str) -> dict[str, Any]:
    """JSON Schema of a form with a file and nothing else."""
    return {"type": "object", "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary", "description": about}}}
