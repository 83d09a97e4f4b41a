"""How fast the link moves episodes and adapters beside raw ZeroMQ, and what it holds in memory while nobody listens.

Two processes on this machine, in the same run and in turns: raw ZeroMQ moving the same bytes in the same pieces with
the same encryption from file to file, forced to the disk, and the link doing the same, hashed and acknowledged besides.
An episode is a file on both sides, so this is the comparison that is judged. Also raw ZeroMQ from memory to memory,
encrypted and in plain, which on two cores leaves no processor time for a disk or a hash: the processor seconds are
printed. Then an adapter of 100 MB from `publish` to checked and staged on the robot, beside copying the file; then a
robot that makes 1,000 episodes while the learner is away.

    python -m benchmarks.learner.link [--quick]

Exit 1 where a goal is missed: episodes at 80 % of raw ZeroMQ's files or more, memory growth below 64 MB, a rollback in
force within one control period of 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import zmq

from benchmarks.adapters.large_adapter import large_adapter, wide
from benchmarks.harness.results import machine
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.link import keys as link_keys
from ratchet_vla.link.learner.artifact_server import ArtifactServer
from ratchet_vla.link.learner.inbox import Inbox
from ratchet_vla.link.learner.server import LinkServer
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.fetch import Fetcher
from ratchet_vla.link.robot.learner_tag_watcher import LearnerTagWatcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.link.wire import CHUNK
from ratchet_vla.storage.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
EPISODE = 50_000_000  # bytes
GOAL_SPEED, GOAL_MEMORY, GOAL_ROLLBACK = 0.8, 64.0, 0.05  # share of raw ZeroMQ; MB; s


def child(
    work: Callable[[Callable[[Any], None], Callable[[], Any]], None],
) -> tuple[Callable[[], Any], Callable[[Any], None], int]:
    """Run `work(tell, hear)` in a forked process; returns hear, tell and the process id of this side."""
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            source, target = os.fdopen(down[0], "r"), os.fdopen(up[1], "w")

            def say(what: Any) -> None:
                target.write(json.dumps(what) + "\n")
                target.flush()

            work(say, lambda: json.loads(source.readline()))
            status = 0
        finally:
            os._exit(status)
    source, target = os.fdopen(up[0], "r"), os.fdopen(down[1], "w")

    def tell(what: Any) -> None:
        target.write(json.dumps(what) + "\n")
        target.flush()

    return lambda: json.loads(source.readline()), tell, pid


def raw(total: int, curve: bool, folder: Path | None = None) -> float:
    """MB/s of PUSH to PULL between two processes, pieces of the link's size.

    folder: None moves from memory to memory and does nothing with it; else from a file to files there of an episode's
    size, each forced to the disk.
    """
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    if folder is not None:
        folder.mkdir(parents=True)
        (folder / "source").write_bytes(os.urandom(CHUNK) * (EPISODE // CHUNK))

    def receive(tell: Callable[[Any], None], hear: Callable[[], Any]) -> None:
        context: zmq.Context[Any] = zmq.Context()
        pull = context.socket(zmq.PULL)
        if curve:
            pull.curve_server, pull.curve_secretkey = True, server[1]
        tell(pull.bind_to_random_port("tcp://127.0.0.1"))
        pull.recv()
        began, got = time.perf_counter(), 0
        file, written = -1, 0
        while got < total:
            piece = pull.recv(copy=False).buffer
            got += len(piece)
            if folder is None:
                continue
            if file < 0:
                file, written = os.open(folder / f"target-{got}", os.O_CREAT | os.O_WRONLY), 0
            written += os.pwrite(file, piece, written)
            if written >= EPISODE or got >= total:
                os.fsync(file)
                os.close(file)
                file = -1
        tell(total / 1e6 / (time.perf_counter() - began))
        context.destroy(0)

    hear, _, pid = child(receive)
    context: zmq.Context[Any] = zmq.Context()
    push = context.socket(zmq.PUSH)
    if curve:
        push.curve_serverkey, push.curve_publickey, push.curve_secretkey = server[0], client[0], client[1]
    push.connect(f"tcp://127.0.0.1:{hear()}")
    episode = memoryview(os.urandom(EPISODE))  # as large as what the link sends, so that no cache holds it
    os.sync()
    push.send(b"first")
    file = os.open(folder / "source", os.O_RDONLY) if folder is not None else -1
    for place in range(0, total, CHUNK):
        size = min(CHUNK, total - place)
        at = place % (EPISODE // CHUNK * CHUNK)
        push.send(os.pread(file, size, at) if file >= 0 else episode[at : at + size], copy=False)
    if file >= 0:
        os.close(file)
    speed = float(hear())
    context.destroy(0)
    os.waitpid(pid, 0)
    return speed


class Ends:
    """Keys and folders of both ends; `learner` is the work of a child process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server_keys = link_keys.make(root / "keys", "learner")
        self.robot_keys = link_keys.make(root / "rkeys", "robot-1")
        link_keys.allow(root / "keys", root / "rkeys" / "robot-1.key")
        self.port = 0

    def learner(self, tell: Callable[[Any], None], hear: Callable[[], Any]) -> None:
        """Serves until told to stop; on "publish" stores what lies in `made` and offers it."""
        journal = Journal(self.root / "learner" / "journal.jsonl")
        inbox = Inbox(self.root / "learner" / "inbox", journal, reserve=0)
        store = FolderStore(self.root / "learner" / "adapters", create=True)
        address = f"tcp://127.0.0.1:{self.port or '*'}"
        server = LinkServer(address, inbox, ArtifactServer(store), keys=self.server_keys, allow=self.root / "keys")
        server.start()
        tell(int(server.address.rsplit(":", 1)[1]))
        while (word := hear()) != "stop":
            if word == "publish":
                first = store.put(large_adapter(1)).id
                began = time.time()
                second = store.put(large_adapter(2)).id
                tell({"put": time.time() - began, "first": first, "second": second})
            elif isinstance(word, list):
                tell({"published": time.time()})
                server.publish({"adapters": word, "tags": {"active": word[-1]}})
            else:
                tell({"received": len(journal.events), "peak_mb": peak_mb()})
        server.stop()
        inbox.close()
        journal.close()

    def client(
        self,
        outbox: Outbox,
        fetcher: Fetcher | None = None,
        on_state: Callable[[dict[str, Any]], None] = lambda s: None,
    ) -> LinkClient:
        return LinkClient(
            f"tcp://127.0.0.1:{self.port}",
            "robot-1",
            outbox,
            keys=self.robot_keys,
            learner=self.server_keys.public,
            fetcher=fetcher,
            on_state=on_state,
        )


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rss_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def link(root: Path, episodes: int) -> dict[str, float]:
    """MB/s from a filled outbox to everything acknowledged, both ends in processes of their own."""
    ends = Ends(root)
    hear, tell, pid = child(ends.learner)
    ends.port = hear()
    outbox = Outbox(root / "robot" / "outbox", reserve=0)
    began = time.perf_counter()
    for n in range(episodes):
        outbox.put(os.urandom(CHUNK) * (EPISODE // CHUNK) + n.to_bytes(8, "big"), "episode", f"e{n}")
    filled = episodes * EPISODE / 1e6 / (time.perf_counter() - began)
    client = ends.client(outbox)
    os.sync()  # what filling it left to write is not the link's work
    total, spent = outbox.size, time.process_time()
    learner = psutil.Process(pid).cpu_times()
    began = time.perf_counter()  # connecting and shaking hands are the link's, raw ZeroMQ is measured without
    client.start()
    assert client.wait(lambda: not len(outbox), 300), client.status()
    speed = total / 1e6 / (time.perf_counter() - began)
    spent = time.process_time() - spent
    client.stop()
    outbox.close()
    after = psutil.Process(pid).cpu_times()
    tell("count")
    assert hear()["received"] == episodes
    tell("stop")
    os.waitpid(pid, 0)
    taken = after.user + after.system - learner.user - learner.system
    return {
        "speed": speed,
        "filled": filled,
        "robot_cpu": 1e9 * spent / total,
        "learner_cpu": 1e9 * taken / total,
    }


def processor() -> float:
    """Processor seconds of this process and of children that have ended."""
    whole = os.times()
    return whole.user + whole.system + whole.children_user + whole.children_system


def adapter(root: Path) -> dict[str, float]:
    """Seconds from `publish` to stored, and to staged beside a running policy; of a rollback from the message's arrival
    to the flip; and of copying the file."""
    torch.set_num_threads(1)
    ends = Ends(root)
    hear, tell, pid = child(ends.learner)
    ends.port = hear()
    outbox = Outbox(root / "robot" / "outbox", reserve=0)
    store = FolderStore(root / "robot" / "adapters", create=True)
    policy, lora = wide()
    swapper = HotSwapper(policy, lora, store=store)
    arrived: dict[str, float] = {}
    swapped: list[tuple[str, float]] = []
    told: list[float] = []
    changed = threading.Condition()

    def on_adapter(name: str) -> None:
        with changed:
            arrived[name] = time.time()
            changed.notify_all()
        tag_watcher.on_adapter(name)

    def on_swap(name: str) -> None:
        with changed:
            swapped.append((name, time.perf_counter()))
            changed.notify_all()

    def on_state(state: dict[str, Any]) -> None:
        told.append(time.perf_counter())
        tag_watcher.on_state(state)

    flips: list[float] = []
    tag_watcher = LearnerTagWatcher(store, lambda name: flips.append(swapper.swap(name).unavailable), on_swap=on_swap)
    fetcher = Fetcher(store, root / "robot" / "incoming", on_adapter=on_adapter)
    client = ends.client(outbox, fetcher, on_state)
    client.start()
    assert client.wait(lambda: client.status().up, 30)
    tell("publish")
    said = hear()
    first, second = said["first"], said["second"]
    results: dict[str, float] = {"learner_put": said["put"]}

    def publish(*adapters: str) -> float:
        tell(list(adapters))
        published = float(hear()["published"])
        with changed:
            assert changed.wait_for(lambda: swapped[-1:] and swapped[-1][0] == adapters[-1], 120), client.status()
        return published

    publish(first)
    began = publish(first, second)
    results["published_to_stored"] = arrived[second] - began
    results["published_to_running"] = time.time() - began
    publish(first)  # the rollback: its adapter is still in memory
    results["rollback"] = swapped[-1][1] - told[-1]
    results["flip"] = max(flips)
    client.stop()
    tag_watcher.stop()
    outbox.close()
    tell("stop")
    os.waitpid(pid, 0)
    source = next((root / "learner" / "adapters" / "objects" / second).glob("*.safetensors"))
    began = time.perf_counter()
    copied = root / "copy"
    shutil.copyfile(source, copied)
    with copied.open("rb") as file:
        os.fsync(file.fileno())
    return {**results, "megabytes": source.stat().st_size / 1e6, "copy": time.perf_counter() - began}


# -- away --------------------------------------------------------------------------------------------------------------


def away(root: Path, episodes: int, size: int) -> dict[str, float]:
    """Memory of the robot's process while the learner is away, and while it then takes everything."""
    ends = Ends(root)
    hear, tell, pid = child(ends.learner)
    ends.port = hear()
    tell("stop")
    os.waitpid(pid, 0)
    outbox = Outbox(root / "robot" / "outbox", reserve=0)
    client = ends.client(outbox)
    client.start()
    content = bytearray(os.urandom(size))
    outbox.put(bytes(content), "episode", "warm")
    before, highest = rss_mb(), 0.0
    for n in range(episodes):
        content[:8] = n.to_bytes(8, "big")
        outbox.put(bytes(content), "episode", f"e{n}")
        if n % 50 == 0:
            highest = max(highest, rss_mb())
    alone = max(highest, rss_mb()) - before
    assert len(outbox) == episodes + 1
    hear, tell, pid = child(ends.learner)
    hear()
    began = time.perf_counter()
    peak = [rss_mb()]

    def drained() -> bool:
        peak[0] = max(peak[0], rss_mb())
        return not len(outbox)

    assert client.wait(drained, 600), client.status()
    seconds = time.perf_counter() - began
    client.stop()
    tell("count")
    counted = hear()
    assert counted["received"] == episodes + 1, counted
    tell("stop")
    os.waitpid(pid, 0)
    outbox.close()
    return {
        "episodes": episodes,
        "megabytes": episodes * size / 1e6,
        "growth_away_mb": alone,
        "growth_draining_mb": peak[0] - before,
        "learner_peak_mb": counted["peak_mb"],
        "drain_seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rounds, episodes, gone = (2, 2, 40) if arguments.quick else (21, 10, 1000)
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="ratchet-link-"))
    rows: list[dict[str, float]] = []
    try:
        for n in range(rounds):
            total = episodes * EPISODE
            spent = processor()
            row = {"raw_curve": raw(total, True)}
            row["raw_curve_cpu"] = (processor() - spent) / total * 1e9
            row["raw_plain"] = raw(total, False)
            row["raw_files"] = raw(total, True, scratch / f"files-{n}")
            row |= link(scratch / f"link-{n}", episodes)
            row["share"] = row["speed"] / row["raw_files"]
            row["share_of_memory"] = row["speed"] / row["raw_curve"]
            rows.append(row)
            shutil.rmtree(scratch / f"link-{n}")
            shutil.rmtree(scratch / f"files-{n}")
            print(
                f"round {n + 1}: raw from file to file {row['raw_files']:.0f} MB/s, link {row['speed']:.0f} MB/s = "
                f"{row['share']:.0%}; raw from memory to memory {row['raw_curve']:.0f}, plain {row['raw_plain']:.0f}",
                flush=True,
            )
        adapters = [adapter(scratch / f"adapter-{n}") for n in range(1 if arguments.quick else 5)]
        memory = away(scratch / "away", gone, 1_000_000)
    finally:
        shutil.rmtree(scratch)
    share = median(r["share"] for r in rows)
    of_memory = median(r["share_of_memory"] for r in rows)
    cpu = {name: median(r[name] for r in rows) for name in ("raw_curve_cpu", "robot_cpu", "learner_cpu")}
    middle = {name: median(a[name] for a in adapters) for name in adapters[0]}
    growth = max(memory["growth_away_mb"], memory["growth_draining_mb"])
    report = {
        "command": " ".join(["python -m benchmarks.learner.link", *sys.argv[1:]]),
        "machine": machine(),
        "episode_bytes": EPISODE,
        "episodes_per_round": episodes,
        "rounds": rows,
        "share_median": share,
        "share_spread": [min(r["share"] for r in rows), max(r["share"] for r in rows)],
        "share_of_memory_median": of_memory,
        "processor_seconds_per_gb": cpu,
        "adapter": {"median": middle, "runs": adapters},
        "memory": memory,
    }
    if not arguments.quick:
        path = ROOT / "benchmarks" / "results" / "link.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"processor seconds per GB, both ends: raw from memory to memory {cpu['raw_curve_cpu']:.2f}, link "
        f"{cpu['robot_cpu'] + cpu['learner_cpu']:.2f}; the link moves {of_memory:.0%} of what raw moves from memory to "
        f"memory on {os.cpu_count()} cores"
    )
    print(
        f"adapter of {middle['megabytes']:.0f} MB: published to stored {middle['published_to_stored']:.2f} s, to "
        f"running {middle['published_to_running']:.2f} s, copying the file {middle['copy']:.2f} s; rollback in force "
        f"{1e3 * middle['rollback']:.0f} ms after its message, forwards held off {1e3 * middle['flip']:.2f} ms"
    )
    print(
        f"memory with {memory['episodes']:.0f} episodes waiting: {memory['growth_away_mb']:+.0f} MB away, "
        f"{memory['growth_draining_mb']:+.0f} MB while {memory['megabytes']:.0f} MB are taken in "
        f"{memory['drain_seconds']:.0f} s"
    )
    print(
        f"link: {share:.0%} of raw encrypted ZeroMQ from file to file (goal >= {GOAL_SPEED:.0%}), memory "
        f"{growth:+.0f} MB (goal < {GOAL_MEMORY:.0f} MB), rollback {1e3 * middle['rollback']:.0f} ms "
        f"(goal < {1e3 * GOAL_ROLLBACK:.0f} ms)"
    )
    return 0 if share >= GOAL_SPEED and growth < GOAL_MEMORY and middle["rollback"] < GOAL_ROLLBACK else 1


if __name__ == "__main__":
    raise SystemExit(main())
