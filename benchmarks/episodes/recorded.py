"""Episodes for benchmarks of what happens after recording: a scripted expert on Meta-World, seen by two cameras.

Knows the simulator and the store. A few rollouts are rendered and written many times, each time as another episode:
what is measured does not depend on what the frames show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ratchet_sim import registry
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Mark, Observation, Step

TASKS = ("drawer-open", "door-open", "faucet-open", "window-open", "button-press-topdown")


def two_cameras(size: int) -> RobotContract:
    """Meta-World's contract with a second view. size: pixels of each side."""
    contract = registry.contract_for("metaworld")
    first = contract.cameras[0]
    side = CameraSpec("corner3", size, size, source="corner3", rotate=180)
    return dataclasses.replace(contract, cameras=(dataclasses.replace(first, width=size, height=size), side))


def rollout(contract: RobotContract, task: str, initial: int, steps: int, *, stop: bool = True) -> Episode:
    """One attempt: a frame of each camera, a state and a command per control step. stop: soon after success."""
    env = registry.make_env("metaworld", task, contract)
    expert = registry.make_expert("metaworld", task)
    made: list[Step] = []
    ticks: list[ControlTick] = []
    rng = np.random.default_rng(initial)
    solved = False
    try:
        env.reset(initial)
        expert.reset(env)
        for i in range(steps):
            stamp = i / contract.control_hz
            state = env.state()
            images = {c.name: env.render(c.name) for c in contract.cameras}
            action = np.asarray(expert.act(env), np.float32)
            seen = Observation(images, state, env.info.instruction, stamp, i)
            shape = (1, len(action))
            chunk = ActionChunk(
                action[None], rng.integers(0, 256, shape), -rng.random(shape, np.float32), "0" * 64, 1.0, stamp, i
            )
            made.append(Step(seen, chunk, np.ones(1, np.bool_), 0.0, False, 1))
            ticks.append(ControlTick(stamp, stamp, i, action, action, Mark.NONE, i, 0, "0" * 64, state))
            env.step(action)
            solved = solved or env.success()
            if stop and solved and i % 10 == 9:
                break
    finally:
        env.close()
    made[-1] = dataclasses.replace(made[-1], done=True, reward=float(solved))
    return Episode(task, env.info.instruction, made, solved, "simulator", initial, adapter_id="0" * 64, ticks=ticks)


def fill(
    store: EpisodeStore,
    contract: RobotContract,
    rollouts: Sequence[Episode],
    count: int,
    *,
    frames: Codec = "jpeg",
    labelled: bool = True,
) -> None:
    """`count` episodes in the store. labelled: with the simulator's label; without, they wait for a person."""
    folder = store.folder("bench")
    for i in range(count):
        source = rollouts[i % len(rollouts)]
        given = dataclasses.replace(source, seed=i, meta={"copy": i})
        if not labelled:
            given = dataclasses.replace(given, success=None, success_source="")
        path = folder / f"{i:04d}.mcap"
        store.add(path, write_episode(path, given, contract, frames=frames, session="bench", mode="deploy"))
