"""A mock arm that speaks a real driver's messages, and a rig of it with the safety node; the test is the policy."""

from __future__ import annotations

import threading
import time
from array import array
from typing import Any

import numpy as np
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

from ratchet_ros.messages import qos
from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import to_time
from ratchet_ros.safety.node import SafetyNode
from ratchet_vla.contract import RobotContract
from tests.ros2_ws.graph import ROOT, Watcher

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
            return np.asarray((np.array(limits.position_low) + np.array(limits.position_high)) / 2.0 + 0.1)
        if field.name == limits.position_state:
            return np.asarray((np.array(limits.workspace_low) + np.array(limits.workspace_high)) / 2.0)
        if field.size == 4:
            return np.asarray(np.array([0.999, 0.01, 0.0, 0.0]) / np.hypot(0.999, 0.01))
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
        if self.broken == "silent":
            return
        stamp = to_time(time.time() - (5.0 if self.broken == "old" else 0.0))
        for topic, joints in self._joints.items():
            names = [*sorted(joints, reverse=bool(self._count % 2)), "someone_elses_joint"]
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

    def __init__(self, name: str, **parameters: Any) -> None:
        path = ROOT / "robots" / f"{name}.yaml"
        self.contract = RobotContract.load(path)
        self.arm = MockArm(self.contract)
        given = {"contract": str(path), **parameters}
        self.safety = SafetyNode(parameter_overrides=[Parameter(n, value=v) for n, v in given.items()])
        self.watcher = Watcher()
        self.applied = self.watcher.collect(msg.Applied, "applied", qos.EVENTS)
        self.command = self.watcher.node.create_publisher(msg.Command, "command", qos.COMMANDS)
        self.events = self.watcher.collect(msg.SafetyEvent, "safety_events", qos.EVENTS)
        self.session = 7
        self._number = 0
        self._executors = []
        for node in (self.arm.node, self.safety):
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            thread = threading.Thread(target=executor.spin, daemon=True)
            thread.start()
            self._executors.append((executor, thread))
        self.safety.trigger_configure()
        self.watcher.until(lambda: not self.intake().missing(), "all states")
        self.safety.trigger_activate()
        assert self.safety.refused is None
        self.watcher.until(lambda: self.command.get_subscription_count() == 1, "the safety node's ear")

    def intake(self) -> Intake:
        """The safety node's, which it has once it is configured."""
        assert self.safety.intake is not None
        return self.safety.intake

    def send(self, kind: int, action: np.ndarray | None = None) -> Any:
        """One command and what became of it."""
        self._number += 1
        values = array("f", np.asarray(action, np.float32).tobytes()) if action is not None else array("f")
        stamp = to_time(time.time())
        self.command.publish(
            msg.Command(stamp=stamp, due=stamp, session=self.session, number=self._number, kind=kind, action=values)
        )
        number = self._number
        self.watcher.until(lambda: any(a.number == number for a in self.applied), f"command {number}")
        return next(a for a in self.applied if a.number == number)

    def wait(self, topic: str, count: int) -> list[Any]:
        self.watcher.until(lambda: len(self.arm.got[topic]) >= count, f"{count} messages on {topic}")
        return self.arm.got[topic]

    def close(self) -> None:
        self.safety.trigger_deactivate()
        for executor, thread in self._executors:
            executor.shutdown()
            thread.join()
        self.safety.trigger_cleanup()
        self.safety.destroy_node()
        self.arm.node.destroy_node()
        self.watcher.close()


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
    known = arm.values.get(action.gripper.dim)
    out[gripper] = action.gripper.open if known is None else known[0]
    return out.astype(np.float32)
