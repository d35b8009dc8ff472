"""What `ldm2 eval` computes: scores of sound files, each with what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm2 import audio, fields
from ldm2.metrics import distances
from ldm2.metrics.embedding import Embedding

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
PATH_KEYS = ("path", "file", "file_name", "wav", "audio")  # of a manifest: ours, then those of other data sets
TEXT_KEYS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Score:
    """A number with what it depends on.

    n, seconds: of the generated sounds that went into it; the same of the reference, None where there is none.
    more: what else belongs to this kind of number.
    """

    name: str
    value: float
    embedding: str
    revision: str
    resampler: str
    n: int
    seconds: float
    n_reference: int | None = None
    seconds_reference: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict:
        """Plain values."""
        values = {name: value for name, value in vars(self).items() if name not in ("name", "more")}
        return values | dict(self.more)


@dataclass(frozen=True)
class Sound:
    """One file: its length, its embedding (D,), and its own numbers, None where they were not asked for."""

    path: Path
    seconds: float
    vector: np.ndarray
    prompt: str | None = None
    clap_score: float | None = None
    frechet_audio_distance: float | None = None
    kernel_audio_distance: float | None = None


@dataclass(frozen=True)
class Report:
    """Numbers in total, and file by file. notes: what could not be computed, and why."""

    scores: tuple[Score, ...]
    sounds: tuple[Sound, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict:
        """Plain values."""
        names = ("seconds", "prompt", "clap_score", "frechet_audio_distance", "kernel_audio_distance")
        return {
            "scores": {score.name: score.as_json() for score in self.scores},
            "files": [{"file": str(sound.path)} | {name: getattr(sound, name) for name in names}
                      for sound in self.sounds],
            "notes": list(self.notes),
        }


def sound_files(place: str | Path) -> list[Path]:
    """The sound files in a folder and its sub-folders, by name; or the one file. Raises ValueError if there is none."""
    place = Path(place).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"no such file or folder: {place}")
    if not place.is_dir():
        fields.check_file(place)
        return [place]
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{place} holds no sound file ({', '.join(SUFFIXES)})")
    return found


def manifest_prompts(manifest: str | Path, paths: Sequence[Path]) -> dict[Path, str]:
    """The prompt of each of the sound files, from a manifest with one JSON object a line.

    Each names a file (path, file, file_name, wav or audio) and its prompt (prompt, caption or text). A file is found as
    the line writes it, beside the manifest, or by its name where that is the only one. Lines about other files, and
    those whose "status" is "error", do not count. Raises ValueError for lines that make no sense and files without one.
    """
    manifest = Path(manifest).expanduser()
    fields.check_file(manifest)
    whole = {path.resolve(): path for path in paths}
    names: dict[str, list[Path]] = {}
    for path in paths:
        names.setdefault(path.name, []).append(path)
    found: dict[Path, str] = {}
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        row = _row(line, f"{manifest}, line {number}")
        if row is None:
            continue
        written, prompt = row
        path = whole.get(Path(written).resolve()) or whole.get((manifest.parent / written).resolve())
        same_name = names.get(Path(written).name, [])
        path = path or (same_name[0] if len(same_name) == 1 else None)
        if path is not None and found.setdefault(path, prompt) != prompt:
            raise ValueError(f"{manifest}, line {number}: a second prompt for {path}")
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(f"{manifest} has no prompt for {len(missing)} of {len(paths)} sounds, first {missing[0]}")
    return found


def _row(line: str, where: str) -> tuple[str, str] | None:
    """File and prompt of a line; None where it has nothing to say."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    if row.get("status") == "error":
        return None
    values = []
    for keys in (PATH_KEYS, TEXT_KEYS):
        value = next((row[key] for key in keys if key in row), None)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where} needs a text under one of {', '.join(keys)}, got {value!r}")
        values.append(value)
    return values[0], values[1]


