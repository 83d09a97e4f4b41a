"""A session that nobody opened, or that another robot's check opened, makes a manifest that is not true.

Pinned: sessions are asked of the process that runs the robot, which answers; a robot whose process has ended and a wish
meant for a dead process open nothing; contract, checks with their overrides, calibrations, adapters and episodes are in
one manifest; a killed process goes on with its session, another robot does not. Processes are played by desks in this
one; a second thread asks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session import robot_folder
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.manifest import Manifest, Session
from ratchet_vla.testing.fake_contract import arm

BASE = "b" * 64
CHECK = {"front": {"date": "2026-01-01T00:00:00+00:00", "moved": True, "override": "half a pixel", "person": "Ada"}}


def calibrated() -> RobotContract:
    raw = arm().to_dict()
    raw["cameras"][0]["calibration_id"] = "cal-1"
    return RobotContract.from_dict(raw)


class Robot:
    """The process that runs the robot."""

    def __init__(self, folder: Path, contract: RobotContract | None = None, base: str = BASE) -> None:
        self.ended: list[Manifest] = []
        self.adapter = base
        contract = contract or calibrated()
        self.controller = SessionController(
            folder, "nodes", contract, base, lambda: self.adapter,
            calibrations={c.name: c.calibration_id for c in contract.cameras if c.calibration_id},
            episodes=lambda session: [{"id": "e" * 64, "name": f"{session}-0001"}], on_end=self.ended.append,
        )  # fmt: skip

    def asked(self, action: str, **details: Any) -> Any:
        """What a person in another terminal is told, while this process looks."""
        told: list[Any] = []

        def ask() -> None:
            try:
                told.append(robot_folder.ask(self.controller.folder, action, 30.0, **details))
            except RatchetError as error:
                told.append(error.code)

        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            self.controller.look()
            asking.join(0.01)
        return told[0]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RatchetError) as caught:
        call()
    return caught.value.code


def test_one_manifest_holds_what_a_session_was(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    assert robot.controller.id == ""
    assert robot.asked("stop") == "session.none"
    session = robot.asked("start", notes={"note": "new cups"}, checks=CHECK)
    assert robot.controller.id == session
    assert robot.asked("start") == "session.open"
    robot.adapter = "1" * 64
    robot.controller.look()
    assert robot.asked("stop", reason="lunch") == session
    assert robot.controller.id == ""
    manifest = Session.read(tmp_path / "sessions" / session)
    assert manifest == robot.ended[0]
    assert manifest.checks == CHECK
    assert manifest.calibrations == {"front": "cal-1"}
    assert (manifest.contract_id, manifest.notes, manifest.reason) == (calibrated().id, {"note": "new cups"}, "lunch")
    assert [i for _, i in manifest.adapters] == [BASE, "1" * 64]
    assert manifest.episodes == [{"id": "e" * 64, "name": f"{session}-0001"}]
    robot.controller.close()


def test_a_robot_that_does_not_run_is_not_asked(tmp_path: Path) -> None:
    assert refused(lambda: robot_folder.ask(tmp_path / "nothing", "start", 1.0)) == "session.no_robot"
    robot = Robot(tmp_path)
    assert robot_folder.who(tmp_path).pid == os.getpid()
    assert robot_folder.who(tmp_path).robot().id == calibrated().id
    robot.controller.close()
    assert refused(lambda: robot_folder.ask(tmp_path, "start", 1.0)) == "session.no_robot"
    assert not (tmp_path / "session.wish").exists()


def test_a_wish_that_a_dead_process_left_unread_opens_nothing(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    dead = robot_folder.who(tmp_path)
    robot.controller.close()
    robot_folder.replace(
        tmp_path / "session.wish", {"number": "1", "process": dead.process, "action": "start", "checks": CHECK}
    )
    robot = Robot(tmp_path)
    robot.controller.look()
    assert robot.controller.id == ""
    assert not (tmp_path / "session.wish").exists()
    robot.controller.close()


def test_one_robot_per_folder(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    assert refused(lambda: Robot(tmp_path)) == "session.busy"
    robot.controller.close()
    Robot(tmp_path).controller.close()


def test_a_process_that_does_not_look_is_told_of(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    assert refused(lambda: robot_folder.ask(tmp_path, "start", 0.01)) == "session.no_answer"
    robot.controller.look()
    assert robot.controller.id == ""
    robot.controller.close()


def test_a_killed_process_goes_on_with_its_session_and_another_robot_does_not(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    session = robot.controller.start({}, CHECK)
    robot.controller.close()
    robot = Robot(tmp_path)
    assert robot.controller.id == session
    robot.controller.close()
    other = Robot(tmp_path, base="c" * 64)
    assert other.controller.id == ""
    assert [m.session for m in other.ended] == [session]
    assert "another contract or base" in Session.read(tmp_path / "sessions" / session).reason
    other.controller.close()


def test_a_wrong_calibration_is_the_answer(tmp_path: Path) -> None:
    robot = Robot(tmp_path)
    robot.controller._calibrations = {"front": "cal-0"}
    assert robot.asked("start") == "session.calibration"
    assert robot.controller.id == ""
    robot.controller.close()
