"""Every contract of an arm against a mock controller that speaks the arm's real messages, over DDS.

It matters because a wrong joint order, unit, sign or type is found by the arm otherwise. Pinned, per contract: the
safety node reads the state by joint NAME though the driver shuffles its joints and mixes in others; what the controller
receives is the commanded motion in the controller's own terms; hold is a message that keeps the pose; the driver check
finds the arm sound, and names what is wrong after the driver was broken on purpose. Determinism: the mock answers, no
clocks are compared beyond the contract's limits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from geometry_msgs.msg import TwistStamped
from ratchet_msgs import msg
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray

from ratchet_ros.messages import qos
from ratchet_ros.tools.checks import GraphCheck, worst
from ratchet_vla.contract import RobotContract
from tests.ros2_ws.arm import MockArm, Rig, small_action
from tests.ros2_ws.graph import ROOT, Watcher

ARMS = ("franka_fr3", "franka_fr3_joint", "ur5e", "ur5e_trajectory", "so101", "xarm")


@pytest.fixture
def rig(ros: None, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("rig", ARMS, indirect=True)
def test_a_controller_gets_the_commanded_motion_in_its_own_terms(rig: Rig) -> None:
    contract, arm = rig.contract, rig.arm
    state, _ = rig.intake().aligner.newest_state()
    for name, values in arm.values.items():
        np.testing.assert_allclose(state[name], values, atol=1e-6)
    action = small_action(contract, arm)
    told = rig.send(msg.Command.ACTION, action)
    assert told.marks == 0, told
    np.testing.assert_array_equal(np.array(told.action, np.float32), action)
    assert contract.ros is not None
    names = [d.name for d in contract.action.dims]
    for sink in contract.ros.commands:
        part = action[[names.index(d) for d in sink.dims]].astype(np.float64)
        got = rig.wait(sink.topic, 1)[0]
        if sink.kind == "twist_stamped":
            linear, angular = got.twist.linear, got.twist.angular
            speeds = [linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]
            np.testing.assert_allclose(speeds, part * contract.control_hz, rtol=1e-12)
            assert got.header.frame_id == "base"
            assert abs(got.header.stamp.sec - time.time()) < 60.0
        elif sink.kind == "joint_trajectory":
            assert list(got.joint_names) == list(sink.names)
            assert (got.header.stamp.sec, got.header.stamp.nanosec) == (0, 0)
            (point,) = got.points
            np.testing.assert_allclose(point.positions, part, rtol=1e-12)
            assert point.time_from_start.nanosec == round(2e9 / contract.control_hz)
        elif sink.kind == "float64_multi_array":
            np.testing.assert_allclose(got.data, part, rtol=1e-12)
        else:
            assert got.command.position == pytest.approx(part[0] * sink.scale)
            assert got.command.max_effort == sink.max_effort


@pytest.mark.parametrize("rig", ["franka_fr3", "ur5e", "xarm"], indirect=True)
def test_a_hold_keeps_the_pose_and_the_grip(rig: Rig) -> None:
    action = small_action(rig.contract, rig.arm)
    rig.send(msg.Command.ACTION, action)
    while rig.send(msg.Command.HOLD).action:
        pass
    assert rig.contract.ros is not None
    arm_sink = rig.contract.ros.commands[0]
    last = rig.wait(arm_sink.topic, 2)[-1]
    if arm_sink.kind == "twist_stamped":
        assert last.twist == TwistStamped().twist
    else:
        values = last.data if arm_sink.kind == "float64_multi_array" else last.points[0].positions
        before = rig.arm.got[arm_sink.topic][-2]
        kept = before.data if arm_sink.kind == "float64_multi_array" else before.points[0].positions
        np.testing.assert_array_equal(values, kept)
        assert np.abs(np.array(values)).max() > 0.05  # never zeros
    gripper = rig.contract.ros.commands[1].topic
    assert len(rig.arm.got[gripper]) == 1  # an unchanged gripper is not told again


@pytest.mark.parametrize("rig", ["so101"], indirect=True)
def test_a_parameter_that_is_set_leaves_the_active_node_answering(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_over = threading.Event()
    monkeypatch.setattr(rig.safety, "changed", taken_over.set)
    (result,) = rig.safety.set_parameters([Parameter("use_sim_time", value=False)])
    assert result.successful
    assert taken_over.wait(10.0)
    assert rig.send(msg.Command.ACTION, small_action(rig.contract, rig.arm)).marks == 0


@pytest.mark.parametrize("rig", ["ur5e"], indirect=True)
def test_a_second_commander_is_a_fault(rig: Rig) -> None:
    assert rig.contract.ros is not None
    topic = rig.contract.ros.commands[0].topic
    rig.send(msg.Command.ACTION, small_action(rig.contract, rig.arm))
    intruder = rig.watcher.node.create_publisher(Float64MultiArray, topic, 10)
    events = rig.watcher.collect(msg.SafetyEvent, "safety_events", qos.EVENTS)
    rig.watcher.until(lambda: len(rig.safety.get_publishers_info_by_topic(topic)) == 2, "the intruder's discovery")
    number = len(rig.applied)
    while not any(e.code == "safety.second_sender" for e in events):
        rig.send(msg.Command.ACTION, small_action(rig.contract, rig.arm))
    assert len(rig.applied) > number
    rig.safety.trigger_deactivate()
    rig.safety.trigger_activate()
    assert rig.safety.refused is not None
    assert rig.safety.refused.code == "ros.second_publisher"
    rig.watcher.node.destroy_publisher(intruder)


@pytest.mark.parametrize("name", ARMS)
def test_the_driver_check_finds_a_sound_arm_sound(ros: None, name: str) -> None:
    assert {f.code for f in checked(name, "") if f.level == "error"} == set()


@pytest.mark.parametrize(
    ("broken", "code"),
    [("renamed", "doctor.joint_names"), ("old", "doctor.age"), ("small", "ros.bad_image")],
)
def test_the_driver_check_names_what_is_broken(ros: None, broken: str, code: str) -> None:
    findings = checked("ur5e", broken)
    assert worst(findings) == "error"
    assert code in {f.code for f in findings}
    assert all(f.fix or f.level == "ok" for f in findings), findings


def test_the_driver_check_names_a_missing_arm(ros: None) -> None:
    watcher = Watcher("checker")
    check = GraphCheck(watcher.node, RobotContract.load(ROOT / "robots" / "xarm.yaml"))
    codes = {f.code for f in check.findings()}
    watcher.close()
    assert {"doctor.no_publisher", "doctor.no_controller"} <= codes


def checked(name: str, broken: str) -> list[Any]:
    contract = RobotContract.load(ROOT / "robots" / f"{name}.yaml")
    arm, watcher = MockArm(contract), Watcher("checker")
    arm.broken = broken
    check = GraphCheck(watcher.node, contract)
    watcher.executor.add_node(arm.node)
    try:
        heard = check.heard.values()
        watcher.until(lambda: all(len(h.moments) > 15 for h in heard), "every topic")
        return [f for f in check.findings() if f.code not in ("doctor.gap", "doctor.rate")]  # a busy machine's business
    finally:
        watcher.executor.remove_node(arm.node)
        arm.node.destroy_node()
        watcher.close()
