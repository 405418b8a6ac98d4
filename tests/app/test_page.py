"""The page over HTTP, as programs and browsers ask it: right answers, clear refusals, nothing kept."""

import base64
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import bcoskit
from bcoskit import Explanation, cli
from bcoskit.evaluation import attribute
from bcoskit.models import create_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'bcoskit[app]'")
import httpx
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from bcoskit.app import ExplanationService, make_page, serve

PHOTOGRAPHS = Path(bcoskit.__file__).parent / "assets" / "photographs"
CAT = PHOTOGRAPHS / "cat.jpg"
MODEL = "resnet20.bcos_cifar10"
MAX_BYTES = 1_000_000


@pytest.fixture(scope="module")
def model():
    return create_model(MODEL, weights=True)


class Server:
    """A page in a thread, until it is stopped."""

    def __init__(self, model, folder):
        ordinary = create_model("resnet20.standard_cifar10")
        self.folder, self._ready = folder, threading.Event()
        self.service = ExplanationService(model, ordinary, max_bytes=MAX_BYTES, max_pixels=1_000_000)
        self._thread = threading.Thread(
            target=serve,
            args=(self.service,),
            kwargs={"port": 0, "ready": self._note, "allowed_hosts": ["Proxy.example"]},
            daemon=True,
        )
        self._thread.start()
        assert self._ready.wait(120)

    def _note(self, address, stop):
        self.address, self._stop = address, stop
        self._ready.set()

    def stop(self):
        self._stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def files(self):
        return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    server = Server(model, folder)
    yield server
    server.stop()
    tempfile.tempdir = before
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def client(server):
    return Client(server.address, verbose=False)


def explained(client, image, target="", versus="", shares=False, data="none"):
    return client.predict(handle_file(str(image)), target, versus, shares, data, api_name="/explain")


def write_image(path, size=(40, 30), mode="RGB"):
    Image.new(mode, size).save(path)
    return path


