"""LIBERO through the vector environment is what the learner trains on there; fakes and Meta-World cannot vouch for it.

Pinned: states, frames, rewards and ends of two episodes side by side in a worker process equal those of the plain task
environment stepped by hand, bit for bit, also when the worker is killed in between.
Determinism: official initial states, actions from a seeded generator, the kill falls between two rounds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from ratchet_sim import registry
from ratchet_sim.workers.vector import ChunkVectorEnv

SUITE = "libero_object"
TASK = "pick_up_the_cream_cheese_and_place_it_in_the_basket"
CAMERAS = ("agentview", "wrist")
FIELDS = ("eef_position", "gripper")
CHUNK = 4
ROUNDS = 2
STATES = (0, 7)


@pytest.fixture(scope="module")
def env() -> Iterator[ChunkVectorEnv]:
    vector_env = ChunkVectorEnv(
        SUITE, cameras=CAMERAS, state_fields=FIELDS, chunk=CHUNK, workers=1, slots_per_worker=len(STATES)
    )
    yield vector_env
    vector_env.close()


def actions(round_: int) -> np.ndarray:
    dims = registry.contract_for(SUITE).action.dims
    low, high = (np.array([getattr(d, side) for d in dims], np.float32) for side in ("low", "high"))
    shape = (len(STATES), CHUNK, len(dims))
    return np.random.default_rng(round_).uniform(0.6 * low, 0.6 * high, shape).astype(np.float32)


@pytest.fixture(scope="module")
def by_hand() -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames and states of both episodes after the reset and after each round."""
    plain = registry.make_env(SUITE, TASK)
    observations: list[list[tuple[np.ndarray, np.ndarray]]] = []
    try:
        for slot, state in enumerate(STATES):
            plain.reset(state)
            observations.append([])
            for round_ in range(ROUNDS + 1):
                images = np.stack([plain.render(c) for c in CAMERAS])
                fields = plain.state()
                observations[slot].append((images, np.concatenate([fields[f] for f in FIELDS])))
                for action in actions(round_)[slot]:
                    plain.step(action)
    finally:
        plain.close()
    return [
        (np.stack([s[round_][0] for s in observations]), np.stack([s[round_][1] for s in observations]))
        for round_ in range(ROUNDS + 1)
    ]


def test_equal_to_the_plain_environment_also_after_a_kill(
    env: ChunkVectorEnv, by_hand: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    observation, _ = env.reset(options={"task": TASK, "initial_state": np.array(STATES), "horizon": 100})
    for round_ in range(ROUNDS + 1):
        np.testing.assert_array_equal(observation["images"], by_hand[round_][0])
        np.testing.assert_array_equal(observation["state"], by_hand[round_][1].astype(np.float32))
        if round_ == 1:
            process = env._workers[0].process
            assert isinstance(process, BaseProcess)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if round_ < ROUNDS:
            observation, reward, success, truncated, _ = env.step(actions(round_))
            assert not reward.any()
            assert not success.any()
            assert not truncated.any()
