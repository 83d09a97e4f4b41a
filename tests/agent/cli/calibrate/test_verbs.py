"""`ratchet calibrate`: what a person does on the first day with an arm, from a printed board to a session.

Pinned: the verbs lead from drawn images to a stored calibration whose id goes into a contract, exports and a session
that is refused once the camera moved; refusals are one coded line with exit code 2 and leave nothing half done.
Determinism: images are drawn; the simulator is not started.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ratchet_calibration.boards.board import Board
from ratchet_calibration.geometry import quaternion
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_vla.cli.calibrate import arm as calibrate_arm
from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract, VerifiedFact, write_verified
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.manifest import Session
from tests.calibration import scenes
from tests.calibration.scenes import BOARD, drawn

ROOT = Path(__file__).resolve().parents[4]
VERBS = ["board", "capture", "intrinsics", "handeye", "cameras", "actions", "use", "drift", "report", "export", "list"]


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a person would have it: board.json, images for the lens, hand-eye images with poses."""
    folder = tmp_path_factory.mktemp("day")
    (folder / "board.json").write_text(json.dumps(BOARD.to_dict()))
    for name in ("lens", "hand"):
        (folder / name).mkdir()
    for k, pose in enumerate(scenes.poses(16, seed=9)):
        cv2.imwrite(str(folder / "lens" / f"{k:03d}.png"), drawn(BOARD, pose))
    told: dict[str, Any] = {}
    _, _, poses, _ = scenes.arm(count=12, seed=4)
    for k, (pose, flange) in enumerate(zip(scenes.poses(12, seed=4), poses, strict=True)):
        cv2.imwrite(str(folder / "hand" / f"{k:03d}.png"), drawn(BOARD, pose))
        told[f"{k:03d}.png"] = {"position": flange[:3, 3].tolist(), "orientation": quaternion(flange).tolist()}
    (folder / "hand" / "poses.json").write_text(json.dumps(told))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_from_a_board_to_a_session(
    shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ["--store", str(tmp_path / "calibrations")]
    board = ["--board", str(shown / "board.json")]
    assert main(["calibrate", "intrinsics", str(shown / "lens"), "--camera", "front", *board, *store, "--json",
                 "--model", "none", "--serial", "SN7"]) == 0  # fmt: skip
    lens = said(capsys)
    assert lens["model"]["fx"] == pytest.approx(scenes.CAMERA.fx, rel=5e-3)
    assert lens["held_out_rms"] < 0.2
    assert main(["calibrate", "handeye", str(shown / "hand"), "--camera", "front", "--mounting", "eye_in_hand", *board,
                 *store, "--json", "--next-poses", "1"]) == 0  # fmt: skip
    hand = said(capsys)
    truth = scenes.arm(count=12, seed=4)[0]
    assert np.linalg.norm(np.array(hand["camera"])[:3, 3] - truth[:3, 3]) < 3e-3
    assert len(hand["next"]) == 1
    stored = CalibrationStore(tmp_path / "calibrations").load(hand["id"])
    assert stored.camera_serial == "SN7"
    assert stored.mount is not None
    page = Path(hand["report"]).read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert main(["calibrate", "list", *store, "--json"]) == 0
    assert [c["id"] for c in said(capsys)][-1] == hand["id"]
    assert main(["calibrate", "export", "front", "--form", "urdf", *store]) == 0
    assert "front_optical_frame" in capsys.readouterr().out
    assert main(["calibrate", "report", "front", *store]) == 0

    _a_session(tmp_path, hand["id"], shown, store)


def _a_session(tmp_path: Path, identity: str, shown: Path, store: list[str]) -> None:
    """Session start refuses until somebody looked, and after the camera moved, but for an override."""
    (tmp_path / "contract.yaml").write_text((ROOT / "robots" / "so101.yaml").read_text())
    assert main(["calibrate", "use", identity[:12], "--contract", "contract.yaml", *store]) == 0
    assert RobotContract.load(tmp_path / "contract.yaml").camera("front").calibration_id == identity
    with _arm(tmp_path / "robot", RobotContract.load(tmp_path / "contract.yaml")) as controller:
        _sessions(tmp_path, controller, shown, store)


@contextmanager
def _arm(folder: Path, contract: RobotContract) -> Iterator[SessionController]:
    """The process that runs the robot, played by a thread: it answers whoever asks for a session."""
    base = "b" * 64
    calibrations = {camera.name: camera.calibration_id for camera in contract.cameras if camera.calibration_id}
    controller = SessionController(folder, "nodes", contract, base, lambda: base, calibrations=calibrations)
    over = threading.Event()

    def answer() -> None:
        while not over.wait(0.01):
            controller.look()

    thread = threading.Thread(target=answer)
    thread.start()
    yield controller
    over.set()
    thread.join()
    controller.close()


def _sessions(tmp_path: Path, controller: SessionController, shown: Path, store: list[str]) -> None:
    start = ["session", "start", "--robot", "robot", "--contract", "contract.yaml", "--calibrations", store[1]]
    drift = ["calibrate", "drift", "front", *store, "--image"]
    then, now = str(shown / "hand" / "000.png"), str(shown / "hand" / "001.png")

    def checks() -> Mapping[str, Any]:
        return Session.read(tmp_path / "robot" / "sessions" / controller.id).checks["front"]

    assert main(start) == 2  # nobody has looked
    assert main([*drift, then]) == 2  # no reference yet
    assert main([*drift, then, "--remember"]) == 0
    assert main([*drift, now]) == 2  # moved
    assert (tmp_path / "drift.png").is_file()
    assert main(start) == 2
    assert controller.id == ""
    assert main([*drift, now, "--override", "on purpose"]) == 2  # nobody takes responsibility
    assert main([*drift, now, "--override", "on purpose", "--operator", "Ada"]) == 0
    assert main(start) == 0
    assert (checks()["override"], checks()["person"]) == ("on purpose", "Ada")
    assert main(["session", "stop", "--robot", "robot"]) == 0
    assert main([*drift, then]) == 0
    assert main(start) == 0
    assert checks()["moved"] is False


def test_a_simulated_arm_needs_nothing_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command on a machine without a printer: board, lens and arm are simulated, in this order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate_arm, "LENS_VIEWS", 12)
    words = ["calibrate", "handeye", "hand", "--camera", "front", "--mounting", "eye_in_hand"]
    assert main([*words, "--simulate", "8", "--json"]) == 0
    told = said(capsys)
    assert told["from_truth"]["mm"] < 3
    store = CalibrationStore(tmp_path / "calibrations")
    assert [store.load(i).mount is not None for i in (store.resolve("front"), told["id"])] == [True, True]
    assert len(store.ids()) == 2
    # Without --simulate the command to run before is named.
    assert main([*words[:4], "wrist", *words[5:], "--board", str(_board(tmp_path)), "--json"]) == 2
    assert said(capsys)["error"]["fix"].startswith("ratchet calibrate intrinsics IMAGES --camera wrist")


