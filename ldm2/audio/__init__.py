"""Sound files in and out, their tags, and pictures of sound."""

from ldm2.audio.reading import FileInfo, describe, read, read_channels, read_metadata
from ldm2.audio.samples import (
    as_samples,
    check_rate,
    check_rows,
    mix,
    resample,
    samples_to_seconds,
    seconds_to_samples,
)
from ldm2.audio.writing import FORMATS, check_format, check_output, nearest_encoding, to_wav, write, write_all

__all__ = [
    "FORMATS", "FileInfo", "as_samples", "check_format", "check_output", "check_rate", "check_rows", "describe",
    "mix", "nearest_encoding", "read", "read_channels", "read_metadata", "resample", "samples_to_seconds",
    "seconds_to_samples", "to_wav", "write", "write_all",
]
