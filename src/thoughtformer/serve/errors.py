"""What went wrong, in the shape and with the codes that clients of OpenAI's API expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from thoughtformer.errors import (
    BusyError,
    CheckpointError,
    ContextOverflowError,
    InputError,
    OutputError,
    OverloadedError,
    StoppedError,
    StoreError,
    ThoughtformerError,
    TooLargeError,
    UnsupportedError,
)

__all__ = ["error_body", "error_response", "response_of"]

#: The first that fits counts: (exception, status, code).
STATUSES: tuple[tuple[type[ThoughtformerError], int, str], ...] = (
    (OverloadedError, 429, "overloaded"),
    (StoppedError, 503, "stopped"),
    (BusyError, 409, "session_busy"),
    (CheckpointError, 409, "session_unusable"),
    (ContextOverflowError, 400, "context_length_exceeded"),
    (TooLargeError, 413, "too_large"),
    (OutputError, 507, "no_storage"),
    (StoreError, 500, "store_damaged"),
    (UnsupportedError, 400, "unsupported"),
    (InputError, 400, "invalid_value"),
)
RETRY_AFTER_SECONDS = 1


def error_body(message: str, *, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    # What somebody sent may hold halves of characters, which can't be written.
    shown = " ".join(message.encode("utf-8", "replace").decode().split())
    return {"error": {"message": shown, "type": kind, "param": param, "code": code}}


def error_response(
    message: str,
    *,
    status: int,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A whole response."""
    more = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else {}
    return JSONResponse(
        error_body(message, status=status, code=code, param=param),
        status_code=status,
        headers={**more, **(headers or {})},
    )


def response_of(error: ThoughtformerError) -> JSONResponse:
    """The response that tells of one of our exceptions."""
    for kind, status, code in STATUSES:
        if isinstance(error, kind):
            return error_response(str(error), status=status, code=code)
    return error_response(str(error), status=500)
