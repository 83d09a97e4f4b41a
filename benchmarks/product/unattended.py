"""Soak test: robot process, learner process and gate over three tasks, both killed at random, to the end.

Starts `ratchet learner` and `ratchet robot` with keys over CURVE on this machine, kills -9 one of them at seeded random
moments, starts it again, and waits until the learner says that all tasks are over. Then all is checked from files:
the journal's chain, every episode of every batch, the store, the gate's decisions. The timeline is printed.

    python -m benchmarks.product.unattended [--quick] [--seed N] [--out runs/unattended]

Stopped, the same command goes on. Exit 1 where a task was not promoted, an earlier task lies below the gate's allowed
drop, an episode was lost, doubled or off-policy, or the store is damaged.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.results import machine
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.learner.service.telemetry import timeline
from ratchet_vla.link import keys as link_keys
from ratchet_vla.link.robot.outbox import history
from ratchet_vla.paths import python_path
from ratchet_vla.storage.journal import Event, read

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("button-press", "handle-press", "button-press-topdown")
PORT = 5571
PAUSE = (90.0, 420.0)  # seconds between two kills: each life must be able to get something done


class Side:
    """One process of the two, started again whenever it has ended."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.command, self.log = name, command, log
        self.lives = 0
        self.start()

    def start(self) -> None:
        self.lives += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(inherited=False)}
        with self.log.open("a") as out:
            out.write(f"--- life {self.lives}\n")
            out.flush()
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, env=environment, cwd=ROOT)
        self.handle = os.pidfd_open(self.process.pid)

    def ended(self) -> int:
        """Take the end of a process that has ended; its exit code."""
        os.close(self.handle)
        return self.process.wait()


def commands(out: Path, quick: bool, seed: int) -> dict[str, list[str]]:
    """The two command lines, as a user would give them."""
    ratchet = [sys.executable, "-m", "ratchet_vla.cli.main"]
    address = f"tcp://127.0.0.1:{PORT}"
    keys = out / "keys"
    tasks = TASKS[:1] if quick else TASKS
    learner = ["learner", "--tasks", *tasks, "--out", str(out / "learner"), "--address", address]
    learner += ["--keys", str(keys / "learner" / "learner.key_secret"), "--seed", str(seed), "--workers", "1"]
    if quick:
        learner += ["--updates", "1", "--groups", "4", "--group-size", "4", "--noise-correlation", "0.9"]
        learner += ["--gate.episodes", "20", "--gate.new-task", "not_worse", "--lora.rank", "4", "--lora.alpha", "4"]
    else:
        learner += ["--recipe", "demo", "--gate.episodes", "100"]
    robot = ["robot", "--out", str(out / "robot"), "--learner", address, "--until-done"]
    robot += ["--keys", str(keys / "robot-1" / "robot-1.key_secret")]
    robot += ["--learner-key", str(keys / "learner" / "learner.key")]
    robot += ["--lora.rank", "4", "--lora.alpha", "4"] if quick else ["--recipe", "demo"]
    return {"learner": ratchet + learner, "robot": ratchet + robot}


def work(out: Path, quick: bool, seed: int, limit: float) -> dict[str, Any]:
    """Run both to the end; returns kills and seconds of this call."""
    if not (out / "keys").exists():
        link_keys.make(out / "keys" / "learner", "learner")
        link_keys.make(out / "keys" / "robot-1", "robot-1")
        link_keys.allow(out / "keys" / "learner", out / "keys" / "robot-1" / "robot-1.key")
    kills_path = out / "kills.jsonl"
    done = len(kills_path.read_text().splitlines()) if kills_path.exists() else 0
    draw = random.Random(f"{seed} {done}")
    began = time.monotonic()
    sides = {name: Side(name, command, out / f"{name}.log") for name, command in commands(out, quick, seed).items()}
    pause = (25.0, 40.0) if quick else PAUSE
    strike = began + draw.uniform(*pause)
    finished = False
    try:
        while not finished:
            now = time.monotonic()
            if now - began > limit:
                raise TimeoutError(f"not at the end after {limit:.0f} s")
            handles = {side.handle: side for side in sides.values()}
            ready, _, _ = select.select(list(handles), [], [], max(0.0, strike - now))
            for handle in ready:
                side = handles[handle]
                code = side.ended()
                if side.name == "robot" and code == 0:
                    finished = True
                elif code in (0, -signal.SIGKILL):
                    side.start()
                else:
                    raise ChildProcessError(f"{side.name} ended with {code}; see {side.log}")
            if not finished and time.monotonic() >= strike:
                name = draw.choice(sorted(sides))
                os.kill(sides[name].process.pid, signal.SIGKILL)
                with kills_path.open("a") as file:
                    file.write(json.dumps({"side": name, "after": round(time.monotonic() - began, 1)}) + "\n")
                strike = time.monotonic() + draw.uniform(*pause)
    finally:
        for side in sides.values():
            if side.process.poll() is None:
                side.process.terminate()
                side.process.wait(60)
    kills = [json.loads(line)["side"] for line in kills_path.read_text().splitlines()] if kills_path.exists() else []
    return {"kills": dict(collections.Counter(kills)), "seconds": time.monotonic() - began}


