"""Two GPUs must learn what one learns: a factor of two in a gradient is a learning rate that nobody chose.

Pinned: the adapter after an update by two processes (gloo, each with half of the episodes, base whole or sharded by
FSDP) equals that of one process with all of them, up to rounding, and both ranks hold the same one; batches survive
packing. Determinism: fixed policy, episodes and order of samples; processes meet in a file.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.errors import RatchetError
from agent.learner.distributed import Ranks, concatenate, pack, unpack
from agent.learner.rollouts import RolloutBatch, run_episodes
from agent.learner.update import UpdateConfig, Updater
from tests.agent.learner.ranks import CONFIG
from tests.agent.learner.runs import ROOT, fake_env, tiny_with_adapter
from tests.agent.learner.test_rollouts import specs


@pytest.fixture(scope="module")
def halves() -> list[RolloutBatch]:
    policy, _ = tiny_with_adapter()
    env = fake_env(1, 4)
    try:
        made = [run_episodes(policy, env, part, temperature=1.0, adapter_id="x")[1] for part in (specs(13), specs(8))]
    finally:
        env.close()
    grouped = []
    for number, batch in enumerate(made):
        assert batch is not None
        grouped.append(dataclasses.replace(batch, group=np.full(len(batch.success), number)))
    return grouped


def same(one: RolloutBatch, two: RolloutBatch) -> bool:
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in ((getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))
    )


def test_packing_changes_nothing(halves: list[RolloutBatch]) -> None:
    assert same(unpack(pack(halves[0])), halves[0])


def test_only_one_policys_episodes_are_joined(halves: list[RolloutBatch]) -> None:
    joined = concatenate(halves)
    assert len(joined.success) == 21
    assert joined.episode.max() == 20
    with pytest.raises(RatchetError) as refused:
        concatenate([halves[0], dataclasses.replace(halves[1], adapter_id="y")])
    assert refused.value.code == "learner.off_policy"


def test_without_a_process_group_it_is_refused() -> None:
    with pytest.raises(RatchetError) as refused:
        Ranks()
    assert refused.value.code == "learner.no_process_group"


@pytest.mark.parametrize("mode", ["grpo-whole", "ppo-whole", "grpo-sharded"])
def test_two_processes_learn_what_one_learns(mode: str, halves: list[RolloutBatch], tmp_path: Path) -> None:
    for rank, half in enumerate(halves):
        (tmp_path / f"batch{rank}.npz").write_bytes(pack(half))
    command = [sys.executable, "-m", "tests.agent.learner.ranks", str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank), "2", mode], cwd=ROOT) for rank in range(2)]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    policy, lora = tiny_with_adapter()
    before = lora.export()
    before = {n: t.clone() for n, t in before.items()}
    config = UpdateConfig(algorithm=mode.split("-")[0], **CONFIG)  # type: ignore[arg-type]
    logged = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0)).update(concatenate(halves))
    alone = lora.export()
    first, second = (torch.load(tmp_path / f"adapter{rank}.pt", weights_only=True) for rank in range(2))
    assert max(float((alone[n] - before[n]).abs().max()) for n in alone) > 1e-4
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-5)
    there = json.loads((tmp_path / "logged0.json").read_text())
    for name in ("gradient_norm", "approx_kl", "samples", "optimizer_steps", "loss"):
        assert there[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-6), name