def settings_inside(path: Path) -> dict:
    """The settings that ldm2 wrote into a sound file; empty if it wrote none."""
    try:
        settings = json.loads(audio.read_metadata(path).get("comment", "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def inner_prompts(paths: Iterable[Path]) -> dict[Path, str]:
    """The prompts that ldm2 wrote into the sound files; files without one are left out."""
    found = {path: settings_inside(path).get("prompt") for path in paths}
    return {path: prompt for path, prompt in found.items() if isinstance(prompt, str) and prompt.strip()}


def evaluate(
    generated: Sequence[Path], embedding: Embedding, *, reference: Sequence[Path] = (),
    prompts: Mapping[Path, str] | None = None, each: Callable[[], object] = lambda: None,
) -> Report:
    """CLAP score of the generated sounds that have a prompt; distances of all from the reference, if there is one.

    each() is called after each file. Raises ValueError or OSError naming a file that cannot be read.
    """
    prompts = prompts or {}
    sounds = [_sound(path, embedding, prompts.get(path), each) for path in generated]
    others = [_sound(path, embedding, None, each) for path in reference]
    notes: list[str] = []
    scores = _clap_scores(sounds, embedding, notes)
    if others:
        sounds, found = _distances(sounds, others, embedding, notes)
        scores += found
    else:
        notes.append("no distances: they need --reference")
    return Report(tuple(scores), tuple(sounds), tuple(notes))


def _sound(path: Path, embedding: Embedding, prompt: str | None, each: Callable[[], object]) -> Sound:
    waveform, rate = audio.read(path)
    vector = embedding.sound(waveform, rate)
    if not np.isfinite(vector).all():
        raise ValueError(f"{path}: its embedding holds NaN or infinite values")
    score = None if prompt is None else float(vector @ embedding.texts([prompt])[0])
    each()
    return Sound(path, len(waveform) / rate, vector, prompt, score)


def _about(embedding: Embedding, sounds: Sequence[Sound]) -> dict:
    return {"embedding": embedding.name, "revision": embedding.revision, "resampler": embedding.resampler,
            "n": len(sounds), "seconds": sum(sound.seconds for sound in sounds)}


def _clap_scores(sounds: Sequence[Sound], embedding: Embedding, notes: list[str]) -> list[Score]:
    """The mean cosine, with its standard error."""
    scored = [sound for sound in sounds if sound.clap_score is not None]
    if len(scored) < len(sounds):
        notes.append(f"{len(sounds) - len(scored)} of {len(sounds)} sounds have no prompt: give --prompts")
    if not scored:
        return []
    values = np.array([sound.clap_score for sound in scored])
    more = {"standard_error": float(values.std(ddof=1) / len(values) ** 0.5)} if len(values) > 1 else {}
    return [Score("clap_score", float(values.mean()), **_about(embedding, scored), more=more)]


def _distances(
    sounds: Sequence[Sound], others: Sequence[Sound], embedding: Embedding, notes: list[str]
) -> tuple[list[Sound], list[Score]]:
    """The sounds with their own distances, and those of all together."""
    if len(others) < 2:
        raise ValueError(f"a reference needs two sounds or more, got {len(others)}")
    x, y = (np.stack([sound.vector for sound in group]) for group in (sounds, others))
    bandwidth = distances.median_distance(y)
    points = distances.frechet_of_points(x, y), distances.kernel_of_points(x, y, bandwidth)
    sounds = [Sound(sound.path, sound.seconds, sound.vector, sound.prompt, sound.clap_score, float(a), float(b))
              for sound, a, b in zip(sounds, *points)]
    if len(sounds) < 2:
        notes.append("no distances of all together: they need two generated sounds or more")
        return sounds, []
    about = _about(embedding, sounds) | {
        "n_reference": len(others), "seconds_reference": sum(sound.seconds for sound in others)
    }
    scores = [Score("frechet_audio_distance", distances.frechet(x, y), **about)]
    if len(sounds) >= distances.FEWEST_TO_EXTRAPOLATE:
        line = distances.frechet_infinity(x, y)
        scores.append(Score("frechet_audio_distance_infinity", line.value, **about,
                            more={"slope": line.slope, "r2": line.r2}))
    else:
        notes.append(f"no extrapolation to infinite N: it needs {distances.FEWEST_TO_EXTRAPOLATE} generated sounds")
    kernel = distances.kernel(x, y, bandwidth)
    return sounds, [*scores, Score("kernel_audio_distance", kernel, **about, more={"bandwidth": bandwidth})]
