"""Nodes of two ROS distributions in one graph: robots are not upgraded all at once.

Pinned: a Jazzy safety node between a Kilted policy node and a Kilted simulated arm; a Jazzy client runs a task, gets
feedback and result, swaps an adapter and presses the stop. Every kind of interface (topic, service, action) crosses.
Determinism: lock-step and a fake policy.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ratchet_msgs import msg

from ratchet_ros.messages import qos
from tests.ros2_ws.graph import INHERITED, ROOT, Graph, Watcher, active

JAZZY = str(ROOT / ".venv-jazzy" / "bin" / "python")
CONTRACT = str(ROOT / "robots" / "metaworld.yaml")


def jazzy(**request: Any) -> tuple[int, list[Any]]:
    environment = {k: v for k, v in os.environ.items() if k not in INHERITED}
    command = [JAZZY, "-m", "ratchet_ros", "ctl", json.dumps({"limit": 30.0, **request})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=90, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_graph_of_two_distributions(ros: None, tmp_path: Path) -> None:
    graph, watcher = Graph(tmp_path), Watcher()
    timed: dict[str, Any] = {"contract": CONTRACT, "use_sim_time": True, "lock_step": True}
    try:
        graph.start("sim_robot_node", contract=CONTRACT, task="door-open", lock_step=True)
        graph.start("safety_node", python=JAZZY, **timed)
        graph.start(
            "policy_node",
            **timed,
            policy_python=str(ROOT / ".venv" / "bin" / "python"),
            policy_module="ratchet_vla.testing.fake_policy_worker",
            policy_options='{"image_size": 96, "chunk": 8}',
            judge="scene",
            mode="collect",
        )
        applied = watcher.collect(msg.Applied, "applied", qos.EVENTS)
        active(watcher, "sim_robot_node", "safety_node", "policy_node")
        goal = {"task": "door-open", "instruction": "open the door"}
        code, lines = jazzy(verb="run", **goal, horizon=60, progress=True)
        assert code == 0
        result = lines[-1]["result"]
        assert (result["outcome"], result["termination"]) == ("failure", "horizon")
        assert lines[0]["feedback"]["motion"]
        watcher.until(lambda: applied and not applied[-1].action, "what became of the commands")
        assert {a.marks for a in applied if a.chunk_sequence >= 0} == {0}
        assert sum(a.chunk_sequence >= 0 for a in applied) == 60
        code, lines = jazzy(verb="swap", reference="1")
        assert (code, lines[-1]["result"]["old_id"]) == (0, result["adapter_id"])
        code, lines = jazzy(verb="stop", pressed=True)
        assert code == 0
        code, lines = jazzy(verb="run", **goal, horizon=10)
        assert (code, lines[-1]["error"]["code"]) == (2, "safety.latched")
    finally:
        codes = graph.stop()
        watcher.close()
    assert set(codes.values()) == {0}, {n: graph.log(n) for n in codes}
