"""Every contract of an arm against a mock controller that speaks the arm's real messages, over DDS.

It matters because a wrong joint order, unit, sign or type is found by the arm otherwise. Pinned, per contract: the safety
node reads the state by joint NAME though the driver shuffles its joints and mixes in others; what the controller
receives is the commanded motion in the controller's own terms; hold is a message that keeps the pose; the driver check
finds the arm sound, and names what is wrong after the driver was broken on purpose. Determinism: the mock answers, no
clocks are compared beyond the contract's limits.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from control_msgs.action import GripperCommand
from geometry_msgs.msg import PoseStamped, TwistStamped
from ratchet_msgs import msg
from rclpy.action import ActionServer
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from agent.contract import RobotContract
from ratchet_ros import qos
from ratchet_ros.checks import GraphCheck, worst
from ratchet_ros.safety_node import SafetyNode
from ratchet_ros.times import to_time
from tests.ros2_ws.graph import ROOT, Watcher

ARMS = ("franka_fr3", "franka_fr3_joint", "ur5e", "ur5e_trajectory", "so101", "xarm")
TYPES = {
    "twist_stamped": TwistStamped,
    "joint_trajectory": JointTrajectory,
    "float64_multi_array": Float64MultiArray,
    "pose_stamped": PoseStamped,
}


class MockArm:
    """A driver: publishes states at 100 Hz and camera images at 30, takes commands, keeps everything it was sent."""

    def __init__(self, contract: RobotContract) -> None:
        assert contract.ros is not None
        self.contract, self.node = contract, Node("mock_driver")
        self.got: dict[str, list[Any]] = {s.topic: [] for s in contract.ros.commands}
        self.values = {s.name: self._start(s) for s in contract.state}
        self.broken = ""
        self._count = 0
        self._make_publishers()
        for sink in contract.ros.commands:
            if sink.kind == "gripper_command":
                ActionServer(self.node, GripperCommand, sink.topic, self._gripper(sink.topic))
            else:
                self.node.create_subscription(TYPES[sink.kind], sink.topic, self.got[sink.topic].append, 10)
        self.node.create_timer(0.01, self._publish)

    def _start(self, field: Any) -> np.ndarray:
        limits = self.contract.limits
        if field.name == limits.position_state and limits.position_low:
            return (np.array(limits.position_low) + np.array(limits.position_high)) / 2.0 + 0.1
        if field.name == limits.position_state:
            return (np.array(limits.workspace_low) + np.array(limits.workspace_high)) / 2.0
        if field.size == 4:
            return np.array([1.0, 0.0, 0.0, 0.0])
        return np.linspace(0.01, 0.03, field.size)

    def _make_publishers(self) -> None:
        assert self.contract.ros is not None
        fields = {s.name: s for s in self.contract.state}
        self._joints: dict[str, dict[str, float]] = {}
        self._poses: dict[str, PoseStamped] = {}
        for source in self.contract.ros.state:
            topic, values = fields[source.field].topic, self.values[source.field]
            if source.kind == "joint_state":
                self._joints.setdefault(topic, {}).update(zip(source.names, values.tolist(), strict=True))
            else:
                pose = self._poses.setdefault(topic, PoseStamped())
                if source.part == "position":
                    pose.pose.position.x, pose.pose.position.y, pose.pose.position.z = values.tolist()
                else:
                    o = pose.pose.orientation
                    o.x, o.y, o.z, o.w = (-values).tolist()  # the other sign of the same rotation
        create = self.node.create_publisher
        self._out = {t: create(JointState, t, qos.STATES_RELIABLE) for t in self._joints}
        self._out |= {t: create(PoseStamped, t, qos.STATES_RELIABLE) for t in self._poses}
        self._images = {c.topic: (create(Image, c.topic, qos.IMAGES), c) for c in self.contract.cameras}

    def _publish(self) -> None:
        self._count += 1
        stamp = to_time(time.time() - (5.0 if self.broken == "old" else 0.0))
        for topic, joints in self._joints.items():
            names = sorted(joints, reverse=bool(self._count % 2)) + ["someone_elses_joint"]
            values = [joints.get(n, 9.9) for n in names]
            if self.broken == "renamed":
                names = [f"{n}_2" for n in names]
            message = JointState(name=names, position=values)
            message.header.stamp = stamp
            self._out[topic].publish(message)
        for topic, pose in self._poses.items():
            pose.header.stamp = stamp
            self._out[topic].publish(pose)
        if self._count % 3 == 0:
            for out, camera in self._images.values():
                wide = camera.width // (2 if self.broken == "small" else 1)
                image = Image(height=camera.height, width=wide, encoding="rgb8", step=wide * 3)
                image.header.stamp = stamp
                image.data = array("B", bytes(camera.height * wide * 3))
                out.publish(image)

    def _gripper(self, topic: str) -> Any:
        def execute(handle: Any) -> Any:
            self.got[topic].append(handle.request)
            handle.succeed()
            return GripperCommand.Result(reached_goal=True)

        return execute


class Rig:
    """A mock driver and the safety node, each on an executor thread of its own; the test is the policy."""

    def __init__(self, name: str) -> None:
        path = ROOT / "robots" / f"{name}.yaml"
        self.contract = RobotContract.load(path)
        self.arm = MockArm(self.contract)
        self.safety = SafetyNode(parameter_overrides=[Parameter("contract", value=str(path))])
        self.watcher = Watcher()
        self.applied = self.watcher.collect(msg.Applied, "applied", qos.EVENTS)
        self.command = self.watcher.node.create_publisher(msg.Command, "command", qos.COMMANDS)
        self._number = 0
        self._executors = []
        for node in (self.arm.node, self.safety):
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            threading.Thread(target=executor.spin, daemon=True).start()
            self._executors.append(executor)
        self.safety.trigger_configure()
        self.watcher.until(lambda: not self.safety.intake.missing(), "all states")
        self.safety.trigger_activate()
        assert self.safety.refused is None
        self.watcher.until(lambda: self.command.get_subscription_count() == 1, "the safety node's ear")

    def send(self, kind: int, action: np.ndarray | None = None) -> Any:
        """One command and what became of it."""
        self._number += 1
        values = array("f", np.asarray(action, np.float32).tobytes()) if action is not None else array("f")
        stamp = to_time(time.time())
        self.command.publish(
            msg.Command(stamp=stamp, due=stamp, session=7, number=self._number, kind=kind, action=values)
        )
        number = self._number
        self.watcher.until(lambda: any(a.number == number for a in self.applied), f"command {number}")
        return next(a for a in self.applied if a.number == number)

    def wait(self, topic: str, count: int) -> list[Any]:
        self.watcher.until(lambda: len(self.arm.got[topic]) >= count, f"{count} messages on {topic}")
        return self.arm.got[topic]

    def close(self) -> None:
        self.safety.trigger_deactivate()
        self.safety.trigger_cleanup()
        for executor in self._executors:
            executor.shutdown()
        self.safety.destroy_node()
        self.arm.node.destroy_node()
        self.watcher.close()


@pytest.fixture
def rig(ros: None, request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.close()


def small_action(contract: RobotContract, arm: MockArm) -> np.ndarray:
    """A motion that no limit touches: a quarter of what acceleration allows in the first period, ramp included."""
    action, period = contract.action, 1.0 / contract.control_hz
    out = np.zeros(action.size)
    measured = arm.values[contract.limits.position_state]
    gripper = next(i for i, d in enumerate(action.dims) if action.gripper and d.name == action.gripper.dim)
    moving = [i for i in range(action.size) if i != gripper]
    for n, i in enumerate(moving):
        fastest = min(contract.limits.acceleration[i], (contract.limits.jerk or (np.inf,) * action.size)[i] * period)
        step = 0.02 * fastest * period * period * (1.0 if n % 2 else -1.0)
        out[i] = step if action.control_mode == "ee_delta" else measured[n] + step
    assert action.gripper is not None
    out[gripper] = action.gripper.open
    return out.astype(np.float32)


@pytest.mark.parametrize("rig", ARMS, indirect=True)
def test_a_controller_gets_the_commanded_motion_in_its_own_terms(rig: Rig) -> None:
    contract, arm = rig.contract, rig.arm
    state, _ = rig.safety.intake.aligner.newest_state()
    for name, values in arm.values.items():
        wanted = values if values.shape != (4,) else np.abs(values)
        np.testing.assert_allclose(state[name], wanted, atol=1e-6)
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
