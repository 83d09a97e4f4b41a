"""Cameras and gamepads become the messages that the other nodes take.

Pinned: a recording plays as a camera, in the contract's encoding and raw orientation, stamped, so that decoding gives
the upright image back, with its calibration beside it; a camera of another size, kind or topic, or a calibration that
does not fit, is refused when it is configured; a stick becomes an
action in physical units with the contract's signs, the gripper keeps what its buttons chose, and a joystick that falls
silent releases everything. Determinism: images without noise; joystick messages are sent until they are heard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from ratchet_msgs import msg
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image, Joy

from ratchet_calibration.boards.board import Board
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration
from ratchet_ros.devices.camera import CameraNode
from ratchet_ros.devices.teleop import TeleopNode
from ratchet_ros.messages import decode, qos
from ratchet_ros.nodes.base import RatchetNode
from ratchet_vla.contract import RobotContract
from tests.ros2_ws.graph import ROOT, Watcher

Start = Callable[..., Any]


@pytest.fixture
def start(ros: None) -> Iterator[Start]:
    """Make a node with parameters, configured and spinning in a thread; None where it refused."""
    running: list[tuple[RatchetNode, SingleThreadedExecutor, threading.Thread]] = []

    def build(kind: Callable[..., RatchetNode], **parameters: Any) -> RatchetNode:
        node = kind(parameter_overrides=[Parameter(n, value=v) for n, v in parameters.items()])
        if node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        thread = threading.Thread(target=executor.spin, daemon=True)
        thread.start()
        running.append((node, executor, thread))
        return node

    yield build
    for node, executor, thread in running:
        if node.active:
            node.trigger_deactivate()
        executor.shutdown()
        thread.join()
        node.trigger_shutdown()
        node.destroy_node()


def contract_with(folder: Path, **camera: Any) -> str:
    data = yaml.safe_load((ROOT / "robots" / "so101.yaml").read_text())
    data["cameras"] = [{"name": "front", "topic": "/front/image_raw", "width": 40, "height": 30} | camera]
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_a_recording_is_a_camera(start: Start, tmp_path: Path, encoding: str) -> None:
    path = contract_with(tmp_path, rotate=180, encoding=encoding)
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    cv2.imwrite(str(image_folder / "0.png"), raw[..., ::-1])
    watcher = Watcher()
    got = watcher.collect(Image, "/front/image_raw", qos.IMAGES)
    node = start(CameraNode, contract=path, camera="front", device="recorded", source=str(image_folder), fps=60.0)
    assert node.refused is None
    watcher.until(lambda: len(got) > 3, "images")
    watcher.close()
    camera = RobotContract.load(path).camera("front")
    np.testing.assert_array_equal(decode.image(got[0], camera), np.rot90(raw, 2))
    stamps = [m.header.stamp.sec + m.header.stamp.nanosec * 1e-9 for m in got]
    assert stamps == sorted(set(stamps))
    assert got[0].header.frame_id == "front_optical_frame"


@pytest.mark.parametrize(
    ("change", "parameters", "code"),
    [
        ({"width": 41}, {}, "camera.bad_size"),
        ({}, {"source": "/nowhere"}, "camera.not_found"),
        ({}, {"device": "realsense"}, "camera.no_driver"),
        ({}, {"device": "uvc", "source": "/dev/video77"}, "camera.not_found"),
        ({}, {"device": "polaroid"}, "ros.bad_parameter"),
        ({"topic": "/front/image_raw/compressed"}, {}, "camera.compressed"),
        ({}, {"camera": "back"}, "contract.unknown_camera"),
    ],
    ids=str,
)
def test_a_camera_that_does_not_fit_is_refused(
    start: Start, tmp_path: Path, change: dict[str, Any], parameters: dict[str, Any], code: str
) -> None:
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    cv2.imwrite(str(image_folder / "0.png"), np.zeros((30, 40, 3), np.uint8))
    given = {"camera": "front", "device": "recorded", "source": str(image_folder)} | parameters
    node = start(CameraNode, contract=contract_with(tmp_path, **change), **given)
    assert not node.active
    assert node.refused is not None
    assert node.refused.code == code


LENS = CameraModel(40, 30, 41.0, 42.0, 19.5, 14.5, "brown5", (0.1, -0.2, 0.001, 0.002, 0.05))


def stored(folder: Path, lens: CameraModel = LENS) -> str:
    store = CalibrationStore(folder / "calibrations")
    return store.put(Calibration("front", lens, Board(), "2026-01-01T00:00:00Z", 0.1, 0.1, 20), {}).id


def test_the_calibration_is_published_with_every_image(start: Start, tmp_path: Path) -> None:
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    cv2.imwrite(str(image_folder / "0.png"), np.zeros((30, 40, 3), np.uint8))
    path = contract_with(tmp_path, calibration_id=stored(tmp_path))
    watcher = Watcher()
    images = watcher.collect(Image, "/front/image_raw", qos.IMAGES)
    got = watcher.collect(CameraInfo, "/front/camera_info", qos.IMAGES)
    node = start(CameraNode, contract=path, camera="front", device="recorded", source=str(image_folder), fps=30.0,
                 calibrations=str(tmp_path / "calibrations"))  # fmt: skip
    assert node.refused is None
    watcher.until(lambda: len(got) > 3 and len(images) > 3, "images and their calibration")
    watcher.close()
    info = got[-1]
    assert (info.width, info.height, info.distortion_model) == (40, 30, "plumb_bob")
    np.testing.assert_allclose(np.reshape(info.k, (3, 3)), LENS.matrix)
    np.testing.assert_allclose(info.d, LENS.distortion)
    assert info.header.frame_id == "front_optical_frame"
    stamps = {(m.header.stamp.sec, m.header.stamp.nanosec) for m in images}
    assert len(stamps & {(m.header.stamp.sec, m.header.stamp.nanosec) for m in got}) > 1


@pytest.mark.parametrize(
    ("lens", "tied", "parameters", "code"),
    [
        (CameraModel(80, 60, 80, 80, 40, 30), True, {}, "camera.other_size"),
        (LENS, False, {}, "camera.not_calibrated"),
        (LENS, True, {"calibrations": "/nowhere"}, "calibration.unknown"),
        (LENS, True, {"transform": True}, "calibration.no_mount"),
        (LENS, True, {"transform": True, "calibrations": ""}, "ros.bad_parameter"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_calibration_that_does_not_fit_is_refused(
    start: Start, tmp_path: Path, lens: CameraModel, tied: bool, parameters: dict[str, Any], code: str
) -> None:
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    cv2.imwrite(str(image_folder / "0.png"), np.zeros((30, 40, 3), np.uint8))
    identity = stored(tmp_path, lens)
    path = contract_with(tmp_path, **({"calibration_id": identity} if tied else {}))
    given = {"camera": "front", "device": "recorded", "source": str(image_folder)}
    given |= {"calibrations": str(tmp_path / "calibrations")} | parameters
    node = start(CameraNode, contract=path, **given)
    assert node.refused is not None
    assert node.refused.code == code


def test_a_stick_becomes_an_action_and_silence_releases_it(start: Start) -> None:
    contract = RobotContract.load(ROOT / "robots" / "franka_fr3.yaml")
    watcher = Watcher()
    got = watcher.collect(msg.OperatorInput, "operator", qos.INPUT)
    joy = watcher.node.create_publisher(Joy, "joy", 10)
    node = start(
        TeleopNode,
        contract=str(ROOT / "robots" / "franka_fr3.yaml"),
        axes=["dx=1", "dy=-0"],
        speed=0.5,
        person="Ada",
        timeout=0.5,
    )
    assert node.refused is None
    watcher.until(lambda: joy.get_subscription_count() == 1, "the node's ear")
    buttons = [0] * 6
    buttons[3], buttons[5] = 1, 1

    def said(ready: Callable[[msg.OperatorInput], bool]) -> bool:
        joy.publish(Joy(axes=[1.0, -0.5, 0.0], buttons=buttons))
        return bool(got) and ready(got[-1])

    watcher.until(lambda: said(lambda m: m.intervene), "an intervention")
    action = np.array(got[-1].action)
    assert got[-1].person == "Ada"
    np.testing.assert_allclose(action[:3], [-0.5 * 0.5 * 0.02, -0.5 * 0.02, 0.0], atol=1e-7)
    assert contract.action.gripper is not None
    assert action[6] == pytest.approx(contract.action.gripper.closed)
    buttons[3] = 0
    buttons[0] = 1
    watcher.until(lambda: said(lambda m: m.judge == msg.OperatorInput.JUDGE_SUCCESS), "a label")
    assert got[-1].action[6] == pytest.approx(contract.action.gripper.closed)  # closed stays closed
    watcher.until(lambda: not got[-1].intervene, "the release by silence")
    assert not got[-1].dead_man
    watcher.close()


def test_a_stick_cannot_command_positions(start: Start) -> None:
    node = start(TeleopNode, contract=str(ROOT / "robots" / "ur5e.yaml"))
    assert node.refused is not None
    assert node.refused.code == "ros.teleop_mode"
