"""The page under load: are all answers right, how long do they take, what does it cost, and what can do harm?

    python benchmarks/page.py [--requests 200] [--clients 8]
    python benchmarks/page.py --screenshots [--ordinary NAME --ordinary-weights FILE]

Starts `bcoskit app`, asks its API from several clients at once for explanations of different images, targets and
options, and compares every answer with `bcoskit.explain` of the same image. Then a client is killed while it is
answered, an upload is broken off, and an image of 100 megapixels is sent, while the others go on. Writes JSON and
Markdown under `benchmarks/results`. `--screenshots` takes the pictures of the documentation instead, by Chromium.
"""

import argparse
import base64
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from rich.console import Console
from rich.progress import track

import bcoskit
from bcoskit import Explanation
from bcoskit.evaluation import attribute
from bcoskit.models import Network

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PHOTOGRAPHS = Path(bcoskit.__file__).parent / "assets" / "photographs"
MODEL = "resnet20.bcos_cifar10"
TOLERANCE = 1e-5  # of the largest value, since a batch of another size rounds otherwise
WARM_UP = 64  # requests before memory is measured, which load what is loaded once


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    image: str
    target: str
    versus: str
    shares: bool
    data: str
    method: str | None


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """The address of a page of its own, and its process."""
    code = "import sys; from bcoskit.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "app", "--port", "0", *options]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        yield next(word for word in words if word.startswith("http")), process.pid
        if process.poll() is not None:
            raise RuntimeError("the server has died")
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    if code != 0:
        raise RuntimeError(f"the server ended with code {code}")


def memory(process: int) -> float:
    """What a process holds in memory, in megabytes."""
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True)
    return int(shown.stdout) * 1024 / 1e6


def write_images(folder: Path) -> list[str]:
    """The photographs of the package, and others of other sizes, formats and modes."""
    with Image.open(PHOTOGRAPHS / "chelsea.jpg") as photograph:
        cat = photograph.convert("RGB")
    cat.resize((3000, 2000)).save(folder / "large.jpg", quality=90)
    cat.convert("L").save(folder / "grey.png")
    cat.convert("P").save(folder / "palette.gif")
    cat.rotate(90, expand=True).save(folder / "upright.webp")
    clear = cat.convert("RGBA")
    clear.putalpha(128)
    clear.save(folder / "clear.png")
    return [str(path) for path in sorted((*PHOTOGRAPHS.glob("*.jpg"), *folder.iterdir()))]


def mixed(images: Sequence[str], classes: Sequence[str], count: int) -> list[Request]:
    """Requests of all kinds, the same in every run."""
    draw = random.Random(42)
    requests: list[Request] = []
    for index in range(count):
        first, second = draw.sample(classes, 2)
        target = draw.choice(["", first, str(classes.index(first))])
        requests.append(
            Request(
                draw.choice(images),
                first if index % 10 == 0 else target,
                second if target and draw.random() < 0.4 else "",
                draw.random() < 0.3,
                draw.choice(["none", "none", "npz", "safetensors"]),
                draw.choice(["grad_cam", "input_x_gradient", "bcos"]) if index % 10 == 0 else None,
            )
        )
    return requests


def ask(client: Client, request: Request) -> tuple[float, dict[str, Any]]:
    """The answer to a request, and the seconds that it takes with the upload."""
    start = time.perf_counter()
    image = handle_file(request.image)
    if request.method is None:
        given = (image, request.target, request.versus, request.shares, request.data)
        answer = client.predict(*given, api_name="/explain")
    else:
        answer = client.predict(image, request.target, request.method, False, api_name="/compare")
    return time.perf_counter() - start, answer


