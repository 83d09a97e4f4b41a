"""LIBERO rollouts per minute: Ratchet's environment against the benchmark's own, same actions, same processes.

Both sides replay the same recorded episodes (the scripted expert's, in chunks of 8), in worker processes, one
environment each. The naive side does what published evaluation loops do: `reset()` with a recompile, initial state,
settling, both cameras rendered at every step. Ratchet's side resets without recompiling and renders both cameras once
per chunk. Because the two are bitwise equal, the episodes must end after the same number of steps, in the same state.

    python -m benchmarks.learner.rollouts [--suite libero_object] [--task NAME] [--workers 2] [--quick]

Compiling the model at start-up is not timed on either side. Exit 1 where Ratchet is less than 6 times as fast or an
episode differs. `--quick` takes one round of one episode per worker, cut after four chunks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import machine

ROOT = Path(__file__).resolve().parents[2]
GOAL = 6.0
CHUNK = 8
REPEATS = 4
CAMERAS = ("agentview", "wrist")


class Episode(NamedTuple):
    """A recorded attempt. actions: (T, 7) float32, physical units."""

    initial_state: int
    actions: np.ndarray


class Outcome(NamedTuple):
    """What must agree between the sides: steps run, success, final simulator state; `checksum` keeps frames used."""

    steps: int
    success: bool
    state: np.ndarray
    checksum: int


class Side(Protocol):
    """One environment under test."""

    def run(self, episode: Episode) -> Outcome: ...

    def close(self) -> None: ...


class Ratchet:
    def __init__(self, suite: str, task: str) -> None:
        from ratchet_sim.libero.env import LiberoTaskEnv

        self.env = LiberoTaskEnv(suite, task)

    def run(self, episode: Episode) -> Outcome:
        env, checksum, steps = self.env, 0, 0
        env.reset(episode.initial_state)
        for start in range(0, len(episode.actions), CHUNK):
            # What a policy would be given, at the only instant at which it decides.
            checksum += sum(int(env.render(camera)[0, 0, 0]) for camera in CAMERAS)
            for action in episode.actions[start : start + CHUNK]:
                env.step(action)
                steps += 1
                if env.success():
                    return Outcome(steps, True, env.simulator_state(), checksum)
        return Outcome(steps, False, env.simulator_state(), checksum)

    def close(self) -> None:
        self.env.close()


class Naive:
    def __init__(self, suite: str, task: str) -> None:
        from ratchet_sim.libero.env import CONTRACT
        from ratchet_sim.testing.libero_reference import ReferenceLibero
        from ratchet_vla.contract import RobotContract

        self.env = ReferenceLibero(suite, task)
        self.scale = np.array([d.command_scale for d in RobotContract.load(CONTRACT).action.dims], np.float32)

    def run(self, episode: Episode) -> Outcome:
        env, checksum, steps = self.env, 0, 0
        env.reset(episode.initial_state)
        for start in range(0, len(episode.actions), CHUNK):
            checksum += sum(int(image[0, 0, 0]) for image in env.images().values())
            for action in episode.actions[start : start + CHUNK]:
                env.step((action / self.scale).astype(np.float64))
                steps += 1
                if env.success():
                    return Outcome(steps, True, env.simulator_state(), checksum)
        return Outcome(steps, False, env.simulator_state(), checksum)

    def close(self) -> None:
        self.env.close()


SIDES: dict[str, Callable[[str, str], Side]] = {"naive": Naive, "ratchet": Ratchet}


def record(suite: str, task: str, states: Sequence[int], limit: int) -> list[Episode]:
    """The scripted expert's episodes, at most `limit` steps of each."""
    from ratchet_sim.libero.env import LiberoTaskEnv
    from ratchet_sim.libero.expert import make_libero_expert

    env, expert, episodes = LiberoTaskEnv(suite, task), make_libero_expert(suite, task), []
    for state in states:
        env.reset(state)
        expert.reset(env)
        actions: list[np.ndarray] = []
        while len(actions) < min(limit, env.info.horizon) and not env.success():
            actions.append(expert.act(env))
            env.step(actions[-1])
        episodes.append(Episode(state, np.stack(actions)))
    env.close()
    return episodes


