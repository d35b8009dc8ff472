"""What a client sends -> what is to be made, checked: the same options and lines as everywhere, within the limits."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ldm2 import audio
from ldm2.options import Option, default_value, exact, from_word, options_of, refuse_unknown
from ldm2.result import output_of
from ldm2.serve.errors import Refused, invalid
from ldm2.serve.limits import MOST_CHANGES, Limits
from ldm2.settings import EDITS, GENERATE, ORIGIN, PER_PROMPT, RECONSTRUCT, RESULTS, Output, Settings

OPTIONS = options_of(Settings)
OUTPUT = options_of(Output)
FORMATS = tuple(suffix[1:] for suffix in audio.FORMATS)
DEFAULT_FORMAT = "wav"
HIGHEST_RATE = 192_000                     # Hz, of files
BESIDE = ("kind", "format", *ORIGIN)       # names in a body that are no options


@dataclass(frozen=True)
class About:
    """What is known of the model that is served.

    origin, defaults: as of ldm2.runtime.loaded.Loaded; sample_rate: Hz
    is_speech_model: whether each prompt needs words to say; ranks: whether candidates are ranked
    max_steps: of a sampler
    check:  looks at resolved settings of a sound without input as the model would. Raises ValueError.
    loras:  names that requests may give; files of the server are not for its clients
    """

    origin: Mapping[str, Any]
    defaults: Mapping[str, Any]
    sample_rate: int
    is_speech_model: bool
    ranks: bool
    max_steps: int
    check: Callable[[Settings], object] = field(default=lambda settings: None, compare=False)
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upload:
    """A sound that a client has sent: where it lies, for how long it plays, its bytes."""

    path: Path
    seconds: float
    size: int


@dataclass(frozen=True)
class Asked:
    """A request for a sound: `options` make it, of `upload` if it is an edit; `form` and `format` say how files are.

    told: all options with their values, for people
    """

    kind: str
    options: dict[str, Any]
    told: dict[str, Any]
    form: dict[str, Any]
    format: str
    upload: Upload | None = None


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises Refused for anything else, NaN and infinite numbers included."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body must be JSON: {str(error) or 'nested too deep'}", "invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body must be an object of JSON, got {type(found).__name__}", "invalid_json")
    return found


def from_words(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Fields of a form -> options: values are words, lists stand as JSON or as several fields of one name.

    Raises Refused.
    """
    found: dict[str, Any] = {}
    for name, word in fields:
        known = OPTIONS.get(name) or OUTPUT.get(name)
        value = word if known is None or name in PER_PROMPT else _checked(name, known, word, from_word)
        if name in found and isinstance(value, tuple):
            value = (*found[name], *value)
        elif name in found:
            raise invalid(f"{name} is given twice", name)
        found[name] = value
    return found


def asked(given: Mapping[str, Any], about: About, limits: Limits, upload: Upload | None = None) -> Asked:
    """The request in a body. None stands for "not given". Raises Refused."""
    given = {name: value for name, value in given.items() if value is not None}
    kind = _kind(given)
    _check_origin(given, about)
    _check_names(kind, given)
    if kind in EDITS and upload is None:
        raise Refused(400, f"{kind} needs a sound: send a form (multipart/form-data) with the file as audio",
                      "missing_audio", "audio")
    if kind not in EDITS and upload is not None:
        raise invalid(f"{kind} takes no audio", "audio")
    settings = _settings(kind, {name: value for name, value in given.items() if name in OPTIONS and name != "task"},
                         about, limits, upload)
    form, format = _form(given, about)
    plain = {name: value for name, value in settings.plain().items() if value is not None}
    options = {name: value for name, value in plain.items()
               if name == "task" or getattr(settings, name) != default_value(Settings, name)}
    return Asked(kind, options, plain | {"model": about.origin["model"]}, form, format, upload)


def _kind(given: Mapping[str, Any]) -> str:
    """What is to be done: `kind`, or `task` as files have it."""
    kind, task = given.get("kind"), given.get("task")
    if kind is not None and task is not None and kind != task:
        raise invalid(f"kind {kind!r:.100} and task {task!r:.100} are two things", "kind")
    found = _checked("kind", OPTIONS["task"], next((each for each in (kind, task) if each is not None), GENERATE))
    if found == RECONSTRUCT:
        raise invalid(f"unknown kind {found!r}, choose from {', '.join(RESULTS)}", "kind")
    return found


def _check_origin(given: Mapping[str, Any], about: About) -> None:
    """What settings say of where they come from may stand beside them; the model must be the one that is served."""
    model = about.origin["model"]
    if given.get("model", model) != model:
        raise Refused(404, f"the model here is {model!r}, got {given['model']!r:.200}", "model_not_found", "model")


