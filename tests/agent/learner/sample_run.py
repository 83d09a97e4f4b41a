"""Synthetic run folders with every file that the report reads; seeded, no simulator."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

from ratchet_vla.learner.gate.decision import Comparison, GateConfig, decide
from ratchet_vla.learner.measures.intervals import mean
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix
from ratchet_vla.learner.report.run_folder import video_name

TASKS = ("pick_up_the_alphabet_soup_and_place_it_in_the_basket", "open <the> [top] drawer & wait", "push-v3")
HELD_OUT = ("close_the_microwave", "button-press-v3")


def sample_matrix(episodes: int = 40) -> SuccessMatrix:
    """Three trained and two held-out tasks; rates rise when a task is learned and stay."""
    rng = np.random.default_rng(0)
    rates = [
        [0.4, 0.35, 0.5, 0.3, 0.6],
        [0.9, 0.4, 0.5, 0.35, 0.6],
        [0.88, 0.85, 0.6, 0.3, 0.62],
        [0.9, 0.86, 1, 0.4, 0],
    ]
    matrix = SuccessMatrix(TASKS, HELD_OUT)
    for stage, row in enumerate(rates):
        for task, rate in zip(matrix.columns, row, strict=True):
            outcome = rng.random(episodes) < rate
            keys = [f"state-{i}/seed-0" for i in range(episodes)]
            matrix.record(stage, task, Cell.of(dict(zip(keys, map(bool, outcome), strict=True))))
    return matrix


def write_sample_run(folder: Path) -> None:
    """Fill `folder` with run.json, matrix.json, updates.jsonl, adapters.json and videos."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps(
            {
                "title": "sample sequence",
                "command": ["ratchet", "learn", "--tasks", *TASKS],
                "method": "seq_ft",
                "seed": 7,
                "contract": {"name": "libero", "id": "c0" * 32},
                "base_hash": "ab" * 32,
                "started": "2026-01-01T10:00:00",
                "config": {"grpo": {"clip_low": 0.2, "clip_high": 0.28}, "updates_per_task": 5},
                "host": {"cpu": "2 cores", "memory_gib": 8},
                "versions": {"python": "3.11", "torch": "2.13"},
                "initial_states": "train 0-24, evaluation 25-49",
            }
        )
    )
    sample_matrix().save(folder / "matrix.json")
    with (folder / "updates.jsonl").open("w") as file:
        for t, task in enumerate(TASKS):
            for update in range(5):
                record = {
                    "task": task,
                    "update": update,
                    "episodes": 64,
                    "successes": int(rng.binomial(64, 0.45 + 0.1 * update)),
                    "loss": float(0.02 * rng.standard_normal()),
                    "approx_kl": float(0.004 + 0.002 * rng.random()),
                    "entropy": 3.1 - 0.1 * update - 0.2 * t,
                    "clip_fraction": float(0.05 + 0.02 * rng.random()),
                    "seconds_rollout": 312.5,
                    "seconds_update": 48.0,
                }
                file.write(json.dumps(record) + "\n")
    (folder / "adapters.json").write_text(
        json.dumps([{"stage": k, "task": task, "id": f"{k}f" * 32, "tags": ["active"]} for k, task in enumerate(TASKS)])
    )
    (folder / "videos").mkdir()
    for n, (task, moment) in enumerate([(TASKS[0], "before"), (TASKS[0], "after"), (TASKS[1], "after")]):
        frames = np.zeros((4, 48, 64, 3), dtype=np.uint8)
        for i in range(4):
            frames[i, 10 * i : 10 * i + 10, :, n % 3] = 255
        iio.imwrite(folder / "videos" / video_name(task, moment), frames, duration=100, loop=0)


def sample_comparison() -> dict[str, Any]:
    """Two learned tasks and a held-out one of 20 states; the adapter wins on the first, loses on the held-out one."""
    wins = {"new": (9, 19), "earlier": (15, 18), "held_out": (12, 4)}
    pairs = []
    for (role, counts), task in zip(wins.items(), (TASKS[0], TASKS[1], HELD_OUT[0]), strict=True):
        base, adapter = ({f"state-{30 + i}": i < won for i in range(20)} for won in counts)
        pairs.append(Comparison(task, role, Cell.of(base), Cell.of(adapter)))  # type: ignore[arg-type]
    config = GateConfig(episodes=20, temperature=1.0, horizon=200)
    learned = pairs[:2]
    return {
        "adapter": {
            "id": "5a" * 32,
            "made by": "seq_ft: ratchet demo --suite x",
            "tasks learned": [TASKS[1], TASKS[0]],
        },
        "verdict": decide("5a" * 32, "", learned, config).as_dict(),
        "change": dataclasses.asdict(mean([c.change for c in learned])),
        "outcomes": {c.task: {"base": dict(c.active.episodes), "adapter": dict(c.candidate.episodes)} for c in learned},
        "when_made": decide("5a" * 32, "", pairs, config).as_dict(),
        "video": {"task": TASKS[0], "episode": "state-39", "why": "the first that only the adapter solved"},
        "update": {
            "task": HELD_OUT[1],
            "episodes": 16,
            "successes": 3,
            "approx_kl": 0.0123,
            "seconds_rollout": 31.0,
            "adapter_id": "5a" * 32,
            "to": "6b" * 32,
        },
    }
