"""Watcher of a tag in an adapter store: promotion and rollback reach the policy that runs, without anybody asking it.

Knows one small file and one function that brings its tag into force. Knows no policy, no link and no robot. Whoever
moves the tag (`ratchet sync`, `ratchet adapters promote|rollback`, a person) renames a new file over the old one, so
that a look at the file's number and time tells.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

Stamp = tuple[int, int, int] | None


class TagWatcher:
    """A thread that calls `changed` whenever the tag was moved, and once at the start where there is one.

    Args:
        path: the tag's file; it need not exist yet.
        period: seconds between two looks; a look costs microseconds.
        changed: brings the tag into force; False where that was refused.
        again: seconds until what was refused is tried again.
    """

    def __init__(self, path: Path, period: float, changed: Callable[[], bool], *, again: float = 1.0) -> None:
        self._path, self._period, self._changed, self._again = path, period, changed, again
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tag-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a swap that is under way is finished first."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last_stamp: Stamp = None
        pause = self._period
        while not self._stop.wait(pause):
            pause = self._period
            stamp = self._stamp()
            if stamp is None or stamp == last_stamp:
                continue
            if self._changed():
                last_stamp = stamp
            else:
                pause = self._again

    def _stamp(self) -> Stamp:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
