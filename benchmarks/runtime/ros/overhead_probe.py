"""Observation to command through the real nodes, step by step: `overhead.py MAIN_PYTHON CAMERAS WIDTH HEIGHT STEPS`.

A driver in lock-step publishes state, frames and time, and waits for the arm's command. On the way lie: frames through
DDS, decoding, alignment, shared memory, the policy process (a fake policy, which thinks for no time), the node's safety
stage, the command through DDS, the command filter, encoding, DDS again.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sized

import rclpy
from ratchet_msgs import msg
from ratchet_msgs.action import RunTask
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rosgraph_msgs.msg import Clock

from benchmarks.runtime.ros.driver import Driver, Nodes, contract_file, fake_policy, told, until
from ratchet_ros.messages import dds, qos
from ratchet_ros.messages.times import to_time
from ratchet_vla.contract import RobotContract

WARM = 20


def longer(commands: Sized, count: int) -> bool:
    """Whether there are more than `count` by now."""
    return len(commands) > count


def main() -> None:
    python, cameras, width, height, steps = sys.argv[1], *(int(v) for v in sys.argv[2:6])
    dds.load_profile(loopback=True)
    rclpy.init()
    nodes = Nodes()
    path = contract_file(nodes.folder, cameras, width, height)
    contract = RobotContract.load(path)
    driver = Driver(contract, lock_step=True)
    clock = driver.create_publisher(Clock, "/clock", qos.LOCK_STEP)
    chunks: list[msg.ActionChunk] = []
    statuses: list[msg.PolicyStatus] = []
    driver.create_subscription(msg.ActionChunk, "chunks", chunks.append, qos.EVENTS)
    driver.create_subscription(msg.PolicyStatus, "policy_status", statuses.append, qos.STATUS)
    executor = SingleThreadedExecutor()
    executor.add_node(driver)
    timed = {"contract": str(path), "use_sim_time": True, "lock_step": True}
    try:
        nodes.start("safety_node", **timed)
        nodes.start("policy_node", **timed, **fake_policy(python, 1), mode="collect")
        now, period = 1.0, 1.0 / contract.control_hz

        def publish() -> float:
            began = time.monotonic()
            driver.state(now)
            driver.frames(now)
            clock.publish(Clock(clock=to_time(now)))
            return began

        publish()
        client = ActionClient(driver, RunTask, "policy_node/run_task")
        until(executor, client.server_is_ready, "the policy node")
        handle = None
        while handle is None:
            asked = client.send_goal_async(RunTask.Goal(task="overhead", instruction="move", horizon=steps + WARM + 10))
            until(executor, asked.done, "the goal")
            ended = asked.result().get_result_async()
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and not driver.commands and not ended.done():
                executor.spin_once(timeout_sec=0.05)
            if driver.commands:
                handle = asked.result()
        seconds, inference = [], []
        for step in range(steps + WARM):
            count = len(driver.commands)
            now += period
            began = publish()
            until(executor, functools.partial(longer, driver.commands, count), "a command")
            if step >= WARM:
                seconds.append(driver.commands[count][0] - began)
                inference.append(statuses[-1].inference if statuses else 0.0)
        handle.cancel_goal_async()
        for _ in range(6):
            now += period
            publish()
            executor.spin_once(timeout_sec=0.1)
        told({"seconds": seconds, "forward": sorted(inference)[len(inference) // 2], "chunks": len(chunks)})
    finally:
        nodes.stop()
        driver.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
