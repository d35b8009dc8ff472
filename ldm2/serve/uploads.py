"""Sounds that clients send: kept in the folder of their job, and read as strictly as files are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from starlette.datastructures import UploadFile

from ldm2 import audio
from ldm2.batch.rows import LONGEST_REASON
from ldm2.fields import one_line
from ldm2.serve.asked import Upload
from ldm2.serve.errors import UPLOADS, Refused
from ldm2.serve.limits import Limits

MOST_SAMPLES = 2**26                       # of all channels: 600 s of stereo at 48 kHz
LONGEST_NAME = 80


def keep(file: UploadFile, folder: Path, limits: Limits) -> Upload:
    """Write the file into the folder of a job, under a name like the client's own, and read it once.

    Raises Refused for what is no sound, or too long.
    """
    place = folder / UPLOADS
    place.mkdir()
    path = place / file_name(file.filename)
    with open(path, "wb") as copy:
        shutil.copyfileobj(file.file, copy)
    try:
        about = audio.describe(path)
        seconds = min(limits.max_seconds, MOST_SAMPLES / (about.sample_rate * about.channels))
        channels, rate = audio.read_channels(path, seconds)
    except (ValueError, OSError) as error:
        line = one_line(error, LONGEST_REASON).replace(f"{place}/", "")
        raise Refused(400, line, "invalid_audio", "audio") from None
    return Upload(path, channels.shape[-1] / rate, path.stat().st_size)


def file_name(given: str | None) -> str:
    """A harmless file name like the given one."""
    last = re.split(r"[/\\]", given or "")[-1]
    words = re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip(".-")[-LONGEST_NAME:]
    return words or "audio"
