"""Whether anything is lost, doubled or off-policy when robot and learner are broken on purpose, again and again.

Two forked processes (a learner and a robot, `benchmarks/learner/small_world.py`) learn two tasks over a CURVE link.
Seeded faults strike both at chosen steps: kill -9 at any system call or phase, a power cut that tears the file being
written, a full disk, a jump of the wall clock, messages dropped, doubled and reordered, episodes of other adapters
slipped in. The end must equal that of a run without faults: the same adapter ids after every update, the same episodes
in every batch, the same verdicts. Then 10,000 malformed messages and a client with a wrong key against a running
learner's link.

    python -m benchmarks.learner.faults [--quick] [--faults N] [--seed N]

Exit 1 where anything is lost, doubled, off-policy, different, accepted or crashed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import zmq

from benchmarks.harness.results import machine
from benchmarks.learner.breakage import Fault, FaultyFiles, foreign_episode
from benchmarks.learner.malformed import attack
from benchmarks.learner.small_world import World, forked, read_episode, summary, write_episode
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.journal import read

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kill", "kill", "torn", "full", "network", "clock", "foreign")
PER_SIDE = 6  # faults planned per process and scenario
STUCK = 240.0  # seconds after which a scenario counts as stuck


# kill -9 at each phase by name, one after the other, in the first scenario: receiving, writing, accepting, rollout,
# update, checkpoint, adapter, evaluation, promotion, delivery of files and of adapters.
PHASES = {
    "learner": [
        *("open", "write", "rename", "write journal.jsonl", "fsync journal.jsonl", "phase update", "phase updated"),
        *(
            "fsync 2.tmp",
            "write adapter_model",
            "rename training",
            "phase gate",
            "phase gated",
            "rename active",
            "phase promoted",
        ),
    ],
    "robot": [
        *("phase rollout", "phase rollout", "open", "rename", "write done.jsonl", "fsync done.jsonl"),
        *("open adapter_model", "write adapter_model", "write card.json", "rename", "remove"),
    ],
}


def plan(seed: int, side: str) -> list[Fault]:
    """The faults of one process, from the scenario's seed; seed 0 goes through the phases."""
    if seed == 0:
        return [Fault("kill", 1 + n % 3, n, where) for n, where in enumerate(PHASES[side])]
    draw = random.Random(f"{seed} {side}")
    kinds = [k for k in KINDS if side == "robot" or k != "foreign"]
    return [Fault(draw.choice(kinds), draw.randint(1, 90), draw.randrange(2**31)) for _ in range(PER_SIDE)]


