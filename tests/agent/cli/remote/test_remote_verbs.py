"""The verbs of the remote learner, as a person gives them: keys, status, session, and refusals in one line.

Pinned: what they print with --json, exit codes, and what a session leaves on the disk. Deterministic: no sockets, no
simulator; the robot's process is played by `SessionController` in this one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ratchet_calibration.store import last_check
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.tie import tie
from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.dispatch import of_session
from ratchet_vla.runtime.session.manifest import Session
from ratchet_vla.storage.journal import Journal
from tests.agent.episodes.samples import episode, small_contract
from tests.calibration.store.test_tie import calibration_of

ROOT = Path(__file__).resolve().parents[4]
BASE, ONE = "b" * 64, "1" * 64


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_keys_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, learner = str(tmp_path), str(tmp_path / "learner")
    for name in ("learner", "robot-1"):
        assert told(capsys, "keys", "make", name, "--out", out)[0] == 0
    key = str(tmp_path / "robot-1" / "robot-1.key")
    assert told(capsys, "keys", "allow", key, "--learner", learner) == (0, {"allowed": "robot-1"})
    assert list(told(capsys, "keys", "list", "--learner", learner)[1]) == ["robot-1"]
    assert told(capsys, "keys", "revoke", "robot-1", "--learner", learner) == (0, {"revoked": "robot-1"})
    assert told(capsys, "keys", "list", "--learner", learner) == (0, {})
    code, answer = told(capsys, "keys", "make", "learner", "--out", out)
    assert (code, answer["error"]["code"]) == (2, "link.key_exists")


class Robot:
    """The robot's process, as far as sessions go."""

    def __init__(self, folder: Path, contract: RobotContract | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.adapter = BASE
        self.contract = contract or RobotContract.load(ROOT / "robots" / "metaworld.yaml")
        self.open()

    def open(self) -> None:
        self.store = EpisodeStore(self.folder / "episodes", create=True)
        self.controller = SessionController(
            self.folder, "robot", self.contract, BASE, lambda: self.adapter,
            calibrations={c.name: c.calibration_id for c in self.contract.cameras if c.calibration_id},
            episodes=lambda session: of_session(self.store, session), store=str(self.store.root),
        )  # fmt: skip

    def close(self) -> None:
        self.controller.close()

    def kill(self) -> None:
        self.close()
        self.open()

    def episode(self, name: str) -> None:
        path, contract = self.store.folder(self.controller.id) / f"{name}.mcap", small_contract(8)
        write_episode(path, episode(contract, seed=ord(name[0])), contract, session=self.controller.id, name=name)
        self.store.add(path)

    def told(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
        """What a verb says while this process looks."""
        codes: list[int] = []
        verb = threading.Thread(target=lambda: codes.append(main([*arguments, "--robot", str(self.folder), "--json"])))
        verb.start()
        while verb.is_alive():
            self.controller.look()
            verb.join(0.01)
        return codes[0], json.loads(capsys.readouterr().out)


def test_a_session_from_start_to_stop_with_a_kill_between(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "robot")
    robot = Robot(tmp_path / "robot")
    code, answer = robot.told(capsys, "session", "start", "--note", "new cups")
    session = robot.controller.id
    assert (code, answer) == (0, {"session": session, "state": "open"})
    robot.episode("a")
    robot.adapter = ONE
    robot.controller.look()
    robot.kill()
    assert robot.controller.id == session
    robot.episode("b")
    status = told(capsys, "session", "status", "--robot", folder)[1]
    assert (status["open"], status["running"]) == (session, True)
    assert [e["key"] for e in status["sessions"][0]["episodes"]] == ["a", "b"]
    code, answer = robot.told(capsys, "session", "stop", "--reason", "lunch")
    assert (code, answer) == (0, {"session": session, "state": "ended"})
    assert robot.controller.id == ""
    robot.episode("outside")
    [row] = told(capsys, "session", "status", "--robot", folder)[1]["sessions"]
    assert [e["key"] for e in row["episodes"]] == ["a", "b"]
    assert [adapter for _, adapter in row["adapters"]] == [BASE, ONE]
    assert (row["base_hash"], row["reason"], row["notes"]) == (BASE, "lunch", {"note": "new cups"})
    assert len(row["contract_id"]) == 64
    assert row["software"]
    robot.close()
    assert main(["session", "status", "--robot", folder]) == 0
    assert "not running" in capsys.readouterr().out


def test_a_session_of_no_robot_and_of_another_contract_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("start", "stop", "status"):
        code, answer = told(capsys, "session", verb, "--robot", str(tmp_path / "nothing"))
        assert (code, answer["error"]["code"]) == (2, "session.no_robot")
    robot = Robot(tmp_path / "robot")
    code, answer = robot.told(capsys, "session", "start", "--contract", str(ROOT / "robots" / "so101.yaml"))
    assert (code, answer["error"]["code"]) == (2, "session.other_contract")
    for word in ("metaworld", "so101"):
        assert word in answer["error"]["what"]
    robot.close()
    code, answer = robot.told(capsys, "session", "start")
    assert (code, answer["error"]["code"]) == (2, "session.no_robot")
    assert "has ended" in answer["error"]["what"]


def test_a_session_starts_on_a_fresh_look_at_the_cameras_and_keeps_who_let_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, store = tmp_path / "robot.yaml", tmp_path / "calibrations"
    path.write_text((ROOT / "robots" / "metaworld.yaml").read_text())
    contract = RobotContract.load(path)
    camera = contract.cameras[0].name
    made = CalibrationStore(store).put(calibration_of(contract, camera), {})
    robot = Robot(tmp_path / "robot", tie(path, made)[1])
    start = ("session", "start", "--calibrations", str(store))
    assert robot.told(capsys, *start)[1]["error"]["code"] == "session.not_checked"
    now = datetime.now(UTC).isoformat()
    last_check.write(store, made.id, last_check.Check(now, True, "", "", {}))
    assert robot.told(capsys, *start)[1]["error"]["code"] == "session.camera_moved"
    last_check.write(store, made.id, last_check.Check(now, True, "half a pixel", "Ada", {"pixels": 0.5}))
    code, answer = robot.told(capsys, *start)
    assert code == 0
    manifest = Session.read(robot.folder / "sessions" / answer["session"])
    assert manifest.checks[camera]["person"] == "Ada"
    assert manifest.calibrations == {camera: made.id}
    robot.close()


def learner_status(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "phase": "collecting", "stage": 1, "order": "x", "training": ONE, "active": "", "error": "",
        "queue": [{"task": "door-open", "state": "learning", "updates": 2}],
        "episodes": {"accepted": 3, "replay": 1}, "kept_out": {"inbox.other_adapter": 1},
        "last_update": {"task": "door-open", "update": 1, "adapter": ONE, "successes": 2, "facts": {"approx_kl": 0.01}},
        "last_update_episodes": 8,
        "last_gate": {"decision": "hold", "candidate": ONE, "reasons": [{"task": "door-open", "text": "why"}]},
        "robots": [{"name": "robot-1", "age": 1.0, "report": {"doing": "running", "waiting": 1, "waiting_bytes": 5}}],
        "link": {"received": 4, "bytes": 100, "malformed": 0}, "free_bytes": 10**10, "alerts": [],
        "rates": {"seconds": 600.0, "episodes_per_hour": 84.0, "bytes_per_second": 4e5},
        "written": time.time(),
    }  # fmt: skip
    return {**facts, **changes}


def test_status_of_a_learner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "status.json", str(tmp_path)
    path.write_text(json.dumps(learner_status()))
    assert main(["status", "--learner", folder]) == 0
    text = capsys.readouterr().out
    for word in ("door-open", "inbox.other_adapter", "hold", "robot-1", "2/8", "84 episodes/h, 0.40 MB/s"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
    path.write_text(json.dumps(learner_status(alerts=[{"code": "learner.sync", "text": "no word"}])))
    assert main(["status", "--learner", folder]) == 1
    assert "learner.sync" in capsys.readouterr().out
    path.write_text(json.dumps(learner_status(written=time.time() - 60)))
    code, facts = told(capsys, "status", "--learner", folder)
    assert (code, facts["running"]) == (1, False)
    path.write_text(json.dumps(learner_status(written=time.time() + 1e6, pid=os.getpid())))  # a clock set back
    code, facts = told(capsys, "status", "--learner", folder)
    assert (code, facts["running"]) == (0, True)


def test_status_of_a_robot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "robot": "robot-1", "doing": "waiting", "error": "", "adapter": ONE, "session": "",
        "link": {"up": False, "heard": None, "error": "the learner does not let this key in"},
        "outbox": {"waiting": 2, "bytes": 10, "delivered": 5}, "refused": {"link.damaged_file": 1},
        "written": time.time(),
    }  # fmt: skip
    (tmp_path / "status.json").write_text(json.dumps(facts))
    assert main(["status", "--robot", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "does not let this key in" in text
    assert "link.damaged_file" in text


def test_the_timeline_and_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("started", pid=7, address="x")
    journal.append("promoted", adapter=ONE, by="the gate")
    journal.close()
    assert main(["status", "--learner", str(tmp_path), "--timeline"]) == 0
    assert "is active, by the gate" in capsys.readouterr().out
    assert [e["kind"] for e in told(capsys, "status", "--learner", str(tmp_path), "--timeline")[1]] == [
        "started",
        "promoted",
    ]
    code, answer = told(capsys, "status", "--learner", str(tmp_path / "nothing"))
    assert (code, answer["error"]["code"]) == (2, "status.none")


def test_what_the_robot_mode_changes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learner", "--mode", "robot", "--tasks", "door-open", "--explain"]) == 0
    text = capsys.readouterr().out
    for word in ("1,024", "leave-one-out", "interventions"):
        assert word in text
