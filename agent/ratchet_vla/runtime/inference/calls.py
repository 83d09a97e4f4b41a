"""Calls to the policy process other than for chunks: each waits as a future for the answer with its number.

Knows numbers and futures. Knows no process and no lock: whoever owns it keeps other threads away, but from the futures.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from ratchet_vla.errors import RatchetError


class Calls:
    """Calls without an answer yet, by number."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[str, Future[Any]]] = {}

    @property
    def swapping(self) -> bool:
        """Whether an adapter is on its way into force."""
        return any(kind == "swap" for kind, _ in self._pending.values())

    def add(self, number: int, kind: str) -> Future[Any]:
        """A future for the answer with this number. kind: the message's type."""
        future: Future[Any] = Future()
        self._pending[number] = (kind, future)
        return future

    def take(self, number: int) -> Future[Any] | None:
        """The future that the answer with this number is for; None where nobody asked."""
        return self._pending.pop(number, ("", None))[1]

    def take_all(self) -> list[Future[Any]]:
        """Every future; none is pending afterwards."""
        futures = [future for _, future in self._pending.values()]
        self._pending.clear()
        return futures


def refused(error: RatchetError) -> Future[Any]:
    """The answer to what could not be asked."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
