"""Two GPUs must learn what one learns: a factor of two in a gradient is a learning rate that nobody chose.

Pinned: the adapter after an update by two processes (gloo, each with half of the episodes, base whole or sharded by
FSDP) equals that of one process with all of them, up to rounding, and both ranks hold the same one; batches survive
packing. A whole sequential run of two processes, stopped and resumed, gives the matrix and the adapters of one; ranks
with different commands are refused. Determinism: fixed policy, episodes and order of samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learner.small_world import forked, write_episode
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.samples import to_episodes
from ratchet_vla.learner.sequence import SequentialRun
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.update.ranks import Ranks, concatenate, join, pack, unpack
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from tests.agent.learner.rollouts.test_collection import specs
from tests.agent.learner.runs import ROOT, fake_env, start, tiny_with_adapter
from tests.agent.learner.update import two_ranks as ranks
from tests.agent.learner.update.two_ranks import CONFIG, SERVICE, two_updates


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


def together(folder: Path, mode: str, **environment: str) -> None:
    """Run two ranks to their end with the variables that torchrun gives; forked, so that nothing is imported again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}

    def rank(number: int) -> Callable[[], None]:
        def work() -> None:
            os.environ.update(given, RANK=str(number), LOCAL_RANK=str(number))
            ranks.main(folder, mode)

        return work

    logs = [folder / f"rank{number}.log" for number in range(2)]
    children = [forked(rank(number), log) for number, log in enumerate(logs)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0], "".join(log.read_text() for log in logs)


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
    together(tmp_path, mode)
    policy, lora = tiny_with_adapter()
    before = lora.export()
    before = {n: t.clone() for n, t in before.items()}
    config = UpdateConfig(algorithm=mode.split("-", 1)[0], **CONFIG)  # type: ignore[arg-type]
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> SequentialRun:
    return start(tmp_path_factory.mktemp("alone"), lambda kind, facts: None)


@pytest.mark.parametrize("base", ["whole", "sharded"])
def test_a_whole_run_of_two_processes_is_that_of_one(base: str, alone: SequentialRun, tmp_path: Path) -> None:
    if base == "whole":
        together(tmp_path, "sequence-whole", STOP="3")  # in the second task; what follows resumes it
        assert not (tmp_path / "ids0.json").exists()
    together(tmp_path, f"sequence-{base}")
    first, second = (json.loads((tmp_path / f"ids{rank}.json").read_text()) for rank in range(2))
    assert first == second
    ids, matrix = first
    assert len(set(ids)) == 3
    assert matrix == alone.matrix.to_dict()
    store = FolderStore(tmp_path / "run" / "adapters")
    effects = [store.card(i).provenance.effect for i in ids[1:]]
    assert effects == pytest.approx([alone.store.card(i).provenance.effect for i in alone.adapter_ids[1:]], rel=1e-3)
    assert sorted(store.ids()) == sorted(ids[1:])
    for mine, theirs in zip(ids[1:], alone.adapter_ids[1:], strict=True):
        ours, single = store.get(mine).tensors, alone.store.get(theirs).tensors
        for name, tensor in single.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    lines = (tmp_path / "run" / "state" / "updates.jsonl").read_text().splitlines()
    assert [(json.loads(x)["stage"], json.loads(x)["update"]) for x in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [json.loads(x)["episodes"] for x in lines] == [16] * 4


def test_ranks_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    together(tmp_path, "sequence-whole", ODD="1")
    assert [(tmp_path / f"refused{rank}").read_text() for rank in range(2)] == ["learner.ranks_differ"] * 2
    assert not list((tmp_path / "run" / "state").iterdir())


def test_one_process_has_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(RatchetError) as refused:
        join("cuda")
    assert refused.value.code == "learner.no_gpu"


def test_parts_of_ranks_are_everything_once() -> None:
    for count in range(9):
        parts = []
        for rank in range(4):
            ranks = object.__new__(Ranks)
            ranks.rank, ranks.world = rank, 4
            parts += list(range(count))[ranks.own(count)]
        assert parts == list(range(count))


@pytest.mark.parametrize("base", ["whole", "sharded"])
def test_the_service_updates_as_alone_with_a_rank_that_assists(base: str, tmp_path: Path) -> None:
    policy, lora = tiny_with_adapter()
    name = lora.adapter(binding_of(policy)).id
    wanted = specs(12)
    env = fake_env(1, 4)
    try:
        _, batch = run_episodes(policy, env, wanted, temperature=SERVICE.temperature, adapter_id=name)
    finally:
        env.close()
    assert batch is not None
    batch.success[::3] = True
    contract = RobotContract.load(ROOT / "robots" / "metaworld.yaml")
    episodes = to_episodes(batch, wanted, policy, contract)
    for number, episode in enumerate(episodes):
        write_episode(tmp_path / f"{number:02}.episode", episode)
    together(tmp_path, f"service-{base}")
    single = Trainer(policy, lora, SERVICE)
    before = lora.export()
    two_updates(single, episodes)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert max(float((tensor - before[name]).abs().max()) for name, tensor in lora.export().items()) > 1e-4
    for tensor_name, tensor in lora.export().items():
        torch.testing.assert_close(state["lora"][tensor_name], tensor, rtol=1e-3, atol=2e-5)
