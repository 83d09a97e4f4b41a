"""How often the scripted experts succeed, per task, clean and under executed noise; nothing is rendered.

    python -m benchmarks.science.experts --suite libero_object [--states 12] [--quick]

Half of the initial states are training states, half evaluation states. Exit 1 where fewer than 8 of 10 tasks reach
80 % without noise. `--quick` takes two states per task of the first five tasks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import machine
from ratchet_sim import registry
from ratchet_sim.base import Expert, TaskEnv, TaskInfo
from ratchet_sim.demonstrations import NoiseConfig
from ratchet_sim.testing.noisy_expert import NoisyExpert
from ratchet_vla.learner.measures.intervals import wilson

ROOT = Path(__file__).resolve().parents[2]
GOAL_RATE, GOAL_SHARE = 0.8, 0.8


def spread(ids: tuple[int, ...], count: int) -> list[int]:
    """`count` ids, evenly spaced over `ids`."""
    return [ids[i] for i in np.linspace(0, len(ids) - 1, count).round().astype(int)]


def attempt(env: TaskEnv, expert: Expert, state: int, horizon: int) -> int:
    """Control steps until success, 0 for none."""
    env.reset(state)
    expert.reset(env)
    for step in range(horizon):
        env.step(expert.act(env))
        if env.success():
            return step + 1
    return 0


def measure(info: TaskInfo, states: list[int], noise: NoiseConfig) -> dict[str, Any]:
    """Both columns of one task: steps to success per initial state."""
    env = registry.make_env(info.suite, info.name)
    try:
        expert = registry.make_expert(info.suite, info.name)
        started = time.perf_counter()
        clean = [attempt(env, expert, s, info.horizon) for s in states]
        seconds = (time.perf_counter() - started) / len(states)
        noisy = [attempt(env, NoisyExpert(expert, noise, seed=s), s, info.horizon) for s in states]
    finally:
        env.close()
    return {"task": info.name, "clean": clean, "noisy": noisy, "seconds_per_episode": round(seconds, 3)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--states", type=int, default=12, help="initial states per task")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    infos = registry.tasks(arguments.suite)
    count = 2 if arguments.quick else arguments.states
    infos = infos[:5] if arguments.quick else infos
    noise = NoiseConfig(probability=0.05)

    table = Table(title=f"scripted experts, {arguments.suite}, {count} initial states per task")
    for name in ("task", "success % [95 %]", "steps", "with noise %", "s/episode"):
        table.add_column(name, justify="left" if name == "task" else "right")
    rows, solved = [], 0
    for info in infos:
        train, evaluation = spread(info.train_states, count // 2), spread(info.evaluation_states, count - count // 2)
        row = measure(info, train + evaluation, noise)
        clean, noisy = [s for s in row["clean"] if s], [s for s in row["noisy"] if s]
        solved += len(clean) >= GOAL_RATE * count
        table.add_row(
            info.name,
            wilson(len(clean), count).percent(),
            f"{np.median(clean):.0f}" if clean else "-",
            f"{100 * len(noisy) / count:.0f}",
            f"{row['seconds_per_episode']:.2f}",
        )
        interval = wilson(len(clean), count)
        rows.append(
            {**row, "states": train + evaluation, "rate": interval.estimate, "wilson": [interval.low, interval.high]}
        )
        print(f"{info.name}: {len(clean)}/{count}, with noise {len(noisy)}/{count}", file=sys.stderr, flush=True)
    Console(width=150).print(table)
    total = sum(bool(s) for r in rows for s in r["clean"])
    overall = wilson(total, count * len(rows))
    result = {
        "command": ["python", "-m", "benchmarks.science.experts", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": count,
        "spread": [overall.low, overall.high],
        "suite": arguments.suite,
        "horizon": infos[0].horizon,
        "noise": vars(noise),
        "tasks": rows,
        "rate": overall.estimate,
        "rate_with_noise": sum(bool(s) for r in rows for s in r["noisy"]) / (count * len(rows)),
        "tasks_solved": solved,
        "goal": f"{GOAL_SHARE:.0%} of tasks at >= {GOAL_RATE:.0%}",
    }
    output = arguments.output or ROOT / f"benchmarks/results/experts_{arguments.suite}.json"
    if not arguments.quick or arguments.output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"experts_{arguments.suite}: {solved} of {len(rows)} tasks at >= {GOAL_RATE:.0%}, all {overall.percent()} % "
        f"(goal {GOAL_SHARE * len(rows):.0f} of {len(rows)})"
    )
    return 0 if solved >= GOAL_SHARE * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
