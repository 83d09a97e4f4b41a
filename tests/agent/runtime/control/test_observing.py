"""What an observation is made of, and for how long it may be trusted.

An image from one moment and joints from another teach a policy a lie, and a frozen camera drives blind.

Pinned: alignment to the newest moment that all cameras saw, stated skew and its refusal, the watchdog's times, the
three clocks. Stamps are arguments; threads meet on conditions.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.clock import Clock, ExternalClock, ManualClock, MonotonicClock
from ratchet_vla.runtime.control.watchdog import Watchdog
from ratchet_vla.runtime.messages.align import Aligner
from ratchet_vla.testing.fake_contract import arm


def two_cameras() -> RobotContract:
    raw = arm(rotation="none").to_dict()
    raw["cameras"].append({"name": "wrist", "width": 8, "height": 8})
    return RobotContract.from_dict(raw)


def image(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_parts_are_taken_from_the_newest_moment_that_all_cameras_saw() -> None:
    aligner = Aligner(two_cameras(), max_skew=0.02)
    for i in range(10):
        aligner.add_frame("front", image(i), 1.0 + i * 0.033)
        aligner.add_state("place", np.full(3, i, np.float32), 1.0 + i * 0.033 + 0.004)
        aligner.add_state("gripper", np.zeros(1, np.float32), 1.0 + i * 0.033)
        if i < 7:
            aligner.add_frame("wrist", image(100 + i), 1.0 + i * 0.033 + 0.010)  # the slow camera
    got = aligner.observe("go", 5)
    assert got.observation.stamp == pytest.approx(1.0 + 6 * 0.033 + 0.010)
    assert (got.observation.images["front"][0, 0, 0], got.observation.images["wrist"][0, 0, 0]) == (6, 106)
    assert got.observation.state["place"][0] == 6
    assert got.skew == pytest.approx({"front": -0.010, "wrist": 0.0, "place": -0.006, "gripper": -0.010})
    assert got.worst == pytest.approx(0.010)
    assert (got.observation.instruction, got.observation.sequence) == ("go", 5)
    assert aligner.frames_stamp() == got.observation.stamp
    assert aligner.newest_state()[0]["place"][0] == 9


def test_what_is_missing_or_too_far_apart_is_named() -> None:
    aligner = Aligner(two_cameras(), max_skew=0.02)
    with pytest.raises(RatchetError, match=r"observation\.missing.*front, wrist"):
        aligner.observe("go", 0)
    assert aligner.frames_stamp() == -np.inf
    aligner.add_frame("front", image(0), 1.0)
    aligner.add_frame("wrist", image(0), 1.0)
    aligner.add_state("place", np.zeros(3, np.float32), 1.05)
    aligner.add_state("gripper", np.zeros(1, np.float32), 1.0)
    with pytest.raises(RatchetError, match=r"observation\.skew.*\+50\.0 ms.*place"):
        aligner.observe("go", 0)
    with pytest.raises(RatchetError, match=r"observation\.bad_state"):
        aligner.add_state("place", np.zeros(4, np.float32), 2.0)
    with pytest.raises(RatchetError, match=r"observation\.unknown_source"):
        aligner.add_frame("side", image(0), 1.0)


def test_repeated_and_reordered_deliveries_change_nothing() -> None:
    aligner = Aligner(arm(rotation="none"), max_skew=1.0)
    aligner.add_state("place", np.zeros(3, np.float32), 1.0)
    aligner.add_state("gripper", np.zeros(1, np.float32), 1.0)
    aligner.add_frame("front", image(2), 1.0)
    aligner.add_frame("front", image(3), 1.0)
    aligner.add_frame("front", image(1), 0.9)
    assert aligner.dropped == 2
    assert aligner.observe("go", 0).observation.images["front"][0, 0, 0] == 2


def test_the_watchdogs_times() -> None:
    dog = Watchdog(arm().watchdog, frozen_after=0.3)
    assert dog.late(0.0) is None
    dog.request(1.0)
    assert dog.asked
    assert dog.late(1.5) is None
    late = dog.late(1.51)
    assert late is not None
    assert late[0] == "safety.policy_timeout"
    dog.answered()
    assert dog.late(9.0) is None
    dog.waiting(True, 2.0)
    dog.waiting(True, 2.4)
    assert dog.late(2.5) is None
    assert dog.late(2.6) is not None
    dog.waiting(False, 2.6)
    assert dog.late(2.6) is None
    assert dog.old(1.0, 1.2) is None
    assert dog.old(1.0, 1.21) is not None
    assert dog.frozen({"a": image(1)}, 0.0, True) is None
    assert dog.frozen({"a": image(1)}, 0.31, False) is None  # standing still: nothing to see
    assert dog.frozen({"a": image(1)}, 0.60, True) is None
    assert dog.frozen({"a": image(1)}, 0.62, True) is not None
    assert dog.frozen({"a": image(2)}, 0.63, True) is None


def test_clocks() -> None:
    manual = ManualClock(5.0)
    assert manual.sleep_until(6.0)
    assert manual.now() == 6.0
    assert manual.sleep_until(1.0)
    assert manual.now() == 6.0
    real = MonotonicClock()
    assert real.sleep_until(real.now() - 1.0)
    told = ExternalClock(stall_timeout=0.01)
    assert not told.sleep_until(1.0)  # nobody tells the time
    patient = ExternalClock(stall_timeout=60.0)

    def tell() -> None:
        for moment in (0.5, 1.0):
            patient.update(moment)

    teller = threading.Thread(target=tell)
    teller.start()
    assert patient.sleep_until(1.0)
    teller.join()
    assert all(isinstance(c, Clock) for c in (manual, real, told))
