"""Robot and learner over real sockets: nothing is lost, doubled or believed, whoever dies, whatever the network does.

Pinned: delivery in order, resumption instead of sending again, strangers and revoked robots refused, adapters believed
only by their hash, life without the other side, plain text on loopback only. Deterministic in what it asserts: every
test waits for an event with a long limit, never for a time; network faults are seeded.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import zmq

from ratchet_vla.adapters.peft_format import WEIGHTS
from ratchet_vla.adapters.protocol import BASE, Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.link import keys, wire
from ratchet_vla.link.learner.server import LinkServer
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.learner_tag_watcher import LearnerTagWatcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.storage.files import Files
from ratchet_vla.testing.tiny_policy import made
from tests.agent.link.parts import LearnerEnd, RobotEnd, both


def body(name: str, size: int = 1000) -> bytes:
    return random.Random(name).randbytes(size)


def put(robot: RobotEnd, *names: str, size: int = 1000) -> None:
    for name in names:
        robot.outbox.put(body(name, size), "episode", name, {"name": name})


def test_files_arrive_in_order_and_adapters_come_back(tmp_path: Path) -> None:
    with both(tmp_path) as (learner, robot):
        put(robot, "a", "b")
        put(robot, "large", size=3_500_000)
        card = learner.store.put(made(), Provenance(task="door", stage=2))
        learner.server.publish({"adapters": [card.id], "tags": {"active": card.id}})
        robot.wait(lambda: not len(robot.outbox) and robot.offered == [card.id])
        assert learner.received() == ["a", "b", "large"]
        for name, size in (("a", 1000), ("large", 3_500_000)):
            sha = hashlib.sha256(body(name, size)).hexdigest()
            assert learner.inbox.path(sha).read_bytes() == body(name, size)
        assert robot.store.get(card.id).id == card.id
        assert robot.store.card(card.id).provenance.task == "door"
        assert robot.client.state["tags"] == {"active": card.id}
        robot.client.report({"doing": "something"})
        robot.wait(lambda: learner.server.peers()[0].report == {"doing": "something"})
        assert learner.server.counts.malformed == 0


def test_an_unknown_robot_is_refused_and_told(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path / "learner").start()
    stranger = RobotEnd(tmp_path / "s", learner, "robot-2", allowed=False)
    put(stranger, "a")
    stranger.start()
    stranger.wait(lambda: "does not let this key in" in stranger.client.status().error)
    stranger.stop()
    stranger.close()
    assert learner.received() == []
    assert learner.server.counts.messages == 0
    # The same robot, once it is allowed, needs nothing but the file.
    keys.allow(learner.keys, tmp_path / "s" / "keys" / "robot-2.key")
    second_end = RobotEnd.__new__(RobotEnd)
    second_end.__dict__.update(stranger.__dict__)
    second_end.outbox = Outbox(tmp_path / "s" / "outbox", reserve=0)
    second_end.start()
    second_end.wait(lambda: not len(second_end.outbox))
    second_end.stop()
    second_end.close()
    learner.stop()


def test_a_robot_sends_nothing_to_a_false_learner(tmp_path: Path) -> None:
    real = LearnerEnd(tmp_path / "real").start()
    false = LearnerEnd(tmp_path / "false").start()
    robot = RobotEnd(tmp_path / "r", real)
    keys.allow(false.keys, tmp_path / "r" / "keys" / "robot-1.key")
    put(robot, "a")
    assert real.pair is not None
    client = LinkClient(false.address, "robot-1", robot.outbox, keys=robot.pair, learner=real.pair.public, beat=0.05)
    client.start()
    assert client.wait(lambda: bool(client.status().error), 30)
    assert len(robot.outbox) == 1
    client.stop()
    assert false.server.counts.messages == 0
    robot.close()
    for learner in (real, false):
        learner.stop()


def test_a_revoked_robot_is_not_heard_any_more(tmp_path: Path) -> None:
    with both(tmp_path) as (learner, robot):
        put(robot, "a")
        robot.wait(lambda: not len(robot.outbox))
        keys.revoke(learner.keys, "robot-1")
        put(robot, "b")
        robot.wait(lambda: learner.server.counts.strangers > 0)
        assert learner.received() == ["a"]
        assert len(robot.outbox) == 1


def test_one_robot_cannot_speak_for_another(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path / "learner").start()
    robot = RobotEnd(tmp_path / "r", learner, "robot-2")
    put(robot, "a")
    assert learner.pair is not None
    client = LinkClient(
        learner.address, "robot-1", robot.outbox, keys=robot.pair, learner=learner.pair.public, beat=0.05
    )
    client.start()
    assert client.wait(lambda: "link.wrong_name" in client.status().error or learner.server.counts.malformed > 2, 30)
    client.stop()
    assert learner.received() == []
    robot.close()
    learner.stop()


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5544", "tcp://192.0.2.1:5544", "tcp://localhost:5544", "tcp://[::]:1"]
)
def test_plain_text_never_leaves_the_machine(tmp_path: Path, address: str) -> None:
    learner = LearnerEnd(tmp_path, plain=True)
    learner.address = address
    with pytest.raises(RatchetError, match=r"link\.plain"):
        learner.start()
    learner.journal.close()
    outbox = Outbox(tmp_path / "o", reserve=0)
    with pytest.raises(RatchetError, match=r"link\.plain"):
        LinkClient(address, "r", outbox)
    outbox.close()


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "inproc://x", "tcp://", "tcp://127.0.0.1", "udp://1.2.3.4:5", ""])
def test_other_transports_are_refused(tmp_path: Path, address: str) -> None:
    outbox = Outbox(tmp_path / "o", reserve=0)
    with pytest.raises(RatchetError, match=r"link\.bad_address"):
        LinkClient(address, "r", outbox)
    outbox.close()


def test_plain_works_on_loopback(tmp_path: Path) -> None:
    with both(tmp_path, plain=True) as (learner, robot):
        put(robot, "a")
        robot.wait(lambda: not len(robot.outbox))
        assert learner.received() == ["a"]


def test_a_taken_address_is_named(tmp_path: Path) -> None:
    first = LearnerEnd(tmp_path / "a").start()
    second = LearnerEnd(tmp_path / "b")
    second.address = first.address
    with pytest.raises(RatchetError, match=r"link\.address_in_use"):
        second.start()
    second.journal.close()
    first.stop()


def test_each_side_works_alone_and_rejoins(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path / "learner").start()
    robot = RobotEnd(tmp_path / "robot", learner)
    learner.stop()  # the robot starts while nobody listens
    put(robot, *(f"e{i}" for i in range(5)))
    robot.start()
    card = learner.store.put(made())
    learner.start()
    learner.server.publish({"adapters": [card.id]})
    robot.wait(lambda: not len(robot.outbox) and robot.offered == [card.id])
    learner.stop()
    put(robot, "later")
    learner.start()
    robot.wait(lambda: not len(robot.outbox))
    assert learner.received() == ["e0", "e1", "e2", "e3", "e4", "later"]
    robot.stop()
    # The robot's process is another one now; the learner's state reaches it anew.
    robot.start()
    learner.server.publish({"adapters": [], "note": "new"})
    robot.wait(lambda: robot.client.state.get("note") == "new")
    robot.stop()
    robot.close()
    learner.stop()


def test_an_upload_goes_on_where_a_dead_learner_was(tmp_path: Path) -> None:
    size = 6 * wire.CHUNK
    learner = LearnerEnd(tmp_path / "learner")

    class Dead(Files):
        """From the third piece on, this learner's disk takes nothing: as if it had died there."""

        left = 3

        def step(self, call: str, path: Path) -> None:
            if call == "write" and path.parent.name == "partial":
                self.left -= 1
                if self.left < 0:
                    raise OSError(5, "Input/output error", str(path))

    learner.start(files=Dead())
    robot = RobotEnd(tmp_path / "robot", learner)
    put(robot, "large", size=size)
    robot.start()
    robot.wait(lambda: learner.server.counts.refused > 0)
    learner.stop()
    learner.start()
    robot.wait(lambda: not len(robot.outbox))
    assert learner.server.counts.bytes == size - 3 * wire.CHUNK
    assert learner.received() == ["large"]
    robot.stop()
    robot.close()
    learner.stop()


