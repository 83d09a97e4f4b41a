"""The translation between the contract's numbers and messages, without any node.

A wrong sign, order or rotation here moves an arm the wrong way with every safety check content. Pinned: what is encoded
for an arm and read on the arm's side is bit by bit the float32 action; images arrive upright and RGB whatever encoding,
step, rotation and mirror; joints are found by name in any order; orientations keep one sign while a gripper points
straight down; delta targets add up on PoseStamped and joint sinks, in the base's and the tool's frame. Property tests
draw the numbers; no time is involved.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sensor_msgs.msg import CompressedImage, Image, JointState

from ratchet_ros.messages import arm_side, decode, encode
from ratchet_ros.messages.times import seconds, to_time
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.contract.topics import CommandSink
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime import rotation
from tests.ros2_ws.graph import ROOT

METAWORLD = RobotContract.load(ROOT / "robots" / "metaworld.yaml")
LIBERO = RobotContract.load(ROOT / "robots" / "libero.yaml")
FR3 = RobotContract.load(ROOT / "robots" / "franka_fr3.yaml")
UR5E = RobotContract.load(ROOT / "robots" / "ur5e.yaml")
NOW = Time(sec=5)


def actions(contract: RobotContract) -> st.SearchStrategy[np.ndarray]:
    lows = np.array([d.low for d in contract.action.dims], np.float32)
    highs = np.array([d.high for d in contract.action.dims], np.float32)
    unit = hnp.arrays(np.float32, contract.action.size, elements=st.floats(0, 1, width=32))
    return unit.map(lambda u: (lows + u * (highs - lows)).astype(np.float32))


@pytest.mark.parametrize("contract", [METAWORLD, LIBERO], ids=["metaworld", "libero"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_simulated_arm_reads_exactly_what_was_commanded(contract: RobotContract, data: st.DataObject) -> None:
    action = data.draw(actions(contract))
    names = [d.name for d in contract.action.dims]
    got = np.zeros(len(names))
    assert contract.ros is not None
    for sink in contract.ros.commands:
        places = [names.index(d) for d in sink.dims]
        encoder = encode.make_encoder(contract, sink, "", "")
        message = encoder.action(action.astype(np.float64)[places], {}, NOW)
        got[places] = arm_side.command_values(contract, sink, message)
    np.testing.assert_array_equal(got.astype(np.float32), action)


@given(
    vector=hnp.arrays(np.float64, 3, elements=st.floats(-1, 1)).filter(lambda v: np.linalg.norm(v) > 1e-3),
    angle=st.floats(0.01, 2 * math.pi - 0.01),
)
@settings(max_examples=200, deadline=None)
def test_a_simulators_rotation_vector_survives_the_quaternion(vector: np.ndarray, angle: float) -> None:
    values = (vector / np.linalg.norm(vector) * angle).astype(np.float32)
    state = {"eef_position": np.zeros(3, np.float32), "eef_rotation": values, "gripper": np.zeros(2, np.float32)}
    message = arm_side.state_messages(LIBERO, state, NOW)["eef_pose"]
    assert LIBERO.ros is not None
    reader = decode.StateReader(LIBERO, LIBERO.ros.state[1])
    read = reader.read(message)
    assert read is not None
    np.testing.assert_allclose(read, values, rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_an_image_arrives_upright_and_rgb(rotate: Any, mirror: bool, encoding: Any) -> None:
    camera = CameraSpec("c", 7, 5, topic="c/image_raw", encoding=encoding, rotate=rotate, mirror=mirror)
    upright = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    message = arm_side.image_message(upright, camera, NOW)
    assert isinstance(message.data, array)
    np.testing.assert_array_equal(decode.image(message, camera), upright)


def test_other_encodings_and_padded_rows_are_read() -> None:
    camera = CameraSpec("c", 3, 2, topic="c/image_raw")
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    padded = np.concatenate([rgb.reshape(2, 9), np.full((2, 3), 99, np.uint8)], axis=1)
    message = Image(height=2, width=3, encoding="rgb8", step=12, data=array("B", padded.tobytes()))
    np.testing.assert_array_equal(decode.image(message, camera), rgb)
    four = np.concatenate([rgb[..., ::-1], np.zeros((2, 3, 1), np.uint8)], axis=2)
    message = Image(height=2, width=3, encoding="bgra8", step=12, data=array("B", four.tobytes()))
    np.testing.assert_array_equal(decode.image(message, camera), rgb)
    grey = Image(height=2, width=3, encoding="mono8", step=3, data=array("B", bytes(range(6))))
    np.testing.assert_array_equal(decode.image(grey, camera)[..., 2], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    "change", [{"width": 4}, {"encoding": "16UC1"}, {"step": 5}, {"data": array("B", bytes(17))}], ids=str
)
def test_a_wrong_image_is_refused(change: dict[str, Any]) -> None:
    camera = CameraSpec("c", 3, 2, topic="c/image_raw")
    right = {"height": 2, "width": 3, "encoding": "rgb8", "step": 9, "data": array("B", bytes(18))}
    with pytest.raises(RatchetError) as refused:
        decode.image(Image(**(right | change)), camera)
    assert refused.value.code == "ros.bad_image"


def test_a_compressed_topic_is_decompressed() -> None:
    import cv2

    camera = CameraSpec("c", 32, 16, topic="c/image_raw/compressed")
    assert decode.image_type(camera) is CompressedImage
    rgb = np.zeros((16, 32, 3), np.uint8)
    rgb[:, :, 0] = 200
    data = cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode.image(CompressedImage(format="png", data=data), camera), rgb)
    with pytest.raises(RatchetError):
        decode.image(CompressedImage(format="png", data=b"nonsense"), camera)


@given(order=st.permutations(range(8)))
def test_joints_are_found_by_name(order: list[int]) -> None:
    assert UR5E.ros is not None
    reader = decode.StateReader(UR5E, UR5E.ros.state[0])
    names = [*UR5E.ros.state[0].names, "finger", "rail"]
    message = JointState(name=[names[i] for i in order], position=[float(i) for i in order])
    read = reader.read(message)
    assert read is not None
    np.testing.assert_array_equal(read, np.arange(6))
    assert reader.read(JointState(name=names[:5], position=[0.0] * 5)) is None
    with pytest.raises(RatchetError):
        reader.read(JointState(name=names, position=[math.nan] * 8))


def test_an_orientation_does_not_flip_where_a_gripper_points_down() -> None:
    assert FR3.ros is not None
    reader = decode.StateReader(FR3, FR3.ros.state[1])
    generator = np.random.default_rng(0)
    reads: list[np.ndarray] = []
    for _ in range(200):
        q = np.array([1.0, 0.0, 0.0, 0.0]) + generator.normal(0.0, 0.01, 4)
        q *= generator.choice([-1.0, 1.0]) / np.linalg.norm(q)
        message = PoseStamped()
        o = message.pose.orientation
        o.x, o.y, o.z, o.w = q.tolist()
        orientation = reader.read(message)
        assert orientation is not None
        reads.append(orientation)
    assert np.abs(np.diff(np.stack(reads), axis=0)).max() < 0.1
    assert reads[0][0] > 0
    message.pose.orientation.x = 3.0
    with pytest.raises(RatchetError):
        reader.read(message)


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_delta_poses_add_up_from_the_measured_one(frame: str) -> None:
    action = dataclasses.replace(FR3.action, frame=frame)
    contract = dataclasses.replace(FR3, action=action)
    sink = CommandSink("pose_stamped", "/target", tuple(d.name for d in action.dims[:6]), frame="base")
    encoder = encode.make_encoder(contract, sink, "eef_position", "eef_rotation")
    quarter = rotation.from_vector(np.array([0.0, 0.0, math.pi / 2]))
    state = {"eef_position": np.array([0.5, 0, 0.3], np.float32), "eef_rotation": quarter.astype(np.float32)}
    for _ in range(3):
        message = encoder.action(np.array([0.01, 0, 0, 0, 0, 0.1]), state, NOW)
    o = message.pose.orientation
    turn = rotation.to_vector(np.array([o.x, o.y, o.z, o.w]))
    np.testing.assert_allclose(turn, [0, 0, math.pi / 2 + 0.3], atol=1e-6)
    moved = np.array([message.pose.position.x - 0.5, message.pose.position.y])
    if frame == "base":
        np.testing.assert_allclose(moved, [0.03, 0.0], atol=1e-6)
    else:  # x of a tool that is turned by 90, 95.7 and 101.5 degrees
        steps = [math.pi / 2 + 0.1 * k for k in range(3)]
        np.testing.assert_allclose(
            moved, [0.01 * sum(map(math.cos, steps)), 0.01 * sum(map(math.sin, steps))], atol=1e-6
        )
    held = encoder.hold(state, NOW)
    assert held is not None
    assert held.pose == message.pose
    assert encoder.hold(state, NOW) is None  # said once
    again = encoder.action(np.zeros(6), state, NOW)
    assert again is not None
    assert again.pose.position.x == pytest.approx(0.5)  # a new start from the measured pose


@pytest.mark.parametrize(
    ("mode", "moved", "kept"), [("joint_delta", [1.2, 2.4], [1.2, 2.4]), ("joint_velocity", [0.1, 0.2], [0.0, 0.0])]
)
def test_joint_deltas_and_velocities(mode: Any, moved: list[float], kept: list[float]) -> None:
    dims = UR5E.action.dims[:2]
    contract = dataclasses.replace(
        UR5E, action=dataclasses.replace(UR5E.action, control_mode=mode, dims=dims, gripper=None)
    )
    sink = CommandSink("float64_multi_array", "/c", tuple(d.name for d in dims), scale=1.0)
    encoder = encode.make_encoder(contract, sink, "joints", "")
    state = {"joints": np.array([1.0, 2.0], np.float32)}
    for _ in range(2):
        message = encoder.action(np.array([0.1, 0.2]), state, NOW)
    np.testing.assert_allclose(message.data, moved)
    held = encoder.hold(state, NOW)
    assert held is not None
    np.testing.assert_allclose(held.data, np.array(kept))


def test_a_gripper_is_told_only_what_changes() -> None:
    assert FR3.ros is not None
    encoder = encode.make_encoder(FR3, FR3.ros.commands[1], "", "")
    assert encoder.action(np.array([0.08]), {}, NOW).command.position == pytest.approx(0.04)
    assert encoder.action(np.array([0.08]), {}, NOW) is None
    assert encoder.action(np.array([0.0]), {}, NOW).command.position == 0.0
    assert encoder.hold({}, NOW) is None


@given(st.floats(0.0, 2.0**31 - 2))
def test_seconds_survive_the_stamp(moment: float) -> None:
    assert seconds(to_time(moment)) == pytest.approx(moment, abs=1e-6)


@pytest.mark.parametrize("moment", [-1.0, math.inf, math.nan, -math.inf, 2.0**31])
def test_a_moment_that_is_none_becomes_zero(moment: float) -> None:
    assert to_time(moment) == Time()
