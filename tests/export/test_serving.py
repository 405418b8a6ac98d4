"""The examples that serve a file: with onnxruntime alone, and in a browser."""

import base64
import functools
import http.client
import http.server
import importlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import bcoskit
from export_toys import CLASSES

EXAMPLES = Path(__file__).parents[2] / "examples"
BROWSER = EXAMPLES / "browser"


def image_of(size, kind="PNG"):
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), format=kind)
    return file.getvalue()


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def serving():
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("serve_onnx")


@pytest.fixture(scope="module")
def port(serving, exported):
    with running(serving.Server(exported[2], 0)) as port:
        yield port


def with_facts(source, path, **facts):
    """A copy of a file, of which some metadata are others."""
    model = onnx.load(source)
    for entry in model.metadata_props:
        entry.value = facts.get(entry.key, entry.value)
    onnx.save(model, path)
    return path


def post(port, body, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/", body, dict(headers))
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def post_when_free(port, body):
    """The thread of a connection that is closed may live a moment longer."""
    for _ in range(1000):
        try:
            return post(port, body)[0]
        except (OSError, http.client.HTTPException):
            continue
    raise AssertionError("the server is never free")


@pytest.mark.parametrize(("size", "kind"), [((16, 16), "PNG"), ((40, 25), "JPEG"), ((21, 33), "WEBP")])
def test_server_answers_as_explain(size, kind, exported, port):
    network, transform, _ = exported
    body = image_of(size, kind)
    status, content = post(port, body)
    expected = bcoskit.explain(network, transform(body)[None])
    index = int(expected.target)
    assert status == 200
    assert content["class"] == CLASSES[index]
    assert content["probability"] == pytest.approx(float(expected.logits.softmax(1)[0, index]), rel=1e-4)
    with Image.open(
        io.BytesIO(base64.b64decode(content["contributions"].removeprefix("data:image/png;base64,")))
    ) as file:
        shown = np.asarray(file.convert("RGB")).astype(int)
    contributions = expected.contributions[0]
    strong = (contributions.abs() > 0.05 * contributions.abs().max()).numpy()
    assert shown.shape == (16, 16, 3)
    assert (((shown[..., 0] > shown[..., 2]) == (contributions.numpy() > 0)) | ~strong).all()


@pytest.mark.parametrize(
    ("loss", "probability"), [("bce", torch.sigmoid), ("cross_entropy", lambda row: row.softmax(0)), ("none", None)]
)
def test_probabilities_are_those_of_the_loss(loss, probability, exported, serving, tmp_path):
    network, transform, path = exported
    body = image_of((16, 16))
    session = onnxruntime.InferenceSession(with_facts(path, tmp_path / "model.onnx", loss=loss))
    logits = bcoskit.explain(network, transform(body)[None]).logits[0]
    expected = None if probability is None else pytest.approx(float(probability(logits).max()), rel=1e-4)
    assert serving.explained(session, body)["probability"] == expected


def test_without_a_server(exported, tmp_path):
    network, transform, path = exported
    (tmp_path / "photo.png").write_bytes(image_of((40, 25)))
    command = [sys.executable, EXAMPLES / "explain_onnx.py", path, tmp_path / "photo.png"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert told["class"] == CLASSES[int(bcoskit.explain(network, transform(image_of((40, 25)))[None]).target)]
    assert told.keys() == {"class", "probability", "contributions"}


def test_server_refuses(port):
    assert post(port, b"no image")[0] == 400
    assert post(port, image_of((16, 16))[:200])[0] == 400
    assert post(port, b"", {"Content-Length": "30000000"}) == (
        413,
        {"error": "send an image of at most 20000000 bytes"},
    )
    assert post(port, None, {"Content-Length": "many"}) == (411, {"error": "send an image, with its Content-Length"})
    assert post(port, image_of((16, 16)))[0] == 200  # it goes on


def test_server_refuses_what_would_be_huge(port):
    Image.new("1", (8000, 8000)).save(file := io.BytesIO(), format="PNG")
    status, content = post(port, file.getvalue())
    assert (status, "more than 50000000 pixels" in content["error"]) == (400, True)
    Image.new("1", (1, 300_000)).save(file := io.BytesIO(), format="PNG")
    assert post(port, file.getvalue())[0] == 400


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_server_refuses_pixels_of_16_bits(mode, port):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new(mode, (16, 16)).save(file := io.BytesIO(), format=kind)
    assert post(port, file.getvalue())[0] == (400 if mode == "I;16" else 200)


def test_server_does_not_wait_for_the_silent(exported, serving, monkeypatch):
    assert serving.Handler.timeout == 30
    monkeypatch.setattr(serving.Handler, "timeout", 1)
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 1)
    with running(serving.Server(exported[2], 0)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
            silent.sendall(b"POST / HTTP/1.0\r\nContent-Length: 20000000\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port), timeout=60) as other:
                assert other.recv(1) == b""  # one too many
            silent.recv(1)  # until it is given up
        assert post_when_free(port, image_of((16, 16))) == 200


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def page(exported, tmp_path_factory):
    """The page for browsers, in headless Chromium."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    if not (BROWSER / "vendor" / "ort.wasm.min.mjs").exists():
        pytest.skip("onnxruntime-web is not there: `make web` fetches it")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = tmp_path_factory.mktemp("page")
    for name in ("index.html", "explain.js", "vendor"):
        (folder / name).symlink_to(BROWSER / name)
    shutil.copy(exported[2], folder / "model.onnx")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    with running(server) as port, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        strangers = []
        opened.on("request", lambda request: strangers.append(request.url))
        opened.goto(f"http://127.0.0.1:{port}/")
        opened.wait_for_selector("#status[data-state=ready]", timeout=60_000)
        yield opened
        browser.close()
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:")) for url in strangers)


def drop(page, body, state="explained"):
    page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": body})
    page.wait_for_function("document.querySelector('#status').dataset.state !== 'busy'")
    page.wait_for_selector(f"#status[data-state={state}]", timeout=60_000)


# Their shorter side is what the transform resizes to: only a crop is left, some at half a pixel.
@pytest.mark.parametrize("size", [(20, 20), (20, 23), (21, 20)], ids=str)
def test_page_explains_as_explain(size, exported, page):
    network, transform, _ = exported
    page.reload()
    page.wait_for_selector("#status[data-state=ready]", timeout=60_000)
    body = image_of(size)
    drop(page, body)
    x = transform(body)[None]
    prediction = bcoskit.explain(network, x)
    assert page.inner_text("#status").startswith(CLASSES[int(prediction.target)] + ": ")
    assert page.inner_text("#target option >> nth=1") == CLASSES[0]  # its characters are text
    for index in (3, 0):
        page.select_option("#target", str(index))
        page.wait_for_function(f"document.querySelector('#status').innerText.startsWith({json.dumps(CLASSES[index])})")
        expected = bcoskit.explain(network, x, index)
        assert float(page.get_attribute("#status", "data-logit")) == pytest.approx(float(expected.value), rel=1e-4)
        shown = page.evaluate(
            "Array.from(document.querySelector('#map').getContext('2d').getImageData(0, 0, 16, 16).data)"
        )
        colors = np.array(shown).reshape(16, 16, 4)
        contributions = expected.contributions[0]
        strong = (contributions.abs() > 0.05 * contributions.abs().max()).numpy()
        assert (((colors[..., 0] > colors[..., 2]) == (contributions.numpy() > 0)) | ~strong).all()


def test_page_says_what_is_wrong(page):
    drop(page, b"no image", "error")
    assert page.inner_text("#status").startswith("This did not work: ")
    drop(page, image_of((20, 20)))  # and goes on