class NetworkFaults:
    """Drops, doubles and delays messages; seeded."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._late = list[Any]()
        self.lost = 0

    def __call__(self, frames: list[Any]) -> list[list[Any]]:
        luck = self._random.random()
        messages = []
        if luck < 0.1:
            self.lost += 1
        elif luck < 0.25:
            self._late.append(frames)
        elif luck < 0.4:
            messages = [frames, frames]
        else:
            messages = [frames]
        if self._late and self._random.random() < 0.5:
            messages.append(self._late.pop(0))
        return messages


@pytest.mark.parametrize("seed", [1, 2])
def test_network_faults_change_nothing_but_time(tmp_path: Path, seed: int) -> None:
    to_learner = NetworkFaults(seed)
    to_robot = NetworkFaults(seed + 100)
    learner = LearnerEnd(tmp_path / "learner").start(tamper=to_robot)
    robot = RobotEnd(tmp_path / "robot", learner)
    names = [f"e{i}" for i in range(8)]
    put(robot, *names)
    put(robot, "large", size=3 * wire.CHUNK + 5)
    card = learner.store.put(made())
    robot.start(tamper=to_learner)
    learner.server.publish({"adapters": [card.id]})
    robot.wait(lambda: not len(robot.outbox) and robot.offered == [card.id], 60)
    assert learner.received() == [*names, "large"]
    assert to_learner.lost > 0
    assert robot.store.verify() == []
    robot.stop()
    robot.close()
    learner.stop()


def test_a_full_learner_is_waited_for(tmp_path: Path) -> None:
    with both(tmp_path) as (learner, robot):
        learner.inbox.reserve = 1 << 60
        put(robot, "a")
        robot.wait(lambda: learner.server.counts.refused > 0)
        assert len(robot.outbox) == 1
        learner.inbox.reserve = 0
        robot.wait(lambda: not len(robot.outbox))
        assert learner.received() == ["a"]


def test_a_file_that_the_robots_disk_changed_is_put_aside(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path / "learner").start()
    robot = RobotEnd(tmp_path / "robot", learner)
    put(robot, "a", "b")
    first = robot.outbox.waiting()[0]
    robot.outbox.path(first).write_bytes(b"X" + body("a")[1:])
    robot.start()
    robot.wait(lambda: not len(robot.outbox))
    assert learner.received() == ["b"]
    assert robot.outbox.done == {"link.damaged_file": 1, "stored": 1}
    robot.stop()
    robot.close()
    learner.stop()


def test_an_adapter_is_believed_only_by_its_own_hash(tmp_path: Path) -> None:
    """The learner's disk gives another adapter's weights under this id: every file hash fits, the id does not."""
    learner = LearnerEnd(tmp_path / "learner").start()
    right = learner.store.put(made(1))
    other_card = learner.store.put(made(2))
    objects = learner.root / "adapters" / "objects"
    good = (objects / right.id / WEIGHTS).read_bytes()
    shutil.copyfile(objects / other_card.id / WEIGHTS, objects / right.id / WEIGHTS)
    robot = RobotEnd(tmp_path / "robot", learner).start()
    learner.server.publish({"adapters": [right.id]})
    status = robot.client.status
    robot.wait(lambda: status().fetching == [right.id] and _attempts(learner) > 0)
    assert robot.offered == []
    assert robot.store.ids() == []
    (objects / right.id / WEIGHTS).write_bytes(good)
    learner.stop()
    learner.start()
    learner.server.publish({"adapters": [right.id]})
    robot.wait(lambda: robot.offered == [right.id])
    robot.stop()
    robot.close()
    learner.stop()


def _attempts(learner: LearnerEnd) -> int:
    return max(learner.server.counts.messages - 5, 0)


def test_an_adapter_that_the_learner_no_longer_has_is_given_up(tmp_path: Path) -> None:
    with both(tmp_path) as (learner, robot):
        card = learner.store.put(made())
        learner.server.publish({"adapters": ["0" * 64, card.id]})
        robot.wait(lambda: robot.offered == [card.id] and robot.client.status().fetching == [])


def test_the_running_adapter_follows_promotion_and_rollback(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path / "learner").start()
    robot = RobotEnd(tmp_path / "robot", learner)
    swapped: list[str] = []
    swap_seen = threading.Condition()

    def swap(adapter: str) -> None:
        with swap_seen:
            robot.store.resolve(adapter)
            swapped.append(adapter)
            swap_seen.notify_all()

    tag_watcher = LearnerTagWatcher(robot.store, swap)
    robot.start(on_state=tag_watcher.on_state)
    robot.client._fetcher._on_adapter = tag_watcher.on_adapter  # type: ignore[union-attr]
    first_id = learner.store.put(made(1)).id
    second_id = learner.store.put(made(2)).id
    for active in (first_id, second_id, first_id, BASE):
        learner.server.publish({"adapters": [first_id, second_id], "tags": {"active": active}})
        with swap_seen:
            assert swap_seen.wait_for(lambda active=active: swapped[-1:] == [active], 30)  # type: ignore[misc]
    tag_watcher.stop()
    assert swapped == [first_id, second_id, first_id, BASE]
    assert robot.store.tags()["active"] == BASE
    robot.stop()
    robot.close()
    learner.stop()


def test_a_candidate_arrives_as_a_name_and_runs_only_when_a_person_says_so(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, create=True)
    swapped: list[str] = []
    arrived = threading.Event()
    tag_watcher = LearnerTagWatcher(store, swapped.append, on_swap=lambda adapter: arrived.set())
    first = made(1)
    second = made(2)
    tag_watcher.on_state({"tags": {"active": first.id, "candidate": second.id}})  # before either is here
    store.put(second)
    tag_watcher.on_adapter(second.id)
    store.put(first)
    tag_watcher.on_adapter(first.id)
    assert arrived.wait(30)
    tag_watcher.stop()
    assert store.tags()["candidate"] == second.id
    assert swapped == [first.id]


def test_a_refused_swap_is_told_and_not_tried_forever(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, create=True)
    card = store.put(made())
    errors: list[str] = []
    reported = threading.Event()

    def swap(adapter: str) -> None:
        raise RatchetError("adapter.wrong_base", "not this base")

    def on_error(error: RatchetError) -> None:
        errors.append(error.code)
        reported.set()

    tag_watcher = LearnerTagWatcher(store, swap, on_error=on_error)
    tag_watcher.on_state({"tags": {"active": card.id}})
    assert reported.wait(30)
    tag_watcher.on_adapter(card.id)
    tag_watcher.stop()
    assert errors == ["adapter.wrong_base"]
    assert store.tags() == {}


def test_a_robot_gone_mad_does_not_stop_the_learner(tmp_path: Path) -> None:
    """Random and nearly right messages from an allowed robot: each is refused, a sane robot is served meanwhile."""
    with both(tmp_path) as (learner, robot):
        assert learner.pair is not None
        mad = keys.make(tmp_path / "mad", "mad")
        keys.allow(learner.keys, tmp_path / "mad" / "mad.key")
        context: zmq.Context[Any] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.curve_serverkey = learner.pair.public
        socket.curve_publickey = mad.public
        socket.curve_secretkey = mad.secret
        socket.connect(learner.address)
        draw = random.Random(0)
        for number in range(200):
            frames = [draw.randbytes(draw.randrange(100)) for _ in range(draw.randrange(1, 5))]
            socket.send_multipart(frames)
            assert socket.poll(30_000)
            answer = wire.decode(socket.recv_multipart())
            assert answer.kind == "refused", number
        put(robot, "a")
        robot.wait(lambda: not len(robot.outbox))
        assert learner.received() == ["a"]
        assert learner.server.counts.malformed == 200
        socket.close()
        context.term()


def test_bytes_that_are_no_link_at_all_do_not_stop_the_learner(tmp_path: Path) -> None:
    import socket

    with both(tmp_path) as (learner, robot):
        port = int(learner.address.rsplit(":", 1)[1])
        draw = random.Random(0)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), 10) as raw:
                raw.sendall(draw.randbytes(draw.randrange(1, 500)))
        put(robot, "a")
        robot.wait(lambda: not len(robot.outbox))
        assert learner.received() == ["a"]


def test_a_fault_of_ones_own_is_answered_and_the_thread_goes_on(tmp_path: Path) -> None:
    reported: list[str] = []

    def broken(state: dict[str, Any]) -> None:
        reported.append("state")
        raise ValueError("a listener with a fault")

    with both(tmp_path, on_state=broken) as (learner, robot):
        offer = learner.inbox.offer
        calls = []

        def once_broken(offered: Any) -> int | None:
            calls.append(offered.key)
            if len(calls) == 1:
                raise ZeroDivisionError("a fault in the learner")
            return offer(offered)

        learner.inbox.offer = once_broken  # type: ignore[method-assign]
        learner.server.publish({"note": 1})
        put(robot, "a")
        robot.wait(lambda: not len(robot.outbox) and bool(reported))
        assert learner.received() == ["a"]
        assert calls[:2] == ["a", "a"]


def test_equal_states_are_told_once(tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    learner = LearnerEnd(tmp_path / "learner").start()
    robot = RobotEnd(tmp_path / "robot", learner).start(on_state=states.append)
    for note in (1, 1, 2):
        version = learner.server.publish({"note": note})
        robot.wait(lambda version=version: robot.client.version == version)  # type: ignore[misc]
    with pytest.raises(RatchetError, match=r"link\.bad_message"):
        learner.server.publish({"note": object()})
    assert [t["note"] for t in states if "note" in t] == [1, 2]
    robot.stop()
    robot.close()
    learner.stop()


def test_server_wants_keys_and_list_together(tmp_path: Path) -> None:
    learner = LearnerEnd(tmp_path)
    with pytest.raises(RatchetError, match=r"link\.no_key"):
        LinkServer("tcp://127.0.0.1:*", None, None, keys=learner.pair)  # type: ignore[arg-type]
