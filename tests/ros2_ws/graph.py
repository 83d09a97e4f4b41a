"""Node processes for tests, and a node that watches them. Waiting is always for an event, with a limit."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import rclpy
import yaml
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from ratchet_vla.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0
INHERITED = ("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "LD_LIBRARY_PATH")


class Watcher:
    """A node, its executor, and waiting."""

    def __init__(self, name: str = "watcher") -> None:
        self.node = Node(name)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._clients: dict[str, Any] = {}

    def until(self, predicate: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Spin until the predicate holds; its value."""
        end = time.monotonic() + limit
        while not (value := predicate()):
            left = end - time.monotonic()
            assert left > 0.0, f"not within {limit} s: {what}"
            self.executor.spin_once(timeout_sec=min(left, 0.1))
        return value

    def collect(self, kind: type[Any], topic: str, qos: Any) -> list[Any]:
        """Everything that arrives on a topic, in a list that grows."""
        got: list[Any] = []
        self.node.create_subscription(kind, topic, got.append, qos)
        return got

    def call(self, kind: type[Any], name: str, request: Any, limit: float = LIMIT) -> Any:
        client = self._clients.setdefault(name, self.node.create_client(kind, name))
        self.until(client.service_is_ready, f"service {name}", limit)
        future = client.call_async(request)
        return self.until(lambda: future.done() and future.result(), f"answer of {name}", limit)

    def goal(self, kind: type[Any], name: str, goal: Any, feedback: Callable[[Any], None] | None = None) -> Any:
        """The handle of an accepted goal."""
        client = self._clients.setdefault(name, ActionClient(self.node, kind, name))
        self.until(client.server_is_ready, f"action {name}")
        future = client.send_goal_async(goal, feedback_callback=feedback)
        handle = self.until(lambda: future.done() and future.result(), f"answer of {name}")
        assert handle.accepted
        return handle

    def result(self, handle: Any, limit: float = LIMIT) -> Any:
        future = handle.get_result_async()
        return self.until(lambda: future.done() and future.result(), "result of the goal", limit)

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()


class Graph:
    """Node processes with their parameters and logs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, module: str, name: str = "", python: str = sys.executable, **parameters: Any) -> Any:
        """python: another ROS distribution's interpreter, which must not inherit this one's library paths."""
        name = name or module
        environment = dict(os.environ)
        if python != sys.executable:
            environment = {k: v for k, v in environment.items() if k not in INHERITED}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({f"/{name}": {"ros__parameters": {"autostart": True, **parameters}}}))
        command = [python, "-m", "ratchet_ros", module, "--ros-args", "--params-file", str(file)]
        command += ["-r", f"__node:={name}"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> dict[str, int]:
        """Interrupt every process; exit statuses."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes


def ratchet(*arguments: str) -> tuple[int, Any]:
    """The command line, in this process; its ROS half is a process of its own. Exit status and last JSON line."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main([*arguments, "--json"])
    return code, json.loads(out.getvalue().strip().splitlines()[-1])


def active(watcher: Watcher, *names: str) -> None:
    """Wait until all of these nodes are active."""
    from lifecycle_msgs.msg import State
    from lifecycle_msgs.srv import GetState

    def is_active(name: str) -> bool:
        try:
            answer = watcher.call(GetState, f"/{name}/get_state", GetState.Request(), limit=3.0)
        except AssertionError:
            return False  # the question may have gone to a node that was killed and is not yet missed
        return bool(answer.current_state.id == State.PRIMARY_STATE_ACTIVE)

    for name in names:
        watcher.until(lambda name=name: is_active(name), f"{name} active")  # type: ignore[misc]


def spin_a_moment(watcher: Watcher, seconds: float) -> None:
    """Let callbacks run: for looking at what does not happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watcher.executor.spin_once(timeout_sec=0.05)


__all__ = ["ROOT", "Graph", "Watcher", "active", "ratchet", "rclpy", "spin_a_moment"]
