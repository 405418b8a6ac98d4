"""Downloads, from a server of our own."""

import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field

import pytest
import torch

from bcoskit.models import _download, create_model, save_model
from bcoskit.models._download import cached

CONTENT = bytes(range(256)) * 8_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """Serves one content at every path, and keeps what was asked for."""

    content: bytes = CONTENT
    ranges: bool = True
    breaks_at: int | None = None
    etag: str | None = '"one"'
    status: int | None = None
    asked: list = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server():
    settings = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            settings.asked.append((self.path, asked))
            if self.headers.get("If-Range") != settings.etag:
                asked = None
            if settings.status is not None:
                self.send_error(settings.status)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and settings.ranges else 0
            if start >= len(settings.content) and asked:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(settings.content)}")
                self.end_headers()
                return
            body = settings.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(settings.content) - 1}/{len(settings.content)}")
            if settings.etag:
                self.send_header("ETag", settings.etag)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            stop = None if settings.breaks_at is None else max(settings.breaks_at - start, 0)
            self.wfile.write(body[:stop])

        def log_message(self, *_arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    settings.url = f"http://127.0.0.1:{httpd.server_port}"
    yield settings
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "checkpoints"


def left(cache):
    return sorted(path.name for path in cache.iterdir())


def test_once(server, cache):
    for _ in range(2):
        path = cached(f"{server.url}/some/file.pth", SHA256[:10])
        assert path == cache / "file.pth"
        assert path.read_bytes() == CONTENT
    assert server.asked == [("/some/file.pth", None)]
    assert left(cache) == [".file.pth.lock", "file.pth"]
    path.write_bytes(b"another file of that name")
    with pytest.raises(ValueError, match=rf"file.pth: its SHA-256 does not begin with {SHA256[:10]}; delete"):
        cached(f"{server.url}/some/file.pth", SHA256[:10])


def test_names_without_a_published_hash(server, cache):
    first = cached(f"{server.url}/s/LW2HsNDz/download")
    assert first.name.endswith("-LW2HsNDz")
    server.content = b"other"
    second = cached(f"{server.url}/t/LW2HsNDz/download")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b"other")
    with pytest.raises(ValueError, match="names no file"):
        cached(f"{server.url}/download")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(ranges, server, cache):
    server.breaks_at, server.ranges = 700_000, ranges
    with pytest.raises(ConnectionError, match=r"broke off after [\d,]+ of 2,048,000 bytes; call again"):
        cached(f"{server.url}/file.pth", SHA256[:10])
    size = (cache / "file.pth.partial").stat().st_size
    assert 0 < size <= 700_000
    server.breaks_at = None
    assert cached(f"{server.url}/file.pth", SHA256[:10]).read_bytes() == CONTENT
    assert server.asked[1:] == [("/file.pth", f"bytes={size}-")]
    assert left(cache) == [".file.pth.lock", "file.pth"]


def test_a_beginning_is_gone_before_another_version_begins(server, monkeypatch):
    server.breaks_at = 700_000
    with pytest.raises(ConnectionError, match="broke off"):
        cached(f"{server.url}/file.pth")
    server.breaks_at, server.content, server.etag = None, CONTENT[::-1], '"two"'

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_download, "_receive", killed)
        with pytest.raises(KeyboardInterrupt):
            cached(f"{server.url}/file.pth")
    assert cached(f"{server.url}/file.pth").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"one"', '"two"'])
def test_another_version_of_the_file_is_not_appended(etag, server):
    server.breaks_at = 700_000
    with pytest.raises(ConnectionError, match="broke off"):
        cached(f"{server.url}/file.pth")
    server.breaks_at, server.content, server.etag = None, CONTENT[::-1], etag
    assert cached(f"{server.url}/file.pth").read_bytes() == CONTENT[::-1]


def test_servers_that_tell_no_version_are_asked_for_the_whole(server, cache):
    server.breaks_at, server.etag = 700_000, None
    with pytest.raises(ConnectionError, match="broke off"):
        cached(f"{server.url}/file.pth")
    server.breaks_at = None
    assert cached(f"{server.url}/file.pth").read_bytes() == CONTENT
    assert server.asked[1:] == [("/file.pth", None)]


def test_a_finished_download_that_was_not_renamed(server, cache):
    cache.mkdir(parents=True)
    for content in (CONTENT, CONTENT + b"more"):
        (cache / "file.pth.partial").write_bytes(content)
        (cache / "file.pth.version").write_text(server.etag)
        path = cached(f"{server.url}/file.pth", SHA256[:10])
        assert path.read_bytes() == CONTENT
        assert left(cache) == [".file.pth.lock", "file.pth"]
        path.unlink()
    assert len(server.asked) == 3  # the longer one was asked for again


def test_other_content_is_discarded(server, cache):
    with pytest.raises(ValueError, match=r"its SHA-256 is \w{12}…, not 0123456789…: it is discarded"):
        cached(f"{server.url}/file.pth", "0123456789")
    assert left(cache) == [".file.pth.lock"]


def test_an_empty_file_is_none(server, cache):
    server.content = b""
    with pytest.raises(ConnectionError, match="broke off after 0 of 0 bytes"):
        cached(f"{server.url}/file.pth")
    assert not [name for name in left(cache) if not name.endswith(".lock")]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a b.pth", "http://127.0.0.1:9/é.pth"])
def test_addresses_that_are_none(url):
    with pytest.raises(ConnectionError, match=f"cannot download {url} "):
        cached(url)


@pytest.mark.parametrize("status", [404, 500])
def test_refusals_of_the_server(status, server, cache):
    server.status = status
    with pytest.raises(ConnectionError, match=rf"cannot download {server.url}/file.pth \(HTTP Error {status}"):
        cached(f"{server.url}/file.pth")
    assert not [name for name in left(cache) if not name.endswith(".lock")]


def test_no_server(cache):
    with pytest.raises(ConnectionError, match=rf"this may be put at {re.escape(str(cache))}"):
        cached("http://127.0.0.1:9/file.pth")


def test_weights_of_a_model_by_url(server, tmp_path):
    torch.manual_seed(0)
    model = create_model("cnn9.bcos_v1_b2_cifar10")
    save_model(model, tmp_path / "x.safetensors")
    server.content = (tmp_path / "x.safetensors").read_bytes()
    opened = create_model("cnn9.bcos_v1_b2_cifar10", weights=f"{server.url}/x.safetensors")
    assert torch.equal(opened.head.conv.weight, model.head.conv.weight)


def test_released_weights_by_name(server, tmp_path, monkeypatch):
    name = "cnn9.bcos_v1_b2_cifar10"
    torch.manual_seed(0)
    model = create_model(name)
    keys = [f"{index}.linear.weight" for index in range(9)]
    torch.save(dict(zip(keys, model.state_dict().values(), strict=True)), tmp_path / "x.pth")
    server.content = (tmp_path / "x.pth").read_bytes()
    monkeypatch.setattr("bcoskit.models._registry.cached", lambda url, sha256: cached(_at(server, url), sha256))
    opened = create_model(name, weights=True)
    assert torch.equal(opened.layers[0].weight, model.layers[0].weight)
    assert server.asked == [("/index.php/s/mksX2CJMCDQbMYb/download", None)]


def _at(server, url):
    return server.url + url.removeprefix("https://nextcloud.mpi-klsb.mpg.de")
