"""An episode is the same in process and through the runtime, or the gate passes another policy than drives the arm.

Pinned: Meta-World with the built-in VLA, greedy and sampled: identical actions, tokens and log-probabilities, bit by
bit, and identical success, in process and through policy process, executor, safety filter and loop in lock-step;
nothing is clipped on the way. Determinism: same initial state, noise from the episode's seed as rollouts draw it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ratchet_sim.robot import SimRobot
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.policy.protocol import Chunks, PolicyInput
from ratchet_vla.records import Mark
from ratchet_vla.runtime.clock import ManualClock
from ratchet_vla.runtime.control.chunks import CollectExecutor
from ratchet_vla.runtime.control.labelling import SceneLabeller
from ratchet_vla.runtime.control.loop import ControlLoop, Termination
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.safety.filter import SafetyFilter

POLICY = Path(__file__).resolve().parents[4] / "models" / "small-metaworld"
TASK, STATE, SEED, HORIZON = "door-open", 3, 17, 64


@pytest.fixture(scope="module")
def robot() -> Iterator[SimRobot]:
    made = SimRobot("metaworld", TASK, STATE)
    made.connect()
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(robot: SimRobot) -> Iterator[PolicyClient]:
    launch = PolicyLaunch(options={"policy": str(POLICY)}, nice=0, environment={"OMP_NUM_THREADS": "1"})
    with PolicyClient(robot.contract, launch) as started:
        yield started


def in_process(robot: SimRobot, temperature: float) -> tuple[list[Chunks], np.ndarray, bool]:
    """The plain way: observe, infer, execute the chunk; stop at success."""
    policy = checkpoint.load(POLICY)
    spec = policy.spec
    generator = np.random.Generator(np.random.Philox(key=SEED))
    robot.reset(STATE)
    answers: list[Chunks] = []
    sent: list[np.ndarray] = []
    while len(sent) < HORIZON:
        seen = robot.observe()
        state = torch.from_numpy(np.concatenate([seen.state[n] for n in spec.state]))[None]
        images = np.stack([seen.images[n] for n in spec.cameras])[None]
        batch = PolicyInput(images, state, [seen.instruction])
        if temperature:
            noise = chunk_noise(generator, (spec.chunk, len(spec.action_names)), 0.0)
            answers.append(policy.sample(batch, temperature, torch.from_numpy(noise)[None]))
        else:
            answers.append(policy.predict(batch))
        for action in answers[-1].actions[0].numpy():
            robot.act(action)
            sent.append(action)
            if robot.success():
                return answers, np.stack(sent), True
            if len(sent) == HORIZON:
                break
    return answers, np.stack(sent), False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_episode_is_the_same_in_process_and_through_the_runtime(
    robot: SimRobot, client: PolicyClient, temperature: float
) -> None:
    torch.set_num_threads(1)
    answers, expected, solved = in_process(robot, temperature)
    robot.reset(STATE)
    sink = MemorySink()
    client.sample(temperature, SEED)
    loop = ControlLoop(
        robot,
        client,
        SafetyFilter(robot.contract),
        CollectExecutor(robot.contract),
        sink=sink,
        clock=ManualClock(),
        lock_step=True,
    )
    end = loop.run_episode(TASK, "open the door", horizon=HORIZON, labeller=SceneLabeller(robot.success))
    assert [e.code for e in sink.events] == []
    ticks = [t for t in sink.ticks if t.chunk_sequence >= 0]
    np.testing.assert_array_equal(np.stack([t.command for t in ticks if t.command is not None]), expected)
    assert all(t.marks == Mark.NONE for t in ticks)
    assert end.success is solved
    assert (end.termination is Termination.SUCCESS) == solved
    assert len(sink.chunks) == len(answers)
    for chunk, answer in zip(sink.chunks, answers, strict=True):
        assert answer.tokens is not None
        assert answer.log_prob is not None
        np.testing.assert_array_equal(chunk.tokens, answer.tokens[0].numpy())
        np.testing.assert_array_equal(chunk.log_prob, answer.log_prob[0].numpy())
    assert solved  # an episode that fails either way would prove little
