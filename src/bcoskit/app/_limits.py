"""What every request and answer of the server is held to."""

import ipaddress
import re
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bcoskit.app._keeper import Uploads
from bcoskit.app._upload import UPLOAD

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
# What the page and its clients ask for. Gradio also serves addresses of elsewhere, files, copies of what tabs show on
# disk, and calls past the queue.
_READ = re.compile(
    r"/|/(assets|static)/.+|/(config|favicon\.ico|manifest\.json|robots\.txt|theme\.css)"
    r"|/gradio_api/((info|app_id|openapi\.json|startup-events|theme\.css|upload_progress)/?|queue/(data|status)"
    r"|heartbeat/[^/]+|call/(v2/)?(explain|compare)/[^/]+)"
)
_WRITTEN = re.compile(rf"{UPLOAD}|/gradio_api/(queue/join|reset|cancel|call/(v2/)?(explain|compare))/?")
_ALLOWED = {"GET": _READ, "HEAD": _READ, "POST": _WRITTEN}
# By these a request would decide where Gradio thinks that the page is; the server reads those of a local proxy before.
_DECIDED = re.compile(rb"x-forwarded-|x-gradio-server|forwarded$")
_HOST = re.compile(r"((?P<name>[a-zA-Z0-9._-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(:[0-9]+)?")
_AROUND = 100_000  # bytes of a request besides the file that it may have


class TooLargeError(Exception):
    """A request with too many bytes."""


class Limits:
    """Refuses what the page does not need, and too many bytes while they come in; pages load nothing from elsewhere.

    Args:
        app: The application behind it.
        max_bytes: Of a file.
        uploads: Where files go.
        names: Of this machine: who asks by them must come from a page at the same one. Numeric addresses are known.
        proxies: Names by which browsers reach the page, whatever the name by which a proxy asks.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, uploads: Uploads, names: Iterable[str], proxies: Iterable[str]
    ) -> None:
        self._app, self._max_bytes, self._uploads = app, max_bytes, uploads
        self._names, self._proxies = ({name.lower() for name in each} for each in (names, proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [each for each in scope["headers"] if not _DECIDED.match(each[0])]}
        refusal = self._misled(Headers(scope=scope))
        if refusal:
            await _refuse(send, 403, refusal)
            return
        addresses = _ALLOWED.get(scope["method"])
        if addresses is None or not addresses.fullmatch(scope["path"]):
            await _refuse(send, 403, "This address is not part of the page.")
            return
        is_upload = scope["path"] == UPLOAD
        most = self._max_bytes + _AROUND if is_upload else _AROUND
        if is_upload and self._uploads.full:
            await _refuse(send, 507, "There are too many images at once: try again in some minutes.")
            return
        request = _Request(receive, send, most, self._uploads.add if is_upload else None)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > most:
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
            name, allowed = ("image", self._max_bytes) if is_upload else ("request", most)
            await _refuse(send, 413, f"The {name} is too large: at most {allowed / 1e6:g} MB are allowed.")

    def _misled(self, headers: Headers) -> str:
        """Why a request is not one of the page's: another website sends it, or has given its name to this server."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return f"The host {host[:100]!r} is not known here: name it with --allowed-hosts."
        asking = host if origin is None else origin.partition("://")[2]
        # A proxy may ask by another name than browsers do.
        if asking.lower() != host.lower() and _hostname(asking) not in self._proxies:
            return f"The page is not for other websites, such as {origin!r:.100}."
        return ""

    def _is_ours(self, host: str) -> bool:
        name = _hostname(host)
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names or name in self._proxies
        return True  # which no website can make lead elsewhere


def _hostname(host: str) -> str:
    """Of `name:port`, lower case, and without the brackets of IPv6; empty if it is none."""
    found = _HOST.fullmatch(host)
    return (found["name"] or found["address"]).lower() if found else ""


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


class _Request:
    """A request of which at most so many bytes are read."""

    def __init__(self, receive: Receive, send: Send, most: int, count: Callable[[int], None] | None) -> None:
        self._receive, self._send, self._left, self._count = receive, send, most, count
        self.too_large = self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self._left -= size
        if self._count is not None:
            self._count(size)
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
