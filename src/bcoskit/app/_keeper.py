"""What goes by itself: uploads, what tabs show, and answers that nobody collects."""

import asyncio
import time
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from gradio.routes import App, file_upload_statuses
from gradio.state_holder import SessionState, StateHolder

_EVERY = 5  # seconds between sweeps
_FORGOTTEN = 300  # seconds until a file goes, and what nobody collects
_KEPT = 1800  # seconds since its last use that what a tab shows stays in memory
_PROGRAMS = 64  # sessions that show nothing: those of programs, and of tabs that are about to
_MESSAGES = 200  # that wait for somebody to collect them, each at most a whole explanation
_BLOCK = 4096  # bytes that even an empty file takes

_Key = TypeVar("_Key", bound=Hashable)


class Sessions(StateHolder):
    """What tabs show; programs, which come back for nothing, take no place from tabs."""

    def update(self, session_id: str) -> None:
        """Note a use of a session, and forget those that were not used for longest where there are too many."""
        with self.lock:
            if session_id in self.session_data:
                self.session_data.move_to_end(session_id)
            kinds: tuple[list[str], list[str]] = [], []
            for name, state in self.session_data.items():
                kinds[_shows(state)].append(name)
            for names, most in zip(kinds, (_PROGRAMS, self.capacity), strict=True):
                for name in names[: max(0, len(names) - most)]:
                    self.forget(name)

    def forget(self, session_id: str) -> None:
        """Drop all of a session: its state, and the outputs that Gradio keeps to restore it."""
        self.session_data.pop(session_id, None)
        self.time_last_used.pop(session_id, None)

    def sweep(self, now: float) -> None:
        """Forget what was not used for long, whether its tab is open or not."""
        for name, used in list(self.time_last_used.items()):
            state = self.session_data.get(name)
            kept = _KEPT if state is not None and _shows(state) else _FORGOTTEN
            if now - used.timestamp() > kept:
                self.forget(name)


def _shows(state: SessionState) -> bool:
    return any(value is not None for value in state.state_data.values())


class Uploads:
    """The folder of uploads, of which so many bytes are kept.

    Args:
        folder: The folder.
        most: Bytes.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self._most, self._bytes = folder, most, 0

    @property
    def full(self) -> bool:
        """Whether nothing more is taken until some of it is removed."""
        return self._bytes >= self._most

    def add(self, size: int) -> None:
        """Count what comes in, before it is a file."""
        self._bytes += size

    def sweep(self, now: float) -> None:
        """Remove all files that were not written to for five minutes, also those that were broken off."""
        before, found = self._bytes, 0
        # What a folder holds comes before the folder.
        for path in sorted(self.folder.rglob("*"), reverse=True):
            with suppress(OSError):  # Gradio moves and removes files as well
                status = path.lstat()
                is_old = now - status.st_mtime > _FORGOTTEN
                if path.is_dir():
                    if is_old:
                        path.rmdir()
                elif is_old:
                    path.unlink()
                else:
                    found += max(_BLOCK, status.st_size)
        self._bytes += found - before


class Keeper:
    """Sweeps what a page holds.

    Args:
        app: The application that Gradio has made of it.
        uploads: The folder of its uploads.
    """

    def __init__(self, app: App, uploads: Uploads) -> None:
        self._page, self._uploads = app.get_blocks(), uploads
        self._sessions = Sessions()
        self._sessions.set_blocks(self._page)
        app.state_holder = self._sessions
        self._waiting, self._progress = _Ages[str](), _Ages[str]()

    async def run(self) -> None:
        """Sweep every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(_EVERY)
            await self.sweep(time.time())

    async def sweep(self, now: float) -> None:
        """Sweep once.

        Args:
            now: Seconds, as `time.time()` tells.
        """
        self._sessions.sweep(now)
        await self._sweep_answers(now)
        tracked = {*file_upload_statuses._statuses, *file_upload_statuses._signals}
        for name in self._progress.older(tracked, now, _FORGOTTEN):
            file_upload_statuses._statuses.pop(name, None)
            file_upload_statuses._signals.pop(name, None)
        await asyncio.to_thread(self._uploads.sweep, now)

    async def _sweep_answers(self, now: float) -> None:
        """Drop the oldest answers to which nobody listens, and the requests behind them."""
        queue = self._page._queue
        messages = queue.pending_messages_per_session
        alone = [name for name in {*messages, *queue.pending_event_ids_session} if not _is_heard(messages.get(name))]
        dropped = self._waiting.older(alone, now, _FORGOTTEN)
        held = {name: messages[name].qsize() for name in self._waiting if name in messages and name not in dropped}
        left = sum(held.values())
        for name, count in held.items():
            if left > _MESSAGES and count:
                dropped.append(name)
                left -= count
        for name in dropped:
            await queue.clean_events(session_hash=name)
            messages.pop(name, None)
            queue.pending_event_ids_session.pop(name, None)


def _is_heard(messages: "asyncio.Queue[object] | None") -> bool:
    # A listener of Gradio waits in `get`, for which the queue has no public question.
    return bool(getattr(messages, "_getters", ()))


class _Ages(dict[_Key, float]):
    """Since when keys are there, oldest first, as sweeps find them."""

    def older(self, keys: Iterable[_Key], now: float, age: float) -> list[_Key]:
        """Those of the keys that have been there for longer than an age."""
        found = sorted(((self.get(key, now), key) for key in keys), key=lambda pair: pair[0])
        self.clear()
        self.update((key, since) for since, key in found)
        return [key for key, since in self.items() if now - since > age]
