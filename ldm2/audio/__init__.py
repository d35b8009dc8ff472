"""Sound files in and out, their tags, and pictures of sound."""

from ldm2.audio.files import (
    FORMATS,
    FileInfo,
    check_output,
    check_rows,
    describe,
    mix,
    nearest_encoding,
    read,
    read_channels,
    read_metadata,
    resample,
    samples_to_seconds,
    seconds_to_samples,
    write,
)

__all__ = [
    "FORMATS", "FileInfo", "check_output", "check_rows", "describe", "mix", "nearest_encoding", "read",
    "read_channels", "read_metadata", "resample", "samples_to_seconds", "seconds_to_samples", "write",
]