class TestApi:
    @pytest.mark.parametrize("suffix", ["npz", "safetensors"])
    def test_an_answer_is_that_of_the_library(self, client, model, tmp_path, suffix):
        told = explained(client, CAT, "dog", "3", True, suffix)
        expected = bcoskit.explain(model, model.transform(CAT).unsqueeze(0), 5, versus=3)
        assert (told["target"]["class"], told["versus"]["class"]) == ("dog", "cat")
        assert told["value"] == pytest.approx(float(expected.value), rel=1e-5)
        assert abs(told["residual"]) < 1e-5
        path = tmp_path / f"explanation.{suffix}"
        path.write_bytes(base64.b64decode(told["data"]))
        saved = Explanation.load(path)
        assert torch.allclose(saved.weights, expected.weights, atol=1e-5 * float(expected.weights.abs().max()))
        assert saved.shares is not None

    def test_the_prediction_without_a_target(self, client, model):
        told = explained(client, CAT)
        assert (told["target"]["class"], told["shares"], told["residual"], told["data"]) == ("cat", None, None, None)

    def test_comparisons(self, client, model):
        told = client.predict(handle_file(str(CAT)), "cat", "input_x_gradient", False, api_name="/compare")
        data = bytearray(base64.b64decode(told["contributions"]))
        found = torch.frombuffer(data, dtype=torch.float32).view(told["shape"])
        expected = attribute(model, model.transform(CAT).unsqueeze(0), 3, "input_x_gradient")[0]
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))

    def test_plain_http(self, server):
        with httpx.Client(base_url=server.address, timeout=60) as http:
            path = http.post("/gradio_api/upload", files={"files": ("x.jpg", CAT.read_bytes())}).json()[0]
            image = {"path": path, "meta": {"_type": "gradio.FileData"}}
            asked = http.post("/gradio_api/call/explain", json={"data": [image, "cat", "", False, "none"]}).json()
            answer = http.get(f"/gradio_api/call/explain/{asked['event_id']}").text
        assert answer.startswith("event: complete")
        assert json.loads(answer.partition("data: ")[2])[0]["target"]["class"] == "cat"

    def test_clients_that_send_the_same_image_at_once(self, server):
        with ThreadPoolExecutor(4) as pool:
            clients = list(pool.map(lambda _: Client(server.address, verbose=False), range(4)))
            told = list(pool.map(lambda client: [explained(client, CAT, "cat")["value"] for _ in range(3)], clients))
        assert torch.tensor(told).std() < 1e-5


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"target": "<img src=x onerror=alert(1)>"},
                "(='<img src=x onerror=alert(1)>') is neither a class",
            ),
            ({"target": "10"}, "`target` (='10') is neither a class"),
            ({"target": "cat", "versus": "cat"}, "'cat' cannot be explained against itself"),
            ({"data": "exe"}, "`data` (='exe') must be of: none, npz, safetensors"),
        ],
    )
    def test_arguments(self, client, given, message):
        with pytest.raises(AppError, match=re.escape(message)):
            explained(client, CAT, **given)

    def test_images(self, client, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "half.jpg").write_bytes(CAT.read_bytes()[:400])
        write_image(tmp_path / "huge.png", (10_000, 10_000), "1")
        for name, message in (
            ("text.png", "is no image of a known format"),
            ("half.jpg", "damaged or truncated"),
            ("huge.png", "10000x10000 pixels, more than"),
        ):
            with pytest.raises(AppError, match=message) as caught:
                explained(client, tmp_path / name)
            assert "Traceback" not in str(caught.value)
            assert str(tmp_path) not in str(caught.value)
        with pytest.raises(AppError, match="is empty"):
            client.predict(None, "", "", False, "none", api_name="/explain")
        assert explained(client, CAT)["target"]["class"] == "cat"

    def test_methods_that_take_minutes(self, client):
        for method in ("rise", "lime", "kernel_shap", "nothing", None):
            with pytest.raises(AppError, match="must be of: bcos, grad_cam"):
                client.predict(handle_file(str(CAT)), "cat", method, False, api_name="/compare")

    def test_errors_of_the_server_are_told_to_its_log_alone(self, server, client, monkeypatch, caplog):
        def fail(*args, **kwargs):
            raise OSError("/secret/path")

        monkeypatch.setattr(server.service, "explain", fail)
        with pytest.raises(AppError, match=r"the server has failed \(OSError\)") as caught:
            explained(client, CAT)
        assert "secret" not in str(caught.value)
        assert "/secret/path" in caplog.text

    @pytest.mark.parametrize("path", [str(CAT), "/etc/hostname", "../secret.png", "http://127.0.0.1:1/x.png", "\0"])
    def test_what_was_not_uploaded(self, server, path):
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for data in ([image, "", "", False, "none"], [None, image, "", False, "none"]):
            with httpx.Client(base_url=server.address, timeout=60) as http:
                asked = http.post("/gradio_api/call/explain", json={"data": data}).json()
                answer = http.get(f"/gradio_api/call/explain/{asked['event_id']}").text
            assert answer.startswith("event: error")
            assert "give the image itself: upload it" in answer

    @pytest.mark.parametrize("image", [{"a": 3}, "text", 7, [{"path": "x"}]])
    def test_what_is_no_file(self, server, image):
        with httpx.Client(base_url=server.address, timeout=60) as http:
            asked = http.post("/gradio_api/call/explain", json={"data": [image, "", "", False, "none"]}).json()
            answer = http.get(f"/gradio_api/call/explain/{asked['event_id']}").text
        assert answer.startswith("event: error")
        assert "give one image" in answer

    @pytest.mark.parametrize("given", [{"content": b"x"}, {"data": {"files": "x"}}, {"files": {"image": b"x"}}])
    def test_what_is_no_upload(self, server, given):
        answer = httpx.post(f"{server.address}/gradio_api/upload", **given)
        assert (answer.status_code, "a file of the form's field `files`" in answer.text) == (400, True)

    def test_too_many_bytes(self, server):
        def pieces():
            for _ in range(30):
                yield bytes(100_000)

        large = {"files": ("large.png", bytes(MAX_BYTES + 200_000))}
        told = "The image is too large: at most 1 MB are allowed."
        for address, given, message in (
            ("upload", {"files": large}, told),
            ("queue/join", {"content": pieces()}, told.replace("image", "request").replace("1 MB", "0.1 MB")),
            ("call/explain", {"content": bytes(200_000)}, told.replace("image", "request").replace("1 MB", "0.1 MB")),
        ):
            answer = httpx.post(f"{server.address}/gradio_api/{address}", **given)
            assert (answer.status_code, answer.text) == (413, message)
        assert httpx.post(f"{server.address}/gradio_api/call/explain", content=bytes(90_000)).status_code == 422
        small = {"files": ("small.png", bytes(MAX_BYTES - 1000))}
        assert httpx.post(f"{server.address}/gradio_api/upload", files=small).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"host": "attacker.example"}, 403),
            ({"host": "localhost.attacker.example:80"}, 403),
            ({"host": "127.0.0.1.attacker.example"}, 403),
            ({"host": ""}, 403),
            ({"host": "[x"}, 403),
            ({"host": "attacker.example@localhost"}, 403),
            ({"origin": "http://127.0.0.1:1"}, 403),
            ({"origin": f"http://{socket.gethostname()}:1"}, 403),
            ({"host": socket.gethostname()}, 200),
            ({"origin": "https://attacker.example"}, 403),
            ({"origin": "null"}, 403),
            ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
            ({"host": "localhost"}, 200),
            ({"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}, 200),
            ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
            ({"host": "192.168.1.7"}, 200),
            ({"host": "proxy.example", "origin": "https://proxy.example"}, 200),
            ({"origin": "https://proxy.example"}, 200),
        ],
    )
    def test_other_websites(self, server, headers, status):
        answer = httpx.get(f"{server.address}/config", headers=headers)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers or status == 200

    def test_a_request_does_not_say_where_the_page_is(self, server):
        headers = {"x-forwarded-host": "attacker.example", "x-gradio-server": "http://attacker.example"}
        answer = httpx.get(f"{server.address}/config", headers=headers)
        assert "attacker" not in answer.text
        assert answer.json()["root"] == server.address

    @pytest.mark.parametrize(
        "path",
        [
            "file=http://example.com/x.iso",
            "file/http://example.com/x.iso",
            "proxy=https://x.hf.space/",
            "deep_link?session_hash=x",
            "vibe-code",
            "stream/a/b/1/playlist.m3u8",
            "info/../deep_link?session_hash=x",
        ],
    )
    def test_what_the_page_does_not_need(self, server, path):
        assert httpx.get(f"{server.address}/gradio_api/{path}").status_code == 403
        for name in ("run/explain", "run/predict", "api/explain", "component_server", "process_recording"):
            assert httpx.post(f"{server.address}/gradio_api/{name}", json={"data": []}).status_code == 403
        assert httpx.request("OPTIONS", f"{server.address}/gradio_api/upload").status_code == 403
        assert httpx.get(f"{server.address}/gradio_api/info").status_code == 200

    def test_no_copy_of_what_a_tab_shows(self, server):
        tab = Tab(server)
        tab.fire("examples", "click", *CONTROLS, index=3)
        assert (
            httpx.get(f"{server.address}/gradio_api/deep_link", params={"session_hash": tab.session}).status_code == 403
        )
        assert not [path for path in server.folder.rglob("*") if path.name == "deep_links"]

    def test_files_of_the_machine(self, server):
        for path in ("/etc/hostname", str(CAT), "../../etc/hostname"):
            assert httpx.get(f"{server.address}/gradio_api/file={path}").status_code == 403

    def test_a_client_that_goes_in_the_middle(self, server, client):
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\nabc"
            )
        assert explained(client, CAT)["target"]["class"] == "cat"