def _board(folder: Path) -> Path:
    (folder / "board.json").write_text(json.dumps(BOARD.to_dict()))
    return folder / "board.json"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", verb, "--help"])
    assert stopped.value.code == 0
    assert "--" in capsys.readouterr().out


def test_a_board_is_printed_with_its_description(tmp_path: Path) -> None:
    out = tmp_path / "new" / "board.pdf"
    assert main(["calibrate", "board", str(out), "--board.columns", "7", "--board.rows", "5"]) == 0
    assert out.read_bytes().startswith(b"%PDF")
    assert Board.from_dict(json.loads(out.with_suffix(".json").read_text())).columns == 7


@pytest.mark.parametrize(
    ("change", "arguments", "code"),
    [
        ("", ["intrinsics", "nowhere", "--camera", "front"], "calibration.no_images"),
        ("", ["intrinsics", "lens", "--camera", "front", "--board", "none.json"], "calibration.no_description"),
        ("board", ["intrinsics", "lens", "--camera", "front"], "calibration.bad_board"),
        ("other board", ["intrinsics", "lens", "--camera", "front"], "calibration.wrong_board"),
        ("few", ["intrinsics", "lens", "--camera", "front"], "calibration.too_few_views"),
        ("mixed", ["intrinsics", "lens", "--camera", "front"], "calibration.mixed_sizes"),
        ("mirrored", ["intrinsics", "lens", "--camera", "front"], "calibration.mirrored"),
        ("name", ["intrinsics", "lens", "--camera", "../front"], "calibration.bad_name"),
        ("", ["handeye", "hand", "--camera", "front", "--mounting", "eye_in_hand"], "calibration.unknown"),
        ("", ["drift", "front"], "calibration.unknown"),
        ("", ["export", "front"], "calibration.unknown"),
        ("", ["board", "x.pdf", "--board.square", "0.2"], "calibration.bad_board"),
        ("", ["board", "x.pdf", "--board.square", "0.06", "--board.marker", "0.04"], "calibration.too_large"),
    ],
    ids=str,
)
def test_refusals_are_one_line_and_change_nothing(
    shown: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    arguments: list[str],
    code: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    lens = tmp_path / "lens"
    lens.mkdir()
    count = {"few": 3, "mirrored": 2, "other board": 2}.get(change, 10)
    for path in sorted((shown / "lens").iterdir())[:count]:
        image = cv2.imread(str(path))
        assert image is not None
        if change == "mirrored":
            image = image[:, ::-1]
        elif change == "mixed" and path.name == "001.png":
            image = cv2.resize(image, (960, 720), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(lens / path.name), image)
    description = {"board": "{", "other board": json.dumps(Board(columns=7, rows=5).to_dict())}
    (tmp_path / "board.json").write_text(description.get(change, json.dumps(BOARD.to_dict())))
    (tmp_path / "hand").mkdir()
    before = contents(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    captured = capsys.readouterr()
    assert f"[{code}" in captured.err  # a renamed code names its former self behind it
    assert "Traceback" not in captured.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("poses", "code"),
    [
        (None, "calibration.no_poses"),
        ("{", "calibration.bad_poses"),
        ("[1]", "calibration.bad_poses"),
        ('{"000.png": {"position": [1, 2]}}', "calibration.bad_poses"),
        ("one missing", "calibration.mismatch"),
        ("millimetres", "calibration.units"),
    ],
)
def test_poses_that_are_no_poses(
    shown: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    poses: str | None,
    code: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    calibration = scenes_calibration()
    CalibrationStore(tmp_path / "calibrations").put(calibration, {})
    hand = tmp_path / "hand"
    hand.mkdir()
    told = json.loads((shown / "hand" / "poses.json").read_text())
    for path in sorted((shown / "hand").glob("*.png"))[:3]:
        (hand / path.name).write_bytes(path.read_bytes())
    if poses == "one missing":
        del told["001.png"]
        poses = json.dumps(told)
    elif poses == "millimetres":
        told = {n: p | {"position": [1e3 * x + 3e4 for x in p["position"]]} for n, p in told.items()}
        poses = json.dumps(told)
    if poses is not None:
        (hand / "poses.json").write_text(poses)
    (tmp_path / "board.json").write_text(json.dumps(BOARD.to_dict()))
    before = contents(tmp_path)
    assert main(["calibrate", "handeye", "hand", "--camera", "front", "--mounting", "eye_in_hand"]) == 2
    assert f"[{code}]" in capsys.readouterr().err
    assert contents(tmp_path) == before


def scenes_calibration() -> Any:
    from ratchet_calibration.store.record import Calibration

    return Calibration("front", scenes.CAMERA, BOARD, "2026-01-01T00:00:00Z", 0.1, 0.1, 20)


# -- what was verified on the robot ------------------------------------------------------------------------------------


def test_verified_facts_go_into_the_contract_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "so101.yaml"
    path.write_text((ROOT / "robots" / "so101.yaml").read_text())
    before, text = RobotContract.load(path), path.read_text()
    write_verified(path, [VerifiedFact("x.scale", 1.01, "", "2026-01-01T00:00:00Z")])
    write_verified(path, [VerifiedFact("x.scale", 0.99, "", "2026-01-02T00:00:00Z"),
                          VerifiedFact("x.latency", 0.05, "s", "2026-01-02T00:00:00Z")])  # fmt: skip
    after = RobotContract.load(path)
    assert after.id == before.id
    assert [(f.name, f.value) for f in after.verified] == [("x.scale", 0.99), ("x.latency", 0.05)]
    assert path.read_text().startswith(text.rstrip())  # comments and order as a person left them
    assert [p.name for p in tmp_path.iterdir()] == ["so101.yaml"]


def test_a_broken_contract_gets_no_facts(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("schema: 1\n")
    with pytest.raises(RatchetError, match=r"contract\.missing_field"):
        write_verified(path, [VerifiedFact("x.scale", 1.0, "", "")])
    assert path.read_text() == "schema: 1\n"
