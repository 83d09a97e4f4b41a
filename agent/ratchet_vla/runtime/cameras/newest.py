"""A camera that is drained in its own thread: whoever asks gets the newest frame, never one that waited in a queue.

Knows a device that reads. Knows no driver and no policy.
"""

from __future__ import annotations

import threading
import time

from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.cameras.devices import Device


class NewestFrame:
    """Owns an open device. Any thread may ask; `close` ends the thread and the device."""

    def __init__(self, device: Device, name: str) -> None:
        self.name = name
        self._device = device
        self._arrived = threading.Condition()
        self._frame: tuple[UInt8, float] | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self.count = self.silent = 0
        self._thread = threading.Thread(target=self._drain, name=f"camera {name}", daemon=True)
        self._thread.start()

    def newest(self, after: float = float("-inf"), timeout: float = 2.0) -> tuple[UInt8, float]:
        """The newest frame that was taken later than `after`, and when (s, monotonic clock); waits for one.

        Raises:
            RatchetError: camera.silent after `timeout` seconds without; camera.failed where the driver broke.
        """
        with self._arrived:
            there = self._arrived.wait_for(
                lambda: self._failure is not None or (self._frame is not None and self._frame[1] > after), timeout
            )
            if self._failure is not None:
                raise RatchetError("camera.failed", repr(self._failure), where=self.name, fix="check cable and driver")
            if not there or self._frame is None:
                raise RatchetError(
                    "camera.silent", f"no new frame for {timeout:g} s", where=self.name, fix="check cable and driver"
                )
            return self._frame

    def series(self, count: int, timeout: float = 10.0) -> tuple[list[UInt8], list[float]]:
        """So many frames in a row, each the newest when it was asked for, and when they were taken."""
        frames: list[UInt8] = []
        stamps: list[float] = []
        end, last = time.monotonic() + timeout, float("-inf")
        while len(frames) < count:
            frame, last = self.newest(last, max(end - time.monotonic(), 0.001))
            frames.append(frame)
            stamps.append(last)
        return frames, stamps

    def close(self) -> None:
        with self._arrived:
            self._stopping = True
        self._thread.join(5.0)
        self._device.close()

    def _drain(self) -> None:
        while not self._stopping:
            try:
                got = self._device.read()
            except Exception as error:  # whatever a driver raises ends this camera, and must be told to who waits
                with self._arrived:
                    self._failure = error
                    self._arrived.notify_all()
                return
            if got is None:
                self.silent += 1
                time.sleep(0.005)  # an unplugged device answers at once; do not spin on it
                continue
            with self._arrived:
                self._frame = got
                self.count += 1
                self._arrived.notify_all()
