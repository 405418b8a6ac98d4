"""`bcoskit app`."""

import ipaddress
import sys
import webbrowser
from collections.abc import Callable
from threading import Thread

from rich.console import Console

from bcoskit._devices import device_named
from bcoskit._text import printable
from bcoskit.app import ExplanationService, serve
from bcoskit.models import create_model


def show_app(
    *,
    model: str = "resnet20.bcos_cifar10",
    weights: str | None = None,
    ordinary: str | None = None,
    ordinary_weights: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    allowed_hosts: list[str] = [],  # noqa: B006 - shown by --help, and never changed
    open: bool = False,
    max_megabytes: float = 20,
    max_megapixels: float = 50,
    batch_size: int = 16,
    device: str | None = None,
) -> int:
    """Show a page in the browser that explains photographs, until Ctrl-C.

    Args:
        model: Name of a network, or a file that training has written.
        weights: File or URL of the network's weights; by default those that go with its name.
        ordinary: Name or file of an ordinary network for the same classes, to compare with, such as `timm/resnet50`.
        ordinary_weights: File or URL of its weights; by default those that go with its name.
        host: The address. Everyone who reaches it can use the page: there are no passwords.
        port: The port; 0 for any that is free.
        allowed_hosts: Names by which browsers reach the page, such as that of a proxy; other names are refused.
        open: Also open the page in the browser of this machine.
        max_megabytes: Largest image that is taken.
        max_megapixels: Largest number of its pixels, in millions, at most 100.
        batch_size: Images of several users that are explained at once.
        device: Where to compute, such as cpu or cuda; by default cuda where there is one.

    Returns:
        The exit code.

    Raises:
        ValueError: If an option is out of its range, the port is in use, or the networks do not fit one another.
    """
    for name, value, most in (("max_megabytes", max_megabytes, 10_000), ("max_megapixels", max_megapixels, 100)):
        if not 0 < value <= most:
            raise ValueError(f"`{name}` (={value}) must be positive, and at most {most}")
    if ordinary is None and ordinary_weights is not None:
        raise ValueError(f"`ordinary_weights` (={ordinary_weights!r}) needs `ordinary`, the name of their network")
    chosen = device_named(device)
    network = create_model(model, weights=True if weights is None else weights).to(chosen)
    beside = None
    if ordinary is not None:
        beside = create_model(ordinary, weights=True if ordinary_weights is None else ordinary_weights).to(chosen)
    service = ExplanationService(
        network,
        beside,
        max_bytes=int(max_megabytes * 1e6),
        max_pixels=int(max_megapixels * 1e6),
        batch_size=batch_size,
    )
    serve(service, host=host, port=port, allowed_hosts=allowed_hosts, ready=_told(host, open))
    Console(stderr=True).print("stopped")
    return 0


def _told(host: str, open: bool) -> Callable[[str, Callable[[], None]], None]:
    """What says where the page is, and warns where others can reach it."""

    def told(address: str, _stop: Callable[[], None]) -> None:
        console = Console(stderr=True, soft_wrap=True, markup=False)
        if not _is_loopback(host):
            console.print(
                f"warning: {printable(host)} may be reached by others, who can use the page and this machine's time"
            )
        sys.stdout.write(f"The page is at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        if open:  # what opens may last as long as its window
            Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    return told


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
