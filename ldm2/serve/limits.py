"""What a server lets a client ask for. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from ldm2.options import check_options, integer, number, option
from ldm2.settings import MAX_SECONDS

BODY_BYTES = 2**18                         # of a body that is no upload
MOST_CHANGES = 64                          # of the prompt in one sound


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises ValueError naming limit, value and rule."""

    queue: int = option(integer(1), "jobs that may wait; more are refused with 429", value=64, metavar="N")
    pending: int = option(integer(1), "jobs of one client that may wait or run", value=32, metavar="N")
    max_seconds: float = option(
        number(above=0, maximum=MAX_SECONDS, unit="seconds"), "sound of one job in seconds, of all its candidates "
        "together; also of an upload", value=MAX_SECONDS, metavar="S")
    max_waveforms: int = option(integer(1), "candidates of one job", value=16, metavar="N")
    max_prompt: int = option(integer(1), "characters of a text", value=2000, metavar="N")
    upload_mb: float = option(number(above=0), "size of an upload in megabytes", value=64.0, metavar="MB")
    keep_mb: float = option(number(above=0), "results and uploads that are kept, in megabytes; the oldest go first",
                            value=1024.0, metavar="MB")
    keep_minutes: float = option(number(above=0), "how long a finished job is kept", value=60.0, metavar="MIN")
    keep_jobs: int = option(integer(1), "finished jobs that are kept", value=1000, metavar="N")
    grace: float = option(number(0), "seconds that a running job has when the server is stopped", value=10.0,
                          metavar="S")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def upload_bytes(self) -> int:
        """The size of an upload in bytes."""
        return int(self.upload_mb * 1e6)