class TestNothingIsKept:
    @pytest.mark.parametrize("name", ["../../<b>hostile</b>.png", "CON.png", "..", "a" * 300, "%2e%2e/x", "x\\y.png"])
    def test_no_path_has_a_name_of_a_users(self, server, name):
        files = [("files", (name, CAT.read_bytes())), ("files", (name, b"text"))]
        answer = httpx.post(f"{server.address}/gradio_api/upload", params={"upload_id": name}, files=files)
        paths = [Path(path) for path in answer.json()]
        assert [path.read_bytes() for path in paths] == [CAT.read_bytes(), b"text"]
        assert all(re.fullmatch("[0-9a-f]{32}", path.name) and path in server.files() for path in paths)
        assert not [path for path in server.files() if path.suffix]

    def test_uploads_go(self, server):
        path = Path(httpx.post(f"{server.address}/gradio_api/upload", files={"files": CAT.read_bytes()}).json()[0])
        assert path in server.files()
        page = make_page(server.service)
        page.upload_file_set.update(map(str, server.files()))
        assert page.delete_cache == (30, 300)
        delete_files_created_by_app(page, age=300)
        assert path in server.files()
        delete_files_created_by_app(page, age=-1)
        assert server.files() == []

    def test_nothing_is_loaded_from_elsewhere(self, server):
        answer = httpx.get(server.address)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        loading = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']([^\"']*)", answer.text)
        assert loading
        assert not [address for address in loading if "//" in address]
        assert '"analytics_enabled":false' in answer.text.replace(" ", "")


