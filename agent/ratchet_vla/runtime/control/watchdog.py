"""Stale, frozen or missing inputs: the policy's answers, frames, and frames that must change while an arm moves.

Knows the contract's times. Decides nothing: a finding goes to `safety.filter`, which knows whether to hold.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from ratchet_vla.contract import Watchdog as Times
from ratchet_vla.records import UInt8

Problem = tuple[str, str]  # code, message
GRID = 8  # every so many pixels count when frames are compared: enough to tell a stuck driver from a living camera


class Watchdog:
    """One per control loop. Times in seconds on the loop's clock.

    frozen_after: how long a camera may repeat one image, bit by bit, while the arm moves; 0 does not look (simulated
        cameras have no noise, and a still scene repeats itself there).
    """

    def __init__(self, times: Times, frozen_after: float = 0.0) -> None:
        self.times, self.frozen_after = times, frozen_after
        self._asked: float | None = None
        self._waiting: float | None = None
        self._images: dict[str, tuple[int, float]] = {}

    @property
    def asked(self) -> bool:
        """Whether an answer is outstanding."""
        return self._asked is not None

    def request(self, now: float) -> None:
        """A question went to the policy."""
        self._asked = now

    def answered(self) -> None:
        """It was answered, or nobody waits for the answer any more."""
        self._asked = None

    def waiting(self, waits: bool, now: float) -> None:
        """Whether the arm stands because the next action is not there, told once per tick."""
        self._waiting = (now if self._waiting is None else self._waiting) if waits else None

    def forget(self) -> None:
        """A new episode, or motion after a hold."""
        self._asked = self._waiting = None
        self._images.clear()

    def late(self, now: float) -> Problem | None:
        """Whether the policy has been waited for too long."""
        allowed = self.times.policy_timeout
        if self._asked is not None and now - self._asked > allowed:
            return "safety.policy_timeout", f"no chunk after {now - self._asked:.3g} s, allowed {allowed} s"
        if self._waiting is not None and now - self._waiting > allowed:
            return "safety.policy_timeout", f"nothing to execute for {now - self._waiting:.3g} s, allowed {allowed} s"
        return None

    def old(self, frames_stamp: float, now: float) -> Problem | None:
        """Whether the newest frames are too old to move on."""
        age, allowed = now - frames_stamp, self.times.observation_max_age
        if age <= allowed:
            return None
        return "safety.observation_age", f"the newest frames are {age:.3g} s old, allowed {allowed} s"

    def frozen(self, images: Mapping[str, UInt8], now: float, moving: bool) -> Problem | None:
        """Whether a camera repeats itself although the arm moves: a driver that hangs but stamps on."""
        if self.frozen_after <= 0.0:
            return None
        found = None
        for name, image in images.items():
            digest = zlib.crc32(image[::GRID, ::GRID].tobytes())
            before, since = self._images.get(name, (-1, now))
            if digest != before or not moving:
                self._images[name] = (digest, now)
            elif now - since > self.frozen_after:
                text = f"camera {name} has shown one image for {now - since:.3g} s, allowed {self.frozen_after} s"
                found = "safety.frozen_frame", text
        return found
