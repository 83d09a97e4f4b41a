"""From the arm to an adapter that runs on the arm: does all that is recorded arrive, once, whoever dies meanwhile?

The commands of docs/story.md, all real: nodes over a simulated arm, recorder, sync agent, learner, review page. First
in peace, then with kill -9 at random instants of recorder, sync agent, learner and policy process. Counted is what a
goal's result said was recorded, what is in the store, labelled, received and learned from. Timed is the way from a
round's last label to the first answer of the adapter that came of it, with a person who promotes as soon as the
gate holds. Then the same nodes in real time, with and without recording in turns: what it costs the control loop.

    python -m benchmarks.product.spine [--quick] [--kills N] [--seed N]

Exit 1 where a count differs, anything is lost or doubled, or recording costs the loop more than 0.2 ms at the 99th
percentile or a tick. What was not reached within `--minutes` is missing from the result, and misses the goal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.harness.ros_probe import DOMAIN, arguments, write
from benchmarks.product.week import LIMIT, ROOT, Beside, Lines, Week, eventually, stop
from ratchet_vla.cli.nodes import ros
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.storage.journal import read

GOAL_MS = 0.2
BATCH, HORIZON = 4, 24
VICTIMS = ("recorder", "sync", "learner", "policy")
WHOLE = ("horizon", "success")  # how an attempt ends that a person can label
# The nodes' recorder at commit 8bfdbde, which kept the wire's messages: of each of two goals over the same arm.
FORMER = {"bytes": 0.9e6, "seconds": 502 / 20}


@dataclass
class Counts:
    """Of one part of the run. recorded: goals whose result named an episode; lost: of these, those that the store does
    not hold; doubled: names, labels or arrivals that are there twice, and episodes that two updates took."""

    goals: int = 0
    recorded: int = 0
    stored: int = 0
    cut_off: int = 0
    judged: int = 0  # labelled; the result file keeps its keys
    discarded: int = 0
    received: int = 0
    learned_from: int = 0
    lost: int = 0
    doubled: int = 0
    unjudged_learned_from: int = 0

    @property
    def equal(self) -> bool:
        """Everything that was recorded whole was labelled, received and learned from; or was one too many, and
        discarded by the person."""
        return self.stored == self.judged + self.discarded and self.judged == self.received == self.learned_from


class Spine(Week):
    """Somebody who collects, labels and promotes, and somebody who kills."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(folder)
        self.rng = rng
        self.guard = threading.RLock()  # who is at work is changed by one at a time
        self.told: list[str] = []  # names of episodes that results named
        self.goals = self.labelled = 0
        self.rounds: list[dict[str, float]] = []  # what happened when after the last label, in seconds
        self.kills: Counter[str] = Counter()
        self.restarts = 0  # of the nodes, where the policy's process had died too often

    def begin(self) -> None:
        """The learner and the arm, until the arm runs what the learner trains."""
        self.make_keys()
        self.learner, self.up = self.start("ratchet learner"), self.start("ratchet up")
        self.in_force(eventually(lambda: self.learner_state().training, "the learner's first rollout request"))

    # -- who works -------------------------------------------------------------------------------------------------

    def attempt(self) -> None:
        """The scene is put back and the policy tries; who finds the arm latched or its nodes at an end sees to that."""
        self.beside.do("reset", initial_state=self.rng.randrange(50), patience=LIMIT)
        while True:
            told = self.beside.do("run", limit=2 * LIMIT, horizon=HORIZON, patience=5.0)
            if "error" not in told:
                break
            self.mend(told["error"])
        self.goals += 1
        result = told["result"]
        if result["episode"]:
            self.told.append(result["episode"])
        if result["termination"] == "fault":
            self.beside.do("clear", person="ada", patience=LIMIT)

    def mend(self, error: dict[str, Any]) -> None:
        """What a person does about a refusal that does not pass by itself."""
        if self.beside.status.get("state") == "failed":
            self.start_nodes_again()
        elif error["code"] == "safety.latched":
            self.beside.do("clear", person="ada", patience=LIMIT)
        elif error["code"] not in ("policy.not_ready", "ros.no_data", "ros.not_active", "ros.no_safety_node"):
            raise RuntimeError(f"a goal was refused: {error}")

    def start_nodes_again(self) -> None:
        """A policy process that died too often in a row is not started any more: its nodes are."""
        with self.guard:
            assert self.up is not None
            self.up.end()
            before = self.beside.statuses
            self.up = self.start("ratchet up")
            self.restarts += 1
            self.beside.wait_for(lambda: self.beside.statuses > before, "the new nodes' status")

    def runs(self, adapter: str) -> None:
        """Wait until the arm has it, whoever dies meanwhile."""
        while True:
            seen = self.beside.see(
                lambda s: s["adapter_id"] == adapter or s["state"] == "failed", "the promoted adapter at the arm"
            )
            if seen["state"] != "failed":
                return
            self.start_nodes_again()

    def label(self, wanted: int) -> int:
        """Everything that waits on the page: attempts that came to their end as they went, the rest is discarded;
        returns how many of them count."""
        if self.review is None:
            self.open_page()
        counted = 0
        while (card := self.page.next()) is not None:
            if card["reason"] in WHOLE and counted < wanted:
                # Of each pair one was a success: what the arm did decides nothing here, a person's word does.
                self.page.label(card["id"], "success" if self.labelled % 2 == 0 else "failure")
                self.labelled += 1
                counted += 1
            else:
                self.page.label(card["id"], "discard")
        return counted

    def round(self) -> None:
        """A batch, an update, a gate that cannot measure, a person who promotes at once; then the arm runs it."""
        counted, updates = 0, len(self.learner_state().updates)
        while counted < BATCH:
            self.attempt()
            counted += self.label(BATCH - counted)
        began = time.monotonic()
        moments = {}
        eventually(lambda: len(self.learner_state().updates) > updates, "an update")
        moments["updated"] = time.monotonic() - began
        candidate = eventually(self._held, "a gate that holds")
        moments["held"] = time.monotonic() - began
        code, out = self.say("ratchet adapters promote")
        assert code == 0, out
        moments["promoted"] = time.monotonic() - began
        self.runs(candidate)
        moments["swapped"] = self.beside.status_at - began
        self.rounds.append(moments)
        while True:
            try:
                self.in_force(candidate)
                break
            except TimeoutError:
                if self.beside.status.get("state") != "failed":
                    raise
                self.start_nodes_again()

    def _held(self) -> str:
        state = self.learner_state()
        return state.candidate if state.phase == "waiting" else ""

    # -- who dies --------------------------------------------------------------------------------------------------

    def kill_one(self, victim: str) -> bool:
        """Kill -9, and start again what does not come back by itself. False where it is not there to be killed."""
        with self.guard:
            if victim == "learner":
                assert self.learner is not None
                self.learner.kill()
                self.learner = self.start("ratchet learner")
            else:
                assert self.up is not None
                if victim not in self.up.children():
                    return False
                self.up.kill_child(victim)
            self.kills[victim] += 1
            return True

    # -- what came of it -------------------------------------------------------------------------------------------

    def count(self) -> Counts:
        """The books, compared."""
        store = EpisodeStore("runs/robot/episodes")
        annotations, state = Annotations(store), self.learner_state()
        journal = read(self.folder / "runs" / "learner" / "journal.jsonl")
        cards = list(store.cards().values())
        names = Counter(card.name for card in cards)
        states = {card.id: annotations.status(card.id).state for card in cards}
        labelled = {episode for episode, state in states.items() if state == "verified"}
        arrived = [e.data["sha"] for e in journal if e.kind == "received" and e.data["type"] == "episode"]
        used = Counter(sha for batch in state.retired for sha in batch)
        twice = [*(n for n in names.values() if n > 1), *(n for n in Counter(arrived).values() if n > 1)]
        twice += [n for n in used.values() if n > 1]
        wrong = {a.sha for a in state.arrivals.values() if a.success != annotations.status(a.sha).success}
        return Counts(
            goals=self.goals,
            recorded=len(self.told),
            stored=sum(_whole(card) for card in cards),
            cut_off=sum(not _whole(card) for card in cards),
            judged=len(labelled),
            discarded=sum(_whole(c) and states[c.id] == "discarded" for c in cards),
            received=len(set(arrived) & labelled),
            learned_from=len(set(used) & labelled),
            lost=sum(names[name] == 0 for name in self.told) + len(labelled - set(used)),
            doubled=len(twice),
            unjudged_learned_from=len(set(used) - labelled) + len(wrong),
        )


