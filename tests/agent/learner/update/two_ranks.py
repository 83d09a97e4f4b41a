"""What one rank does in a process of its own, with torchrun's variables set."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learner.small_world import read_episode
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.sequence import Stop
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.update.ranks import Ranks, join, unpack
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.records import Episode
from tests.agent.learner.runs import CONFIG as CONFIG_OF_RUNS
from tests.agent.learner.runs import start, tiny_with_adapter

CONFIG = {"learning_rate": 1e-3, "minibatches": 2, "micro_size": 7}
SERVICE = ServiceConfig(("door-open",), update=UpdateConfig(algorithm="ppo", **CONFIG))  # type: ignore[arg-type]


def main(folder: Path, mode: str) -> None:
    """mode: what is done, "-", and whether the base is "whole" or "sharded"; torchrun's variables say which rank."""
    torch.set_num_threads(1)
    ranks = join()
    assert ranks is not None
    try:
        what, base = mode.split("-")
        if what == "sequence":
            sequence(folder, ranks, base == "sharded")
        elif what == "service":
            service(folder, ranks, base == "sharded")
        else:
            update(folder, ranks, what, base == "sharded")
    except RatchetError as error:
        (folder / f"refused{ranks.rank}").write_text(error.code)
    finally:
        ranks.leave()


def update(folder: Path, ranks: Ranks, algorithm: str, sharded: bool) -> None:
    """One update from this rank's batch and the others'."""
    policy, lora = tiny_with_adapter()
    if sharded:
        whole = sum(p.numel() for p in policy.network.parameters())
        ranks.shard(policy, lora)
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.network.parameters())
        assert local < whole
    batch = ranks.gather(unpack((folder / f"batch{ranks.rank}.npz").read_bytes()))
    config = UpdateConfig(algorithm=algorithm, **CONFIG)  # type: ignore[arg-type]
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0), ranks)
    logged = updater.update(batch)
    torch.save(lora.export(), folder / f"adapter{ranks.rank}.pt")
    (folder / f"logged{ranks.rank}.json").write_text(json.dumps(logged))


def sequence(folder: Path, ranks: Ranks, sharded: bool) -> None:
    """A whole run, or the rest of one; STOP in the environment ends it after so many updates, as a kill would."""
    stop = int(os.environ.get("STOP", "0"))
    seen = 0

    def on_event(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "update"
        if stop and seen == stop:
            raise Stop

    config = CONFIG_OF_RUNS
    if os.environ.get("ODD") == str(ranks.rank):
        config = dataclasses.replace(config, seed=1)
    try:
        done = start(folder / "run", on_event, config, ranks=ranks, shard=sharded)
    except Stop:
        return
    (folder / f"ids{ranks.rank}.json").write_text(json.dumps([done.adapter_ids, done.matrix.to_dict()]))


def service(folder: Path, ranks: Ranks, sharded: bool) -> None:
    """Two updates of the learner's service with a refused batch between, rank 1 assisting."""
    policy, lora = tiny_with_adapter()
    if sharded:
        ranks.shard(policy, lora)
    trainer = Trainer(policy, lora, SERVICE, ranks=ranks)
    if not ranks.main:
        trainer.assist()
        return
    episodes = [read_episode(path) for path in sorted(folder.glob("*.episode"))]
    two_updates(trainer, episodes)
    trainer.save(folder / "checkpoint.pt")
    trainer.dismiss()


def two_updates(trainer: Trainer, episodes: list[Episode]) -> None:
    """Both from the same episodes, the second with the optimiser that the first left."""
    start = trainer.adapter()
    groups = [0] * (len(episodes) // 2) + [1] * (len(episodes) - len(episodes) // 2)
    trainer.begin(start, 0, 0)
    trainer.train(episodes, groups)
    with pytest.raises(RatchetError, match=r"learner\.off_policy"):
        trainer.train(episodes, groups)
    trainer.lora.load(start.tensors, start.config)
    trainer.train(episodes, groups)
