"""Rollouts run for hours over processes that leak, hang and die; a lost batch or a swapped frame would poison learning.

Pinned: results do not depend on the number of workers; a worker killed, hung or recycled in the middle of episodes
changes nothing, bit for bit; errors come back coded; nothing is left behind.
Determinism: actions come from a seeded generator, faults are injected between two rounds, never by timing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.errors import RatchetError
from tests import fakes

OPTIONS: dict[str, Any] = {"cameras": ("corner2",), "state_fields": ("hand", "gripper"), "chunk": 4}


@pytest.fixture
def make() -> Iterator[Callable[..., ChunkVectorEnv]]:
    vector_envs: list[ChunkVectorEnv] = []

    def build(**options: Any) -> ChunkVectorEnv:
        env = ChunkVectorEnv("metaworld", **{**OPTIONS, "make_env": fakes.make_fake, **options})
        vector_envs.append(env)
        return env

    yield build
    for env in vector_envs:
        env.close()


def actions(round_: int, slots: int = 4) -> np.ndarray:
    return np.random.default_rng(round_).uniform(-0.01, 0.02, (slots, 4, 4)).astype(np.float32)


def play(env: ChunkVectorEnv, fault: Callable[[int], None] = lambda round_: None) -> list[np.ndarray]:
    observation, _ = env.reset(options={"task": "door-open", "initial_state": np.arange(4), "horizon": 20})
    results = [observation["images"], observation["state"]]
    for round_ in range(4):
        fault(round_)
        observation, reward, success, truncated, info = env.step(actions(round_))
        results += [observation["images"], observation["state"], reward, success, truncated, info["steps_run"]]
    return results


def assert_equal(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("workers", "slots"), [(2, 2), (4, 1)])
def test_workers_do_not_change_the_result(make: Callable[..., ChunkVectorEnv], workers: int, slots: int) -> None:
    assert_equal(play(make(workers=1, slots_per_worker=4)), play(make(workers=workers, slots_per_worker=slots)))


def test_workers_take_one_thread_whatever_the_parent_does(
    make: Callable[..., ChunkVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the Makefile nobody sets these, and a user may give the policy more: workers share the cores anyway."""
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    env = make(workers=1, slots_per_worker=4)
    play(env)  # a process that answers has its own environment: between fork and exec it is still the parent's
    process = env._workers[0].process
    environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")  # type: ignore[attr-defined]
    for name in (b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"MKL_NUM_THREADS", b"LP_NUM_THREADS"):
        assert name + b"=1" in environment
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert "LP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_killed_worker_costs_nothing(make: Callable[..., ChunkVectorEnv], when: int) -> None:
    undisturbed = play(make(workers=2, slots_per_worker=2))
    env = make(workers=2, slots_per_worker=2)

    def kill(round_: int) -> None:
        if round_ == when:
            process = env._workers[1].process
            assert isinstance(process, BaseProcess)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    assert_equal(undisturbed, play(env, kill))
    assert env.restarts == 1


def test_a_killed_simulator_costs_nothing(make: Callable[..., ChunkVectorEnv]) -> None:
    from ratchet_sim.registry import make_env

    undisturbed = play(make(workers=2, slots_per_worker=2, make_env=make_env))
    env = make(workers=2, slots_per_worker=2, make_env=make_env)

    def kill(round_: int) -> None:
        if round_ == 2:
            process = env._workers[0].process
            assert isinstance(process, BaseProcess)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    assert_equal(undisturbed, play(env, kill))


def test_recycling_costs_nothing(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=4, recycle_after=5)
    first = play(env)
    assert env.recycled == 0
    assert_equal(first, play(env))
    assert env.recycled == 1