def _whole(card: Card) -> bool:
    return card.reason in WHOLE


# -- the parts of the benchmark --------------------------------------------------------------------------------------


def with_kills(spine: Spine, wanted: int, end: float) -> None:
    """Rounds, while somebody kills; until so many have died, and then to the end of the round."""
    over = threading.Event()

    def strike() -> None:
        while sum(spine.kills.values()) < wanted and time.monotonic() < end and not over.is_set():
            over.wait(spine.rng.uniform(0.2, 2.5))
            spine.kill_one(spine.rng.choice(VICTIMS))

    killer = threading.Thread(target=strike)
    killer.start()
    try:
        while killer.is_alive():
            spine.round()
    finally:
        over.set()
        killer.join()


def cost(folder: Path, goals: int, seconds: float) -> dict[str, Any]:
    """Goals in real time, every second one without recording. goals: an even number."""
    contract = ROOT / "robots" / "metaworld.yaml"
    store = {"episodes": str(folder / "cost"), "record_least_free_gb": 0.1}
    policy = {"policy": str(ROOT / "models" / "small-metaworld"), "policy_python": sys.executable, "judge": "none"}
    nodes: dict[str, dict[str, Any]] = {
        "ratchet_ros sim_robot_node": {"task": "button-press"},
        "ratchet_ros safety_node": {"use_sim_time": True},
        "benchmarks.runtime.ros.recording_cost": {"use_sim_time": True, "mode": "collect", **policy, **store},
    }
    running: list[Lines] = []
    beside = Beside(ROOT)
    try:
        for module, parameters in nodes.items():
            file = folder / f"{module.split()[-1]}.yaml"
            values = {"autostart": True, "contract": str(contract), **parameters}
            file.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
            command = [ros.python(), "-m", *module.split(), "--ros-args", "--params-file", str(file)]
            running.append(Lines(command, ROOT, ros.environment({"PYTHONUNBUFFERED": "1"})))
        goal = {"task": "button-press", "instruction": "press the button", "temperature": 1.0}
        for _ in range(goals):
            told = beside.do("run", horizon=int(20 * seconds), patience=LIMIT, limit=LIMIT + 2 * seconds, **goal)
            if "error" in told:
                raise RuntimeError(f"a goal was refused: {told['error']}")
        said = [json.loads(line) for line in running[-1].said if line.startswith('{"recorded"')]
    finally:
        stop(*running, beside)
    turns = {
        "with": [told for told in said if told["recorded"]],
        "without": [told for told in said if not told["recorded"]],
    }
    inside = [s for told in turns["with"] for s in told["inside"]]
    preempted = [p for told in turns["with"] for p in told["preempted"]]
    calm = [s for s, p in zip(inside, preempted, strict=True) if not p]
    return {
        **spread(calm),
        "begin_ms": max(told["begin"] for told in turns["with"]) * 1e3,
        "ticks": len(calm),
        "preempted_ticks": sum(preempted),
        "preempted_too": spread(inside),
        "waited_ticks": sum(told["waited"] for told in turns["with"]),
        "missed": {name: sum(told["missed"] for told in turn) for name, turn in turns.items()},
        "to_command": {name: spread([s for told in turn for s in told["commanded"]]) for name, turn in turns.items()},
        "whole_tick": {name: spread([s for told in turn for s in told["done"]]) for name, turn in turns.items()},
    }