class Tab:
    """What a browser does: events by their number, in a session."""

    def __init__(self, server):
        self._http = httpx.Client(base_url=server.address, timeout=60)
        self.session = secrets.token_hex(6)
        self._config = self._http.get("/config").json()

    def fire(self, element, event, *data, **event_data):
        """The outputs of an event, or the note that it leaves on the page."""
        target = next(each["id"] for each in self._config["components"] if each["props"].get("elem_id") == element)
        index = next(each["id"] for each in self._config["dependencies"] if [target, event] in each["targets"])
        asked = {"data": data, "fn_index": index, "session_hash": self.session, "event_data": event_data or None}
        self._http.post("/gradio_api/queue/join", json=asked).raise_for_status()
        with self._http.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "log":
                    return message["log"]
                if message.get("msg") == "process_completed":
                    return message["output"].get("data", message["output"].get("error"))
        raise AssertionError("no answer")

    def upload(self, data, name="x.png"):
        path = self._http.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]
        return {"path": path, "meta": {"_type": "gradio.FileData"}}


CONTROLS = (False, 0.7, 1, 99.5)


class TestTabs:
    def test_from_an_upload_to_a_place(self, server):
        tab = Tab(server)
        _, viewer, classes, target, versus, numbers, _, _, _ = tab.fire(
            "upload", "upload", tab.upload(CAT.read_bytes(), "<b>.png"), *CONTROLS
        )
        assert (target, versus) == (3, -1)
        assert viewer.count("<img") == 3
        assert "What speaks for <b>cat</b>?" in viewer
        assert classes.count("<button") == 10
        assert "fc.logits.bias" in numbers
        news = tab.fire("versus", "input", None, 3, 5, *CONTROLS)
        assert "Why <b>cat</b> and not <b>dog</b>?" in news[1]
        place = tab.fire("viewer", "click", None, 5, row=16, column=16)[0]
        assert "Row 16, column 16" in place
        assert "5 &times; 5" in place
        drawn = tab.fire("opacity", "release", None, True, 0.3, 3, 95)[0]
        assert drawn != news[1]

    def test_tabs_do_not_mix(self, server):
        one, two = Tab(server), Tab(server)
        one.fire("examples", "click", *CONTROLS, index=3)
        two.fire("examples", "click", *CONTROLS, index=9)
        assert "<b>cat</b>" in one.fire("opacity", "release", None, *CONTROLS)[0]
        assert "<b>ship</b>" in two.fire("opacity", "release", None, *CONTROLS)[0]

    def test_comparison_and_download(self, server, tmp_path):
        tab = Tab(server)
        tab.fire("examples", "click", *CONTROLS, index=3)
        compared = tab.fire("compare", "click", None, ["input_x_gradient"], 1)[0]
        assert compared.count("<img") == 4
        assert "ordinary" in compared
        files = tab.fire("pack", "click", None, "npz")[0]
        picture, data = re.findall(r'href="data:[^"]*;base64,([^"]*)"', files)
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "PNG"
        (tmp_path / "explanation.npz").write_bytes(base64.b64decode(data))
        assert len(Explanation.load(tmp_path / "explanation.npz")) == 1

    def test_comparisons_at_the_same_time_do_not_mix(self, server, monkeypatch):
        attribute, together = server.service.attribute, threading.Barrier(2)

        def attribute_together(*args, **kwargs):
            together.wait(10)
            return attribute(*args, **kwargs)

        monkeypatch.setattr(server.service, "attribute", attribute_together)
        titles = {"input_x_gradient": "Input x Gradient", "guided_backprop": "Guided Backpropagation"}

        def compared(method):
            tab = Tab(server)
            tab.fire("examples", "click", *CONTROLS, index=3)
            return tab.fire("compare", "click", None, [method], 1)[0]

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(compared, titles))
        for told, own in zip(found, titles, strict=True):
            assert [told.count(f"<figcaption>{title}") for title in titles.values()] == [
                2 * (method == own) for method in titles
            ]

    def test_what_cannot_be_done(self, server):
        tab = Tab(server)
        assert "choose an image first" in tab.fire("pack", "click", None, "npz")
        assert "is no image" in tab.fire("upload", "upload", tab.upload(b"text"), *CONTROLS)
        tab.fire("examples", "click", *CONTROLS, index=3)
        assert "below 32" in tab.fire("viewer", "click", None, 5, row=99, column=0)
        assert "below 11" in tab.fire("examples", "click", *CONTROLS, index="x")
        assert "itself" in tab.fire("versus", "input", None, 3, 3, *CONTROLS)
        assert "nothing" in tab.fire("compare", "click", None, ["nothing"], 1)

    def test_notes_are_text(self, server, monkeypatch):
        def refuse(*args, **kwargs):
            raise ValueError("<b>&amp;")

        monkeypatch.setattr(server.service, "read", refuse)
        assert Tab(server).fire("examples", "click", *CONTROLS, index=3) == "&lt;b&gt;&amp;amp;"


