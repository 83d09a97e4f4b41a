"""A person who intervenes stands beside the arm: the first motion must be theirs, small, and from where the arm is.

Pinned: in every control mode an intervention does not move the arm by itself, and full deflection grows over the ramp
and stays within the limits; absolute targets stay on a leash; interventions that end, lost devices and labels reach
the loop as promised; each device's bytes mean what its documentation says. Deterministic: the clock is moved by hand,
and devices are fakes that give scripted keys, axes and reports.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Float32, Mark, Observation
from ratchet_vla.runtime.clock import ManualClock
from ratchet_vla.runtime.control.chunks import CollectExecutor
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.source import Ahead, Reply
from ratchet_vla.runtime.safety.filter import SafetyFilter
from ratchet_vla.runtime.teleop.devices import Gamepad, Keyboard, LinuxGamepad, SpaceMouse, TerminalKeys
from ratchet_vla.runtime.teleop.operator import Intent, Intervention, Jog, Teleoperator
from ratchet_vla.testing.fake_arm import FakeArm
from ratchet_vla.testing.fake_contract import HZ, MODES, arm


class FakeDevice:
    """Hands that follow a script: intent per read; None for silence."""

    name = "fake device"

    def __init__(self, script: list[Intent | None]) -> None:
        self.script = script

    def open(self) -> None:
        return

    def read(self, now: float) -> Intent | None:
        return self.script.pop(0) if self.script else None

    def close(self) -> None:
        return


class FakeSource:
    """A policy that answers every request with the same action, K = 4."""

    ready = True

    def __init__(self, action: Float32) -> None:
        self._action, self._answers = action, list[Reply]()

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        chunk = np.tile(self._action, (4, 1))
        self._answers.append(ActionChunk(chunk, None, None, "p", 0.0, observation.stamp, observation.sequence))

    def poll(self) -> list[Reply]:
        answers, self._answers = self._answers, []
        return answers

    def wait(self, timeout: float) -> list[Reply]:
        return self.poll()

    def forget(self) -> None:
        self._answers.clear()


class FakeLoop:
    """Remembers what an intervention tells it."""

    def __init__(self) -> None:
        self.told: list[Float32 | None] = []
        self.cancelled = False

    def human(self, action: Float32 | None) -> None:
        self.told.append(action)

    def cancel(self) -> None:
        self.cancelled = True


def state_of(contract: RobotContract, value: float = 0.1) -> dict[str, Float32]:
    state = {s.name: np.full(s.size, value, np.float32) for s in contract.state}
    if "turned" in state and len(state["turned"]) == 4:
        state["turned"] = np.array([0, 0, 0, 1], np.float32)
    return state


ROTATIONS = [*((m, "axis_angle") for m in MODES), ("ee_absolute", "quaternion_xyzw"), ("ee_absolute", "euler_xyz")]


@pytest.mark.parametrize(("mode", "rotation"), ROTATIONS)
def test_taking_over_moves_nothing(mode: str, rotation: str) -> None:
    contract = arm(mode, rotation=rotation, ramp=1.0)
    jog, state = Jog(contract), state_of(contract)
    jog.take(state, 5.0)
    action = jog.action(Intent(engaged=True), state, 5.0)
    assert action is not None
    moved = SafetyFilter(contract).limiter
    still = {"ee_absolute": state["place"], "joint_absolute": state["place"]}.get(mode, np.zeros(3))
    assert action[moved.linear] == pytest.approx(still)
    if mode == "ee_absolute":
        assert action[3 : 3 + len(state["turned"])] == pytest.approx(state["turned"], abs=1e-6)
    assert action[-1] == pytest.approx(0.1), "the gripper stays as measured"


@pytest.mark.parametrize(("mode", "rotation"), ROTATIONS)
def test_full_deflection_grows_over_the_ramp_and_passes_the_limits(mode: str, rotation: str) -> None:
    contract = arm(mode, rotation=rotation, ramp=1.0)
    clock = ManualClock()
    fake = FakeArm(contract, clock)
    fake.connect()
    jog = Jog(contract, speed=0.3)
    jog.take(fake.observe(cameras=False).state, 0.0)
    limiter = SafetyFilter(contract).limiter
    limiter.start(limiter.measure(fake.observe(cameras=False).state))
    places = [fake.position]
    for i in range(30):
        state = fake.observe(cameras=False).state
        action = jog.action(Intent(True, (1, 0, 0), (0, 0, 1)), state, i / HZ)
        assert action is not None
        allowed, cuts = limiter.apply(action, limiter.measure(state), 1 / HZ)
        assert not cuts, "a person's full deflection is within the limits"
        assert allowed == pytest.approx(action)
        fake.act(action)
        clock.advance(1 / HZ)
        places.append(fake.position)
    speed = np.diff([p[0] for p in places]) * HZ
    full = contract.limits.velocity[0] * 0.3
    assert speed[:20] == pytest.approx(full * np.arange(1, 21) / 20, rel=1e-3)
    assert speed[20:] == pytest.approx(np.full(10, full), rel=1e-3)
    assert np.ptp([p[1] for p in places]) == pytest.approx(0.0)


def test_a_blocked_arm_is_not_wound_up() -> None:
    contract = arm("ee_absolute")
    jog, state = Jog(contract, speed=1.0), state_of(contract)
    jog.take(state, 0.0)
    for i in range(100):
        action = jog.action(Intent(True, (1, 0, 0), (0, 0, 1)), state, i / HZ)
    assert action is not None
    assert action[0] - 0.1 == pytest.approx(0.4 * 0.25)
    assert np.linalg.norm(action[3:6]) < 0.1 * np.sqrt(3) + 1.2 * 0.25 + 1e-6


def test_an_unknown_gripper_stands_until_the_person_says(libero: RobotContract) -> None:
    jog, state = Jog(libero), state_of(libero)
    jog.take(state, 0.0)
    assert jog.action(Intent(True, (1, 0, 0)), state, 0.0) is None
    closed = jog.action(Intent(True, gripper=1), state, 0.0)
    assert closed is not None
    assert closed[-1] == 1.0
    jog.take(state, 0.0, last=np.array([0, 0, 0, 0, 0, 0, -1], np.float32))
    held = jog.action(Intent(True), state, 0.0)
    assert held is not None
    assert held[-1] == -1.0, "what the policy did last holds on"


@pytest.fixture
def libero() -> RobotContract:
    return RobotContract.load(Path(__file__).resolve().parents[4] / "robots/libero.yaml")


@pytest.mark.parametrize("speed", [0.0, 1.1, float("nan")])
def test_speeds_that_are_no_share(speed: float) -> None:
    with pytest.raises(RatchetError, match=r"teleop\.bad_speed"):
        Jog(arm(), speed)


def test_over_and_back_in_a_running_loop() -> None:
    contract = arm("ee_delta", ramp=0.5)
    clock = ManualClock()
    fake = FakeArm(contract, clock)
    fake.connect()
    memory = MemorySink()
    policy = np.zeros(contract.action.size, np.float32)
    policy[0] = 0.01
    loop = ControlLoop(
        fake,
        FakeSource(policy),
        SafetyFilter(contract),
        CollectExecutor(contract),
        sink=memory,
        clock=clock,
        lock_step=True,
    )
    script = [Intent()] * 20 + [Intent(True, (-1, 0, 0))] * 20 + [Intent()] * 19 + [Intent(label="success")]
    events: list[str] = []
    frames: list[float] = []
    intervention = Intervention(
        FakeDevice(list(script)), loop, Jog(contract), on_event=events.append, frames=frames.append
    )
    end = loop.run_episode("t", "move", horizon=100, on_tick=intervention.on_tick)
    human = [bool(t.marks & Mark.HUMAN) for t in memory.ticks]
    assert human[:60] == [False] * 21 + [True] * 20 + [False] * 19, "an intent holds for the next tick"
    assert events == ["taken", "returned"]
    assert (end.termination, intervention.label, len(frames)) == ("cancelled", "success", 20)
    commands = np.array([t.command[0] if t.command is not None else 0.0 for t in memory.ticks])
    jumps = np.abs(np.diff(commands)) * HZ * HZ
    assert jumps.max() <= contract.limits.acceleration[0] * 1.001, "neither way with a jump"
    assert commands[21] < commands[20]
    assert commands[30] < 0
    assert memory.ticks[41].marks & (Mark.RAMPED | Mark.HELD | Mark.CLIPPED), (
        "the intervention ended, the policy begins anew"
    )


def tick_at(contract: RobotContract, stamp: float) -> ControlTick:
    return ControlTick(stamp, stamp, 0, None, None, Mark.NONE, -1, -1, "", state_of(contract))


def test_a_lost_device_hands_nothing_back() -> None:
    contract, loop, events = arm(), FakeLoop(), list[str]()
    intervention = Intervention(
        FakeDevice([Intent(True), None, None, Intent(True)]), loop, Jog(contract), on_event=events.append
    )
    for i in range(4):
        intervention.on_tick(tick_at(contract, i / HZ))
    assert events == ["taken", "lost", "found"]
    assert [a is None for a in loop.told] == [False, False], (
        "silence is neither a command nor an end of the intervention"
    )


# -- devices -----------------------------------------------------------------------------------------------------


class FakeKeys:
    """A keyboard whose keys are typed by the test."""

    def __init__(self) -> None:
        self.typed = ""

    def open(self) -> None:
        return

    def close(self) -> None:
        return

    def __call__(self) -> str:
        typed, self.typed = self.typed, ""
        return typed


def test_keyboard() -> None:
    keys = FakeKeys()
    device = Keyboard(keys)
    assert isinstance(device, Teleoperator)
    keys.typed = "w "
    assert device.read(0.0) == Intent(False, (1, 0, 0)), "moves show, but nobody is engaged and the gripper stays"
    keys.typed = "t"
    assert device.read(1.0) == Intent(True)
    keys.typed = "waJ"
    assert device.read(2.0) == Intent(True, (1, 1, 0), (-1, 0, 0))
    assert device.read(2.1).linear == (1, 1, 0), "between two repetitions of a held key"
    assert device.read(2.2) == Intent(True)
    keys.typed = " 2"
    assert device.read(3.0) == Intent(True, gripper=-1, label="failure")
    keys.typed = "t"
    assert device.read(4.0).engaged is False


def test_no_terminal_is_told() -> None:
    with Path(os.devnull).open() as nowhere, pytest.raises(RatchetError, match=r"teleop\.no_device"):
        TerminalKeys(nowhere).open()


def test_gamepad() -> None:
    pad = Gamepad()
    assert isinstance(pad, Teleoperator)
    assert pad.read(0.0) is None, "it has said nothing yet"
    axes = [0.0, 0.5, 0.0, 0.05, -1.0, 0.0, 0.0, 0.0]
    pad.update(axes, [1, 0, 0, 0, 1, 0, 0, 0, 0], 0.0)
    assert pad.read(0.1) == Intent(True, (0.5, 0, 0), (0, -1, 0), 1), "untouched triggers do not lift the arm"
    axes[5], axes[2] = -1.0, 1.0
    pad.update(axes, [0] * 7 + [1], 0.2)
    intent = pad.read(0.2)
    assert intent == Intent(False, (0.5, 0, 1), (0, -1, 0), label="success")
    pad.update(axes, [0] * 7 + [1], 0.3)
    repeated = pad.read(0.3)
    assert repeated is not None
    assert repeated.label is None, "a held button labels once"
    assert pad.read(0.6) is None, "silence"


def test_linux_gamepad(tmp_path: Path) -> None:
    events = [(0, 0, 0x82, 5), (0, 0, 0x81, 8), (1, -32767, 2, 1), (2, 1, 1, 4), (3, 1, 1, 1)]
    (tmp_path / "js").write_bytes(b"".join(LinuxGamepad.EVENT.pack(*e) for e in events))
    pad = LinuxGamepad(str(tmp_path / "js"))
    assert pad.read(0.0) is None, "not open yet"
    pad.open()
    assert pad.read(0.0) == Intent(True, (1, 0, 0), gripper=-1)
    assert pad.read(9.0) is not None, "the kernel repeats nothing"
    pad.close()
    with pytest.raises(RatchetError, match=r"teleop\.no_device"):
        LinuxGamepad(str(tmp_path / "none")).open()


def test_spacemouse() -> None:
    reports: list[bytes] = []
    device = SpaceMouse(report=lambda: [reports.pop(0) for _ in range(len(reports))])
    assert isinstance(device, Teleoperator)
    device.open()
    reports += [b"\x03\x02", b"\x01" + struct.pack("<3h", 350, -175, 0), b"\x02" + struct.pack("<3h", 0, 0, -350)]
    assert device.read(0.0) == Intent(True, (0.5, -1, 0), (0, 0, 1))
    reports += [b"\x03\x03", b"\x01" + struct.pack("<6h", 0, 0, -700, 0, 0, 0)]
    assert device.read(0.1) == Intent(True, (0, 0, 1), gripper=1), "one report may carry all axes; it is clipped"
    reports += [b"\x03\x01", b"\x03\x00", b"\x03\x01"]
    assert device.read(0.2) == Intent(False, (0, 0, 1), gripper=-1)
