"""How long an arm goes on after each fault: from the blow to the first hold, with real processes in real time.

The policy (FakePolicy, no model) runs in its own process, frames in shared memory, the loop at the contract's rate; the
arm is FakeArm. Faults: the policy process killed, stopped, too slow, out of memory, answering NaN or a wrong shape;
cameras and states frozen, NaN, delayed; the robot refusing; the clock standing still; the e-stop. Repeated and
reordered answers must change nothing; how many were dropped, and how many ticks they disturbed, is told beside.

    python -m benchmarks.runtime.fault_to_hold [--quick]

Exit 1 where a hold took longer than the contract allows for that fault, or the arm jumped on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import machine
from ratchet_vla.contract import RobotContract
from ratchet_vla.runtime.clock import ExternalClock, MonotonicClock
from ratchet_vla.runtime.control.chunks import DeployExecutor
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.priority import real_time
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.inference.source import Ahead, Reply
from ratchet_vla.runtime.safety.filter import SafetyFilter, SafetyState
from ratchet_vla.testing.fake_arm import FakeArm
from ratchet_vla.testing.fake_contract import arm

ROOT = Path(__file__).resolve().parents[2]
HZ = 20.0
T = 1.0 / HZ


@dataclass(frozen=True)
class Case:
    """One fault. allowed: seconds by the contract, from the blow to the hold. options: of the policy process."""

    name: str
    allowed: float
    strike: Callable[[Rig], None] | None = None
    options: dict[str, Any] | None = None
    memory_limit: int = 0


class Repeating:
    """A source that delivers every answer twice, and the one before once more: a network that repeats and reorders."""

    def __init__(self, client: PolicyClient) -> None:
        self.client = client
        self.on = False
        self._last: list[Reply] = []

    @property
    def ready(self) -> bool:
        return self.client.ready

    def request(self, observation: Any, ahead: Ahead | None = None) -> None:
        self.client.request(observation, ahead)

    def poll(self) -> list[Reply]:
        fresh = self.client.poll()
        if not self.on or not fresh:
            self._last = fresh or self._last
            return fresh
        out = [*fresh, *fresh, *self._last]
        self._last = fresh
        return out

    def wait(self, timeout: float) -> list[Reply]:
        return self.client.wait(timeout)

    def forget(self) -> None:
        self.client.forget()


class Rig:
    """One arm in motion."""

    def __init__(self, contract: RobotContract, case: Case) -> None:
        self.contract, self.clock, self.sink = contract, MonotonicClock(), MemorySink()
        self.robot = FakeArm(contract, self.clock)
        self.robot.connect()
        options = {"image_size": 64, "period_steps": 8, "seconds": 0.03, **(case.options or {})}
        launch = PolicyLaunch(
            module="ratchet_vla.testing.fake_policy_worker", options=options, memory_limit=case.memory_limit, nice=0
        )
        self.client = PolicyClient(contract, launch)
        self.client.start()
        self.source = Repeating(self.client)
        self.safety = SafetyFilter(contract)
        self.loop = ControlLoop(
            self.robot,
            self.source,
            self.safety,
            DeployExecutor(contract, use=6),
            sink=self.sink,
            clock=self.clock,
        )
        self.loop.begin("task", "move")

    def run(self, condition: Callable[[], bool], ticks: int) -> bool:
        for _ in range(ticks):
            self.loop.tick()
            if condition():
                return True
        return False


def kill(with_signal: signal.Signals) -> Callable[[Rig], None]:
    return lambda rig: os.kill(rig.client.status().pid, with_signal)


def fault(**changes: Any) -> Callable[[Rig], None]:
    def strike(rig: Rig) -> None:
        for name, value in changes.items():
            setattr(rig.robot.faults, name, value)

    return strike


def stop_clock(rig: Rig) -> None:
    """From here on the loop's clock is one that somebody else tells, and nobody does."""
    told = ExternalClock(stall_timeout=T)
    told.update(rig.clock.now())
    rig.loop.clock = told


def cases(contract: RobotContract) -> list[Case]:
    times = contract.watchdog
    at = {"fault_at": 14}
    timeout = times.policy_timeout + times.stop_time
    stale = times.observation_max_age + times.stop_time
    answer = timeout  # the blow falls somewhere within the waiting time for an answer
    return [
        Case("policy killed (SIGKILL)", times.stop_time, kill(signal.SIGKILL)),
        Case("policy stopped (SIGSTOP)", timeout, kill(signal.SIGSTOP)),
        Case("policy too slow", answer, options={"fault": "slow", "slow_seconds": 2.0, **at}),
        Case("policy out of memory", answer, options={"fault": "oom", **at}, memory_limit=1 << 30),
        Case("policy answers NaN", answer, options={"fault": "nan", **at}),
        Case("policy answers a wrong shape", answer, options={"fault": "shape", **at}),
        Case("cameras frozen", stale, fault(frozen_frames=True)),
        Case("state frozen", stale, fault(frozen_state=True)),
        Case("state not finite", times.stop_time, fault(not_finite=True)),
        Case("state delayed by 0.3 s", times.stop_time, fault(delay=0.3)),
        Case("state jumps by 0.3 m", times.stop_time, fault(shift=0.3)),
        Case("robot refuses", times.stop_time, fault(refuse=True)),
        Case("clock stands still", times.stop_time + 5 * T, stop_clock),
        Case("e-stop", times.stop_time, lambda rig: rig.safety.e_stop(True)),
    ]


