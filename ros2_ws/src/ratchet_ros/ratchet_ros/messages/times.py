"""Seconds inside, ROS time outside: the one clock that stamps observations and commands.

Knows the machine's monotonic clock and a simulation's /clock, and how header stamps map to either.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from builtin_interfaces.msg import Time

from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.clock import ExternalClock, MonotonicClock

REORDERED_S = 0.5  # s of simulated time that messages of different topics may overtake each other by

LAST_STAMP_S = 2.0**31 - 1  # s, the last whole second that a stamp can hold

SAME_MOMENT_S = (
    1e-6  # s that count as the same moment: stamps are rounded to nanoseconds, deadlines are sums of periods
)


def seconds(stamp: Time) -> float:
    """ROS time as seconds."""
    return float(stamp.sec) + float(stamp.nanosec) * 1e-9


def to_time(moment: float) -> Time:
    """Seconds as ROS time, rounded to nanoseconds; what is not finite, negative or beyond its 32 bits becomes 0."""
    if not 0.0 <= moment < LAST_STAMP_S:
        return Time()
    nanoseconds = round(moment * 1e9)
    return Time(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


class TimeBase(Protocol):
    """ratchet_vla.runtime's Clock, plus the way between it and header stamps."""

    def now(self) -> float: ...

    def sleep_until(self, moment: float) -> bool: ...

    def from_ros(self, stamp: Time) -> float:
        """Header stamp -> seconds on this clock; a stamp of zero is taken as now."""
        ...

    def to_ros(self, moment: float) -> Time:
        """Seconds on this clock -> header stamp."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever time was told from outside; never called where time passes by itself."""
        ...

    @property
    def stalled(self) -> bool:
        """Time comes from outside and has not for longer than it may."""
        ...


def time_base(simulated: bool, lock_step: bool, stall_timeout_s: float) -> TimeBase:
    """The clock that a node runs on. stall_timeout_s: real seconds without /clock after which waiting is given up.

    Raises:
        RatchetError: ros.bad_parameter for lock-step without simulated time.
    """
    if lock_step and not simulated:
        raise RatchetError("ros.bad_parameter", "lock_step needs use_sim_time", where="lock_step")
    return SimulatedTime(stall_timeout_s) if simulated else SteadyTime()


class SteadyTime(MonotonicClock):
    """A real robot: the monotonic clock; header stamps are system time and mapped by what both clocks show now."""

    def from_ros(self, stamp: Time) -> float:
        if stamp.sec == 0 and stamp.nanosec == 0:
            return time.monotonic()
        return time.monotonic() - (time.time() - seconds(stamp))

    def to_ros(self, moment: float) -> Time:
        return to_time(time.time() + (moment - time.monotonic()))

    def watch(self, changed: Callable[[], None]) -> None:
        return

    @property
    def stalled(self) -> bool:
        return False


class SimulatedTime(ExternalClock):
    """A simulation: what /clock says. stall_timeout: real seconds without /clock after which waiting is given up."""

    def __init__(self, stall_timeout: float) -> None:
        super().__init__(stall_timeout)
        self._stall_timeout_s = stall_timeout
        self._updated_s = math.inf  # monotonic; nothing stalls before the first /clock
        self._abandoned = False  # guarded by `_changed` of ExternalClock
        self._watchers: list[Callable[[], None]] = []
        self._watchers_lock = threading.Lock()  # `watch` comes from any thread

    def update(self, now: float) -> None:
        """Take what /clock says. It may arrive after data of the same moment; a real step back is passed on."""
        self._updated_s = time.monotonic()
        if self.now() - REORDERED_S < now < self.now():
            return
        super().update(now)
        for changed in self._watchers:
            changed()

    def sleep_until(self, moment: float) -> bool:
        with self._changed:
            while self._now < moment - SAME_MOMENT_S:
                standing = self._stalled or self._abandoned  # then a stop goes on at the rate of a running clock
                limit_s = self._stall_timeout_s
                if standing:
                    limit_s = min(limit_s, moment - self._now)
                if not self._changed.wait(limit_s):
                    self._stalled = True
                    return False
        return True

    def abandon(self, given_up: bool) -> None:
        """Whoever makes time go on has stopped for good: waiting ends at once, until this is taken back. Any thread."""
        with self._changed:
            self._abandoned = given_up
            self._changed.notify_all()

    def from_ros(self, stamp: Time) -> float:
        """Data of a moment shows that the moment has come, whether or not /clock got here first."""
        moment = seconds(stamp)
        if self.now() < moment < self.now() + REORDERED_S:
            self.update(moment)
        return moment

    def to_ros(self, moment: float) -> Time:
        return to_time(moment)

    def watch(self, changed: Callable[[], None]) -> None:
        with self._watchers_lock:
            self._watchers.append(changed)

    @property
    def stalled(self) -> bool:
        return time.monotonic() - self._updated_s > self._stall_timeout_s
