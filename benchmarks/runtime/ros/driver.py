"""What the probes share: a driver without an arm, node processes, and waiting. Runs in the ROS environment's Python.

Knows one contract (a joint arm with cameras of a chosen size). The nodes under test are the real ones, as processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from ratchet_ros.messages import qos
from ratchet_ros.messages.times import to_time
from ratchet_vla.contract import RobotContract

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = "/forward_position_controller/commands"
LIMIT = 120.0


def contract_file(folder: Path, cameras: int, width: int, height: int, hz: float = 20.0) -> Path:
    """The SO-101's contract with other cameras and another rate."""
    data = yaml.safe_load((ROOT / "robots" / "so101.yaml").read_text())
    data["control_hz"] = hz
    data["limits"]["ramp_time"] = 0.0
    data["cameras"] = [
        {"name": f"camera{i}", "topic": f"/camera{i}/image_raw", "width": width, "height": height}
        for i in range(cameras)
    ]
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


class Driver(Node):  # type: ignore[misc]  # rclpy is not among the packages that are checked
    """Publishes states and frames when told to; keeps the moment and the values of every command."""

    def __init__(self, contract: RobotContract, lock_step: bool) -> None:
        super().__init__("bench_driver")
        self.contract = contract
        self.commands: list[tuple[float, list[float]]] = []
        states, images = (qos.LOCK_STEP, qos.LOCK_STEP) if lock_step else (qos.STATES_RELIABLE, qos.IMAGES)
        self._joints = self.create_publisher(JointState, "/joint_states", states)
        self._images = [self.create_publisher(Image, c.topic, images) for c in contract.cameras]
        generator = np.random.default_rng(0)
        self._frames = [generator.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in contract.cameras]
        self.create_subscription(Float64MultiArray, COMMANDS, self._commanded, 10)
        self.position = [0.1] * 5 + [0.2]

    def _commanded(self, message: Float64MultiArray) -> None:
        self.commands.append((time.monotonic(), list(message.data)))
        self.position = list(message.data)

    def state(self, stamp: float) -> None:
        names = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
        message = JointState(name=names, position=self.position)
        message.header.stamp = to_time(stamp)
        self._joints.publish(message)

    def frames(self, stamp: float) -> None:
        for out, frame in zip(self._images, self._frames, strict=True):
            height, width = frame.shape[:2]
            message = Image(height=height, width=width, encoding="rgb8", step=width * 3)
            message.header.stamp = to_time(stamp)
            data = array("B")
            data.frombytes(frame.data.cast("B"))
            message.data = data
            out.publish(message)


class Nodes:
    """Node processes of the package under test."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ratchet-bench-"))
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, module: str, **parameters: Any) -> subprocess.Popen[bytes]:
        file = self.folder / f"{module}.yaml"
        file.write_text(yaml.safe_dump({f"/{module}": {"ros__parameters": {"autostart": True, **parameters}}}))
        command = [sys.executable, "-m", "ratchet_ros", module, "--ros-args", "--params-file", str(file)]
        with (self.folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(os.environ))
        self.running[module] = process
        return process

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(15.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(executor: SingleThreadedExecutor, ready: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """Spin until something holds; its value."""
    end = time.monotonic() + limit
    while not (value := ready()):
        left = end - time.monotonic()
        if left <= 0.0:
            raise TimeoutError(f"not within {limit} s: {what}")
        executor.spin_once(timeout_sec=min(left, 0.05))
    return value


def in_background(node: Node) -> tuple[SingleThreadedExecutor, threading.Thread]:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    return executor, thread


def told(result: Any) -> None:
    """The probe's answer: the last line of its output."""
    print(json.dumps(result), flush=True)


def fake_policy(main_python: str, chunk: int) -> dict[str, Any]:
    """Parameters of a policy node whose policy thinks for no time."""
    return {
        "policy_python": main_python,
        "policy_module": "ratchet_vla.testing.fake_policy_worker",
        "policy_options": json.dumps({"chunk": chunk, "amplitude": 0.01}),
        "judge": "none",
        "nice": 0,
    }
