"""What the page keeps, and for how long: swept at a given time, so that nobody waits."""

import asyncio
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import bcoskit
from bcoskit.models import create_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'bcoskit[app]'")
import httpx
from gradio.routes import App, file_upload_statuses

from bcoskit.app import ExplanationService
from bcoskit.app._server import web_app

CAT = (Path(bcoskit.__file__).parent / "assets" / "photographs" / "cat.jpg").read_bytes()
CONTROLS = (False, 0.7, 1, 99.5)
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
def service():
    service = ExplanationService(create_model("resnet20.bcos_cifar10", weights=True), max_bytes=MAX_BYTES)
    yield service
    service.close()


class Page:
    """A page without a server, whose answers are collected or not."""

    def __init__(self, app, http):
        self.http, self.keeper = http, app.state.keeper
        gradio = next(route.app for route in app.routes if isinstance(getattr(route, "app", None), App))
        self.sessions, self.blocks = gradio.state_holder, gradio.get_blocks()

    async def ask(self):
        """Ask for an explanation, which fails at once for want of an image."""
        answer = await self.http.post("/gradio_api/call/explain", json={"data": [None, "", "", False, "none"]})
        return answer.json()["event_id"]

    async def open(self, session):
        """Open a photograph in a tab."""
        identifier = next(i for i, block in self.blocks.blocks.items() if block.elem_id == "examples")
        index = next(i for i, fn in self.blocks.fns.items() if (identifier, "click") in fn.targets)
        given = {"data": CONTROLS, "fn_index": index, "session_hash": session, "event_data": {"index": 3}}
        await self.http.post("/gradio_api/queue/join", json=given)
        return (await self.http.get("/gradio_api/queue/data", params={"session_hash": session})).text

    async def upload(self, data=CAT):
        return await self.http.post("/gradio_api/upload", files={"files": ("x.jpg", data)})


def on_page(service, folder, monkeypatch, act):
    """What is done with a page, in an event loop of its own."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))

    @asynccontextmanager
    async def opened():
        app = web_app(service, folder)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60) as http,
        ):
            yield Page(app, http)

    async def run():
        async with opened() as page:
            return await act(page)

    return asyncio.run(run())


def test_what_a_tab_shows_stays_for_half_an_hour_after_its_last_use(service, tmp_path, monkeypatch):
    async def act(page):
        assert "process_completed" in await page.open("tab")
        now = time.time()
        await page.keeper.sweep(now + 1700)
        assert "tab" in page.sessions
        page.sessions.session_data["tab"].is_closed = True
        await page.keeper.sweep(now + 1900)
        assert "tab" not in page.sessions
        assert page.sessions.time_last_used == {}

    on_page(service, tmp_path, monkeypatch, act)


def test_programs_take_no_place_from_tabs(service, tmp_path, monkeypatch):
    async def act(page):
        await page.open("tab")
        for index in range(300):
            page.sessions[f"program {index}"]
        assert "tab" in page.sessions
        assert "program 299" in page.sessions
        assert "program 200" not in page.sessions
        shown = page.sessions.session_data["tab"].state_data
        for index in range(130):
            page.sessions[f"other {index}"].state_data.update(shown)
        page.sessions["last"]
        assert "tab" not in page.sessions  # only other tabs take its place
        assert "other 129" in page.sessions

    on_page(service, tmp_path, monkeypatch, act)


def test_answers_that_nobody_collects_go(service, tmp_path, monkeypatch):
    async def act(page):
        queue, now = page.blocks._queue, time.time()
        event = await page.ask()
        assert event in queue.pending_messages_per_session
        await page.keeper.sweep(now)
        await page.keeper.sweep(now + 290)
        assert event in queue.pending_messages_per_session
        await page.keeper.sweep(now + 310)
        assert not queue.pending_messages_per_session
        assert not queue.pending_event_ids_session

    on_page(service, tmp_path, monkeypatch, act)


def test_so_many_answers_wait_at_most(service, tmp_path, monkeypatch):
    async def act(page):
        queue, now = page.blocks._queue, time.time()
        first = await page.ask()
        await page.keeper.sweep(now)
        assert first in queue.pending_messages_per_session
        later = await page.ask()
        for _ in range(199):
            queue.pending_messages_per_session[later].put_nowait(None)
        while not queue.pending_messages_per_session[first].qsize():
            await asyncio.sleep(0)
        await page.keeper.sweep(now + 5)
        assert first not in queue.pending_messages_per_session
        assert first not in queue.pending_event_ids_session

    on_page(service, tmp_path, monkeypatch, act)


def test_progress_of_uploads_that_nobody_follows_goes(service, tmp_path, monkeypatch):
    async def act(page):
        now = time.time()
        await page.http.post("/gradio_api/upload?upload_id=mine", files={"files": ("x.jpg", CAT)})
        await page.keeper.sweep(now)
        assert "mine" in file_upload_statuses._statuses
        await page.keeper.sweep(now + 310)
        assert "mine" not in file_upload_statuses._statuses
        assert "mine" not in file_upload_statuses._signals

    on_page(service, tmp_path, monkeypatch, act)


def test_files_go_after_five_minutes_broken_ones_too(service, tmp_path, monkeypatch):
    async def act(page):
        upload = Path((await page.upload()).json()[0])
        broken = tmp_path / "tmpbroken"
        broken.write_bytes(b"half")
        old = time.time() - 310
        os.utime(broken, (old, old))
        await page.keeper.sweep(time.time())
        assert (upload.exists(), broken.exists()) == (True, False)
        await page.keeper.sweep(time.time() + 310)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        await page.keeper.sweep(time.time() + 700)
        assert list(tmp_path.iterdir()) == []

    on_page(service, tmp_path, monkeypatch, act)


def test_uploads_have_room_for_so_many(service, tmp_path, monkeypatch):
    async def act(page):
        statuses = [(await page.upload(bytes(MAX_BYTES - index))).status_code for index in range(24)]
        assert statuses[:19] == [200] * 19
        assert statuses[-1] == 507
        await page.keeper.sweep(time.time() + 310)
        assert (await page.upload()).status_code == 200

    on_page(service, tmp_path, monkeypatch, act)
