"""A sequential run small enough for tests: the real policy class, adapters, store and updates, a fake environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.contract import RobotContract
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.retention.regulariser import Retention
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations
from ratchet_vla.learner.sequence import SequenceConfig, SequentialRun
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy import presets
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from tests import fakes

ROOT = Path(__file__).resolve().parents[3]
TASKS = {
    name: TaskInfo("metaworld", name, text, tuple(range(100, 110)), tuple(range(6)), 12)
    for name, text in (("door-open", "open the door"), ("faucet-open", "open the faucet"), ("push", "push the puck"))
}


def tiny_policy(compute_dtype: str = "float32") -> PrismaticPolicy:
    """A policy of some 50,000 parameters with fixed random weights; its random motions sometimes reach the goal."""
    contract = RobotContract.load(ROOT / "robots" / "metaworld.yaml")
    spec = presets.spec_for(contract, cameras=["corner2"], state=["hand", "gripper"], chunk=4, statistics_key="fake")
    statistics = Statistics(
        "fake",
        spec.action_units,
        (-0.02, -0.04, -0.04, -1.0),
        (0.06, 0.04, 0.04, 1.0),
        (True, True, True, False),
        (0.0,) * 4,
        (0.1,) * 4,
    )
    torch.manual_seed(0)
    config = presets.small(hidden=32, layers=1, heads=2, channels=(8, 8, 8, 16), compute_dtype=compute_dtype)
    return PrismaticPolicy(config, spec, statistics, train_tokenizer([t.instruction for t in TASKS.values()], 300))


def tiny_with_adapter(rank: int = 4) -> tuple[PrismaticPolicy, Lora]:
    policy = tiny_policy()
    return policy, attach(policy.module, lora_config(rank, float(rank)))


def fake_env(workers: int = 1, slots: int = 4) -> ChunkVectorEnv:
    return ChunkVectorEnv(
        "metaworld",
        cameras=("corner2",),
        state_fields=("hand", "gripper"),
        chunk=4,
        workers=workers,
        slots_per_worker=slots,
        make_env=fakes.make_fake,
    )


CONFIG = SequenceConfig(
    tasks=("door-open", "faucet-open"),
    held_out=("push",),
    updates=2,
    groups=4,
    group_size=4,
    temperature=1.0,
    noise_correlation=0.5,
    evaluation_episodes=6,
    evaluation_temperature=1.0,
    update=UpdateConfig(algorithm="ppo", learning_rate=1e-2, minibatches=2),
)


def start(
    folder: Path,
    on_event: Callable[[str, dict[str, Any]], None],
    config: SequenceConfig = CONFIG,
    method: SeqFT | None = None,
    ranks: Ranks | None = None,
    shard: bool = False,
    known: KnownEvaluations | None = None,
    begin: str = "",
    retention: Retention | None = None,
) -> SequentialRun:
    """Run (or resume) in `folder`; with ranks, this process's part of it. begin: a stored adapter's id."""
    torch.set_num_threads(1)
    method = method or SeqFT()
    policy, lora = tiny_with_adapter()
    if shard and ranks is not None:
        ranks.shard(policy, lora)
    running, running_lora = tiny_with_adapter(method.serving_rank(4, len(config.tasks)))
    store = FolderStore(folder / "adapters", create=True)
    swapper = HotSwapper(running, running_lora, store=store)

    def serve(adapter_id: str) -> PrismaticPolicy:
        if swapper.current_id != (adapter_id or swapper.base_id):
            swapper.swap(adapter_id or swapper.base_id)
        return running

    env = fake_env()
    try:
        sequence = SequentialRun(
            policy,
            lora,
            env,
            TASKS,
            store,
            serve,
            config,
            folder / "state",
            on_event,
            method,
            ranks,
            known,
            origin="ratchet learn --tasks door-open",
            start=begin,
            retention=retention,
        )
        sequence.run()
    finally:
        env.close()
    return sequence


if __name__ == "__main__":
    # A process of its own, for tests that kill it: announces every event on a line and waits for an answer.
    def announce(kind: str, facts: dict[str, Any]) -> None:
        if kind != "episode":
            print(kind, facts.get("update", ""), facts.get("task", ""), flush=True)
            sys.stdin.readline()

    start(Path(sys.argv[1]), announce)