def measure(contract: RobotContract, case: Case, ticks_before: int) -> dict[str, Any]:
    """One blow: seconds to the hold, and the largest change of speed between two commands on the way."""
    rig = Rig(contract, case)
    try:
        held = lambda: rig.safety.state in (SafetyState.HOLDING, SafetyState.LATCHED)  # noqa: E731
        if case.strike is not None:
            moving = rig.run(lambda: not rig.safety.resting and len(rig.sink.ticks) > ticks_before, 200)
            struck = rig.clock.now()
            case.strike(rig)
            missed = rig.loop.timing.missed
        else:
            # The policy strikes by itself: the blow is the request that it fails on.
            asked = int((case.options or {})["fault_at"])
            moving = rig.run(lambda: len(rig.sink.observations) > asked, 400)
            struck = rig.sink.observations[-1].stamp
            missed = rig.loop.timing.missed
        ended = rig.run(held, 100)
        holds = [now for now, command in rig.robot.commands if command is None and now >= struck]
        after = rig.clock.now() if case.strike is stop_clock else (holds[0] if holds else np.inf)
        speeds = np.diff([0.0 if c is None else float(c[0]) / T for _, c in rig.robot.commands])
        return {
            "seconds": after - struck if moving and ended else float("inf"),
            "missed_periods": rig.loop.timing.missed - missed,
            "change": float(np.abs(speeds).max()) if case.name != "robot refuses" else 0.0,
            "code": next((e.code for e in rig.sink.events if e.code in _stops(rig)), ""),
        }
    finally:
        rig.client.stop()


def _stops(rig: Rig) -> set[str]:
    return {rig.safety.cause} | {e.code for e in rig.sink.events if e.latched}


def disturb(contract: RobotContract) -> dict[str, Any]:
    """Repeated and reordered answers for a while: dropped chunks and ticks without a command."""
    rig = Rig(contract, Case("repeats", 0.0))
    try:
        rig.run(lambda: not rig.safety.resting and len(rig.sink.ticks) > 20, 200)
        begun = len(rig.sink.ticks)
        rig.source.on = True
        rig.run(lambda: False, 60)
        dropped = sum(e.code == "safety.chunk_sequence" for e in rig.sink.events)
        held = sum(t.command is None for t in rig.sink.ticks[begun:])
        order = [c.observation_sequence for c in rig.sink.chunks]
        return {"dropped": dropped, "ticks": 60, "held": held, "in_order": order == sorted(set(order))}
    finally:
        rig.client.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each fault once instead of ten times")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fault_to_hold.json")
    arguments = parser.parse_args(argv)
    repeats = 1 if arguments.quick else 10
    scheduling = real_time()
    contract = arm("ee_delta", rotation="none", hz=HZ, camera=64)
    limit = contract.limits.acceleration[0] * T * (1 + 1e-4)
    table = Table(title=f"From fault to hold, {HZ:g} Hz, {repeats} times each, {scheduling}")
    for column in ("fault", "seen as", "median ms", "worst ms", "allowed ms", "jump", ""):
        table.add_column(column, justify="left" if column in ("fault", "seen as", "") else "right")
    rows: dict[str, dict[str, Any]] = {}
    good = True
    for case in cases(contract):
        runs = [measure(contract, case, 20 + i) for i in range(repeats)]
        # A period that another process took from the loop is the machine's, not the runtime's; it is stated beside.
        allowed = case.allowed + 2 * T
        seconds = [r["seconds"] for r in runs]
        net = [r["seconds"] - r["missed_periods"] * T for r in runs]
        smooth = max(r["change"] for r in runs) <= limit
        fine = max(net) <= allowed and smooth
        good &= fine
        rows[case.name] = {
            "seconds": seconds,
            "missed_periods": [r["missed_periods"] for r in runs],
            "allowed": allowed,
            "codes": sorted({r["code"] for r in runs}),
            "largest_change_per_s": max(r["change"] for r in runs),
            "within": fine,
        }
        table.add_row(
            case.name,
            ", ".join(c.split(".", 1)[-1] for c in rows[case.name]["codes"]),
            f"{np.median(seconds) * 1e3:.0f}",
            f"{max(seconds) * 1e3:.0f}",
            f"{allowed * 1e3:.0f}",
            "none" if smooth else "JUMP",
            "ok" if fine else "LATE",
        )
    repeated = disturb(contract)
    good &= repeated["dropped"] > 0 and repeated["in_order"]
    Console(width=100).print(table)
    result = {
        "command": ["python", "-m", "benchmarks.runtime.fault_to_hold", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(scheduling=scheduling),
        "repeats": repeats,
        "contract": {"hz": HZ, "times": contract.to_dict()["watchdog"]},
        "faults": rows,
        "repeated_and_reordered": repeated,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"repeated and reordered answers: {repeated['dropped']} dropped, {repeated['held']} of 60 ticks held")
    within = sum(r["within"] for r in rows.values())
    worst = max((max(r["seconds"]) for r in rows.values()), default=0.0)
    print(f"fault_to_hold: {within} of {len(rows)} faults within the contract, worst {worst * 1e3:.0f} ms (goal all)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
