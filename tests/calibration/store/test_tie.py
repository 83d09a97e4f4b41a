"""The id in the contract is what ties every episode to its camera's calibration: a wrong one is worse than none.

Pinned: every shipped contract takes an id for each camera with everything else in the file as it was; what was tied is
in every episode; another camera's, robot's, device's or size's calibration is refused with its code and nothing is
written. Deterministic: fixed content.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_calibration.store.tie import tie
from ratchet_vla.cli.main import main
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.episodes.file.writer import write_episode
from tests.agent.episodes.samples import ROOT, episode
from tests.calibration.scenes import BOARD, LENS

ROBOTS = sorted((ROOT / "robots").glob("*.yaml"))


def calibration_of(contract: RobotContract, name: str, **changes: Any) -> Calibration:
    spec = contract.camera(name)
    width, height = (spec.width, spec.height) if spec.rotate in (0, 180) else (spec.height, spec.width)
    calibration = Calibration(
        name, dataclasses.replace(LENS, width=width, height=height), BOARD, "2026-01-02", 0.1, 0.1, 20
    )
    return dataclasses.replace(calibration, **changes)


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda p: p.stem)
def test_every_contract_takes_an_id_and_keeps_the_rest(robot: Path, tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(robot.read_text())
    first = RobotContract.load(path)
    for number in range(2):  # a new field, then a new value of it
        for camera in first.cameras:
            calibration = calibration_of(first, camera.name, notes=str(number))
            before, after = tie(path, calibration)
            assert after.camera(camera.name).calibration_id == calibration.id
            assert (after.id != before.id, RobotContract.load(path)) == (True, after)
    text = path.read_text()
    for camera in first.cameras:
        text = text.replace(f", calibration_id: {after.camera(camera.name).calibration_id}", "")
    assert text == robot.read_text(), "comments and order are as they were"


def test_block_style_and_comments_behind_values(tmp_path: Path) -> None:
    raw = (ROOT / "robots/so101.yaml").read_text()
    entry = next(line for line in raw.splitlines() if "name: front" in line)
    block = "  - name: front  # the one on the pole\n    source: /dev/video0\n    topic: /front/image_raw\n"
    block += "    width: 640\n    height: 480  # as the driver gives it"
    path = tmp_path / "robot.yaml"
    path.write_text(raw.replace(entry, block))
    calibration = calibration_of(RobotContract.load(path), "front")
    tie(path, calibration)
    assert "  # the one on the pole\n    source" in path.read_text()
    assert RobotContract.load(path).camera("front").calibration_id == calibration.id


def test_from_the_verb_into_every_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "robot.yaml"
    store = CalibrationStore(tmp_path / "calibrations")
    path.write_text((ROOT / "robots/libero.yaml").read_text())
    calibration = store.put(calibration_of(RobotContract.load(path), "wrist"), {})
    arguments = ["calibrate", "use", "wrist", "--contract", str(path), "--store", str(store.root)]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    contract = RobotContract.load(path)
    assert (answer["calibration"], answer["camera"], answer["after"]) == (calibration.id, "wrist", contract.id)
    write_episode(tmp_path / "a.mcap", episode(contract, steps=1), contract)
    assert EpisodeReader(tmp_path / "a.mcap").info.calibrations == {"wrist": calibration.id}
    assert main(arguments) == 0
    assert "ratchet calibrate drift" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"camera": "wrist"}, "calibration.other_size"),  # which has another size here
        ({"camera": "side"}, "calibration.other_camera"),
        ({"robot": "ur5e"}, "calibration.other_robot"),
        ({"camera_serial": "SN2"}, "calibration.other_device"),
        ({"model": LENS}, ""),
        ({"model": dataclasses.replace(LENS, width=480, height=640)}, "calibration.other_size"),
    ],
)
def test_another_cameras_calibration_is_refused(
    changes: dict[str, Any], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "robot.yaml"
    store = CalibrationStore(tmp_path / "calibrations")
    text = (ROOT / "robots/so101.yaml").read_text().replace("source: /dev/video0", "source: SN1")
    path.write_text(text.replace("source: /dev/video2, width: 640, height: 480", "width: 320, height: 240"))
    before = path.read_text()
    calibration = store.put(calibration_of(RobotContract.load(path), "front", camera_serial="SN1"), {})
    other_calibration = store.put(dataclasses.replace(calibration, **changes), {})
    code_now = main(
        ["calibrate", "use", other_calibration.id, "--contract", str(path), "--store", str(store.root), "--json"]
    )
    answer = json.loads(capsys.readouterr().out)
    if not code:
        assert code_now == 0
        return
    assert (code_now, answer["error"]["code"]) == (2, code)
    assert answer["error"]["fix"]
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