def spread(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50_ms": float(p50) * 1e3, "p99_ms": float(p99) * 1e3, "max_ms": max(seconds) * 1e3}


def disk(store: EpisodeStore) -> dict[str, float]:
    """Bytes that recording took."""
    cards = [c for c in store.cards().values() if _whole(c)]
    size, seconds = sum(c.bytes for c in cards), sum(c.seconds for c in cards)
    return {"bytes_per_episode": size / len(cards), "bytes_per_second": size / seconds, "episodes": len(cards)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round in peace, four kills, seconds of real time")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=4.0, help="no more kills after so long")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "spine.json")
    given = parser.parse_args(argv)
    rounds, wanted = (1, 4) if given.quick else (3, 50)
    wanted = wanted if given.kills is None else given.kills
    end = time.monotonic() + 60.0 * given.minutes
    os.environ |= {"ROS_DOMAIN_ID": DOMAIN}
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        os.environ.pop(name, None)
    profile = ros.PACKAGE / "config" / "fastdds_loopback.xml"
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(profile)
    console, before = Console(width=110), Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="spine"))
    os.chdir(folder)
    spine = Spine(folder, random.Random(given.seed))
    found: dict[str, Any] = {"asked": {"rounds": rounds, "batch": BATCH, "kills": wanted, "seed": given.seed}}
    try:
        console.print("learner, nodes, policy, recorder, sync agent: starting", style="dim")
        spine.begin()
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds} in peace", style="dim")
            spine.round()
        peace = spine.count()
        found |= {"peace": asdict(peace), "seconds_to_swap": list(spine.rounds)}
        found["disk"] = disk(EpisodeStore("runs/robot/episodes"))
        console.print(f"{wanted} kills", style="dim")
        with_kills(spine, wanted, end)
        kills = spine.count()
        found |= {"kills": asdict(kills), "killed": dict(spine.kills), "nodes_started_again": spine.restarts}
        found["sound"] = spine.say("ratchet episodes verify")[0] == 0
        spine.end()
        console.print("real time, with and without recording in turns", style="dim")
        found["cost"] = cost(folder, *((2, 4.0) if given.quick else (6, 10.0)))
    finally:
        spine.end()
        os.chdir(before)
        found["complete"] = "cost" in found and sum(spine.kills.values()) >= wanted
        write(given.output, "product.spine", arguments(argv), {**found, "former_recorder": FORMER})
    shutil.rmtree(folder)
    return report(console, found, peace, kills, spine)


