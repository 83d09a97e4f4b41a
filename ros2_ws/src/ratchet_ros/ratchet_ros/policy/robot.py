"""RosRobot: the arm behind the contract's topics, as ratchet_vla.runtime's Robot. Commands go to the safety node.

Knows the intake, the command publisher and numbers that count commands. Knows no policy and no limits.
"""

from __future__ import annotations

import secrets
import threading
from array import array
from collections.abc import Callable, Mapping

import numpy as np
from ratchet_msgs.msg import Command

from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import TimeBase
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Mark, Observation
from ratchet_vla.runtime.safety.filter import FilterResult, Proposal, SafetyFilter

Publish = Callable[[Command], None]


class RosRobot:
    """One arm. `observe` gives the newest data; nothing here waits, except in lock-step.

    fail: told (code, message) when parts of an observation do not belong together.
    instruction: set by whoever runs a task.
    """

    def __init__(self, contract: RobotContract, intake: Intake, clock: TimeBase, publish: Publish) -> None:
        self._contract, self._intake, self._clock, self._publish = contract, intake, clock, publish
        self.fail: Callable[[str, str], None] = lambda code, message: None
        self.instruction = ""
        self.session = secrets.randbits(63)
        self.skew = 0.0
        self.image_stamps: list[float] = []
        self._number = self._sequence = 0
        self._about: tuple[float, int, int, str, int] = (0.0, -1, -1, "", 0)

    @property
    def contract(self) -> RobotContract:
        return self._contract

    @property
    def number(self) -> int:
        """Of the newest command that was sent; 0 before the first."""
        return self._number

    def connect(self) -> None:
        """Refuse while a source is silent. Raises RatchetError ros.no_data."""
        missing = self._intake.missing()
        if missing:
            topics = {c.name: c.topic for c in self._contract.cameras} | {s.name: s.topic for s in self._contract.state}
            raise RatchetError(
                "ros.no_data",
                "nothing received from " + ", ".join(f"{n} ({topics[n]})" for n in missing),
                where=self._contract.name,
                fix="start the drivers, then `ratchet doctor --contract …` names every mismatch",
            )

    def observe(self, cameras: bool = True) -> Observation:
        self._sequence += 1
        if not cameras:
            state, stamp = self._intake.aligner.newest_state()
            return Observation({}, state, self.instruction, stamp, self._sequence)
        try:
            aligned = self._intake.aligner.observe(self.instruction, self._sequence)
        except RatchetError as error:
            self.fail(error.code, f"{error.what} ({error.where})")
            state, _ = self._intake.aligner.newest_state()
            return Observation({}, state, self.instruction, -np.inf, self._sequence)  # too old for any decision
        self.skew = aligned.worst
        self.image_stamps = [aligned.observation.stamp + aligned.skew.get(c.name, 0.0) for c in self._contract.cameras]
        return aligned.observation

    def note(self, proposal: Proposal | None, result: FilterResult) -> None:
        """What the next `act` or `hold` carries; forgotten by it."""
        taken = proposal if result.accepted else None
        self._about = (
            taken.due if taken else 0.0,
            taken.chunk_sequence if taken else -1,
            taken.chunk_offset if taken else -1,
            taken.adapter_id if taken else "",
            int(result.marks),
        )

    def act(self, action: Float32) -> None:
        command = np.asarray(action, np.float32)
        if command.shape != (self._contract.action.size,) or not np.isfinite(command).all():
            raise RatchetError(
                "robot.bad_action",
                f"{command.tolist()} is no command of {self._contract.action.size} finite values",
                where=self._contract.name,
                fix="nothing was sent",
            )
        self._send(Command.ACTION, command)

    def hold(self) -> None:
        self._send(Command.HOLD)

    def release(self) -> None:
        """Motion has ended and nothing more is to come: the command filter goes idle instead of missing commands."""
        self._send(Command.STOP)

    def close(self) -> None:
        self.release()

    def _send(self, kind: int, command: Float32 | None = None) -> None:
        now = self._clock.now()
        due, sequence, offset, adapter_id, marks = self._about
        self._about = (0.0, -1, -1, "", int(Mark.HELD))
        self._number += 1
        self._publish(
            Command(
                stamp=self._clock.to_ros(now),
                due=self._clock.to_ros(due or now),
                session=self.session,
                number=self._number,
                kind=kind,
                action=array("f", command.tobytes()) if command is not None else array("f"),
                chunk_sequence=sequence,
                chunk_offset=offset,
                adapter_id=adapter_id,
                marks=marks,
            )
        )


class StampedRosRobot(RosRobot):
    """A robot whose frames run on their own: the loop may ask how old they are."""

    def frames_stamp(self) -> float:
        return self._intake.aligner.frames_stamp()


class LockStepRosRobot(RosRobot):
    """A simulation that stands still until it is commanded: `observe` waits until everything is of this moment.

    patience: real seconds to wait for a part that does not come. tolerance: seconds that count as the same moment.
    """

    def __init__(
        self, contract: RobotContract, intake: Intake, clock: TimeBase, publish: Publish, patience: float
    ) -> None:
        super().__init__(contract, intake, clock, publish)
        self._standing = True  # the last command was a hold, or there was none
        self._patience, self._tolerance = patience, 0.25 / contract.control_hz
        self._arrived = threading.Condition()
        self._abandoned = False

    def abandon(self, given_up: bool) -> None:
        """Nothing makes the simulation go on: neither it nor its clock is waited for until this is taken back."""
        self._clock.abandon(given_up)  # type: ignore[attr-defined]
        with self._arrived:
            self._abandoned = given_up
            self._arrived.notify_all()

    def begin(self) -> None:
        """A new task: the simulation waits for its first command."""
        self._standing = True
        self.abandon(False)

    def act(self, action: Float32) -> None:
        self._standing = False
        super().act(action)

    def hold(self) -> None:
        """The first hold after a motion takes the simulation one step further; the next ones do not."""
        super().hold()
        if self._standing:
            self.abandon(True)
        self._standing = True

    def arrived(self) -> None:
        """The intake has something new."""
        with self._arrived:
            self._arrived.notify_all()

    def observe(self, cameras: bool = True) -> Observation:
        moment = self._clock.now() - self._tolerance
        aligner = self._intake.aligner

        def there() -> bool:
            return self._abandoned or (
                aligner.state_stamp() >= moment and (not cameras or aligner.frames_stamp() >= moment)
            )

        with self._arrived:
            if not self._arrived.wait_for(there, self._patience):
                self.fail("safety.observation_age", f"the simulation sent nothing for {self._patience} real seconds")
        return super().observe(cameras)


class NotingSafety(SafetyFilter):
    """A safety filter that tells what it decided on, so that a command on the wire says what it carries."""

    robot: RosRobot

    def step(
        self,
        proposal: Proposal | None,
        state: Mapping[str, Float32],
        stamp: float,
        now: float,
        *,
        expected: bool = False,
    ) -> FilterResult:
        result = super().step(proposal, state, stamp, now, expected=expected)
        self.robot.note(proposal, result)
        return result
