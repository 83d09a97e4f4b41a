"""Whether anything gets past the safety filter, and what it costs: a million random and hostile chunks, then checked.

Every control mode, with and without jerk limits, and every contract in robots/. Chunks are random walks, full-range
jumps, values up to 10^6 times too large, NaN and infinity, wrong shapes, repeats, late and early ones; the clock
jitters, bursts and pauses; measurements turn NaN. A checker that shares no code with the filter differentiates what
came out.

    python -m benchmarks.runtime.safety [--quick]

Exit 1 where a limit was broken at the output or the median cost per action is 0.2 ms or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.spatial.transform import Rotation

from benchmarks.harness.results import machine
from ratchet_vla.contract import RobotContract
from ratchet_vla.records import ActionChunk
from ratchet_vla.runtime.safety.filter import Proposal, SafetyConfig, SafetyFilter, SafetyState
from ratchet_vla.testing.fake_contract import MODES, arm

GOAL_MS = 0.2
ROOT = Path(__file__).resolve().parents[2]
CHUNKS_PER_EPISODE = 100
K = 4


def contracts() -> dict[str, RobotContract]:
    found = {f"{mode}{' jerk' if jerk else ''}": arm(mode, jerk=jerk) for mode in MODES for jerk in (False, True)}
    found |= {f"ee_absolute {r}": arm("ee_absolute", rotation=r) for r in ("quaternion_xyzw", "euler_xyz")}
    for path in sorted((ROOT / "robots").glob("*.yaml")):
        found[path.name] = RobotContract.load(path)
    return found


def hostile_chunk(contract: RobotContract, rng: np.random.Generator, last: np.ndarray) -> np.ndarray:
    """(K, D) float32, sometimes of another shape."""
    low = np.array([d.low for d in contract.action.dims])
    high = np.array([d.high for d in contract.action.dims])
    kind = rng.integers(0, 8)
    if kind == 0:
        out = np.tile(rng.uniform(low, high), (K, 1))
    elif kind == 1:
        out = np.where(rng.random((K, len(low))) < 0.5, low, high)
    elif kind == 2:
        out = rng.uniform(low, high, (K, len(low))) * 10 ** rng.uniform(0, 6)
    elif kind == 3:
        out = np.zeros((K, len(low)))
    elif kind in (4, 5, 6):
        out = last + np.cumsum(rng.normal(size=(K, len(low))) * (high - low) * 0.03, axis=0)
    else:
        out = np.tile(high if rng.random() < 0.5 else low, (K, 1))
    if contract.action.rotation == "quaternion_xyzw":
        turn = rng.normal(size=(K, 4))
        out[:, 3:7] = turn / np.linalg.norm(turn, axis=1, keepdims=True)
    draw = rng.random()
    if draw < 0.004:
        out[rng.integers(K), rng.integers(len(low))] = rng.choice([np.nan, np.inf, -np.inf])
    elif draw < 0.006:
        out = out[:, :-1]
    return out.astype(np.float32)


# time, command, true position and orientation before it, braking, clock unusable
Row = tuple[float, np.ndarray | None, np.ndarray, np.ndarray, bool, bool]


class Episode:
    """A hundred chunks through one filter, with an arm that follows."""

    def __init__(self, contract: RobotContract, seed: int) -> None:
        self.contract, self.rng = contract, np.random.default_rng(seed)
        # An arm that is told to jump by the benchmark itself would trip these; they are tested elsewhere.
        self.stage = SafetyFilter(contract, SafetyConfig(tracking_factor=1e9))
        self.period = self.stage.period
        gauge = self.stage.limiter.gauge
        self.field, self.turn_field = gauge.position_field, gauge.rotation_field
        self.count = len(self.stage.limiter.linear)
        axes = self.stage.limiter.axes[: self.count]
        self.place = np.array([(a.low + a.high) / 2 if np.isfinite([a.low, a.high]).all() else 0.0 for a in axes])
        self.turning = list(range(self.count, contract.action.size - (contract.action.gripper is not None)))
        self.turn = np.zeros(len(self.turning))
        if contract.action.rotation == "quaternion_xyzw":
            self.turn[3] = 1.0
        self.now = 0.0
        self.rows: list[Row] = []
        self.costs: list[float] = []
        self.codes: Counter[str] = Counter()
        self.starts: list[int] = []

    def state(self) -> dict[str, np.ndarray]:
        state = {s.name: np.zeros(s.size, np.float32) for s in self.contract.state}
        state[self.field] = self.place.astype(np.float32)
        if self.turn_field:
            state[self.turn_field] = self.turn.astype(np.float32)
        return state

    def run(self) -> None:
        stage, rng = self.stage, self.rng
        last = np.zeros(self.contract.action.size)
        jitter = rng.uniform(0.0, 0.6)
        sequence = 0
        mode = self.contract.action.control_mode
        for _ in range(CHUNKS_PER_EPISODE):
            if stage.state in (SafetyState.LATCHED, SafetyState.IDLE):
                if stage.state is SafetyState.LATCHED:
                    stage.clear("the benchmark")
                self.now += self.period
                stage.start(self.state(), self.now)
                self.starts.append(len(self.rows))
                sequence = 0
            actions = hostile_chunk(self.contract, rng, last)
            sequence += int(rng.integers(-1, 3)) if rng.random() < 0.05 else 1
            age = float(rng.choice([0.0, 0.02, 5.0, -5.0], p=[0.9, 0.09, 0.006, 0.004]))
            chunk = ActionChunk(actions, None, None, "a", 0.0, self.now - age, sequence)
            clock = time.perf_counter()
            admitted, events = stage.admit(chunk, self.now)
            cost = time.perf_counter() - clock
            self.codes.update(e.code for e in events)
            for offset in range(int(rng.integers(1, K + 1))):
                gap = abs(1.0 + jitter * rng.standard_normal()) if rng.random() > 0.01 else float(rng.choice([0, 7.0]))
                self.now += gap * self.period
                state = self.state()
                if rng.random() < 0.0015:
                    state[self.field] = state[self.field] * np.float32(np.nan)
                proposal = None
                if admitted:
                    action = actions[offset]
                    proposal = Proposal(action, action, self.now - age, sequence, offset)
                    if np.isfinite(action).all():
                        last = action.astype(np.float64)
                clock = time.perf_counter()
                result = stage.step(proposal, state, self.now, self.now, expected=not admitted)
                self.costs.append(time.perf_counter() - clock + cost)
                cost = 0.0
                self.codes.update(e.code for e in result.events)
                stopping = result.state is SafetyState.STOPPING
                self.rows.append(
                    (self.now, result.command, self.place, self.turn, stopping, stage.cause == "safety.clock")
                )
                if result.command is not None:
                    moved = result.command[self.stage.limiter.linear].astype(np.float64)
                    if mode.endswith("absolute"):
                        self.place, self.turn = moved, result.command[self.turning].astype(np.float64)
                    else:
                        self.place = self.place + moved * (
                            1.0 if mode.endswith("delta") else min(gap, 1.0) * self.period
                        )


def check_episode(episode: Episode, worst: dict[str, float]) -> list[str]:
    """What broke a limit, in words; `worst` gets the largest share of each limit that was used."""
    found: list[str] = []
    bounds = [*episode.starts, len(episode.rows)]
    for first, last in itertools.pairwise(bounds):
        found += check_segment(episode, episode.rows[first:last], worst)
    return found


def check_segment(episode: Episode, rows: list[Row], worst: dict[str, float]) -> list[str]:
    if not rows:
        return []
    contract, period, count = episode.contract, episode.period, episode.count
    limits, mode = contract.limits, contract.action.control_mode
    absolute = mode.endswith("absolute")
    gripper = contract.action.gripper is not None
    turning = episode.turning
    velocity, acceleration = np.array(limits.velocity), np.array(limits.acceleration)
    jerk = np.array(limits.jerk) if limits.jerk else None
    low = np.array(limits.workspace_low or limits.position_low or [-np.inf] * count)
    high = np.array(limits.workspace_high or limits.position_high or [np.inf] * count)
    grain = 1e-6 if absolute else 1e-8
    found: list[str] = []
    before = reckoned = rows[0][0] - period
    speed = push = np.zeros(count + (3 if turning and absolute else len(turning)))
    form = contract.action.rotation
    aim, turned, grip = rows[0][2], _rotation(rows[0][3], form) if turning and absolute else None, np.nan
    steps: list[float] = []
    for now, command, place, turn, stopping, no_clock in rows:
        if now - before > 2 * period:
            speed = push = np.zeros_like(speed)
        before = now
        due = reckoned + period
        effective = now if now >= due else min(due, now + 0.25 * period)
        dt = min(effective - reckoned, period)
        reckoned = max(reckoned, effective)
        if command is None or no_clock:
            speed = push = np.zeros_like(speed)
            aim, turned = place, _rotation(turn, form) if turning and absolute else None
            continue
        out = command.astype(np.float64)
        linear = out[:count] - aim if absolute else out[:count]
        aim = out[:count] if absolute else aim
        angular = np.zeros(0)
        if turned is not None:
            new = _rotation(out[turning], form)
            angular, turned = (new * turned.inv()).as_rotvec(), new
        elif turning:
            angular = out[turning]
        moved = np.concatenate([linear, angular])
        if dt <= 1e-9:
            if mode != "joint_velocity" and np.abs(moved).max() > 1e-6:
                found.append(f"{np.abs(moved).max():.3g} moved in no time")
            continue
        steps = [*steps[-2:], dt]
        least = min(steps)
        now_speed = moved / dt if mode != "joint_velocity" else moved
        now_push = (now_speed - speed) / dt
        scale = [np.minimum(v[turning].min(), v[turning]) if turning else v[:0] for v in (velocity, acceleration)]
        if turning and absolute:
            scale = [np.full(3, s.min()) for s in scale]
        v_max = np.concatenate([velocity[:count], scale[0]])
        a_max = np.concatenate([acceleration[:count], scale[1]])
        found += _over("velocity", now_speed, v_max, grain / dt, worst)
        found += _over("acceleration", now_push, a_max, 2 * grain / (dt * least), worst)
        if jerk is not None:
            j_turn = np.full(len(moved) - count, jerk[turning].min()) if turning else jerk[:0]
            j_max = np.concatenate([jerk[:count], j_turn])
            found += _over("jerk", (now_push - push) / dt, j_max, 4 * grain / (dt * least**2), worst)
        if not stopping:
            end = out[:count] if absolute else place + now_speed[:count] * dt
            hardest = np.maximum(np.abs(speed[:count]) - acceleration[:count] * dt, 0.0)
            outward = ((end > high + 1e-4) & (now_speed[:count] > 1e-4)) | (
                (end < low - 1e-4) & (now_speed[:count] < -1e-4)
            )
            if (outward & (absolute | (np.abs(now_speed[:count]) > hardest + 1e-4))).any() and (
                absolute or jerk is None
            ):
                found.append(f"box left: {end}")
        if gripper:
            if not np.isnan(grip):
                rate, allowed = np.array([(out[-1] - grip) / dt]), velocity[-1:]
                found += _over("gripper rate", rate, allowed, 1e-6 / dt, worst)
            grip = out[-1]
        lows = np.array([d.low for d in contract.action.dims])
        highs = np.array([d.high for d in contract.action.dims])
        slack = 1e-5 * np.maximum(np.abs(lows), np.abs(highs))
        is_bounded = np.ones(len(out), bool)
        is_bounded[turning] = not absolute  # a rotation may be written in more than one way
        if (((out < lows - slack) | (out > highs + slack)) & is_bounded).any():
            found.append(f"range left: {out}")
        speed, push = now_speed, now_push
    return found


def _over(what: str, values: np.ndarray, limits: np.ndarray, grain: float, worst: dict[str, float]) -> list[str]:
    sizes = np.abs(values)
    used = float(np.max((sizes - grain) / limits))
    worst[what] = max(worst.get(what, 0.0), used)
    broken = sizes > limits * (1 + 1e-4) + grain
    return [f"{what}: {values[i]:.6g} over {limits[i]:g}" for i in np.flatnonzero(broken)]


def _rotation(values: np.ndarray, form: str) -> Rotation:
    if form == "axis_angle":
        return Rotation.from_rotvec(values)
    return Rotation.from_euler("xyz", values) if form == "euler_xyz" else Rotation.from_quat(values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6,000 chunks instead of 1,000,000")
    parser.add_argument("--chunks", type=int, default=0, help="another number of chunks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "safety.json")
    arguments = parser.parse_args(argv)
    wanted = arguments.chunks or (6_000 if arguments.quick else 1_000_000)
    robots = contracts()
    episodes = max(1, round(wanted / CHUNKS_PER_EPISODE / len(robots)))
    table = Table(title=f"{episodes * CHUNKS_PER_EPISODE * len(robots):,} chunks through the safety filter")
    for column in ("contract", "actions", "violations", "velocity", "acceleration", "jerk", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column == "contract" else "right")
    every: list[np.ndarray] = []
    rows: dict[str, dict[str, Any]] = {}
    violations = 0
    codes: Counter[str] = Counter()
    for number, (name, contract) in enumerate(robots.items()):
        worst: dict[str, float] = {}
        found: list[str] = []
        costs: list[float] = []
        for k in range(episodes):
            episode = Episode(contract, arguments.seed + 1_000_003 * number + k)
            episode.run()
            found += check_episode(episode, worst)
            costs += episode.costs
            codes.update(episode.codes)
        spent = np.array(costs) * 1e3
        every.append(spent)
        violations += len(found)
        p50, p99 = np.percentile(spent, [50, 99])
        rows[name] = {"actions": len(costs), "violations": len(found), "examples": found[:5], "share_used": worst}
        rows[name] |= {"p50_ms": p50, "p99_ms": p99}
        share = [f"{worst.get(w, 0.0):.1%}" for w in ("velocity", "acceleration", "jerk")]
        table.add_row(name, f"{len(costs):,}", str(len(found)), *share, f"{p50:.3f}", f"{p99:.3f}")
    Console(width=100).print(table)
    spent = np.concatenate(every)
    p50, p99 = np.percentile(spent, [50, 99])
    result = {
        "command": ["python", "-m", "benchmarks.runtime.safety", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(numpy=np.__version__),
        "chunks": episodes * CHUNKS_PER_EPISODE * len(robots),
        "actions": len(spent),
        "violations": violations,
        "headline": {"violations": violations, "p50_ms": p50, "p99_ms": p99},
        "contracts": rows,
        "events": dict(codes.most_common()),
        "goal": {"violations": 0, "p50_ms": GOAL_MS},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print("events: " + ", ".join(f"{code} {n}" for code, n in codes.most_common()))
    print(
        f"safety: {violations} violations in {result['chunks']:,} chunks ({len(spent):,} actions), "
        f"{p50:.3f} ms per action at the median (goal 0 violations, < {GOAL_MS} ms)"
    )
    return 0 if violations == 0 and p50 < GOAL_MS else 1


if __name__ == "__main__":
    sys.exit(main())
