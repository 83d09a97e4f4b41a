"""What every camera driver must do. Inherit `CameraConformance` and give its fixtures.

Pinned: frames have the contract's raw size and type, belong to the caller, and carry stamps of the monotonic clock that
grow and are never of the future; drained in its own thread, the newest frame is at most one period old however long
nobody asked; a wrong size or an absent device is refused by name. Waits are for frames, never for time alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ratchet_vla.contract import CameraSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.cameras.devices import Device, raw_size
from ratchet_vla.runtime.cameras.newest import NewestFrame

__all__ = ["CameraConformance"]

Open = Callable[[CameraSpec], Device]


class CameraConformance:
    """Fixtures to give: `opener` (opens the device for a spec), `spec` (what it delivers), `fps`."""

    # What a loaded machine may add to a stamp's age, s: the scheduler's, not the driver's.
    slack = 0.25

    @pytest.fixture
    def device(self, opener: Open, spec: CameraSpec) -> object:
        device = opener(spec)
        yield device
        device.close()

    def test_frames_are_as_the_contract_says(self, device: Device, spec: CameraSpec) -> None:
        got = device.read()
        assert got is not None
        frame, _ = got
        width, height = raw_size(spec)
        assert frame.shape == (height, width, 3)
        assert frame.dtype == np.uint8

    def test_stamps_grow_and_are_of_the_past(self, device: Device) -> None:
        last = float("-inf")
        for _ in range(5):
            got = device.read()
            now = time.monotonic()
            assert got is not None
            assert last < got[1] <= now
            last = got[1]

    def test_a_frame_that_was_handed_out_stays_as_it_is(self, device: Device) -> None:
        first = device.read()
        assert first is not None
        kept = first[0].copy()
        for _ in range(3):
            device.read()
        np.testing.assert_array_equal(first[0], kept)

    def test_the_newest_frame_is_at_most_one_period_old(self, opener: Open, spec: CameraSpec, fps: float) -> None:
        camera = NewestFrame(opener(spec), spec.name)
        try:
            first = camera.newest()[1]
            # Nobody asks for a while: a driver with a queue would now hand out the oldest of it.
            camera.newest(after=first + 10 / fps, timeout=10.0)
            _, taken = camera.newest()
            assert time.monotonic() - taken <= 1 / fps + self.slack
            assert taken >= first + 10 / fps
        finally:
            camera.close()

    def test_a_series_has_no_frame_twice(self, opener: Open, spec: CameraSpec) -> None:
        camera = NewestFrame(opener(spec), spec.name)
        try:
            frames, stamps = camera.series(6)
        finally:
            camera.close()
        assert len(frames) == 6
        assert all(a < b for a, b in pairwise(stamps))

    def test_another_size_is_refused(self, opener: Open, spec: CameraSpec) -> None:
        with pytest.raises(RatchetError, match=r"camera\.bad_size"):
            opener(replace(spec, width=spec.width + 2))

    def test_close_ends_the_thread(self, opener: Open, spec: CameraSpec) -> None:
        camera = NewestFrame(opener(spec), spec.name)
        camera.newest()
        camera.close()
        assert not camera._thread.is_alive()
