"""robot_driver_check: a dry run. Compares the live topics with the contract, names every mismatch, sends nothing.

Knows the checks and how to print them; exit status 0 where the contract holds, 1 where it does not.
"""

from __future__ import annotations

import json
import time

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from ratchet_ros.messages import dds
from ratchet_ros.tools.checks import Finding, GraphCheck, worst
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

DISCOVERY = 10.0  # s that the middleware may need to tell which node a publisher belongs to


def check(node: Node, contract: RobotContract, duration: float, *, alone: bool) -> list[Finding]:
    """Listen for `duration` seconds and report; longer only while some publisher has not told its name yet."""
    graph = GraphCheck(node, contract, alone=alone)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    end = time.monotonic() + duration
    while (left := end - time.monotonic()) > 0.0:
        executor.spin_once(timeout_sec=left)
    while graph.unnamed() and time.monotonic() < end + DISCOVERY:
        executor.spin_once(timeout_sec=0.1)
    executor.remove_node(node)
    return graph.findings()


def main() -> int:
    dds.load_profile()
    rclpy.init()
    node = Node("robot_driver_check")
    try:
        path = node.declare_parameter("contract", "").value
        duration = node.declare_parameter("seconds", 3.0).value
        findings = check(node, RobotContract.load(path), duration, alone=node.declare_parameter("alone", True).value)
        for finding in findings:
            print(json.dumps(finding.as_dict()))
        return 1 if worst(findings) == "error" else 0
    except RatchetError as error:
        print(json.dumps({"error": error.as_dict()}))
        return 2
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
