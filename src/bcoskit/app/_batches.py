"""Requests of several threads that are answered together."""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Batcher(Generic[_Item, _Answer]):
    """Answers requests by the batch: what waits while one batch is computed makes up the next.

    Args:
        answer: From what the requests of a batch have in common, and their items, to their answers in order.
        size: The largest batch.
    """

    def __init__(self, answer: Callable[[Any, Sequence[_Item]], Sequence[_Answer]], size: int) -> None:
        self._answer, self._size = answer, size
        self._waiting = deque[_Request[_Item, _Answer]]()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._work, name="bcoskit-batches", daemon=True)
        self._thread.start()

    def ask(self, kind: Hashable, item: _Item) -> _Answer:
        """Wait for the answer to a request.

        Args:
            kind: What it has in common with those that may share a batch with it.
            item: The rest of it.

        Raises:
            Exception: What the request, alone if need be, was answered with.
            RuntimeError: If the batcher is closed.
        """
        request = _Request[_Item, _Answer](kind, item)
        with self._changed:
            if self._closed:
                raise RuntimeError("the service is closed")
            self._waiting.append(request)
            self._changed.notify()
        return request.answer.result()

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._settle(batch)

    def _next(self) -> "list[_Request[_Item, _Answer]]":
        """The request that waits longest, with those that may share its batch; none once all is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return []
            kind = self._waiting[0].kind
            batch = [request for request in self._waiting if request.kind == kind][: self._size]
            taken = {id(request) for request in batch}
            self._waiting = deque(request for request in self._waiting if id(request) not in taken)
            return batch

    def _settle(self, batch: "list[_Request[_Item, _Answer]]") -> None:
        try:
            answers = self._answer(batch[0].kind, [request.item for request in batch])
        except Exception as error:  # whatever it is belongs to who has asked
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for request in batch:  # one that cannot be answered must not harm the others
                self._settle([request])
            return
        for request, answer in zip(batch, answers, strict=True):
            request.answer.set_result(answer)


@dataclass(frozen=True, eq=False)
class _Request(Generic[_Item, _Answer]):
    kind: Hashable
    item: _Item
    answer: "Future[_Answer]" = field(default_factory=Future)
