"""The page on an address."""

import asyncio
import errno
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from gradio.routes import App
from gradio.themes import Default
from starlette.routing import Mount

from bcoskit.app._keeper import Keeper, Uploads
from bcoskit.app._limits import Limits
from bcoskit.app._page import asset, in_event_loop, make_page
from bcoskit.app._service import ExplanationService
from bcoskit.app._upload import UPLOAD, receiver

_LOGGER = logging.getLogger("uvicorn.error")
_UPLOADS = 20  # of the largest size that are kept at once
_GRACE = 2  # seconds that open connections have when the server ends


def serve(
    service: ExplanationService,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    allowed_hosts: Sequence[str] = (),
    ready: Callable[[str, Callable[[], None]], object] | None = None,
) -> None:
    """Show the page of a service until an interrupt (Ctrl-C, or a signal to end).

    No file is kept: uploads lie in a folder that only this user can read, for five and a half minutes at most, and the
    folder goes when the server does. Nothing else is written, and nothing is sent to or loaded from elsewhere.

    Args:
        service: What explains; it is closed at the end.
        host: The address.
        port: The port; 0 for any that is free.
        allowed_hosts: Names by which browsers reach the page, such as that of a proxy. Requests for other names are
            refused, except for `localhost`, `host`, this machine's name and numeric addresses: a website could have
            its name lead here.
        ready: Called once the page can be opened, as `ready(address, stop)`; `stop` ends the server, from any thread.

    Raises:
        ValueError: If the port is in use or out of range, or the address is not one of this machine.
    """
    listening = _listening(host, port)
    with listening, _own_folder() as folder:
        app = in_event_loop(lambda: web_app(service, folder, host, allowed_hosts))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        server = _Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=_GRACE, lifespan="on"))
        server.when_ready = (lambda: None) if ready is None else (lambda: ready(address, server.stop))
        try:
            with _interrupted_by_signals():
                server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            _LOGGER.setLevel(logging.ERROR)
            service.close()


def web_app(
    service: ExplanationService, folder: Path, host: str = "127.0.0.1", allowed_hosts: Sequence[str] = ()
) -> fastapi.FastAPI:
    """The page of a service as an application of FastAPI, with limits on what it takes, keeps, and where it may lead.

    Args:
        service: What explains.
        folder: Where uploads go, and Gradio's other files: `GRADIO_TEMP_DIR`.
        host: The address.
        allowed_hosts: As of `serve`.
    """
    uploads = Uploads(folder, _UPLOADS * service.max_bytes)

    @asynccontextmanager
    async def kept(app: fastapi.FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(app.state.keeper.run())
        try:
            yield
        finally:
            sweeping.cancel()

    app = fastapi.FastAPI(openapi_url=None, lifespan=kept)
    names = ("localhost", host, socket.gethostname())
    app.add_middleware(Limits, max_bytes=service.max_bytes, uploads=uploads, names=names, proxies=tuple(allowed_hosts))
    app.post(UPLOAD)(receiver(folder))  # comes before Gradio's own
    gr.mount_gradio_app(
        app,
        make_page(service),
        path="",
        theme=_theme(),
        head=f"<style>{asset('page.css')}</style>",  # Gradio would rewrite what it takes as `css`
        max_file_size=service.max_bytes,
        show_error=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api"],
    )
    mounted = next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, App))
    app.state.keeper = Keeper(mounted, uploads)
    return app


class _Server(uvicorn.Server):
    when_ready: Callable[[], object]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _LOGGER.setLevel(logging.CRITICAL)  # connections that open pages keep are cut, which is no error
        await super().shutdown(sockets)

    def stop(self) -> None:
        self.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"`port` (={port}) must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"`host` (={host!r}) is no address of this machine ({error})") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        if isinstance(error, PermissionError) or error.errno == errno.EADDRINUSE:
            raise ValueError(f"`port` (={port}) on {host} is in use or not allowed: choose another") from error
        raise ValueError(f"`host` (={host!r}) is no address of this machine ({error.strerror})") from error
    return listening


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Gradio's files in a folder that only this user can read, and that goes when the server does."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="bcoskit-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """A signal to end interrupts as Ctrl-C does, so that all is removed; only a main thread hears of it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _theme() -> Any:
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    return Default(
        primary_hue="red",
        neutral_hue="zinc",
        font=fonts,
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )
