"""The policy's process may crash, hang or be refused; whoever holds the arm sees a late chunk and a coded reason only.

Pinned: handshake and its refusals, frames through shared memory, swaps beside inference, crash (SIGKILL), hang
(SIGSTOP), out-of-memory, malformed messages, restart under the same base and adapter, also of one that dies while it
is started again, nothing left behind, no model code in the control process. The policy is FakePolicy (no model);
waiting is on conditions, never on time.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Observation
from ratchet_vla.runtime.inference import restarts, wire
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.inference.frames import FrameLayout, Frames, create_memory
from ratchet_vla.runtime.inference.process import PolicyProcess
from ratchet_vla.runtime.inference.source import Ahead, PolicyFault, Reply
from ratchet_vla.testing.fake_contract import arm

CONTRACT = arm("ee_delta", rotation="none")
ROOT = Path(__file__).resolve().parents[4]


@contextmanager
def serving(
    contract: RobotContract = CONTRACT, *, launch: dict[str, object] | None = None, **options: object
) -> Iterator[PolicyClient]:
    settings: dict[str, object] = {"module": "ratchet_vla.testing.fake_policy_worker", "start_timeout": 60.0, "nice": 0}
    client = PolicyClient(
        contract,
        PolicyLaunch(options={"image_size": 8, **options}, **{**settings, **(launch or {})}),  # type: ignore[arg-type]
    )
    client.start()
    try:
        yield client
    finally:
        client.stop()


def seen(sequence: int = 0, contract: RobotContract = CONTRACT) -> Observation:
    images = {c.name: np.full((c.height, c.width, 3), sequence, np.uint8) for c in contract.cameras}
    return Observation(images, {s.name: np.zeros(s.size, np.float32) for s in contract.state}, "go", 1.0, sequence)


def ask(client: PolicyClient, sequence: int = 0) -> Reply:
    client.request(seen(sequence))
    replies = client.wait(60.0)
    assert len(replies) == 1
    return replies[0]


def eventually(client: PolicyClient, condition: Callable[[], bool]) -> None:
    """Wait on the client's own condition variable until something is so."""
    with client._changed:
        assert client._changed.wait_for(condition, 60.0)


def test_answers_carry_the_observation_they_answer_and_who_gave_them() -> None:
    with serving(chunk=5) as client:
        assert client.spec is not None
        assert client.spec.chunk == 5
        reply = ask(client, 7)
        assert isinstance(reply, ActionChunk)
        assert reply.actions.shape == (5, 4)
        assert (reply.observation_sequence, reply.observation_stamp) == (7, 1.0)
        assert reply.adapter_id == client.base_hash
        status = client.status()
        assert (status.state, status.asked, status.answered) == ("ready", 1, 1)
        with pytest.raises(RatchetError, match=r"runtime\.bad_frame"):
            client.request(Observation({"front": np.zeros((4, 4, 3), np.uint8)}, seen().state, "go", 1.0, 1))
        assert isinstance(ask(client, 8), ActionChunk)  # a refused frame leaves the client in order


def test_an_answer_nobody_waits_for_is_never_taken_for_the_next() -> None:
    with serving() as client:
        client.request(seen(0))
        client.forget()
        eventually(client, lambda: client.ready or client._open_request is None)
        reply = ask(client, 1)
        assert isinstance(reply, ActionChunk)
        assert reply.observation_sequence == 1
        assert client.status().discarded == 1


def test_a_policy_for_another_robot_is_refused_before_anything_moves() -> None:
    with (
        pytest.raises(RatchetError, match=r"\[adapter\.|\[compat\.refused\]"),
        serving(launch={"module": "tests.agent.runtime.inference.misfit_worker"}),
    ):
        pass


def test_a_missing_interpreter_and_a_dying_start_are_told_apart() -> None:
    with pytest.raises(RatchetError, match=r"policy\.bad_python"), serving(launch={"python": "/no/such/python"}):
        pass
    with pytest.raises(RatchetError, match=r"policy\.crashed"), serving(launch={"module": "ratchet_vla.errors"}):
        pass


def test_swaps_run_beside_inference_and_refusals_leave_the_adapter() -> None:
    with serving(swap_seconds=0.2) as client:
        base = client.adapter_id
        ticket = client.swap("1")
        assert client.status().swapping
        during = ask(client, 0)
        assert isinstance(during, ActionChunk)
        assert during.adapter_id == base
        report = ticket.result(60.0)
        assert report["old_id"] == base
        after = ask(client, 1)
        assert isinstance(after, ActionChunk)
        assert after.adapter_id == report["new_id"] == client.adapter_id
        with pytest.raises(RatchetError, match=r"adapter\.unknown"):
            client.swap("nonsense").result(60.0)
        still = ask(client, 2)
        assert isinstance(still, ActionChunk)
        assert still.adapter_id == report["new_id"]
        rows = client.adapters().result(60.0)
        assert [r["id"] for r in rows if r["active"]] == [report["new_id"]]
        assert not client.status().swapping


@pytest.mark.parametrize(
    ("options", "launch", "code"),
    [
        ({"fault": "crash"}, {}, "policy.crashed"),
        ({"fault": "exit"}, {}, "policy.crashed"),
        ({"fault": "hang"}, {"hang_timeout": 0.3}, "policy.hung"),
        ({"fault": "oom"}, {"memory_limit": 1 << 30}, "policy.out_of_memory"),
    ],
)
def test_every_way_to_fail_has_its_code(options: dict[str, Any], launch: dict[str, Any], code: str) -> None:
    with serving(launch=launch, fault_at=1, **options) as client:
        assert isinstance(ask(client, 0), ActionChunk)
        client.request(seen(1))
        replies: list[Reply] = []
        while not replies:
            replies = client.wait(0.1)  # polling is what notices a hang
        assert isinstance(replies[0], PolicyFault)
        assert replies[0].code == code
        if code == "policy.out_of_memory":
            assert isinstance(ask(client, 2), ActionChunk)  # the process outlives it
        else:
            assert not client.ready
            with pytest.raises(RatchetError, match=code.replace(".", r"\.") + r"|policy\.not_ready"):
                client.swap("1").result(60.0)


def test_it_is_started_again_as_configured_with_the_same_adapter() -> None:
    with serving(launch={"restarts": 1}) as client:
        wanted = client.swap("1").result(60.0)["new_id"]
        first = client.status().pid
        os.kill(first, signal.SIGKILL)
        eventually(client, lambda: bool(client._replies))
        fault = client.poll()[0]
        assert isinstance(fault, PolicyFault)
        assert "SIGKILL" in fault.message
        eventually(client, lambda: client._state == "ready")
        reply = ask(client, 1)
        assert isinstance(reply, ActionChunk)
        assert reply.adapter_id == wanted
        assert client.status().restarts == 1
        os.kill(client.status().pid, signal.SIGKILL)
        eventually(client, lambda: client._state == "failed")
        assert client.status().restarts == 1


def test_one_that_is_killed_while_it_is_started_again_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each death is told with its code; a row of them has an end."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    handshake, doomed = PolicyProcess._handshake, 0

    def greet(self: PolicyProcess, *given: Any) -> None:
        nonlocal doomed
        if doomed > 0:
            doomed -= 1
            os.kill(self.pid, signal.SIGKILL)
        handshake(self, *given)

    monkeypatch.setattr(PolicyProcess, "_handshake", greet)
    with serving(launch={"restarts": 4}) as client:
        wanted = client.swap("1").result(60.0)["new_id"]
        doomed = 2
        os.kill(client.status().pid, signal.SIGKILL)
        eventually(client, lambda: client._state == "ready" and client._restarts.total == 3)
        faults = [reply for reply in client.poll() if isinstance(reply, PolicyFault)]
        assert [fault.code for fault in faults] == ["policy.crashed"] * 3
        assert ["in vain" in fault.message for fault in faults] == [False, True, True]
        assert all("SIGKILL" in fault.message for fault in faults)
        reply = ask(client, 1)
        assert isinstance(reply, ActionChunk)
        assert reply.adapter_id == wanted
        doomed = 2
        os.kill(client.status().pid, signal.SIGKILL)
        eventually(client, lambda: client._state == "failed")
        assert (client.status().restarts, doomed) == (4, 1)
        assert "in vain" in client.status().error


def test_one_that_is_stopped_while_it_waits_to_be_started_again_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 1e6)
    monkeypatch.setattr(restarts, "LONGEST_PAUSE_S", 1e6)
    with serving(launch={"restarts": 2}) as client:
        monkeypatch.setattr(client, "launch", dataclasses.replace(client.launch, module="ratchet_vla.errors"))
        os.kill(client.status().pid, signal.SIGKILL)
        eventually(client, lambda: len(client._replies) == 2)
        assert client.status().state == "restarting"
    assert client.status().state == "stopped"


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    with serving() as client:
        ask(client)
    before, threads = descriptors(), threading.active_count()
    with serving() as client:
        pid = client.status().pid
        ask(client)
    assert not Path(f"/proc/{pid}").exists()
    assert (descriptors(), threading.active_count()) == (before, threads)
    client.stop()  # again


def test_noise_comes_from_the_seed_alone() -> None:
    with serving() as client:
        drawn: list[np.ndarray] = []
        original = client._link.send  # type: ignore[union-attr]

        def record(message: dict[str, object], arrays: wire.Arrays | None = None) -> bool:
            if arrays is not None:
                drawn.append(arrays["noise"])
            return original(message, arrays)

        client._link.send = record  # type: ignore[union-attr, method-assign]
        for _ in range(2):
            client.sample(1.5, seed=11)
            reply = ask(client)
            assert isinstance(reply, ActionChunk)
            assert reply.temperature == 1.5
        np.testing.assert_array_equal(drawn[0], drawn[1])
        expected = np.random.Generator(np.random.Philox(key=11)).random((8, 4), np.float32)
        np.testing.assert_array_equal(drawn[0], expected)


def test_what_is_ahead_travels_too() -> None:
    with serving() as client:
        client.request(seen(), Ahead(np.ones((3, 4), np.float32), 2))
        assert isinstance(client.wait(60.0)[0], ActionChunk)


def test_the_control_process_holds_no_model_code() -> None:
    code = (
        "import sys, ratchet_vla.runtime.control.loop, ratchet_vla.runtime.inference.client\n"
        "import ratchet_vla.testing.fake_arm, ratchet_vla.runtime.session.manifest\n"
        "import ratchet_vla.runtime.messages.align\n"
        "bad = sorted({'torch', 'transformers', 'peft', 'zmq', 'rclpy', 'cv2'} & set(sys.modules))\n"
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_frame_that_is_overwritten_while_it_is_read_is_noticed() -> None:
    memory = create_memory()
    layout = FrameLayout((("front", 4, 4), ("wrist", 2, 3)), 2)
    writer, reader = Frames(memory, layout, create=True), Frames(memory, layout, create=False)
    os.close(memory)
    images = [np.full((4, 4, 3), 7, np.uint8), np.full((2, 3, 3), 9, np.uint8)]
    slot, sequence = writer.write(images, np.array([1.0, 2.0], np.float32))
    got = reader.read(slot, sequence)
    assert got is not None
    np.testing.assert_array_equal(got[0][0], images[0])
    np.testing.assert_array_equal(got[0][1], images[1])
    np.testing.assert_array_equal(got[1], [1.0, 2.0])
    for _ in range(3):
        writer.write(images, np.zeros(2, np.float32))
    assert reader.read(slot, sequence) is None  # the slot holds another observation
    slot, sequence = writer.write(images, np.zeros(2, np.float32))
    writer._slots[slot][0][0] = sequence + 3  # the writer has begun to overwrite it
    assert reader.read(slot, sequence) is None
    writer.close()
    reader.close()


@pytest.mark.parametrize(
    "data",
    [
        wire.HEADER.pack(2**31, 0),
        wire.HEADER.pack(4, 0) + b"nope",
        wire.HEADER.pack(2, 0) + b"{}",
        wire.HEADER.pack(33, 0) + b'{"type": "x", "arrays": [["a"]]}  ',
    ],
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(data)
        theirs.close()
        with pytest.raises(RatchetError, match=r"wire\.malformed"):
            wire.receive(mine)


def test_messages_come_back_as_they_were_sent() -> None:
    mine, theirs = socket.socketpair()
    arrays: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([], np.int64),
        "c": np.array([1, 2], np.uint8),
    }
    with mine, theirs:
        theirs.sendall(wire.pack({"type": "x", "n": 1}, arrays))
        theirs.close()
        got = wire.receive(mine)
        assert got is not None
        assert got[0] == {"type": "x", "n": 1}
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[1][name], array)
            assert got[1][name].dtype == array.dtype
        assert wire.receive(mine) is None
    with pytest.raises(RatchetError, match=r"wire\.bad_array"):
        wire.pack({"type": "x"}, {"o": np.array([None])})
