"""What is looked at before a request is read: its size, who sends it, and by which name; and what fails unforeseen."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thoughtformer.serve.errors import error_response

__all__ = ["BearerToken", "BodyLimit", "KnownHosts", "Unforeseen"]

logger = logging.getLogger(__name__)


class BodyLimit:
    """Refuses bodies that say they are too long, and those that turn out to be."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one request; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = error_response(
            f"the body is longer than {self.max_bytes} bytes, which is all this server takes.",
            status=413,
            code="body_too_large",
        )
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.max_bytes:
            await refusal(scope, receive, send)
            return
        seen, has_begun, is_over = 0, False, False

        async def counted() -> Message:
            nonlocal seen, is_over
            if is_over:
                return {"type": "http.disconnect"}
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                is_over = True
                # For the application the client is gone: it gives up, and what it answers is dropped.
                return {"type": "http.disconnect"}
            return message

        async def answered(message: Message) -> None:
            nonlocal has_begun
            if not is_over:
                has_begun = True
                await send(message)

        try:
            await self.app(scope, counted, answered)
        except ClientDisconnect:
            if not is_over:
                raise
        if is_over and not has_begun:
            await refusal(scope, receive, send)


class BearerToken:
    """Lets nobody but those who bear the token further than the page and `/health`."""

    OPEN = ("/", "/page.css", "/page.js", "/health")

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one request; see ASGI."""
        if scope["type"] == "http" and scope["path"] not in self.OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = error_response(
                    "this server wants a bearer token: send the header `Authorization: Bearer TOKEN`.",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class KnownHosts:
    """Refuses requests that call the server by another name than its own."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = tuple(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one request; see ASGI."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if re.sub(r":\d*$", "", given).lower() not in self.hosts:
                refusal = error_response(
                    f"this server is not {given!r}: call it as {' or '.join(self.hosts)}.",
                    status=400,
                    code="unknown_host",
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Unforeseen:
    """Answers what nobody foresaw, inside of whatever else is put around answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes one request; see ASGI."""
        has_begun = False

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:
            raise
        except Exception:
            if scope["type"] != "http" or has_begun:
                raise
            logger.exception("a request failed")
            failed = error_response(
                "the server failed on this request; see its log.", status=500, code="internal_error"
            )
            await failed(scope, receive, send)
