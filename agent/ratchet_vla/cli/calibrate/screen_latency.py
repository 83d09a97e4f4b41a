"""How late a camera shows what happens: a screen blinks, the camera looks at it, the two are laid over each other.

Knows a screen that can be black or white, and a camera that is drained. The comparison is calibration's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import cv2
import numpy as np

from ratchet_calibration.cameras import checks as camera_checks
from ratchet_calibration.signals import Lag
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.cameras.newest import NewestFrame

Screen = Callable[[bool], None]
SETTLE_S = 0.5  # of black before the pattern, so that the exposure is used to it


def measure(camera: NewestFrame, screen: Screen, seconds: float = 5.0, seed: int = 0) -> Lag:
    """Blink at random for so long, and find the delay at which the camera sees it.

    Args:
        camera: The camera, which looks at the screen.
        screen: Shows black or white, and returns when it does.
        seconds: How long the screen blinks.
        seed: Of the pattern.

    Raises:
        RatchetError: check.no_signal, check.no_lag, and those of the camera.
    """
    generator = np.random.default_rng(seed)
    screen(False)
    end_s = time.monotonic() + SETTLE_S + seconds
    frames: list[UInt8] = []
    stamps: list[float] = []
    failures: list[RatchetError] = []

    def collect() -> None:
        stamp_s = float("-inf")
        try:
            while time.monotonic() < end_s:
                frame, stamp_s = camera.newest(stamp_s)
                frames.append(np.ascontiguousarray(frame[::4, ::4]))  # brightness needs no more
                stamps.append(stamp_s)
        except RatchetError as error:
            failures.append(error)

    thread = threading.Thread(target=collect, name="latency")
    thread.start()
    times = [time.monotonic()]
    levels = [0.0]  # what the screen shows at each of the times: 0 black, 1 white
    lit = False
    while time.monotonic() < end_s and not failures:
        switch_s = time.monotonic() + generator.uniform(0.08, 0.3)
        while (now := time.monotonic()) < min(switch_s, end_s):
            times.append(now)
            levels.append(float(lit))
            time.sleep(0.004)
        lit = not lit
        screen(lit)
    thread.join()
    if failures:
        raise failures[0]
    return camera_checks.latency(times, levels, stamps, frames)


def window() -> Screen:
    """Open the whole display as a screen.

    Raises:
        RatchetError: check.no_display.
    """
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise RatchetError(
            "check.no_display", "there is no display to blink with", fix="run this at the robot, with a monitor"
        )
    name = "ratchet: point the camera here"
    cv2.namedWindow(name, cv2.WINDOW_NORMAL)
    cv2.setWindowProperty(name, cv2.WND_PROP_FULLSCREEN, cv2.WINDOW_FULLSCREEN)
    images = [np.full((270, 480), level, np.uint8) for level in (0, 255)]

    def show(lit: bool) -> None:
        cv2.imshow(name, images[int(lit)])
        cv2.waitKey(1)

    return show