def test_a_hung_worker_is_replaced(
    make: Callable[..., ChunkVectorEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HANG_MARKER", str(tmp_path / "hung"))
    env = make(workers=1, slots_per_worker=4, make_env=fakes.make_hanging)
    start = env._start

    def patient_start(slots: range) -> Any:
        env._timeout = 300.0  # only the round that hangs is waited for briefly, never a process that starts slowly
        return start(slots)

    def hurry(round_: int) -> None:
        if round_ == 0:
            env._timeout = 4.0
            monkeypatch.setattr(env, "_start", patient_start)

    assert_equal(play(make(workers=1, slots_per_worker=4)), play(env, hurry))
    assert env.restarts == 1


def test_an_error_in_a_worker_is_coded(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=4, make_env=fakes.make_broken)
    env.reset(options={"task": "door-open", "initial_state": 0})
    with pytest.raises(RatchetError, match=r"sim\.worker_error.*unstable"):
        env.step(actions(0))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"task": "door-opn", "initial_state": 0}, "sim.unknown_task"),
        ({"task": "door-open"}, "sim.options"),
        (None, "sim.options"),
    ],
)
def test_bad_resets_are_refused(make: Callable[..., ChunkVectorEnv], options: dict[str, Any] | None, code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        make(workers=1, slots_per_worker=1).reset(options=options)
    assert refused.value.code == code


def test_an_error_in_one_worker_leaves_the_others_usable(make: Callable[..., ChunkVectorEnv]) -> None:
    """A refused initial state in one group must not leave another group's round uncollected, nor run an old episode."""
    env = make(workers=2, slots_per_worker=2, make_env=fakes.make_choosy)
    start = {"task": "door-open", "initial_state": np.arange(4), "horizon": 20}
    env.reset(options=start)
    with pytest.raises(RatchetError, match=r"sim\.unknown_state"):
        env.reset(options={**start, "initial_state": np.array([0, fakes.FORBIDDEN_STATE, 2, 3])})
    with pytest.raises(RatchetError, match=r"sim\.not_reset"):
        env.step(actions(0))
    assert_equal(play(make(workers=1, slots_per_worker=4)), play(env))


@pytest.mark.parametrize(
    ("chunk", "code"),
    [
        (np.zeros((4, 4), np.float32), "sim.bad_action"),  # one action per slot would otherwise fill the whole chunk
        (np.zeros((4, 3, 4), np.float32), "sim.bad_action"),
        (np.full((4, 4, 4), np.nan, np.float32), "sim.bad_action"),
    ],
)
def test_bad_actions_start_nothing(make: Callable[..., ChunkVectorEnv], chunk: np.ndarray, code: str) -> None:
    env = make(workers=2, slots_per_worker=2)
    env.reset(options={"task": "door-open", "initial_state": np.arange(4), "horizon": 20})
    before = env.arrays["state"].copy()
    with pytest.raises(RatchetError) as refused:
        env.step(chunk)
    assert refused.value.code == code
    np.testing.assert_array_equal(env.arrays["state"], before)
    assert_equal(play(make(workers=1, slots_per_worker=4)), play(env))


def test_a_misspelt_task_starts_nothing(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=2, slots_per_worker=1)
    with pytest.raises(RatchetError, match=r"sim\.unknown_task"):
        env.reset(options={"task": ["door-open", "door-opn"], "initial_state": 0})
    env.reset(options={"task": "door-open", "initial_state": 0})


def test_rounds_out_of_order_are_refused(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=2)
    with pytest.raises(RatchetError, match=r"sim\.idle"):
        env.collect(0)
    with pytest.raises(RatchetError, match=r"sim\.not_reset"):
        env.submit(0, {}, {0: actions(0)[0]})
    env.submit(0, {0: ("door-open", 0, 20)}, {})
    with pytest.raises(RatchetError, match=r"sim\.busy"):
        env.submit(0, {1: ("door-open", 0, 20)}, {})
    env.collect(0)
    with pytest.raises(RatchetError, match=r"sim\.not_reset"):
        env.submit(0, {0: ("door-open", 1, 20)}, {0: actions(0)[0]})


def test_a_worker_that_dies_every_time_is_given_up(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=1, make_env=fakes.make_fatal)
    with pytest.raises(RatchetError, match=r"sim\.worker_lost.*three times"):
        env.reset(options={"task": "door-open", "initial_state": 0})
    assert env.restarts == 3
    with pytest.raises(RatchetError, match=r"sim\.not_reset"):
        env.step(actions(0, 1))


def test_masked_resets_leave_the_other_episodes_alone(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=2, slots_per_worker=2)
    first = play(env)
    mask = np.array([False, True, False, False])
    before, _ = env.reset(options={"task": "door-open", "initial_state": np.full(4, 2), "horizon": 20})
    env.step(actions(0))
    after, _ = env.reset(options={"task": "door-open", "initial_state": np.full(4, 3), "reset_mask": mask})
    assert after["images"][1, 0, 0, 0, 0] == 3
    assert after["images"][1, 0, 0, 1, 0] == 0
    assert (after["images"][~mask, 0, 0, 0, 0] == 2).all()
    assert (after["images"][~mask, 0, 0, 1, 0] == 4).all()
    assert (before["images"][:, 0, 0, 1, 0] == 0).all(), "observations handed out must not change afterwards"
    assert first[0].shape == env.observation_space["images"].shape


def test_success_and_horizon_end_an_episode_inside_a_chunk(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=2)
    env.reset(options={"task": "door-open", "initial_state": 0, "horizon": 6})
    chunks = np.zeros((2, 4, 4), np.float32)
    chunks[0, :, 0] = 0.04  # beyond 0.2 with the sixth motion
    totals = np.zeros(2)
    for expected in ([4, 4], [2, 2], [0, 0]):
        _, reward, success, truncated, info = env.step(chunks)
        assert info["steps_run"].tolist() == expected
        totals += reward
    assert totals.tolist() == [1.0, 0.0]
    assert success.tolist() == [True, False]
    assert truncated.tolist() == [False, True]


def test_nothing_is_left_behind(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=2, slots_per_worker=1)
    processes = [w.process for w in env._workers]
    name = env._memory.name
    env.close()
    assert not any(p.is_alive() for p in processes)
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(name=name)


def test_spaces_contain_what_the_environment_gives(make: Callable[..., ChunkVectorEnv]) -> None:
    env = make(workers=1, slots_per_worker=4)
    observation, _ = env.reset(options={"task": "door-open", "initial_state": np.arange(4)})
    assert env.observation_space.contains(observation)
    assert env.action_space.contains(actions(0))
