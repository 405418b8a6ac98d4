"""What every request and answer of the server is held to."""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
}


class TooLargeError(Exception):
    """A request with too many bytes."""


class Limits:
    """Refuses requests with too many bytes, while they come in, and lets pages load nothing from elsewhere.

    Args:
        app: The application behind it.
        max_bytes: Of a file; what surrounds it may add a little.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes + 100_000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, answered = 0, False

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise TooLargeError
            return message

        async def with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        told: Any = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if told.isdigit() and int(told) > self._max_bytes:
                raise TooLargeError
            await self._app(scope, bounded, with_headers)
        except TooLargeError:
            if answered:
                raise
            text = f"The image is too large: at most {(self._max_bytes - 100_000) / 1e6:g} MB are allowed.".encode()
            start = {"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]}
            await with_headers(start)
            await send({"type": "http.response.body", "body": text})