class TestCommand:
    def one_line(self, capsys, *arguments):
        assert cli.main(["app", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line

    def test_wrong_options(self, capsys):
        for arguments, message in (
            (["--model", "nothing"], "nothing"),
            (["--ordinary-weights", "x"], "needs `ordinary`"),
            (["--max-megabytes", "0"], "`max_megabytes` (=0.0)"),
            (["--max-megapixels", "101"], "`max_megapixels` (=101.0) must be positive, and at most 100"),
            (["--port", "99999"], "`port` (=99999)"),
            (["--host", "192.0.2.1"], "`host` (='192.0.2.1') is no address of this machine"),
            (["--ordinary", MODEL, "--batch-size", "0"], "`batch_size` (=0)"),
        ):
            assert message in self.one_line(capsys, *arguments)

    def test_a_port_in_use(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"`port` (={port}) on 127.0.0.1 is in use" in self.one_line(capsys, "--port", str(port))

    def test_without_gradio(self, capsys, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("bcoskit.app", "bcoskit._command_app"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "gradio", None)
        line = self.one_line(capsys)
        assert line == 'bcoskit: error: the page needs gradio: pip install "bcoskit[app]"'

    def test_an_interrupt_ends_it_and_leaves_nothing(self, tmp_path):
        code = "import sys; from bcoskit.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "app", "--port", "0", "--host", "0.0.0.0"]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            line = process.stdout.readline()
            assert re.fullmatch(r"The page is at http://0\.0\.0\.0:\d+ \(Ctrl-C ends it\)\n", line)
            assert [path.stat().st_mode & 0o777 for path in tmp_path.glob("bcoskit-app-*")] == [0o700]
            port = re.findall(r":(\d+) ", line)[0]
            with httpx.stream("GET", f"http://127.0.0.1:{port}/gradio_api/heartbeat/tab", timeout=60) as heartbeat:
                next(heartbeat.iter_raw())  # as an open page does
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors.splitlines()[0].startswith("warning: 0.0.0.0 may be reached by others")
        assert errors.splitlines()[1:] == ["stopped"]
        assert not list(tmp_path.glob("bcoskit*"))
