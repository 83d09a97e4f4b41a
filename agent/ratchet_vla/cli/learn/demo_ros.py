"""The ROS part of the demo: the learned adapter drives the tasks through the nodes, swapped in while the arm moves.

Knows the graph of node processes and one client. The nodes are those of a real arm; only the arm is simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.nodes import ros
from ratchet_vla.cli.nodes.graph import Graph, NodeSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import ROBOTS

EPISODES = 6  # per task and adapter: enough to see that it runs, too few for a rate


def run(folder: Path, suite: str, tasks: Sequence[str], policy: Path, console: Console) -> dict[str, Any]:
    """Run episodes with the base, swap in motion, run the same episodes with the newest adapter; returns the counts.

    Raises:
        RatchetError: ros.no_environment, demo.no_adapter, and whatever the nodes refuse.
    """
    store = FolderStore(folder / "adapters")
    if not store.ids():
        raise RatchetError("demo.no_adapter", "the run has no adapter yet", where=str(folder), fix="ratchet demo")
    active = store.resolve("active")
    adapter = active if active != BASE else max(store.ids(), key=lambda identity: store.card(identity).created)
    infos = [registry.task(suite, task) for task in tasks]
    requests = _episodes(infos)
    # One more episode of the first task with the base, during which the adapter is swapped in.
    in_motion = _episode(infos[0], infos[0].evaluation_states[0])
    in_motion[-1]["swap_to"] = adapter
    requests += [*in_motion, *_episodes(infos)]
    nodes = _Nodes(folder / "ros", suite, infos[0].name, policy, folder / "adapters")
    results = nodes.run(requests, console)
    return _print_counts(results, tasks, console)


def _episodes(infos: Sequence[TaskInfo]) -> list[dict[str, Any]]:
    """Requests for the first episodes of every task."""
    requests = []
    for info in infos:
        for state in info.evaluation_states[:EPISODES]:
            requests += _episode(info, state)
    return requests


def _episode(info: TaskInfo, state: int) -> list[dict[str, Any]]:
    """Requests for one episode from an initial state: the scene is put there, then the task is run."""
    return [
        {"verb": "reset", "task": info.name, "initial_state": state},
        {"verb": "run", "task": info.name, "instruction": info.instruction, "horizon": info.horizon},
    ]


@dataclass(frozen=True)
class _Nodes:
    """The nodes of a simulated arm, started for one batch of requests.

    Attributes:
        logs: Folder of the nodes' logs.
        suite: Simulation suite.
        task: Task whose scene is loaded first.
        policy: Folder of the base policy.
        store: Folder of the adapter store.
    """

    logs: Path
    suite: str
    task: str
    policy: Path
    store: Path

    def run(self, requests: list[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
        """Start the nodes, send the requests, and return what came of the episodes."""
        contract = str(ROBOTS / ("metaworld.yaml" if self.suite == "metaworld" else "libero.yaml"))
        timed = {"contract": contract, "use_sim_time": True, "lock_step": True}
        scene = {"contract": contract, "suite": self.suite, "task": self.task, "lock_step": True}
        policy = {
            **timed,
            "policy": ros.absolute(self.policy),
            "store": ros.absolute(self.store),
            "policy_python": ros.policy_python(),
            "mode": "collect",
            "judge": "scene",
        }
        profile = {"FASTDDS_DEFAULT_PROFILES_FILE": str(ros.PACKAGE / "config" / "fastdds_loopback.xml")}
        with Graph(self.logs, environment=profile) as graph:
            graph.start(NodeSpec("sim_robot_node", "sim_robot_node", scene))
            graph.start(NodeSpec("safety_node", "safety_node", timed))
            graph.start(NodeSpec("policy_node", "policy_node", policy))
            console.print(f"through the ROS nodes (logs in {self.logs}): {len(requests) // 2} episodes")
            ready = {"verb": "await", "nodes": ["sim_robot_node", "safety_node", "policy_node"]}
            batch = {"verb": "batch", "limit": 120.0, "requests": [ready, *requests]}
            results = [answer["result"] for answer in ros.ask("ctl", batch)]
        return [result for result in results if isinstance(result, dict) and "outcome" in result]


def _print_counts(results: list[dict[str, Any]], tasks: Sequence[str], console: Console) -> dict[str, Any]:
    """Count the successes of base and adapter per task, print and return them."""
    count = len(tasks) * EPISODES
    # The episode between the two is the one with the swap.
    episodes_of = {"base": results[:count], "adapter": results[count + 1 :]}
    swap = results[count]["swap"]
    counts: dict[str, Any] = {"swap": swap, "missed": sum(int(result["missed"]) for result in results)}
    for number, task in enumerate(tasks):
        for name, episodes in episodes_of.items():
            of_task = episodes[number * EPISODES : (number + 1) * EPISODES]
            counts[f"{task} {name}"] = sum(result["outcome"] == "success" for result in of_task)
        console.print(f"{task} through ROS: {counts[f'{task} base']} -> {counts[f'{task} adapter']} of {EPISODES}")
    console.print(
        f"swapped in motion {swap['old_id'][:12]} -> {swap['new_id'][:12]}: ready in {1e3 * swap['ready']:.0f} ms, "
        f"unavailable {1e3 * swap['unavailable']:.3f} ms, {counts['missed']} ticks missed"
    )
    return counts
