"""Export of 200 episodes to LeRobotDataset v3: opened by LeRobot's own loader, every value and frame held against the
recording; minutes and bytes.

LeRobot needs other versions of most packages, so it lives in an environment of its own:

    python3.12 -m venv lerobot-env
    lerobot-env/bin/pip install 'lerobot[dataset]==0.6.1'
    python -m benchmarks.episodes.export --lerobot lerobot-env/bin/python [--quick]

Ten rollouts of scripted experts are written as 200 episodes (JPEG streams, two cameras). The export compares everything
it wrote with the recordings by itself; then LeRobot's loader gives every row, and its values must be equal bit by bit,
its frames near. Also written: robomimic HDF5 of the same episodes, compared without tolerance.

Exit 1 where the goal is missed: opens in LeRobot's loader, all rows there and equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.episodes.recorded import TASKS, fill, rollout, two_cameras
from benchmarks.harness.results import machine
from ratchet_vla.episodes.exchange.hdf5 import export_hdf5
from ratchet_vla.episodes.exchange.lerobot_export import ExportOptions, export_lerobot
from ratchet_vla.episodes.exchange.rows import rows, state_vector
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore

ROOT = Path(__file__).resolve().parents[2]

# Runs in the other environment: prints one line of JSON. Arguments: the data set, the expected values, the backend.
LOADER = """
import json, sys, time
import numpy as np
from importlib.metadata import version
from lerobot.datasets.lerobot_dataset import LeRobotDataset

folder, expected, backend = sys.argv[1:4]
want = np.load(expected)
began = time.monotonic()
data = LeRobotDataset("local/ratchet", root=folder, video_backend=backend)
opened = time.monotonic() - began
cameras = [k for k in data.features if k.startswith("observation.images.")]
unequal, errors, lengths = 0, [], {}
for i in range(len(data)):
    row = data[i]
    episode, step = int(row["episode_index"]), int(row["frame_index"])
    lengths[episode] = lengths.get(episode, 0) + 1
    source = episode % int(want["rollouts"])
    for key in ("observation.state", "action"):
        unequal += not np.array_equal(row[key].numpy(), want[f"{source}/{key}"][step])
    unequal += row["task"] != str(want[f"{source}/task"])
    for camera in cameras:
        got = row[camera].numpy().transpose(1, 2, 0) * 255.0
        errors.append(float(np.abs(got - want[f"{source}/{camera}"][step]).mean()))
