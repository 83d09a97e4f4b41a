"""The ROS part of the demo: the learned adapter drives the tasks through the nodes, swapped in while the arm moves.

Knows the graph of node processes and one client. The nodes are those of a real arm; only the arm is simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ratchet_sim import registry
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.nodes import ros
from ratchet_vla.cli.nodes.graph import Graph, NodeSpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import ROBOTS

EPISODES = 6  # per task and adapter: enough to see that it runs, too few for a rate


def run(folder: Path, suite: str, tasks: Sequence[str], policy: Path, console: Console) -> dict[str, Any]:
    """Episodes with the base, a swap in motion, the same episodes with the newest adapter. Returns the counts.

    Raises:
        RatchetError: ros.no_environment, demo.no_adapter, and whatever the nodes refuse.
    """
    store = FolderStore(folder / "adapters")
    if not store.ids():
        raise RatchetError("demo.no_adapter", "the run has no adapter yet", where=str(folder), fix="ratchet demo")
    active = store.resolve("active")
    adapter = active if active != BASE else max(store.ids(), key=lambda i: store.card(i).created)
    infos = [registry.task(suite, task) for task in tasks]
    requests: list[dict[str, Any]] = []
    for swap_to in ("", adapter):
        for info in infos:
            for state in info.evaluation_states[:EPISODES]:
                requests.append({"verb": "reset", "task": info.name, "initial_state": state})
                requests.append(
                    {"verb": "run", "task": info.name, "instruction": info.instruction, "horizon": info.horizon}
                )
        if not swap_to:
            requests.append({"verb": "reset", "task": infos[0].name, "initial_state": infos[0].evaluation_states[0]})
            requests.append(
                {
                    "verb": "run",
                    "task": infos[0].name,
                    "instruction": infos[0].instruction,
                    "horizon": infos[0].horizon,
                    "swap_to": adapter,
                }
            )
    results = _through_nodes(folder / "ros", suite, infos[0].name, policy, folder / "adapters", requests, console)
    return _tell(results, tasks, console)


def _through_nodes(
    logs: Path,
    suite: str,
    task: str,
    policy: Path,
    store: Path,
    requests: list[dict[str, Any]],
    console: Console,
) -> list[dict[str, Any]]:
    contract = str(ROBOTS / ("metaworld.yaml" if suite == "metaworld" else "libero.yaml"))
    timed = {"contract": contract, "use_sim_time": True, "lock_step": True}
    profile = {"FASTDDS_DEFAULT_PROFILES_FILE": str(ros.PACKAGE / "config" / "fastdds_loopback.xml")}
    with Graph(logs, environment=profile) as graph:
        scene = {"contract": contract, "suite": suite, "task": task, "lock_step": True}
        graph.start(NodeSpec("sim_robot_node", "sim_robot_node", scene))
        graph.start(NodeSpec("safety_node", "safety_node", timed))
        paths = {"policy": ros.absolute(policy), "store": ros.absolute(store), "policy_python": ros.policy_python()}
        graph.start(NodeSpec("policy_node", "policy_node", {**timed, **paths, "mode": "collect", "judge": "scene"}))
        console.print(f"through the ROS nodes (logs in {logs}): {len(requests) // 2} episodes")
        ready = {"verb": "await", "nodes": ["sim_robot_node", "safety_node", "policy_node"]}
        asked = {"verb": "batch", "limit": 120.0, "requests": [ready, *requests]}
        lines = [told["result"] for told in ros.ask("ctl", asked)]
    return [line for line in lines if isinstance(line, dict) and "outcome" in line]


def _tell(results: list[dict[str, Any]], tasks: Sequence[str], console: Console) -> dict[str, Any]:
    count = len(tasks) * EPISODES
    parts = {"base": results[:count], "adapter": results[count + 1 :]}
    swap = results[count]["swap"]
    told: dict[str, Any] = {"swap": swap, "missed": sum(int(r["missed"]) for r in results)}
    for number, task in enumerate(tasks):
        for name, episodes in parts.items():
            here = episodes[number * EPISODES : (number + 1) * EPISODES]
            told[f"{task} {name}"] = sum(r["outcome"] == "success" for r in here)
        console.print(f"{task} through ROS: {told[f'{task} base']} -> {told[f'{task} adapter']} of {EPISODES}")
    console.print(
        f"swapped in motion {swap['old_id'][:12]} -> {swap['new_id'][:12]}: ready in {1e3 * swap['ready']:.0f} ms, "
        f"unavailable {1e3 * swap['unavailable']:.3f} ms, {told['missed']} ticks missed"
    )
    return told
