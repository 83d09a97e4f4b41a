"""The loss story with real processes in real time: what is killed, stopped or starved must end in a standing arm.

Pinned: SIGKILL, SIGSTOP, a thinking pause and memory running out in the policy process; the arm holds within the
contract's times, and goes on only as configured, without a jump. The times are the contract's own plus the periods that
the loop itself reports as missed on a busy machine; benchmarks/runtime/fault_to_hold.py measures them tightly.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from ratchet_vla.runtime.clock import MonotonicClock
from ratchet_vla.runtime.control.chunks import DeployExecutor
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.safety.filter import SafetyConfig, SafetyFilter, SafetyState
from ratchet_vla.runtime.safety.types import LATCHING
from ratchet_vla.testing.fake_arm import FakeArm
from ratchet_vla.testing.fake_contract import arm
from tests.agent.runtime.inference.test_process import eventually

T = 0.05
CONTRACT = arm("ee_delta", rotation="none")
TIMES = CONTRACT.watchdog
BUSY = 0.3  # seconds that a loaded machine may add between two readings of the clock


class Rig:
    def __init__(
        self, config: SafetyConfig | None = None, *, launch: dict[str, object] | None = None, **options: object
    ) -> None:
        self.clock, self.sink = MonotonicClock(), MemorySink()
        self.robot = FakeArm(CONTRACT, self.clock)
        self.robot.connect()
        self.client = PolicyClient(
            CONTRACT,
            PolicyLaunch(
                module="ratchet_vla.testing.fake_policy_worker",
                options={"image_size": 8, "period_steps": 8, "seconds": 0.02, **options},
                nice=0,
                **(launch or {}),  # type: ignore[arg-type]
            ),
        )
        self.client.start()
        self.safety = SafetyFilter(CONTRACT, config)
        self.loop = ControlLoop(
            self.robot, self.client, self.safety, DeployExecutor(CONTRACT, use=6), sink=self.sink, clock=self.clock
        )
        self.loop.begin("task", "move")

    def until(self, condition: Callable[[], bool], ticks: int = 200) -> None:
        for _ in range(ticks):
            self.loop.tick()
            if condition():
                return
        raise AssertionError(f"not within {ticks} ticks; events {[e.code for e in self.sink.events]}")

    def moving(self) -> bool:
        return self.safety.state is SafetyState.RUNNING and not self.safety.resting

    def held_after(self, struck: float) -> float:
        """Seconds from the fault to the first hold, less what the loop itself lost to the machine."""
        self.until(lambda: self.safety.state in (SafetyState.HOLDING, SafetyState.LATCHED))
        held = next(now for now, command in self.robot.commands if now >= struck and command is None)
        return held - struck - self.loop.timing.missed * T

    def check_smooth(self) -> None:
        """No two commands, stops and restarts included, differ by more than the acceleration limit allows."""
        speeds = [0.0 if c is None else float(c[0]) / T for _, c in self.robot.commands]
        assert np.abs(np.diff(speeds)).max() <= CONTRACT.limits.acceleration[0] * T * (1 + 1e-4)


@pytest.mark.parametrize(
    ("blow", "codes", "allowed"),
    [
        (signal.SIGKILL, {"policy.crashed"}, TIMES.stop_time),
        (signal.SIGSTOP, {"safety.policy_timeout", "safety.no_action"}, TIMES.policy_timeout + TIMES.stop_time),
    ],
)
def test_a_killed_or_stopped_policy_ends_in_a_hold(blow: signal.Signals, codes: set[str], allowed: float) -> None:
    rig = Rig()
    try:
        rig.until(rig.moving)
        struck = rig.clock.now()
        os.kill(rig.client.status().pid, blow)
        assert rig.held_after(struck) <= allowed + 3 * T + BUSY
        assert codes & {e.code for e in rig.sink.events}
        rig.check_smooth()
    finally:
        rig.client.stop()


def test_memory_running_out_in_inference_ends_in_a_latched_hold() -> None:
    rig = Rig(launch={"memory_limit": 1 << 30}, fault="oom", fault_at=6)
    try:
        rig.until(lambda: rig.safety.state is SafetyState.LATCHED)
        assert rig.safety.cause == "policy.out_of_memory"
        assert rig.robot.commands[-1][1] is None
        rig.check_smooth()
    finally:
        rig.client.stop()


def test_a_late_chunk_holds_and_motion_goes_on_by_itself_without_a_jump() -> None:
    rig = Rig(fault="slow", fault_at=6, slow_seconds=1.2)
    try:
        rig.until(lambda: rig.safety.state is SafetyState.HOLDING)
        rig.until(rig.moving)
        rig.check_smooth()
    finally:
        rig.client.stop()


def test_after_a_crash_motion_goes_on_only_where_that_was_configured() -> None:
    rig = Rig(SafetyConfig(latch_on=LATCHING - {"policy.crashed"}), launch={"restarts": 1})
    try:
        rig.until(rig.moving)
        os.kill(rig.client.status().pid, signal.SIGKILL)
        rig.until(lambda: rig.safety.state is SafetyState.HOLDING)
        eventually(rig.client, lambda: rig.client._state == "ready")
        rig.until(rig.moving)
        assert rig.client.status().restarts == 1
        rig.check_smooth()
    finally:
        rig.client.stop()