print(json.dumps({
    "version": version("lerobot"), "python": sys.version.split()[0], "torch": version("torch"), "backend": backend,
    "episodes": data.num_episodes, "rows": len(data), "unequal": unequal, "open_seconds": opened,
    "seconds": time.monotonic() - began, "mean_error": float(np.mean(errors)), "worst_error": max(errors),
    "frames": len(errors), "lengths": [lengths[e] for e in sorted(lengths)],
    "fps": data.fps, "stats": sorted(data.meta.stats),
}))
"""


def expected(annotations: Annotations, count: int, path: Path) -> int:
    """What the loader must give, per rollout; returns the rows of all episodes together."""
    cards = list(annotations.store.cards().values())
    table: dict[str, Any] = {"rollouts": count}
    lengths = []
    for i, card in enumerate(cards[:count]):
        reader = annotations.store.open(card.id)
        kept = list(rows(reader, "control", card.success))
        robot = reader.info.robot()
        table[f"{i}/observation.state"] = np.stack([state_vector(r.state, robot) for r in kept])
        table[f"{i}/action"] = np.stack([r.action for r in kept])
        table[f"{i}/task"] = card.instruction
        for camera in card.cameras:
            table[f"{i}/observation.images.{camera}"] = np.stack([r.images[camera] for r in kept])
        lengths.append(len(kept))
    np.savez(path, **table)
    return sum(lengths[i % count] for i in range(len(cards)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 episodes instead of 200")
    parser.add_argument("--lerobot", type=Path, help="Python of an environment with LeRobot")
    parser.add_argument("--backend", default="pyav", help="LeRobot's video backend: pyav or torchcodec")
    parser.add_argument("--codec", default="h264", choices=["av1", "h264"])
    parser.add_argument("--size", type=int, default=192, help="pixels of each side")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/export.json")
    arguments = parser.parse_args(argv)
    episodes, unique, steps = (8, 2, 30) if arguments.quick else (200, 10, 80)
    robot = two_cameras(arguments.size)
    console = Console(width=100)
    console.print(f"rendering {unique} rollouts", style="dim")
    made = [rollout(robot, TASKS[i % len(TASKS)], i // len(TASKS), steps) for i in range(unique)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations = Annotations(EpisodeStore(folder / "store", create=True))
        began = time.monotonic()
        fill(annotations.store, robot, made, episodes)
        recorded = sum(c.bytes for c in annotations.store.cards().values())
        writing = time.monotonic() - began
        total = expected(annotations, unique, folder / "expected.npz")
        console.print(f"exporting {episodes} episodes, {total} rows", style="dim")
        report = export_lerobot(annotations, folder / "set", options=ExportOptions(codec=arguments.codec))
        hdf5 = export_hdf5(annotations, folder / "set.hdf5")
        loaded: dict[str, Any] | None = None
        if arguments.lerobot:
            console.print("LeRobot's loader reads every row", style="dim")
            command = [str(arguments.lerobot), "-c", LOADER, str(folder / "set"), str(folder / "expected.npz")]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [*command, arguments.backend], capture_output=True, text=True, env=environment, check=False
            )
            if done.returncode == 0:
                loaded = json.loads(done.stdout.strip().splitlines()[-1])
            else:
                print(done.stderr[-3000:], file=sys.stderr)
    table = Table(title=f"{episodes} episodes, {total} rows, 2 cameras of {arguments.size}x{arguments.size}")
    for column in ("what", "MB", "seconds", "mean error of 255", "worst"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("recordings (MCAP, JPEG)", f"{recorded / 1e6:.1f}", f"{writing:.1f}", "", "")
    table.add_row(
        f"LeRobotDataset v3, {arguments.codec}",
        f"{report.bytes / 1e6:.1f}",
        f"{report.seconds:.1f}",
        f"{report.mean_error:.2f}",
        f"{report.worst_error:.2f}",
    )
    table.add_row("robomimic HDF5", f"{hdf5.bytes / 1e6:.1f}", f"{hdf5.seconds:.1f}", "0", "0")
    good = False
    if loaded:
        good = loaded["unequal"] == 0 and loaded["rows"] == total and loaded["episodes"] == episodes
        good = good and loaded["worst_error"] < ExportOptions().tolerance
        name = f"read by LeRobot {loaded['version']} ({loaded['backend']})"
        table.add_row(
            name, "", f"{loaded['seconds']:.1f}", f"{loaded['mean_error']:.2f}", f"{loaded['worst_error']:.2f}"
        )
    console.print(table)
    result = {
        "command": ["python", "-m", "benchmarks.episodes.export", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": episodes,
        "headline": {"opens_in_lerobot": bool(loaded), "unequal_values": loaded["unequal"] if loaded else None},
        "export": dataclasses.asdict(report) | {"target": ""},
        "hdf5": dataclasses.asdict(hdf5) | {"target": ""},
        "recordings": {"bytes": recorded, "seconds": writing},
        "lerobot": {k: v for k, v in (loaded or {}).items() if k != "lengths"},
        "spread": {"mean_error": report.mean_error, "worst_error": report.worst_error},
        "goal": {"rows": total, "unequal": 0},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    minutes = report.seconds / 60
    if not arguments.lerobot:
        print("LeRobot's loader was not asked: give --lerobot (see --help)")
    told = f"{loaded['rows']} of {total} rows, {loaded['unequal']} unequal" if loaded else "not opened"
    print(
        f"export: {episodes} episodes in {minutes:.2f} minutes, {report.bytes / 1e6:.1f} MB; LeRobot's loader: {told} "
        "(goal all rows, 0 unequal)"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
