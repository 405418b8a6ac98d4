"""What every request and answer of the server is held to."""

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-dns-prefetch-control", b"off"),
]
_AROUND = 100_000  # bytes of a request that has a file, besides the file


class TooLargeError(Exception):
    """A request with too many bytes."""


class Limits:
    """Refuses requests with too many bytes, while they come in, and lets pages load nothing from elsewhere.

    Args:
        app: The application behind it.
        max_bytes: Of a file.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(receive, send, self._max_bytes + _AROUND)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._max_bytes + _AROUND:
            request.too_large = True
        else:
            try:
                await self._app(scope, request.receive, request.send)
            except ClientDisconnect:  # in the middle of what it has sent: there is nobody to answer
                return
            except TooLargeError:
                if request.answered:  # too late for another answer: the connection ends
                    raise
        if request.too_large and not request.answered:
            text = f"The image is too large: at most {self._max_bytes / 1e6:g} MB are allowed.".encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": text})


class _Request:
    """A request of which at most so many bytes are read."""

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive, self._send, self._left = receive, send, most
        self.too_large = self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_large = True
            raise TooLargeError
        return message

    async def send(self, message: Message) -> None:
        if self.too_large and not self.answered:
            return  # what the application makes of a broken-off request is not the answer
        if message["type"] == "http.response.start":
            self.answered = True
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await self._send(message)
