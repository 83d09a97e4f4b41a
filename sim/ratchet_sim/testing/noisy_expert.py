"""NoisyExpert: bursts of disturbed motion are executed, the expert's clean action stays the label.

Knows the action space of the contract and a seed. Works for any expert, knows no simulator.
"""

from __future__ import annotations

import numpy as np

from ratchet_sim.base import Expert, TaskEnv
from ratchet_sim.demonstrations import NoiseConfig
from ratchet_vla.records import Float32


class NoisyExpert(Expert):
    """Drives the arm off the expert's path now and then, so that recoveries come into the data.

    `act` returns what to execute; `label` is the expert's own action in the same state, `disturbed` whether they may
    differ. The noise depends on `seed` and on how many episodes were reset since, on nothing else.

    Args:
        expert: any expert; it is asked at every step and sees where the noise has led.
        config: how often, how long and how strongly.
        seed: of the first episode's noise; set the attribute before `reset` to choose another episode's.
    """

    def __init__(self, expert: Expert, config: NoiseConfig, seed: int) -> None:
        self.expert = expert
        self.config = config
        self.seed = seed
        self.label: Float32 = np.zeros(0, np.float32)
        self.disturbed = False

    def reset(self, env: TaskEnv) -> None:
        self.expert.reset(env)
        dims = env.contract.action.dims
        self._low = np.array([dim.low for dim in dims], np.float32)
        self._high = np.array([dim.high for dim in dims], np.float32)
        gripper = env.contract.action.gripper
        self._gripper = [dim.name for dim in dims].index(gripper.dim) if gripper else None
        self._rng = np.random.default_rng(self.seed)
        self.seed += 1
        self._left = 0
        self.disturbed = False

    def act(self, env: TaskEnv) -> Float32:
        config = self.config
        generator = self._rng
        self.label = self.expert.act(env)
        if self._left == 0 and generator.random() < config.probability:
            self._left = int(generator.integers(1, config.length + 1))
            half_range = (self._high - self._low) / 2
            self._push = (generator.uniform(-1, 1, len(half_range)) * config.scale * half_range).astype(np.float32)
            self._flip = bool(generator.random() < config.grip_flip)
        self.disturbed = self._left > 0
        if not self.disturbed:
            return self.label.copy()
        self._left -= 1
        action: Float32 = np.clip(self.label + self._push, self._low, self._high)
        if self._gripper is not None:
            mid_range = (self._low + self._high)[self._gripper] / 2
            clean_command = self.label[self._gripper]
            action[self._gripper] = 2 * mid_range - clean_command if self._flip else clean_command
        return action
