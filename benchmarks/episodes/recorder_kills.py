"""Whether kill -9 costs more than half a second of recording: random instants, the recorder or everything, many times.

A victim process records short episodes without a pause and says which are finished. After a random time either its
recorder process or the whole process group is killed; the next start recovers. In the end every episode that was ever
said to be finished must be there with its hash, and every unfinished one must be readable up to its last flush.

    python -m benchmarks.episodes.recorder_kills [--quick]

Exit 1 where the goal is missed: 0 finished episodes lost, 0 unreadable. What was lost of the open episodes and how long
recovery took is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.harness.results import machine
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.library.store import Damage, EpisodeStore
from ratchet_vla.episodes.recorder.client import Recorder, RecorderConfig
from ratchet_vla.paths import python_path
from ratchet_vla.records import ControlTick, Mark, Observation

ROOT = Path(__file__).resolve().parents[2]
HZ = 100.0  # faster than an arm, so that a kill hits every part of a recording


def victim(folder: str, length: float) -> None:
    """Record until killed. Says "ready <pid of the recorder>" and "finished <id>"."""
    robot = RobotContract.load(ROOT / "robots/libero.yaml")
    recorder = Recorder(folder, robot, RecorderConfig(memory_mb=32, min_free_gb=0.1))
    assert recorder._process is not None
    print("ready", recorder._process.pid, flush=True)
    rng = np.random.default_rng()
    images = {c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in robot.cameras}
    state = {s.name: np.zeros(s.size, np.float32) for s in robot.state}
    action = np.zeros(robot.action.size, np.float32)
    told = 0
    while True:
        start = time.monotonic()
        recorder.begin("kill", "move", start)
        for i in range(int(length * HZ)):
            time.sleep(max(start + i / HZ - time.monotonic(), 0.0))
            now = time.monotonic()
            if i % 10 == 0:
                recorder.observation(Observation(images, state, "move", now, i // 10))
            for name, image in images.items():
                recorder.frame(name, image, now)
            recorder.tick(ControlTick(now, now, i, action, action, Mark.NONE, i // 10, i % 10, "", state))
            for digest in recorder.status().finished[told:]:
                print("finished", digest, flush=True)
                told += 1
        recorder.end("horizon", None, "", time.monotonic())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 kills instead of 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/recorder_kills.json")
    parser.add_argument("--victim", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.victim:
        victim(arguments.victim[0], float(arguments.victim[1]))
    kills = 10 if arguments.quick else 300
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    finished: list[str] = []
    lost, recovery, bytes_recovered, unreadable, opened = [], [], [], 0, 0
    try:
        for number in track(range(kills), "kills", console=Console(stderr=True)):
            everything = number % 2 == 0
            command = [sys.executable, str(Path(__file__).resolve()), "--victim", str(folder), f"{rng.uniform(0.1, 2)}"]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path(ROOT, inherited=False)},
            )
            assert process.stdout is not None
            recorder = int(process.stdout.readline().split()[1])
            time.sleep(rng.uniform(0.0, 1.5))
            if everything:
                os.killpg(process.pid, signal.SIGKILL)
                killed = time.monotonic()
            else:
                os.kill(recorder, signal.SIGKILL)
                killed = time.monotonic()
                os.killpg(process.pid, signal.SIGKILL)
            finished += [line.split()[1] for line in process.stdout if line.startswith("finished")]
            process.wait()
            _until_gone(recorder)
            store = EpisodeStore(folder, create=True)
            for result in store.take_stock().recovered:
                opened += 1
                recovery.append(result.seconds)
                if result.path is None:
                    continue
                bytes_recovered.append(result.path.stat().st_size)
                try:
                    ticks = store.open(_id(store, result.path)).episode(images=False).ticks
                except Exception as error:
                    unreadable += 1
                    print(f"unreadable: {error}", file=sys.stderr)
                    continue
                if ticks:
                    lost.append(killed - ticks[-1].stamp)
        store = EpisodeStore(folder, create=True)
        there = set(store.cards())
        gone = [i for i in finished if i not in there]
        damaged = [d for d in store.verify() if isinstance(d, Damage)]
        entered = len(there)
    finally:
        shutil.rmtree(folder)
    figures = {
        "command": ["python", "-m", "benchmarks.episodes.recorder_kills", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": kills,
        "headline": {"finished": len(finished), "finished_lost": len(gone), "unreadable": unreadable},
        "episodes_in_the_end": entered,
        "unfinished_files": opened,
        "damage": [dataclasses.asdict(d) for d in damaged],
        "lost_seconds": _spread(lost),
        "recovery_ms": _spread([r * 1e3 for r in recovery]),
        "recovered_bytes": _spread([float(b) for b in bytes_recovered]),
        "goal": {"finished_lost": 0, "unreadable": 0},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{opened} files were open when killed; of each, the last {_words(lost, 's')} were not on the disk yet")
    print(f"recovery took {_words([r * 1e3 for r in recovery], 'ms')} per file")
    print(
        f"recorder_kills: {len(gone)} of {len(finished)} finished episodes lost, {unreadable} unreadable, "
        f"{len(damaged)} damaged after {kills} kills (goal 0, 0, 0)"
    )
    return 0 if not gone and not unreadable and not damaged else 1


def _until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}/exe").exists() and _state(pid) not in "ZX":
        time.sleep(0.005)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def _id(store: EpisodeStore, path: Path) -> str:
    return next(c.id for c in store.cards().values() if store.root / c.file == path)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": max(values), "count": len(values)}


def _words(values: list[float], unit: str) -> str:
    spread = _spread(values)
    return f"{spread['p50']:.3g} {unit} (median), {spread['max']:.3g} {unit} (most)" if spread else "nothing"


if __name__ == "__main__":
    sys.exit(main())
