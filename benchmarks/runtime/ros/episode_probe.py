"""One episode through the nodes in lock-step, told action by action: `episode.py REQUEST` (JSON).

Knows the graph of simulated arm, safety node and policy node. What is told is what the command filter sent to the arm.
"""

from __future__ import annotations

import json
import sys

import rclpy
from ratchet_msgs import msg
from ratchet_msgs.action import RunTask
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from benchmarks.runtime.ros.driver import Nodes, told, until
from ratchet_ros.messages import dds, qos


def main() -> None:
    ask = json.loads(sys.argv[1])
    dds.load_profile(loopback=True)
    rclpy.init()
    nodes, node = Nodes(), Node("bench_episode")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    applied: list[msg.Applied] = []
    node.create_subscription(msg.Applied, "applied", applied.append, qos.EVENTS)
    timed = {"contract": ask["contract"], "use_sim_time": True, "lock_step": True}
    try:
        scene = {k: ask[k] for k in ("contract", "suite", "task", "initial_state")}
        nodes.start("sim_robot_node", **scene, lock_step=True, frame_every=ask["chunk"])
        nodes.start("safety_node", **timed)
        policy = {"policy": ask["policy"], "policy_python": ask["python"], "judge": "scene", "mode": "collect"}
        nodes.start("policy_node", **timed, **policy, patience=120.0)
        client = ActionClient(node, RunTask, "policy_node/run_task")
        until(executor, client.server_is_ready, "the policy node", 600.0)
        result = None
        while result is None or result.code in ("ros.not_active", "ros.no_data", "ros.no_safety_node", "goal.no_scene"):
            goal = RunTask.Goal(task=ask["task"], instruction=ask["instruction"], horizon=ask["horizon"])
            asked = client.send_goal_async(goal)
            until(executor, asked.done, "the goal")
            ended = asked.result().get_result_async()
            until(executor, ended.done, "the result", 3600.0)
            result = ended.result().result
        until(executor, lambda: applied and not applied[-1].action, "the last hold")
        sent = [a for a in applied if a.chunk_sequence >= 0]
        told(
            {
                "actions": [list(a.action) for a in sent],
                "marks": sorted({a.marks for a in sent}),
                "success": result.outcome == RunTask.Result.OUTCOME_SUCCESS,
                "termination": result.termination,
                "code": result.code,
            }
        )
    finally:
        nodes.stop()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