def audit(out: Path) -> dict[str, Any]:
    """Checked from files alone."""
    events = read(out / "learner" / "journal.jsonl")
    received = {e.data["sha"]: e.data["key"] for e in events if e.kind == "received" and e.data["type"] == "episode"}
    made = [i.key for i in history(out / "robot" / "outbox") if i.type == "episode"]
    used: collections.Counter[str] = collections.Counter()
    off_policy = 0
    for event in (e for e in events if e.kind == "updated"):
        for sha in event.data["episodes"]:
            used[received[sha]] += 1
            episode = EpisodeReader(out / "learner" / "inbox" / "files" / sha).episode(images=False)
            off_policy += any(s.chunk.adapter_id != event.data["before"] for s in episode.steps)
    store = FolderStore(out / "learner" / "adapters")
    return {
        "events": len(events),
        "episodes": len(received),
        "lost": len(set(made) - set(received.values())),
        "doubled": sum(n - 1 for n in used.values()) + len(made) - len(set(made)),
        "off_policy": off_policy,
        "store_problems": [p.code for p in store.verify() if p.fatal],
        "updates": sum(e.kind == "updated" for e in events),
        "starts": sum(e.kind == "started" for e in events),
        "learned": {e.data["task"]: e.data["learned"] for e in events if e.kind == "finished"},
        "active": store.tags().get("active", ""),
        "gates": [gate(e) for e in events if e.kind == "gated"],
    }


def gate(event: Event) -> dict[str, Any]:
    """One decision of the gate: what it is, and per task the rates of active and candidate."""
    rows = {r["task"]: [r["role"], round(r["active"], 3), round(r["candidate"], 3)] for r in event.data["rows"]}
    return {"task": event.data["task"], "decision": event.data["decision"], "tasks": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "unattended")
    parser.add_argument("--limit", type=float, default=8 * 3600.0, help="seconds")
    arguments = parser.parse_args()
    out = arguments.out / "quick" if arguments.quick else arguments.out
    if arguments.quick and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    ran = work(out, arguments.quick, arguments.seed, arguments.limit)
    found = audit(out)
    for line in timeline(read(out / "learner" / "journal.jsonl")):
        print(line)
    tasks = TASKS[:1] if arguments.quick else TASKS
    learned = [t for t in tasks if found["learned"].get(t)]
    promoted = [g for g in found["gates"] if g["decision"] == "promote"]
    drops = [a - c for g in promoted for role, a, c in g["tasks"].values() if role == "earlier"]
    worst = max(drops, default=0.0)
    report = {
        "command": " ".join(["python -m benchmarks.product.unattended", *sys.argv[1:]]),
        "machine": machine(),
        "seed": arguments.seed,
        **ran,
        **found,
    }
    if not arguments.quick:
        path = ROOT / "benchmarks" / "results" / "unattended.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    clean = not (found["lost"] or found["doubled"] or found["off_policy"] or found["store_problems"])
    good = clean and len(learned) == len(tasks) and worst <= 0.05 + 1e-9
    print(
        f"unattended: {len(learned)} of {len(tasks)} tasks promoted, largest drop of an earlier task at a promotion "
        f"{100 * worst:.0f} points (goal all, <= 5); {sum(ran['kills'].values())} kills, {found['episodes']} episodes: "
        f"{found['lost']} lost, {found['doubled']} doubled, {found['off_policy']} off-policy (goal 0)"
    )
    return 0 if good or (arguments.quick and clean) else 1


if __name__ == "__main__":
    raise SystemExit(main())