def _check_names(kind: str, given: Mapping[str, Any]) -> None:
    """Refuse names that are none, and options of other tasks."""
    known: dict[str, Option] = options_of(Settings, kind) | OUTPUT
    for name in given:
        if name in OPTIONS and name not in known:
            raise invalid(f"{kind} takes no {name}, got {given[name]!r:.200}", name)
        try:
            refuse_unknown(kind, [name], known, BESIDE)
        except ValueError as error:
            raise Refused(400, f"{error!s:.300}", "unknown_option", name[:100]) from None


def _settings(
    kind: str, options: dict[str, Any], about: About, limits: Limits, upload: Upload | None
) -> Settings:
    """The options of a request with the defaults filled in, checked as far as can be before the work."""
    for name, value in options.items():
        options[name] = _checked(name, OPTIONS[name], value)
        _check_text(name, options[name], limits)
        if name != "seed" and isinstance(options[name], int) and options[name] >= 2**31:
            raise invalid(f"{name} must be below 2**31", name)
    if options.get("seed") is None:
        options["seed"] = secrets.randbelow(2**31)
    if not isinstance(options["seed"], int):
        raise invalid(f"seed must be one number in a job, got {list(options['seed'])}")
    try:
        settings = Settings.create(kind, **options)
        resolved = settings.resolved(about.defaults)
        seconds = resolved.length(0.0 if upload is None else upload.seconds)
        _check_amount(resolved, limits, seconds)
        resolved = resolved.resolved(duration=seconds)
        _check_loras(resolved, about)
        if upload is None:
            about.check(resolved)
    except (ValueError, TypeError, OverflowError) as error:
        raise invalid(error) from None
    return Settings.create(kind, **{name: value for name, value in resolved.plain().items() if name != "task"}
                           | {"seed": options["seed"]})


def _checked(name: str, each: Option, value: Any, check: Callable[..., Any] | None = None) -> Any:
    """A value in its one form. Raises Refused naming it."""
    try:
        return each.kind.check(name, value) if check is None else check(name, each, value)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise invalid(error, name) from None


def _check_text(name: str, value: Any, limits: Limits) -> None:
    """One text, not too long."""
    texts = [text for _, text in value] if name == "prompt_at" else value if name in PER_PROMPT else ()
    if name in PER_PROMPT and len(texts) > 1:
        raise invalid(f"{name} must be one text in a job, got {len(texts)}", name)
    if len(texts) > MOST_CHANGES:
        raise invalid(f"{name} must have at most {MOST_CHANGES} entries, got {len(texts)}", name)
    longest = max(map(len, texts), default=0)
    if longest > limits.max_prompt:
        raise invalid(f"{name} must have at most {limits.max_prompt:,} characters, got {longest:,}", name)


def _check_amount(settings: Settings, limits: Limits, seconds: float) -> None:
    """Not too much sound. seconds: of each waveform."""
    if settings.candidates > limits.max_waveforms:
        raise ValueError(f"num_waveforms must be at most {limits.max_waveforms} here, got {settings.candidates}")
    if seconds * settings.candidates > limits.max_seconds:
        each = "" if settings.candidates == 1 else f" of {settings.candidates} waveforms"
        raise ValueError(f"seconds: a job makes at most {limits.max_seconds:g} s of sound here, got "
                         f"{exact(seconds * settings.candidates)} s{each}")


def _check_loras(settings: Settings, about: About) -> None:
    """Names that the server has, and no paths."""
    for word in (each[0] for each in settings.lora or ()):
        if word not in about.loras:
            raise ValueError(f"lora must be of {', '.join(about.loras) or 'none'} here, got {word!r:.100}")


def _form(given: Mapping[str, Any], about: About) -> tuple[dict[str, Any], str]:
    """How the files are written."""
    told = given.get("output", {})                         # as files and jobs tell it
    if not isinstance(told, dict) or any(name not in (*OUTPUT, "format") for name in told):
        raise invalid(f"output must be an object with {', '.join(OUTPUT)} and format, got {told!r:.100}", "output")
    given = {**told, **given}
    form = {name: _checked(name, OUTPUT[name], given[name]) for name in OUTPUT if name in given}
    format = given.get("format", DEFAULT_FORMAT)
    if format not in FORMATS:
        raise invalid(f"unknown format {format!r:.100}, choose from {', '.join(FORMATS)}", "format")
    output = output_of(form)
    if (output.sample_rate or 0) > HIGHEST_RATE:
        raise invalid(f"sample_rate must be at most {HIGHEST_RATE} Hz, got {output.sample_rate}")
    try:
        audio.check_format(f"sound.{format}", sample_rate=output.sample_rate or about.sample_rate,
                           encoding=output.encoding)
    except ValueError as error:
        raise invalid(error) from None
    return form, format