def report(console: Console, found: dict[str, Any], peace: Counts, kills: Counts, spine: Spine) -> int:
    table = Table(title="What arrives")
    for column in ("", "goals", "recorded", "stored", "labelled", "received", "learned from", "discarded", "cut off"):
        table.add_column(column, justify="right" if column else "left")
    for name, counts in (("in peace", peace), ("in all, with kills", kills)):
        values = (counts.goals, counts.recorded, counts.stored, counts.judged, counts.received, counts.learned_from)
        table.add_row(name, *(str(v) for v in (*values, counts.discarded, counts.cut_off)))
    console.print(table)
    calm = found["seconds_to_swap"]
    middle = {name: float(np.median([r[name] for r in calm])) for name in calm[0]}
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in middle.items())
    console.print(f"after the last label of a round, in peace, median of {len(calm)}: {told}")
    paid, took = found["cost"], found["disk"]
    missed = paid["missed"]
    console.print(
        f"recording, per tick: p99 {paid['p99_ms']:.3f} ms over {paid['ticks']} ticks, "
        f"{paid['preempted_too']['p99_ms']:.3f} ms with the {paid['preempted_ticks']} preempted ones, before the first "
        f"at most {paid['begin_ms']:.2f} ms; missed {missed['with']} with it, {missed['without']} without"
    )
    for name, what in (("to_command", "until the command is out"), ("whole_tick", "the whole tick")):
        told = ", ".join(f"{turn} {row['p50_ms']:.2f} and {row['p99_ms']:.2f} ms" for turn, row in paid[name].items())
        console.print(f"{what}, median and p99 of all ticks, recording: {told}")
    rate = f"{took['bytes_per_episode'] / 1e3:.0f} kB an episode, {took['bytes_per_second'] / 1e3:.0f} kB/s"
    former = f"{FORMER['bytes'] / 1e3:.0f} kB an episode, {FORMER['bytes'] / FORMER['seconds'] / 1e3:.0f} kB/s"
    console.print(f"on the disk: {rate}; the nodes' former recorder: {former}")
    console.print(f"killed: {found['killed']}; nodes started again {spine.restarts} times")
    all_equal = peace.equal and peace.goals == peace.recorded == peace.stored == peace.judged and kills.equal
    whole = kills.lost == kills.doubled == kills.unjudged_learned_from == 0 and found["sound"]
    cheap = paid["p99_ms"] < GOAL_MS and missed["with"] == 0
    print(
        f"spine: {kills.learned_from} of {kills.judged} labelled episodes learned from, {kills.lost} lost and "
        f"{kills.doubled} doubled over {sum(spine.kills.values())} kills, swapped {middle['swapped']:.1f} s after "
        f"the last label, recording {paid['p99_ms']:.3f} ms per tick at p99 (goal all, 0, 0, "
        f"{found['asked']['kills']} kills, < {GOAL_MS} ms and 0 ticks missed)"
    )
    return 0 if all_equal and whole and cheap and found["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
