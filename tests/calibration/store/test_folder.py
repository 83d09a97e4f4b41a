"""A calibration is tied to every episode by its id: the id must mean these numbers and these images for ever.

Pinned: what is stored comes back equal, under an id that depends on every number and image and on nothing else;
storing twice changes nothing; a prefix or a camera's name finds it, the newest of them; exports say the same numbers in
ROS's and URDF's terms. Determinism: fixed content.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from ratchet_calibration.geometry import transform
from ratchet_calibration.store import export
from ratchet_calibration.store.folder import FILE, CalibrationStore
from ratchet_calibration.store.record import Calibration, Mount
from ratchet_vla.errors import RatchetError
from tests.calibration.scenes import BOARD, LENS

TURN = Rotation.from_euler("xyz", [0.3, -0.2, 1.1])
POSE = transform(TURN.as_matrix(), np.array([0.1, -0.2, 0.3]))
MOUNT = Mount.of(
    POSE, mounting="eye_in_hand", parent="tool0", child="wrist_optical_frame", covariance=1e-6 * np.eye(6), poses=20,
    rms=0.2, held_out_pixels=0.5, held_out_position=1e-3, held_out_rotation=1e-3,
)  # fmt: skip
PLAIN = Calibration("wrist", LENS, BOARD, "2026-01-02T03:04:05Z", 0.1, 0.12, 30, "SN1", "arm", "R7", MOUNT)


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    put = store.put(PLAIN, {"a.png": b"1", "b.png": b"2"}, lambda c: f"<html>{c.id}")
    assert store.load(put.id) == put
    assert store.images(put.id) == {"a.png": b"1", "b.png": b"2"}
    assert (tmp_path / put.id / "report.html").read_text() == f"<html>{put.id}"
    assert np.allclose(put.mount.pose, POSE) if put.mount else False
    assert [p.name for p in tmp_path.iterdir()] == [put.id]


def test_the_id_is_the_content(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    first = store.put(PLAIN, {"a.png": b"1"}, lambda c: "one page")
    assert store.put(PLAIN, {"a.png": b"1"}, lambda c: "another page").id == first.id
    others = [
        store.put(PLAIN, {"a.png": b"2"}).id,
        store.put(replace(PLAIN, camera_serial="SN2"), {"a.png": b"1"}).id,
        store.put(replace(PLAIN, model=replace(LENS, fx=np.nextafter(LENS.fx, 1e9))), {"a.png": b"1"}).id,
        store.put(replace(PLAIN, mount=None), {"a.png": b"1"}).id,
    ]
    assert len({first.id, *others}) == 5
    assert sorted(store.ids()) == sorted({first.id, *others})
    raw = yaml.safe_load((tmp_path / first.id / FILE).read_text())
    assert Calibration.from_dict(dict(reversed(raw.items())), "").id == first.id


def test_names_and_prefixes_find_it(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path)
    old = store.put(PLAIN, {})
    new = store.put(replace(PLAIN, date="2026-02-01T00:00:00Z"), {})
    assert store.resolve("wrist") == new.id
    assert store.resolve(old.id[:12]) == old.id
    with pytest.raises(RatchetError, match=r"calibration\.unknown"):
        store.resolve(old.id[:3])
    assert CalibrationStore(tmp_path / "none").ids() == []


def test_exports_say_the_same_numbers() -> None:
    info = export.camera_info(PLAIN)
    assert np.array(info["k"]).reshape(3, 3) == pytest.approx(LENS.matrix)
    assert (info["distortion_model"], info["d"]) == ("plumb_bob", list(LENS.distortion))
    file = yaml.safe_load(export.camera_info_yaml(PLAIN))
    assert file["camera_matrix"]["data"] == info["k"]
    assert (file["image_width"], file["image_height"]) == (640, 480)
    transform = export.static_transform(PLAIN)
    assert transform["translation"] == pytest.approx(POSE[:3, 3])
    assert Rotation.from_quat(transform["rotation"]).as_matrix() == pytest.approx(TURN.as_matrix())
    tree = ET.fromstring(f"<robot>{export.urdf(PLAIN)}</robot>")
    origin = tree.find("joint/origin")
    assert origin is not None
    roll, pitch, yaw = (float(x) for x in origin.attrib["rpy"].split())
    # URDF: fixed axes x, y, z in this order, so R = Rz(yaw) Ry(pitch) Rx(roll)
    about = [Rotation.from_euler(a, v).as_matrix() for a, v in zip("zyx", (yaw, pitch, roll), strict=True)]
    assert about[0] @ about[1] @ about[2] == pytest.approx(TURN.as_matrix(), abs=1e-8)
    assert tree.find("joint/parent").attrib["link"] == "tool0"  # type: ignore[union-attr]
