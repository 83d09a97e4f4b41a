"""The ROS half of `ratchet doctor`: environment, middleware, shared memory, nodes, contract against topics.

Knows how to look; prints one JSON object with findings. Started by the verb, in the ROS environment's Python.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rclpy
from rclpy.node import Node

from ratchet_ros.messages import dds
from ratchet_ros.tools.checks import Finding
from ratchet_ros.tools.robot_driver_check import check
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

NEEDED = 64 << 20  # bytes of /dev/shm for two segments of the shipped profile
OURS = ("policy_node", "safety_node", "camera_node", "teleop_node", "sim_robot_node")


def environment(profile_before: str) -> list[Finding]:
    """What this process runs under, before any graph is looked at."""
    found = [Finding("ok", "doctor.python", f"Python {platform.python_version()}, {sys.executable}")]
    found.append(Finding("ok", "doctor.rclpy", f"rclpy {metadata.version('rclpy')}"))
    try:
        importlib.import_module("ratchet_msgs.msg")
        found.append(Finding("ok", "doctor.ratchet_msgs", "ratchet_msgs is built"))
    except ImportError as error:
        fix = "make ros, or colcon build in ros2_ws and source install/setup.bash"
        found.append(Finding("error", "doctor.ratchet_msgs", f"ratchet_msgs is not built: {error}", "", fix))
    rmw = rclpy.get_rmw_implementation_identifier()
    level, fix = ("ok", "") if rmw == "rmw_fastrtps_cpp" else ("warn", "profile and figures are for rmw_fastrtps_cpp")
    found.append(Finding(level, "doctor.rmw", rmw, "", fix))
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    fix = "" if domain != "0" else "set ROS_DOMAIN_ID where other robots share the network"
    found.append(Finding("ok" if domain != "0" else "warn", "doctor.domain", f"ROS_DOMAIN_ID {domain}", "", fix))
    return found + shared_memory(profile_before or dds.profile(), bool(profile_before))


def shared_memory(profile: str, chosen: bool) -> list[Finding]:
    """Whether images fit: the profile's segment, and room in /dev/shm."""
    found = []
    size = segment_size(Path(profile))
    whose = "chosen" if chosen else "ours; a vendor's camera driver must load it too"
    if size is None:
        text, fix = "the Fast DDS profile sets no shared-memory segment", f"use {dds.shipped('fastdds.xml')}"
        found.append(Finding("error", "doctor.segment", text, profile, fix))
    else:
        level, fix = ("ok", "") if size >= 4 << 20 else ("error", f"use {dds.shipped('fastdds.xml')}")
        found.append(Finding(level, "doctor.segment", f"segment of {size / 1e6:.1f} MB ({whose})", profile, fix))
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        level, fix = ("ok", "") if free > NEEDED else ("error", "docker: --shm-size=1g, or --ipc=host")
        found.append(Finding(level, "doctor.shm", f"{free / 1e6:.0f} MB free", "/dev/shm", fix))
    return found


def segment_size(profile: Path) -> int | None:
    """Bytes of the largest shared-memory segment in a Fast DDS profile; None where there is none."""
    try:
        tree = ElementTree.parse(profile)
    except (OSError, ElementTree.ParseError):
        return None
    texts = [(element.text or "").strip() for element in tree.iter() if element.tag.endswith("segment_size")]
    return max((int(text) for text in texts if text.isdigit()), default=None)


def nodes(node: Node) -> list[Finding]:
    """Our nodes on the graph."""
    there = [name for name, _ in node.get_node_names_and_namespaces()]
    found = []
    for name in OURS:
        if there.count(name) > 1:
            fix = "stop one, or give each arm a namespace of its own"
            found.append(Finding("error", "doctor.doubled", f"{there.count(name)} nodes called {name}", name, fix))
    mine = [n for n in OURS if n in there]
    found.append(Finding("ok", "doctor.nodes", ", ".join(mine) if mine else "none of ours is running"))
    return found


def run(request: dict[str, Any]) -> list[Finding]:
    before = dds.profile()
    dds.load_profile()
    rclpy.init()
    node = Node("ratchet_doctor")
    try:
        found = environment(before)
        contract, duration = request.get("contract"), float(request.get("seconds", 3.0))
        if request.get("sim_time"):
            node.set_parameters([rclpy.parameter.Parameter("use_sim_time", value=True)])
        if contract:
            found += check(node, RobotContract.load(contract), duration, alone=not request.get("running"))
        else:
            end = time.monotonic() + 1.0
            while (left := end - time.monotonic()) > 0.0:  # discovery of who is there
                rclpy.spin_once(node, timeout_sec=left)
        return found + nodes(node)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


def main() -> int:
    try:
        print(json.dumps({"findings": [f.as_dict() for f in run(json.loads(sys.argv[1]))]}))
    except RatchetError as error:
        print(json.dumps({"error": error.as_dict()}))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
