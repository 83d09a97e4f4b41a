"""The latency of a camera decides which frame an action was based on; the figure must be the camera's, not the load's.

Pinned: a stand-in camera that shows the screen as it was 80 ms ago is told to be 80 ms late; one that does not look at
the screen is refused; a missing display is said. Deterministic: brightness follows from stamps, so load changes which
frames there are and not what they show.
"""

from __future__ import annotations

import bisect
import time

import numpy as np
import pytest

from ratchet_vla.cli.calibrate import screen_latency
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.cameras.newest import NewestFrame

LATE = 0.08


class Screen:
    """Remembers when it was what."""

    def __init__(self) -> None:
        self.times, self.values = [float("-inf")], [False]

    def __call__(self, lit: bool) -> None:
        self.values.append(lit)
        self.times.append(time.monotonic())

    def at(self, moment: float) -> bool:
        return self.values[bisect.bisect_right(self.times, moment) - 1]


class LateCamera:
    """Stands in for hardware: at 60 Hz, frames of the screen as it was a while ago, an image's corner full."""

    def __init__(self, screen: Screen, looks: bool) -> None:
        self.screen, self.looks, self.due = screen, looks, time.monotonic()
        self.noise = np.random.default_rng(0)

    def read(self) -> tuple[UInt8, float]:
        self.due = max(self.due + 1 / 60, time.monotonic())
        time.sleep(max(self.due - time.monotonic(), 0.0))
        now = time.monotonic()
        image = self.noise.integers(90, 110, (60, 80, 3), np.uint8)
        if self.looks:
            image[:30, :40] = 230 if self.screen.at(now - LATE) else 20
        return image, now

    def close(self) -> None:
        return


def test_a_late_camera_is_told_to_be_late() -> None:
    screen = Screen()
    camera = NewestFrame(LateCamera(screen, looks=True), "late")
    try:
        found = screen_latency.measure(camera, screen, seconds=2.5)
    finally:
        camera.close()
    assert found.seconds == pytest.approx(LATE, abs=0.025)
    assert found.correlation > 0.7


def test_a_camera_that_looks_elsewhere_is_refused() -> None:
    screen = Screen()
    camera = NewestFrame(LateCamera(screen, looks=False), "elsewhere")
    try:
        with pytest.raises(RatchetError, match=r"check\.no_lag"):
            screen_latency.measure(camera, screen, seconds=2.0)
    finally:
        camera.close()


def test_no_display_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RatchetError, match=r"check\.no_display"):
        screen_latency.window()
