"""Rollouts on a cluster must give the numbers of rollouts on one machine, or results would depend on the hardware.

Pinned: results over Ray actors equal those over local processes bit for bit, also when an actor is killed in between;
errors come back coded. Determinism: seeded actions, the actor is killed between two rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ratchet_sim.workers.ray_actors import RayLauncher
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.errors import RatchetError
from tests import fakes
from tests.sim.workers.test_vector import OPTIONS, actions, assert_equal, play


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    import ray

    yield RayLauncher(cpus=0.1)
    ray.shutdown()


def build(launcher: RayLauncher, **options: Any) -> ChunkVectorEnv:
    options = {
        **OPTIONS,
        "make_env": fakes.make_fake,
        "workers": 2,
        "slots_per_worker": 2,
        "launch": launcher,
        **options,
    }
    return ChunkVectorEnv("metaworld", **options)


def test_equal_to_local_processes_also_after_a_kill(launcher: RayLauncher) -> None:
    local = ChunkVectorEnv("metaworld", **{**OPTIONS, "make_env": fakes.make_fake, "workers": 1, "slots_per_worker": 4})
    try:
        undisturbed = play(local)
    finally:
        local.close()
    env = build(launcher)

    def kill(round_: int) -> None:
        if round_ == 2:
            env._workers[1].process.kill()

    try:
        assert_equal(play(env, kill), undisturbed)
        assert env.restarts == 1
    finally:
        env.close()


def test_an_error_in_an_actor_is_coded(launcher: RayLauncher) -> None:
    env = build(launcher, workers=1, make_env=fakes.make_broken)
    try:
        env.reset(options={"task": "door-open", "initial_state": 0})
        with pytest.raises(RatchetError, match=r"sim\.worker_error.*unstable"):
            env.step(actions(0, 2))
    finally:
        env.close()


def test_an_address_without_a_cluster_is_refused(launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(RatchetError) as refused:
        RayLauncher("ray://127.0.0.1:1")
    assert refused.value.code == "sim.no_cluster"
