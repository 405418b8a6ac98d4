"""Requests that wait at the same time are answered together."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from bcoskit.app._batches import Batcher


class Recorder:
    """Doubles numbers, and remembers the batches; the first one waits until it is let go."""

    def __init__(self):
        self.batches, self.go, self.begun = [], Event(), Event()

    def __call__(self, kind, items):
        self.batches.append((kind, list(items)))
        self.begun.set()
        assert self.go.wait(30)
        if any(item < 0 for item in items):
            raise ValueError(f"{items} holds a negative number")
        return [2 * item for item in items]


def ask_at_once(recorder, requests, size=8):
    """All requests while the first is being answered, so that what waits makes up the next batches."""
    batcher = Batcher(recorder, size)
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(batcher.ask, *requests[0])]
        assert recorder.begun.wait(30)
        for count, request in enumerate(requests[1:], 1):
            futures.append(pool.submit(batcher.ask, *request))
            while len(batcher._waiting) < count:
                assert futures[-1].running() or not futures[-1].done()
        recorder.go.set()
    batcher.close()
    return futures


def test_what_waits_is_one_batch_of_each_kind():
    recorder = Recorder()
    requests = [("a", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5)]
    futures = ask_at_once(recorder, requests)
    assert [future.result() for future in futures] == [2, 4, 6, 8, 10]
    assert recorder.batches == [("a", [1]), ("a", [2, 4]), ("b", [3, 5])]


def test_batches_are_no_larger_than_their_size():
    recorder = Recorder()
    futures = ask_at_once(recorder, [("a", index) for index in range(6)], size=2)
    assert [future.result() for future in futures] == [0, 2, 4, 6, 8, 10]
    assert [items for _, items in recorder.batches] == [[0], [1, 2], [3, 4], [5]]


def test_one_bad_request_harms_no_other():
    recorder = Recorder()
    futures = ask_at_once(recorder, [("a", 0), ("a", 1), ("a", -2), ("a", 3)])
    assert [futures[index].result() for index in (0, 1, 3)] == [0, 2, 6]
    with pytest.raises(ValueError, match=r"\[-2\] holds a negative"):
        futures[2].result()


def test_closed():
    batcher = Batcher(lambda kind, items: list(items), 4)
    assert batcher.ask("a", 1) == 1
    batcher.close()
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.ask("a", 2)
