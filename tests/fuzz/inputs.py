"""Damaged sounds and arguments of every kind, and what has to come of them."""

from __future__ import annotations

import io
import json
import math
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

import ldm2
from ldm2 import audio
from ldm2.options import options_of
from ldm2.settings import TASKS, Settings
from tests.fuzz.damage import Chooser
from tests.fuzz.judge import Verdict

FORMATS = {
    "WAV": "PCM_16", "AIFF": "PCM_24", "AU": "FLOAT", "CAF": "PCM_16", "W64": "PCM_32", "FLAC": "PCM_16",
    "OGG": "VORBIS", "MP3": "MPEG_LAYER_III",
}
SOUND = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))


@dataclass(frozen=True)
class Sounds:
    """Files of every format with bytes changed, lost, added or cut off.

    Right: refused in one line, or read in its whole length. Compressed samples may be others where a bit of them flips.
    """

    files: dict[str, bytes] = field(default_factory=lambda: {name: _encoded(name) for name in FORMATS})

    def case(self, place: Path, pick: Chooser) -> Verdict:
        """Damage a file, read it, and judge what comes of it."""
        name = pick.choose(sorted(self.files))
        data, done = _damaged(bytearray(self.files[name]), pick)
        path = place / f"x.{name.lower()}"
        path.write_bytes(data)
        try:
            waveform, rate = audio.read_channels(path, 600)
        except (ValueError, OSError) as error:
            clear = "\n" not in str(error) and path.name in str(error)
            return Verdict("right" if clear else "unclear", f"{name}: {done}", str(error))
        except Exception:
            return Verdict("traceback", f"{name}: {done}", traceback.format_exc())
        finally:
            path.unlink()
        shorter = waveform.shape[1] < len(SOUND) and not done.startswith("bytes")
        return Verdict("silent" if shorter else "right", f"{name}: {done}", f"{waveform.shape} at {rate} Hz")


def _encoded(name: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SOUND, 16_000, format=name, subtype=FORMATS[name])
    return file.getvalue()


def _damaged(data: bytearray, pick: Chooser) -> tuple[bytes, str]:
    """The data with one kind of damage, and what it was."""
    kind = pick.choose(("bytes changed", "cut off", "added"))
    place = pick.integer(0, len(data) - 1)
    if kind == "cut off":
        return bytes(data[:place]), f"cut off at {place}"
    if kind == "added":
        return bytes(data[:place] + b"\xff\x00" * 4 + data[place:]), f"added at {place}"
    for _ in range(pick.integer(1, 8)):
        data[pick.integer(0, len(data) - 1)] = pick.integer(0, 255)
    return bytes(data), "bytes changed"


VALUES = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.1, 1e300, math.nan, math.inf, -math.inf, 2**64, -2**70, "", "rain",
    "\ud800", "x" * 9, b"rain", [], [1], [1, 2], [(0, 1)], [(1, 0)], [("a", "b")], (0.1, 0.8), {}, {"a": 1}, object(),
    np.float32(0.5), np.int64(3), np.array([1, 2]), np.nan, [None], [[]], ["rain", ""], ["rain", 3], range(3),
    iter("ab"), Path("x"), 1j,
)


@dataclass(frozen=True)
class Arguments:
    """Options with values of every kind. Right: settings that can be resolved, or a ValueError in one line."""

    def case(self, place: Path, pick: Chooser) -> Verdict:
        """Settings of a task with some options, resolved."""
        task = pick.choose(TASKS)
        names = [*options_of(Settings, task), "stepz", "num_inference_steps"]
        given = {pick.choose(names): pick.choose(VALUES) for _ in range(pick.integer(1, 4))}
        done = f"{task}: {given}"
        try:
            settings = ldm2.Settings.create(task, **({"prompt": "rain"} | given)).resolved(duration=5.0)
            again = ldm2.Settings.create(task, **json.loads(json.dumps(settings.plain()))).resolved(duration=5.0)
            return Verdict("right" if again.plain() == settings.plain() else "silent", done, str(settings.plain()))
        except ValueError as error:
            return Verdict("right" if "\n" not in str(error) and str(error) else "unclear", done, str(error))
        except Exception:
            return Verdict("traceback", done, traceback.format_exc())
