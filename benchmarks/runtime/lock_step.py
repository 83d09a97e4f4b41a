"""The same episode three times: in process, through the runtime, through the ROS nodes in lock-step. Equal bit by bit?

LIBERO with a small VLA of random weights (an episode that moves; success is not the point), and Meta-World with the
built-in VLA, which solves its task. In process means: observe, infer, execute the chunk. Through the runtime: policy
process, executor, safety filter, loop. Through ROS: simulated arm, safety node and policy node as processes, over DDS.

    python -m benchmarks.runtime.lock_step [--quick]

Exit 1 where an action differs in any bit, or success does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.ros_probe import ROOT, arguments, probe, write
from ratchet_sim import registry
from ratchet_sim.robot import SimRobot
from ratchet_vla.contract import RobotContract
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.presets import small, spec_for
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.runtime.clock import ManualClock
from ratchet_vla.runtime.control.chunks import CollectExecutor
from ratchet_vla.runtime.control.labelling import SceneLabeller
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.safety.filter import SafetyFilter


def random_policy(contract: RobotContract, instruction: str, folder: Path) -> Path:
    """A small VLA of random weights that fits the contract and moves the arm gently."""
    dims = contract.action.dims
    gripper = contract.action.gripper.dim if contract.action.gripper else ""
    low = tuple(d.low if d.name == gripper else 0.3 * d.low for d in dims)
    high = tuple(d.high if d.name == gripper else 0.3 * d.high for d in dims)
    moved = tuple(d.name != gripper for d in dims)
    size = sum(s.size for s in contract.state)
    statistics = Statistics(
        "bench", tuple(d.unit for d in dims), low, high, moved, state_mean=(0.0,) * size, state_std=(1.0,) * size
    )
    spec = spec_for(
        contract,
        cameras=[c.name for c in contract.cameras],
        state=[s.name for s in contract.state],
        chunk=8,
        statistics_key="bench",
    )
    config = small(image_size=spec.image_size, hidden=64, layers=2, heads=2, channels=(8, 8, 16, 16))
    torch.manual_seed(0)
    checkpoint.save(PrismaticPolicy(config, spec, statistics, train_tokenizer([instruction], 300)), folder)
    return folder


def in_process(robot: SimRobot, policy_folder: Path, state: int, horizon: int) -> tuple[np.ndarray, bool]:
    policy = checkpoint.load(policy_folder)
    robot.reset(state)
    sent: list[np.ndarray] = []
    while True:
        seen = robot.observe()
        values = torch.from_numpy(np.concatenate([seen.state[n] for n in policy.spec.state]))[None]
        images = np.stack([seen.images[n] for n in policy.spec.cameras])[None]
        for action in policy.predict(PolicyInput(images, values, [seen.instruction])).actions[0].numpy():
            robot.act(action)
            sent.append(action)
            if robot.success() or len(sent) == horizon:
                return np.stack(sent), robot.success()


def through_runtime(robot: SimRobot, policy_folder: Path, state: int, horizon: int) -> tuple[np.ndarray, bool]:
    robot.reset(state)
    sink = MemorySink()
    with PolicyClient(robot.contract, PolicyLaunch(options={"policy": str(policy_folder)}, nice=0)) as client:
        loop = ControlLoop(
            robot,
            client,
            SafetyFilter(robot.contract),
            CollectExecutor(robot.contract),
            sink=sink,
            clock=ManualClock(),
            lock_step=True,
            patience=120.0,
        )
        end = loop.run_episode("bench", robot.instruction, horizon=horizon, labeller=SceneLabeller(robot.success))
    commands = [t.command for t in sink.ticks if t.chunk_sequence >= 0 and t.command is not None]
    return np.stack(commands), bool(end.success)


def through_ros(
    suite: str, robot: SimRobot, task: str, policy_folder: Path, state: int, horizon: int
) -> tuple[np.ndarray, bool]:
    name = "metaworld" if suite == "metaworld" else "libero"
    ask = {
        "contract": str(ROOT / "robots" / f"{name}.yaml"),
        "suite": suite,
        "task": task,
        "initial_state": state,
        "instruction": robot.instruction,
        "horizon": horizon,
        "policy": str(policy_folder),
        "python": sys.executable,
        "chunk": checkpoint.load(policy_folder).spec.chunk,
    }
    told = probe("episode_probe", json.dumps(ask))
    return np.array(told["actions"], np.float32), bool(told["success"])


def compare(suite: str, task: str, policy: Path | None, state: int, horizon: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    robot = SimRobot(suite, task, state)
    robot.connect()
    with tempfile.TemporaryDirectory() as scratch:
        folder = policy or random_policy(robot.contract, robot.instruction, Path(scratch) / "policy")
        plain, solved = in_process(robot, folder, state, horizon)
        runtime, runtime_solved = through_runtime(robot, folder, state, horizon)
        robot.close()
        nodes, nodes_solved = through_ros(suite, robot, task, folder, state, horizon)
    return {
        "suite": suite,
        "task": task,
        "actions": len(plain),
        "success": solved,
        "runtime_equal": runtime.shape == plain.shape and bool((runtime == plain).all()) and runtime_solved == solved,
        "ros_equal": nodes.shape == plain.shape and bool((nodes == plain).all()) and nodes_solved == solved,
        "largest_difference": float(np.abs(nodes - plain).max()) if nodes.shape == plain.shape else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter episodes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lock_step.json")
    given = parser.parse_args(argv)
    libero = registry.tasks("libero_object")[0]
    length = 24 if given.quick else 96
    asked = [
        ("metaworld", "door-open", ROOT / "models" / "small-metaworld", 3, 64),
        ("libero_object", libero.name, None, libero.evaluation_states[0], length),
    ]
    rows = []
    for one in asked:  # the two simulators' renderers do not share a process well
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(compare, one))
    table = Table(title="One episode in process, through the runtime, through ROS in lock-step")
    for column in ("suite", "actions", "success", "runtime", "ROS"):
        table.add_column(column)
    for row in rows:
        words = ["equal" if row[k] else "DIFFERS" for k in ("runtime_equal", "ros_equal")]
        table.add_row(row["suite"], str(row["actions"]), str(row["success"]), *words)
    Console(width=100).print(table)
    write(given.output, "runtime.lock_step", arguments(argv), {"episodes": rows})
    equal = sum(r["runtime_equal"] and r["ros_equal"] for r in rows)
    print(f"lock_step: {equal} of {len(rows)} episodes equal bit by bit in all three (goal all)")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
