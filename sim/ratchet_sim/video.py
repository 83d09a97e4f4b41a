"""Rollout videos: one greedy episode as a GIF for a person.

Knows one environment and how to draw it larger. Knows no learning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.policy.commands import robot_actions
from ratchet_vla.policy.protocol import Policy, PolicyInput
from ratchet_vla.records import UInt8

VIEWER = "viewer"


def with_viewer(contract: RobotContract, size: int) -> RobotContract:
    """The contract plus a larger copy of its first camera, for people."""
    first = contract.cameras[0]
    camera: CameraSpec = dataclasses.replace(first, name=VIEWER, width=size, height=size)
    return dataclasses.replace(contract, cameras=(*contract.cameras, camera))


def record(
    policy: Policy,
    task: TaskInfo,
    initial_state: int,
    path: Path,
    *,
    size: int = 192,
    every: int = 2,
    act: Callable[[PolicyInput], Tensor] | None = None,
) -> bool:
    """Run one episode and write it as a GIF in real time; returns success.

    Args:
        every: control steps per frame.
        act: actions (1, K, D) in physical units for an observation; the policy's greedy ones if absent.
    """
    contract = with_viewer(registry.contract_for(task.suite), size)
    env = registry.make_env(task.suite, task.name, contract)
    frames: list[UInt8] = []
    try:
        env.reset(initial_state)
        steps = 0
        while steps < task.horizon and not env.success():
            state_fields = env.state()
            images = np.stack([env.render(camera) for camera in policy.spec.cameras])[None]  # (1, V, H, W, 3)
            state_bs = None
            if policy.spec.state:
                state_vector = np.concatenate([state_fields[field_name] for field_name in policy.spec.state])
                state_bs = torch.from_numpy(state_vector)[None]
            batch = PolicyInput(images=images, state=state_bs, instructions=[task.instruction])
            actions_bkd = policy.predict(batch).actions if act is None else act(batch)
            chunk = actions_bkd[0].float().cpu().numpy()
            for action in robot_actions(chunk, policy.spec, contract):
                if steps % every == 0:
                    frames.append(env.render(VIEWER))
                env.step(action)
                steps += 1
                if env.success() or steps >= task.horizon:
                    break
        success = env.success()
        # Eight frames long, so that the verdict can be read before the GIF loops.
        frames += [_framed(env.render(VIEWER), success)] * 8
    finally:
        env.close()
        registry.release()
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.stack(frames), duration=round(1000 * every / contract.control_hz), loop=0)
    return success


def _framed(image: UInt8, success: bool) -> UInt8:
    """The last frame, with a green or red border that says how it ended."""
    framed = image.copy()
    colour = (40, 160, 60) if success else (190, 40, 40)
    for border in (np.s_[:6], np.s_[-6:], np.s_[:, :6], np.s_[:, -6:]):
        framed[border] = colour
    return framed
