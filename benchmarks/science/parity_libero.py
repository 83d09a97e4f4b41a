"""Whether Ratchet's LIBERO environment is the benchmark's own, over many tasks: physics bit by bit, frames by pixel.

For every task, Ratchet's environment is reset to several initial states in random order, each time after a stretch of
another episode, and compared at every step with a freshly constructed `OffScreenRenderEnv`.

    python -m benchmarks.science.parity_libero [--tasks 8] [--steps 60] [--quick]

Tasks are drawn from all suites that can be run, LIBERO-PRO's included. Exit 1 at the first difference in any of them.
`--quick` takes one task of one suite.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import machine
from ratchet_sim.libero.env import LiberoTaskEnv, libero_suites, libero_task_infos
from ratchet_sim.testing.libero_reference import ReferenceLibero

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
FRAME_EVERY = 10


def choose(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` tasks: the five original suites first, then perturbed ones at random; a random task of each."""
    perturbed = [s for s in libero_suites() if s not in FIRST]
    suites = [*FIRST, *rng.permutation(perturbed)][:count]
    chosen = []
    for suite in suites:
        infos = libero_task_infos(str(suite))
        chosen.append((str(suite), infos[rng.integers(len(infos))].name))
    return chosen


def compare(suite: str, task: str, steps: int, episodes: int, rng: np.random.Generator) -> dict[str, object]:
    """Counts of compared and differing steps and frames for one task, and what the steps cost in ms."""
    env = LiberoTaskEnv(suite, task)
    scale = np.array([d.command_scale for d in env.contract.action.dims], np.float32)
    ids = [*env.info.train_states, *env.info.evaluation_states]
    counts = dict.fromkeys(("steps", "steps_differ", "frames", "frames_differ"), 0)
    ours = 0.0
    for _ in range(episodes):
        state = int(rng.choice(ids))
        # Towards the table, so that things are touched.
        commands = np.clip(rng.normal([0.2, 0, -0.5, 0, 0, 0, 0], 0.7, size=(steps, 7)), -1, 1).astype(np.float32)
        env.reset(int(rng.choice(ids)))
        for command in rng.permutation(commands)[: steps // 2]:
            env.step(command * scale)
        env.reset(state)
        plain = ReferenceLibero(suite, task)
        plain.reset(state)
        for index, command in enumerate(commands):
            counts["steps"] += 1
            counts["steps_differ"] += not (
                np.array_equal(env.simulator_state(), plain.simulator_state()) and env.success() == plain.success()
            )
            if index % FRAME_EVERY == 0:
                for camera, image in plain.images().items():
                    counts["frames"] += 1
                    counts["frames_differ"] += not np.array_equal(env.render(camera), image)
            started = time.perf_counter()
            env.step(command * scale)
            ours += time.perf_counter() - started
            plain.step((command * scale / scale).astype(np.float64))
        plain.close()
    env.close()
    return {"suite": suite, "task": task, **counts, "step_ms": round(1e3 * ours / counts["steps"], 2)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/parity_libero.json")
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(arguments.seed)
    tasks, steps, episodes = arguments.tasks, arguments.steps, arguments.episodes
    if arguments.quick:
        tasks, steps, episodes = 1, 20, 1
    table = Table(title="LIBERO without recompiling against a fresh OffScreenRenderEnv")
    for name in ("suite", "task", "steps", "differ", "frames", "differ "):
        table.add_column(name, justify="left" if name in ("suite", "task") else "right")
    rows = []
    for suite, task in choose(tasks, rng):
        row = compare(suite, task, steps, episodes, rng)
        rows.append(row)
        table.add_row(*(str(row[k]) for k in ("suite", "task", "steps", "steps_differ", "frames", "frames_differ")))
        print(row, file=sys.stderr, flush=True)
    Console(width=150).print(table)
    differ = sum(int(str(r["steps_differ"])) + int(str(r["frames_differ"])) for r in rows)
    total = sum(int(str(r["steps"])) + int(str(r["frames"])) for r in rows)
    result = {
        "command": ["python", "-m", "benchmarks.science.parity_libero", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": episodes,
        "spread": 0.0,
        "tasks": rows,
        "compared": total,
        "differ": differ,
        "goal": 0,
    }
    if not arguments.quick:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"parity_libero: {differ} of {total} steps and frames differ (goal 0)")
    return 0 if differ == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