def remaining(faults: list[Fault], struck: Path) -> list[Fault]:
    done = len(struck.read_text().splitlines()) if struck.exists() else 0
    return faults[done:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_learner(world: World, faults: list[Fault]) -> int:
    def work() -> None:
        files = FaultyFiles(remaining(faults, world.root / "learner.struck"), world.root / "learner.struck")
        world.host(files, files.tamper).run()

    return forked(work, world.root / "learner.log")


def start_robot(world: World, faults: list[Fault]) -> int:
    def work() -> None:
        files = FaultyFiles(remaining(faults, world.root / "robot.struck"), world.root / "robot.struck")
        robot = world.robot(world.address, files, files.tamper)

        def slip_in() -> None:
            request = robot.client.state.get("order")
            while request and files.foreign:
                seed = files.foreign.pop()
                path = world.robot_folder / "foreign"
                write_episode(path, foreign_episode(request, seed))
                try:
                    robot.outbox.put(path, "episode", f"foreign/{seed}")
                except RatchetError as error:  # another fault: the disk is full
                    print(error, flush=True)

        robot.collector.pulse = slip_in
        robot.run(robot.over)

    return forked(work, world.root / "robot.log")


def run(root: Path, parts: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """One scenario to its end. seed None: without faults. Returns its summary, faults struck and restarts."""
    world = World(root, parts=parts, address=f"tcp://127.0.0.1:{free_port()}")
    faults = {side: [] if seed is None else plan(seed, side) for side in ("learner", "robot")}
    starters = {"learner": start_learner, "robot": start_robot}
    pids = {side: starters[side](world, faults[side]) for side in starters}
    exits: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + STUCK
    robot_done, stuck = False, False
    while not robot_done:
        side, status = wait_any(pids, deadline)
        if side is None:
            stuck = True
            break
        exits[f"{side} {status}"] += 1
        robot_done = side == "robot" and status == "exit 0"
        if not robot_done:
            pids[side] = starters[side](world, faults[side])
    for side, pid in pids.items():
        if side == "learner" or stuck:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    events = read(world.learner_folder / "journal.jsonl")
    struck = []
    for side in ("learner", "robot"):
        path = root / f"{side}.struck"
        lines = path.read_text().splitlines() if path.exists() else []
        struck += [(side, *json.loads(line)) for line in lines]
    return {
        "stuck": stuck,
        "struck": struck,
        "exits": dict(exits),
        "summary": summary(events),
        **audit(world, events),
    }


def wait_any(pids: dict[str, int], deadline: float) -> tuple[str | None, str]:
    """Sleep until one of the processes ended; None where the time is over."""
    handles = {os.pidfd_open(pid): side for side, pid in pids.items()}
    try:
        poller = zmq.Poller()
        for handle in handles:
            poller.register(handle, zmq.POLLIN)
        ready = poller.poll(int(max(0.0, deadline - time.monotonic()) * 1000))
        if not ready:
            return None, "stuck"
        side = handles[ready[0][0]]
        _, status = os.waitpid(pids[side], 0)
        code = os.waitstatus_to_exitcode(status)
        return side, f"exit {code}" if code >= 0 else f"signal {-code}"
    finally:
        for handle in handles:
            os.close(handle)


def audit(world: World, events: list[Any]) -> dict[str, Any]:
    """Counted anew from files, not from what the learner believes."""
    received = [e.data for e in events if e.kind == "received" and e.data["type"] == "episode"]
    keys = collections.Counter(r["key"] for r in received)
    used: collections.Counter[str] = collections.Counter()
    off_policy = 0
    for event in (e for e in events if e.kind == "updated"):
        for sha in event.data["episodes"]:
            used[sha] += 1
            episode = read_episode(world.learner_folder / "inbox" / "files" / sha)
            off_policy += any(s.chunk.adapter_id != event.data["before"] for s in episode.steps)
    done = world.robot_folder / "outbox" / "done.jsonl"
    stored = {json.loads(line)["key"] for line in done.read_text().splitlines()} if done.exists() else set()
    return {
        "received": len(received),
        "lost": len(stored - set(keys)),
        "doubled": sum(n - 1 for n in keys.values()) + sum(n - 1 for n in used.values()),
        "off_policy": off_policy,
        "foreign_received": sum(k.startswith("foreign/") for k in keys),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folder of a scenario that failed")
    arguments = parser.parse_args()
    wanted = min(arguments.faults, 20) if arguments.quick else arguments.faults
    messages = min(arguments.messages, 2000) if arguments.quick else arguments.messages
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="ratchet-faults-"))
    parts: dict[str, Any] = {}
    attacked = attack(scratch / "attack", messages, arguments.seed)
    print(f"{attacked['sent']} malformed messages: {attacked}", flush=True)
    World(scratch / "parts", parts=parts)
    reference = run(scratch / "reference", parts, None)
    print(f"without faults: {len(reference['summary']['adapters'])} updates, {reference['exits']}", flush=True)
    totals: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    places: collections.Counter[str] = collections.Counter()
    exits: collections.Counter[str] = collections.Counter()
    bad: list[dict[str, Any]] = []
    seed, runs = arguments.seed, 0
    seeds = [0]
    while sum(kinds.values()) < wanted:
        seed = seeds.pop() if seeds else seed
        folder = scratch / f"seed-{seed}"
        result = run(folder, parts, seed)
        different = result["summary"] != reference["summary"]
        for name in ("lost", "doubled", "off_policy", "received", "foreign_received"):
            totals[name] += result[name]
        totals["stuck"] += result["stuck"]
        totals["different"] += different
        exits.update(result["exits"])
        for side, kind, _, _, where in result["struck"]:
            kinds[f"{side} {kind}"] += 1
            places[where if where.startswith("phase") else where.split(" ")[0]] += 1
        failed = bool(different or result["stuck"] or result["lost"] or result["doubled"] or result["off_policy"])
        failed = failed or any(e.endswith("exit 4") for e in result["exits"])
        if failed:
            bad.append({"seed": seed, **{k: v for k, v in result.items() if k != "summary"}})
        print(
            f"seed {seed}: {len(result['struck'])} faults, {'FAILED' if failed else 'same end'}, {result['exits']}",
            flush=True,
        )
        if not (failed and arguments.keep):
            shutil.rmtree(folder)
        runs += 1
        seed = max(seed + 1, arguments.seed)
    count = sum(kinds.values())
    totals["crashed"] = sum(n for e, n in exits.items() if e.endswith("exit 4"))
    report = {
        "command": " ".join(["python -m benchmarks.learner.faults", *sys.argv[1:]]),
        "machine": machine(),
        "faults": count,
        "scenarios": runs,
        "first_seed": arguments.seed,
        "kinds": dict(sorted(kinds.items())),
        "places": dict(sorted(places.items())),
        "exits": dict(sorted(exits.items())),
        "totals": dict(totals),
        "failed": bad,
        "malformed": attacked,
        "seconds": time.monotonic() - began,
    }
    if not arguments.quick:
        path = ROOT / "benchmarks" / "results" / "faults.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    if not (bad and arguments.keep):
        shutil.rmtree(scratch)
    good = not bad and not any(totals[n] for n in ("lost", "doubled", "off_policy", "stuck", "different", "crashed"))
    good = good and attacked["accepted"] == 0 and attacked["crashes"] == 0 and attacked["wrong_key"]["delivered"] == 0
    good = good and attacked["wrong_key"]["refused"] and not any(a.startswith("ANSWERED") for a in attacked["answers"])
    print(
        f"faults: {count} faults in {runs} runs: {totals['lost']} lost, {totals['doubled']} doubled, "
        f"{totals['off_policy']} off-policy of {totals['received']} episodes, {totals['different']} runs that differ; "
        f"{attacked['sent']} malformed messages: {attacked['accepted']} accepted, {attacked['crashes']} crashes "
        f"(goal: 0 of each)"
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