def work(connection: Connection, side: str, suite: str, task: str) -> None:
    """Worker process: build one environment, warm it up with a short episode, then run what comes."""
    built: Side = SIDES[side](suite, task)
    built.run(Episode(0, np.zeros((1, 7), np.float32)))
    connection.send(None)
    while (episode := connection.recv()) is not None:
        started = time.process_time()
        outcome = built.run(episode)
        connection.send((outcome, time.process_time() - started))
    built.close()


class Workers:
    """Processes of one side; `run` hands out episodes in turn and waits for all."""

    def __init__(self, side: str, suite: str, task: str, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, side, suite, task), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, episodes: Sequence[Episode]) -> tuple[float, float, list[Outcome]]:
        """Wall-clock seconds, processor seconds, and the outcomes in order; each worker takes every W-th episode."""
        started = time.perf_counter()
        results = []
        for first in range(0, len(episodes), len(self.pipes)):
            batch = episodes[first : first + len(self.pipes)]
            for pipe, episode in zip(self.pipes, batch, strict=True):
                pipe.send(episode)
            results += [pipe.recv() for pipe in self.pipes]
        return time.perf_counter() - started, sum(cpu for _, cpu in results), [outcome for outcome, _ in results]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(30)


def same(one: Outcome, other: Outcome) -> bool:
    return (
        one.steps == other.steps
        and one.success == other.success
        and one.checksum == other.checksum
        and np.array_equal(one.state, other.state)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", default="", help="the suite's first where empty")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/rollouts.json")
    arguments = parser.parse_args(argv)
    from ratchet_sim.libero.suites import libero_task_infos

    suite = arguments.suite
    task = arguments.task or libero_task_infos(suite)[0].name
    rounds = 1 if arguments.quick else arguments.rounds
    episodes = record(suite, task, range(arguments.workers), 4 * CHUNK if arguments.quick else 10**6)

    per_minute: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    equal = True
    # One side's processes at a time: memory and cores are the same for both, and rounds alternate against drift. The
    # fast side plays its episodes several times, so that both sides are timed over a similar stretch.
    for index in range(rounds):
        outcomes = {}
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            todo = episodes * (REPEATS if side == "ratchet" else 1)
            workers = Workers(side, suite, task, arguments.workers)
            seconds, cpu, outcomes[side] = workers.run(todo)
            workers.close()
            per_minute[side].append(60 * len(todo) / seconds)
            processor[side].append(cpu / len(todo))
            print(
                f"round {index + 1}, {side}: {per_minute[side][-1]:.2f} episodes/min, {processor[side][-1]:.2f} CPU s",
                file=sys.stderr,
                flush=True,
            )
        pairs = zip(outcomes["naive"] * REPEATS, outcomes["ratchet"], strict=True)
        equal = equal and all(same(a, b) for a, b in pairs)

    ratios = [fast / slow for fast, slow in zip(per_minute["ratchet"], per_minute["naive"], strict=True)]
    ratio = statistics.median(ratios)
    cpu_ratio = statistics.median(processor["naive"]) / statistics.median(processor["ratchet"])
    table = Table(title=f"{suite}/{task}: {len(episodes[0].actions)} steps per episode, {arguments.workers} workers")
    for name in ("environment", "episodes/min", "range", "CPU s/episode"):
        table.add_column(name, justify="left" if name == "environment" else "right")
    for side, rates in per_minute.items():
        table.add_row(
            side,
            f"{statistics.median(rates):.2f}",
            f"{min(rates):.2f} - {max(rates):.2f}",
            f"{statistics.median(processor[side]):.2f}",
        )
    Console(width=110).print(table)
    result = {
        "command": ["python", "-m", "benchmarks.learner.rollouts", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(gl=os.environ.get("MUJOCO_GL", "egl")),
        "repeats": rounds,
        "spread": [min(ratios), max(ratios)],
        "suite": suite,
        "task": task,
        "workers": arguments.workers,
        "chunk": CHUNK,
        "steps": [len(e.actions) for e in episodes],
        "episodes_per_minute": per_minute,
        "cpu_seconds_per_episode": processor,
        "speedup": ratio,
        "speedup_cpu": cpu_ratio,
        "equal": equal,
        "goal": GOAL,
    }
    if not arguments.quick:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"rollouts: {ratio:.1f} x the naive environment ({cpu_ratio:.1f} x in processor time), episodes equal: {equal} "
        f"(goal >= {GOAL:.0f} x, equal)"
    )
    return 0 if ratio >= GOAL and equal else 1


if __name__ == "__main__":
    sys.exit(main())
