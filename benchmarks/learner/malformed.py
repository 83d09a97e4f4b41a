"""An allowed robot gone mad, a stranger with a wrong key, and bytes that are no ZeroMQ at all, against a running link.

Used by `benchmarks/learner/faults.py`; seeded.
"""

from __future__ import annotations

import collections
import random
import socket
import time
from pathlib import Path
from typing import Any

import msgpack
import zmq

from ratchet_vla.link import keys as link_keys
from ratchet_vla.link import wire
from ratchet_vla.link.learner.inbox import Inbox
from ratchet_vla.link.learner.server import LinkServer
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.storage.journal import Journal


def malformed(draw: random.Random, robot: str) -> list[bytes]:
    """One message that no correct peer sends: random bytes, broken headers, wrong types, sizes and names."""
    good: dict[str, Any] = {"robot": robot, "sha": "0" * 64, "offset": 0}
    kind = draw.randrange(12)
    if kind == 0:
        return [draw.randbytes(draw.randrange(0, 2000))]
    if kind == 1:
        return [draw.randbytes(draw.randrange(1, 60)) for _ in range(draw.randrange(1, 6))]
    if kind == 2:
        data = wire.encode("chunk", good, b"x" * 10)[0]
        return [data[: draw.randrange(len(data))], b"x" * 10]
    if kind == 3:
        data = bytearray(wire.encode("chunk", good, b"x")[0])
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return [bytes(data)]
    if kind == 4:
        return [msgpack.packb({"v": draw.choice([0, 2, 99, "1", None, True, -1]), "k": "hello", "robot": robot})]
    if kind == 5:
        wrong: Any = draw.choice([-1, 2**63 - 1, 1.5, None, [], {}, "0", b"0", True])
        return [msgpack.packb({"v": 1, "k": "chunk", **good, "offset": wrong}), b"x"]
    if kind == 6:
        return [msgpack.packb({"v": 1, "k": draw.choice(["", "state", "stored", "eval", "../x", "k" * 500]), **good})]
    if kind == 7:
        value: Any = 1
        for _ in range(draw.randrange(9, 900)):
            value = [value]
        head = {"v": 1, "k": "beat", "robot": robot, "have": "", "report": {"x": value}}
        return [msgpack.packb(head)]
    if kind == 8:
        name = draw.choice(["../../etc/passwd", "", "a" * 65, "robot\n", "someone-else", "/", "."])
        return [msgpack.packb({"v": 1, "k": "chunk", **good, "robot": name}), b"x"]
    if kind == 9:
        return [b"\xdd\xff\xff\xff\xff" + draw.randbytes(20)]  # an array that says it has 4 billion items
    if kind == 10:
        return [msgpack.packb({"v": 1, "k": "hello", "robot": robot, "software": "x" * draw.randrange(65, 60000)})]
    return [msgpack.packb({"v": 1, "k": "parts", "robot": robot, "adapter": draw.choice(["*", "../x", "g" * 64, "0"])})]


def attack(root: Path, count: int, seed: int) -> dict[str, Any]:
    """An allowed robot gone mad, a stranger, and bytes that are no ZeroMQ at all, against a running link."""
    draw = random.Random(seed)
    learner, robot = link_keys.make(root / "l", "learner"), link_keys.make(root / "r", "robot-1")
    stranger = link_keys.make(root / "s", "stranger")
    link_keys.allow(root / "l", root / "r" / "robot-1.key")
    journal = Journal(root / "journal.jsonl")

    class NoArtifacts:
        def files(self, adapter: str) -> list[dict[str, Any]]:
            raise AssertionError("a malformed message reached the artifact server")

        def read(self, adapter: str, name: str, offset: int, size: int) -> bytes:
            raise AssertionError("a malformed message reached the artifact server")

    server = LinkServer(
        "tcp://127.0.0.1:*", Inbox(root / "inbox", journal, reserve=0), NoArtifacts(), keys=learner, allow=root / "l"
    )
    server.start()
    context: zmq.Context[Any] = zmq.Context()
    mad = context.socket(zmq.DEALER)
    mad.setsockopt(zmq.LINGER, 0)
    mad.curve_serverkey, mad.curve_publickey, mad.curve_secretkey = learner.public, robot.public, robot.secret
    mad.connect(server.address)
    answers: collections.Counter[str] = collections.Counter()
    sent, last = 0, time.monotonic()
    while sent < count or (sum(answers.values()) < sent and time.monotonic() - last < 5.0):
        if sent < count:
            mad.send_multipart(malformed(draw, "robot-1"))
            sent += 1
        while mad.poll(0 if sent < count else 500):
            message = wire.decode([f.buffer for f in mad.recv_multipart(copy=False)])
            answers[message["code"] if message.kind == "refused" else f"ANSWERED {message.kind}"] += 1
            last = time.monotonic()
    port = int(server.address.rsplit(":", 1)[1])
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", port), 5) as raw:
            raw.sendall(draw.randbytes(draw.randrange(1, 4000)))

    def client_with(pair: link_keys.KeyPair, folder: str, name: str) -> tuple[LinkClient, Outbox]:
        outbox = Outbox(root / folder, reserve=0)
        outbox.put(b"an episode", "episode", f"{folder}/1")
        return LinkClient(server.address, name, outbox, keys=pair, learner=learner.public, beat=0.1), outbox

    wrong, wrong_box = client_with(stranger, "wrong", "robot-1")
    wrong.start()
    refused = wrong.wait(lambda: "does not let this key in" in wrong.status().error, 10) or bool(wrong.status().error)
    wrong_delivered = wrong.status().delivered
    wrong_error = wrong.status().error
    wrong.stop()
    accepted = len(journal.events)
    right, right_box = client_with(robot, "right", "robot-1")
    right.start()
    alive = right.wait(lambda: not len(right_box), 20)
    right.stop()
    thread_alive = server._thread is not None and server._thread.is_alive()
    server.stop()
    mad.close()
    context.term()
    for box in (wrong_box, right_box):
        box.close()
    journal.close()
    return {
        "sent": sent,
        "answers": dict(answers),
        "accepted": accepted,
        "crashes": int(not (alive and thread_alive)),
        "wrong_key": {"refused": refused, "delivered": wrong_delivered, "told": wrong_error},
    }
