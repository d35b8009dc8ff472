"""What a client is told when a request is refused or a job fails: one shape, with the lines of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm2.batch.rows import LONGEST_REASON
from ldm2.fields import one_line
from ldm2.options import options_of
from ldm2.settings import Output, Settings

UPLOADS = "upload"                         # what clients send, below the folder of their job
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An answer other than success: status of HTTP, a line for people, and for programs a code and what is at fault."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple:
        """As an exception is pickled, it would lose all but its message."""
        return Refused, (self.status, self.message, self.code, self.param, self.headers)

    def told(self) -> dict[str, Any]:
        """The error as an object of JSON."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def invalid(error: Exception | str, param: str | None = None) -> Refused:
    """A value that does not do; param: the option, where the line does not begin with its name."""
    message = error if isinstance(error, str) else one_line(error, LONGEST_REASON)
    first = message.split(" ", 1)[0].rstrip(":")
    known = {*options_of(Settings), *options_of(Output)}
    return Refused(400, message, "invalid_value", param or (first if first in known else None))


def failed(error: Exception, folder: Path) -> Refused:
    """Why a job has failed: bad input, or something that is not the client's fault.

    folder: the job's, which is no business of a client: files in it are told by their names.
    """
    line = one_line(error, LONGEST_REASON).replace(f"{folder / UPLOADS}/", "").replace(f"{folder}/", "")
    return invalid(line) if isinstance(error, ValueError) else Refused(500, line, "failed")


def to_json(value: Any) -> bytes:
    """JSON in ASCII, which any text can be written in."""
    return json.dumps(value, allow_nan=False).encode()