class Reference:
    """What the answers must be: `bcoskit.explain` and `attribute`, one image at a time.

    Args:
        model: The network.
    """

    def __init__(self, model: Network) -> None:
        self._model = model
        self._known: dict[tuple[str, int | None, int | None], Explanation] = {}

    def error(self, request: Request, answer: dict[str, Any]) -> float:
        """How far an answer is from what it must be, relative to the largest value of each kind."""
        x = self._model.transform(request.image).unsqueeze(0)
        target, versus = (self._index(name) for name in (request.target, request.versus))
        if request.method is not None:
            data = bytearray(base64.b64decode(answer["contributions"]))
            found = torch.frombuffer(data, dtype=torch.float32).view(answer["shape"])
            assert target is not None
            return _distance(found, attribute(self._model, x, target, request.method)[0])
        key = (request.image, target, versus)
        if key not in self._known:
            self._known[key] = bcoskit.explain(self._model, x, target, versus=versus)
        expected = self._known[key]
        assert expected.target is not None
        if answer["target"]["index"] != int(expected.target):
            return float("inf")
        scale = expected.logits.abs().max()
        told = torch.tensor([answer["value"], answer["contributions"], answer["bias"], answer["target"]["logit"]])
        true = [expected.value, expected.value - expected.bias, expected.bias, expected.logits[:, expected.target[0]]]
        errors = [float((told - torch.cat(true)).abs().max() / scale)]
        if (answer["residual"] is not None) != request.shares or (answer["data"] is None) != (request.data == "none"):
            return float("inf")
        if request.shares:
            errors.append(abs(answer["residual"]))
        if request.data != "none":
            saved = _opened(answer["data"], request.data)
            errors += [_distance(saved.contributions, expected.contributions), _distance(saved.x, expected.x)]
            errors.append(_distance(saved.weights, expected.weights))
        return max(errors)

    def _index(self, name: str) -> int | None:
        if not name:
            return None
        return int(name) if name.isdecimal() else self._model.classes.index(name)


