"""From the blow to the hold, through the real nodes in real time: `faults.py MAIN_PYTHON REPEATS`.

A driver publishes states at 100 Hz and frames at 30 Hz; policy node, policy process and safety node are processes of
their own. Each fault strikes while the arm moves; the hold is the safety node's first held command after which nothing
moves any more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
from ratchet_msgs import msg, srv
from ratchet_msgs.action import RunTask
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import Bool, Float64MultiArray

from benchmarks.runtime.ros.driver import (
    COMMANDS,
    Driver,
    Nodes,
    contract_file,
    fake_policy,
    in_background,
    told,
    until,
)
from ratchet_ros.messages import dds, qos
from ratchet_vla.contract import RobotContract


@dataclass
class Case:
    """allowed: seconds by the contract: what must be missed first, then the stop, then two periods and 50 ms of DDS."""

    name: str
    missed: float
    strike: Callable[[Bench], None]
    restart: bool = False


class Bench:
    """The rig: driver in the background, nodes as processes, an observer in front."""

    def __init__(self, python: str) -> None:
        self.python, self.nodes = python, Nodes()
        self.path = contract_file(self.nodes.folder, 2, 224, 224)
        self.contract = RobotContract.load(self.path)
        self.driver = Driver(self.contract, lock_step=False)
        self.stopped = {"states": False, "frames": False}
        self.driver.create_timer(0.01, self._publish_state)
        self.driver.create_timer(1 / 30, self._publish_frames)
        self.background = in_background(self.driver)
        self.node = Node("bench_observer")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.applied: list[tuple[float, msg.Applied]] = []
        self.events: list[msg.SafetyEvent] = []
        self.node.create_subscription(
            msg.Applied, "applied", lambda m: self.applied.append((time.monotonic(), m)), qos.EVENTS
        )
        self.node.create_subscription(msg.SafetyEvent, "safety_events", self.events.append, qos.EVENTS)
        self.stop_button = self.node.create_publisher(Bool, "e_stop", qos.STATUS)
        self.client = ActionClient(self.node, RunTask, "policy_node/run_task")
        self.intruder: Any = None
        self.nodes.start("safety_node", contract=str(self.path))
        self.start_policy()

    def _publish_state(self) -> None:
        if not self.stopped["states"]:
            self.driver.state(time.time())

    def _publish_frames(self) -> None:
        if not self.stopped["frames"]:
            self.driver.frames(time.time())

    def start_policy(self) -> None:
        parameters = fake_policy(self.python, 16) | {"restarts": 100, "hang_timeout": 0.4}
        self.nodes.start("policy_node", contract=str(self.path), **parameters)

    def move(self) -> None:
        """A task is running and the arm has moved for a while."""
        until(self.executor, self.client.server_is_ready, "the policy node")
        end = time.monotonic() + 60.0
        while time.monotonic() < end:
            self.applied.clear()
            asked = self.client.send_goal_async(RunTask.Goal(task="move", instruction="move", horizon=100_000))
            limit = time.monotonic() + 3.0
            while not asked.done() and time.monotonic() < limit:
                self.executor.spin_once(timeout_sec=0.05)
            if not asked.done():
                continue
            self.handle = asked.result()
            self.ended = self.handle.get_result_async()
            while not self.ended.done():
                self.executor.spin_once(timeout_sec=0.05)
                if sum(bool(a.action) for _, a in self.applied) > 25:
                    return
            self.clear()
        raise TimeoutError("the arm does not move")

    def clear(self) -> None:
        self.stop_button.publish(Bool(data=False))
        for node in ("safety_node", "policy_node"):
            client = self.node.create_client(srv.ClearFault, f"{node}/clear_fault")
            if client.wait_for_service(5.0):
                asked = client.call_async(srv.ClearFault.Request(person="bench"))
                limit = time.monotonic() + 3.0
                while not asked.done() and time.monotonic() < limit:
                    self.executor.spin_once(timeout_sec=0.05)
            self.node.destroy_client(client)

    def held_after(self, struck: float, quiet: float = 0.8) -> float:
        """Seconds from the blow to the first held command after which no motion was sent for `quiet` seconds."""
        end = time.monotonic() + 15.0
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)
            later = [(t, a) for t, a in self.applied if t > struck]
            moving = [t for t, a in later if a.action]
            holds = [t for t, a in later if not a.action and (not moving or t >= moving[-1])]
            if holds and time.monotonic() - holds[0] > quiet:
                return holds[0] - struck
        raise TimeoutError("the arm never held")

    def worker(self) -> int:
        children = Path(f"/proc/{self.nodes.running['policy_node'].pid}/task")
        for task in children.iterdir():
            for child in (task / "children").read_text().split():
                if b"fake_policy_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        raise LookupError("no policy process")

    def restore(self, restart: bool) -> None:
        self.stopped.update(states=False, frames=False)
        if self.intruder is not None:
            self.node.destroy_publisher(self.intruder)
            self.intruder = None
        process = self.nodes.running["policy_node"]
        if restart and process.poll() is None:
            process.kill()
        if restart:
            process.wait()
            self.start_policy()
        else:
            self.handle.cancel_goal_async()
            until(self.executor, self.ended.done, "the task's end")
        time.sleep(0.3)
        self.clear()


def cases(contract: RobotContract) -> list[Case]:
    times = contract.watchdog

    def kill_node(bench: Bench) -> None:
        bench.nodes.running["policy_node"].kill()

    def stop_node(bench: Bench) -> None:
        bench.nodes.running["policy_node"].send_signal(signal.SIGSTOP)

    def intrude(bench: Bench) -> None:
        bench.intruder = bench.node.create_publisher(Float64MultiArray, COMMANDS, 10)

    return [
        Case("policy node killed", times.action_max_age, kill_node, restart=True),
        Case("policy node stopped (SIGSTOP)", times.action_max_age, stop_node, restart=True),
        Case("policy process killed", 0.0, lambda b: os.kill(b.worker(), signal.SIGKILL)),
        Case("policy process stopped (SIGSTOP)", times.policy_timeout, lambda b: os.kill(b.worker(), signal.SIGSTOP)),
        Case("cameras silent", times.observation_max_age, lambda b: b.stopped.update(frames=True)),
        Case("states silent", times.observation_max_age, lambda b: b.stopped.update(states=True)),
        Case("e-stop pressed", 0.0, lambda b: b.stop_button.publish(Bool(data=True))),
        Case("second publisher on the command topic", 1.0, intrude),
    ]


def main() -> None:
    python, repeats = sys.argv[1], int(sys.argv[2])
    dds.load_profile(loopback=True)
    rclpy.init()
    bench = Bench(python)
    rows: dict[str, dict[str, Any]] = {}
    try:
        period = 1.0 / bench.contract.control_hz
        for case in cases(bench.contract):
            seconds, codes = [], set()
            for _ in range(repeats):
                bench.move()
                bench.events.clear()
                struck = time.monotonic()
                case.strike(bench)
                seconds.append(bench.held_after(struck))
                codes |= {e.code for e in bench.events if e.code.split(".")[1] not in ("velocity", "acceleration")}
                bench.restore(case.restart)
            allowed = case.missed + bench.contract.watchdog.stop_time + 2 * period + 0.05
            rows[case.name] = {"seconds": seconds, "allowed": allowed, "codes": sorted(codes)}
            print(case.name, seconds, file=sys.stderr)
        told({"rows": rows, "times": bench.contract.to_dict()["watchdog"], "hz": bench.contract.control_hz})
    finally:
        for process in bench.nodes.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        bench.nodes.stop()
        bench.background[0].shutdown()
        bench.background[1].join()
        bench.client.destroy()
        bench.node.destroy_node()
        bench.driver.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