def _opened(data: str, suffix: str) -> Explanation:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"explanation.{suffix}")
        path.write_bytes(base64.b64decode(data))
        return Explanation.load(path)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def ask_all(address: str, requests: Sequence[Request], clients: int, title: str) -> list[tuple[float, dict[str, Any]]]:
    """All requests, by so many clients at once, in order."""
    with ThreadPoolExecutor(clients) as pool:
        made = list(pool.map(lambda _: Client(address, verbose=False, httpx_kwargs={"timeout": 60}), range(clients)))
        parts = [
            pool.submit(
                lambda client, part: [ask(client, request) for request in part], made[index], requests[index::clients]
            )
            for index in range(clients)
        ]
        found = [part.result() for part in track(parts, title, transient=True)]
    return [found[index % clients][index // clients] for index in range(len(requests))]


KILLED = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
jobs = [client.submit(handle_file(sys.argv[2]), "cat", "", True, "npz", api_name="/explain") for _ in range(8)]
print("sent", flush=True)
[job.result() for job in jobs]
"""


def kill_a_client(address: str, image: str) -> None:
    """A client that waits for eight answers is killed."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, address, image], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()


def break_off_an_upload(address: str) -> None:
    """A client goes in the middle of what it sends."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(100_000)
        )


def refused(address: str, image: Path) -> str:
    """What is said of an image with too many pixels."""
    try:
        Client(address, verbose=False, httpx_kwargs={"timeout": 60}).predict(
            handle_file(str(image)), "", "", False, "none", api_name="/explain"
        )
    except AppError as error:
        return str(error)
    raise RuntimeError(f"{image.name} was taken")


def measure(count: int, clients: int) -> dict[str, Any]:
    """All figures of one run."""
    torch.set_num_threads(1)
    model = bcoskit.create_model(MODEL, weights=True)
    reference = Reference(model)
    with tempfile.TemporaryDirectory() as place, server() as (address, process):
        images = write_images(Path(place))
        huge = Path(place, "huge.png")
        Image.new("RGB", (10_000, 10_000), "orange").save(huge)
        requests = mixed(images, model.classes, count)
        ask_all(address, mixed(images, model.classes, WARM_UP), clients, "warming up")
        before = memory(process)
        start = time.perf_counter()
        answers = ask_all(address, requests, clients, "asking")
        seconds = time.perf_counter() - start
        after = memory(process)
        errors = [reference.error(request, answer) for request, (_, answer) in zip(requests, answers, strict=True)]
        with ThreadPoolExecutor(4) as pool:
            others = pool.submit(ask_all, address, requests[:32], 4, "asking on")
            harm = [pool.submit(kill_a_client, address, images[0]), pool.submit(break_off_an_upload, address)]
            message = pool.submit(refused, address, huge).result()
            for each in harm:
                each.result()
        disturbed = [
            reference.error(request, answer)
            for request, (_, answer) in zip(requests[:32], others.result(), strict=True)
        ]
        last = memory(process)
    latencies = sorted(latency for latency, _ in answers)
    return {
        "model": MODEL,
        "requests": count,
        "clients": clients,
        "right": sum(error <= TOLERANCE for error in errors),
        "largest_error": max(errors),
        "median_seconds": statistics.median(latencies),
        "p99_seconds": statistics.quantiles(latencies, n=100, method="inclusive")[98],
        "requests_per_second": count / seconds,
        "megabytes_before": before,
        "megabytes_after": after,
        "growth": after / before - 1,
        "disturbed_requests": len(disturbed),
        "disturbed_right": sum(error <= TOLERANCE for error in disturbed),
        "megabytes_after_disturbance": last,
        "refusal": message,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = [
        ("right answers", f"{figures['right']} of {figures['requests']}"),
        ("largest relative error", f"{figures['largest_error']:.1e}"),
        ("median latency", f"{figures['median_seconds']:.2f} s"),
        ("99th percentile", f"{figures['p99_seconds']:.2f} s"),
        ("requests per second", f"{figures['requests_per_second']:.1f}"),
        ("memory before and after", f"{figures['megabytes_before']:.0f} MB, {figures['megabytes_after']:.0f} MB"),
        ("growth of memory", f"{100 * figures['growth']:+.1f} %"),
        ("right while others do harm", f"{figures['disturbed_right']} of {figures['disturbed_requests']}"),
        ("100 megapixels", figures["refusal"]),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# The page under load\n\n`python benchmarks/page.py --requests {figures['requests']} "
        f"--clients {figures['clients']}`, {figures['model']}, {figures['machine']}.\n\n"
        f"| figure | value |\n|---|---|\n{lines}\n\n"
        "Requests differ in image, size, format, target, class to compare with, constants by name, data and method. "
        "An answer is right if all of its numbers are those of `bcoskit.explain` on the same image, to 1e-5 of the "
        "largest. Latency is that of a client which waits for seven others, with the upload, on one machine with them. "
        "Harm is a client killed while eight of its requests are answered, an upload broken off, and an image of 100 "
        "megapixels. Times are those of a machine that other programs used as well.\n"
    )


def take_screenshots(options: Sequence[str]) -> None:
    """The pictures of the documentation."""
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with server(*options) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, width, height in (("app", 1440, 900), ("app_phone", 390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(address)
            page.wait_for_selector(".bc-viewer")
            picture = page.locator(".bc-viewer figure:nth-child(3) img")
            picture.scroll_into_view_if_needed()
            box = picture.bounding_box()
            assert box is not None
            picture.click(position={"x": 0.36 * box["width"], "y": 0.36 * box["height"]})
            page.wait_for_selector(".bc-place strong")
            page.screenshot(path=IMAGES / f"{name}.png")
            if name == "app":
                page.get_by_role("tab", name="Compare").click()
                page.click("#compare")
                page.wait_for_selector(".bc-compare", timeout=120_000)
                page.locator(".bc-compare").screenshot(path=IMAGES / "app_compare.png")
        browser.close()


def main() -> None:
    """Measure, print and write; or take screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--screenshots", action="store_true")
    arguments, options = parser.parse_known_args()
    if arguments.screenshots:
        take_screenshots(options)
        return
    figures = measure(arguments.requests, arguments.clients)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "page.json").write_text(json.dumps(figures, indent=1) + "\n")
    (RESULTS / "page.md").write_text(markdown(figures))
    Console().print(markdown(figures), markup=False)
    if figures["right"] < figures["requests"] or figures["disturbed_right"] < figures["disturbed_requests"]:
        sys.exit("some answers are wrong")
    if figures["growth"] > 0.1:
        sys.exit("memory has grown by more than 10 %")


if __name__ == "__main__":
    main()
