"""Whether two processes learn what one learns, and what sharing costs: gradients, seconds, bytes held and exchanged.

The same batch through one process and through two (gloo, one thread each), the frozen base whole on each rank or
sharded with FSDP. The policy has a Llama-sized vocabulary on a width that a CPU can train. Compared is the gradient of
the first optimiser step of an update, in float32.

    python -m benchmarks.learner.ranks [--quick]

Exit 1 where a gradient differs by more than 1e-5 of its norm, or the ranks' gradients from one another at all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness.results import machine
from benchmarks.learner.small_world import forked
from benchmarks.learner.update import large_policy
from benchmarks.runtime.inference import ROOT
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.update.ranks import Ranks, join
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.discrete.policy import PrismaticPolicy

GOAL = 1e-5
RANK = 32
WORLD = 2
MODES = ("one", "whole", "sharded")


def batch_of(policy: PrismaticPolicy, decisions: int) -> RolloutBatch:
    """Random episodes of four decisions, two groups, of which every other episode succeeded."""
    spec, draw = policy.spec, np.random.default_rng(0)
    side, episodes = spec.image_size, decisions // 4
    shape = (decisions, spec.chunk, len(spec.action_names))
    return RolloutBatch(
        images=draw.integers(0, 256, (decisions, len(spec.cameras), side, side, 3), dtype=np.uint8),
        state=np.zeros((decisions, 0), np.float32),
        instruction=np.zeros(decisions, np.int64),
        instructions=["pick up the soup"],
        tokens=draw.integers(0, spec.bins, shape),
        log_prob=(-5.545 + 0.05 * draw.standard_normal(shape)).astype(np.float32),
        feature=np.zeros((decisions, 0), np.float32),
        valid=np.ones(shape[:2], bool),
        episode=np.repeat(np.arange(episodes), 4),
        success=np.arange(episodes) % 2 == 0,
        steps=np.full(episodes, 4 * spec.chunk),
        group=np.arange(episodes) // (episodes // 2),
        temperature=1.6,
        adapter_id="x",
    )


def held(policy: PrismaticPolicy) -> int:
    """Bytes of the weights that this process keeps."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in policy.network.parameters())


def rank(folder: Path, mode: str, decisions: int, rounds: int) -> None:
    """One process: a first update whose gradient is kept, then timed ones."""
    torch.set_num_threads(1)
    ranks: Ranks | None = join()
    policy = large_policy()
    lora = attach(policy.module, lora_config(RANK, RANK))
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if ranks is not None and mode == "sharded":
        ranks.shard(policy, lora)
    batch = batch_of(policy, decisions)
    gradients: list[torch.Tensor] = []

    def keep() -> None:
        if not gradients:
            gradients.append(torch.cat([p.grad.flatten() for p in lora.trainable() if p.grad is not None]))

    config = UpdateConfig(minibatches=2, micro_size=8)
    updater = Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0), ranks, on_gradient=keep)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        updater.update(batch)
        seconds.append(time.perf_counter() - began)
    number = ranks.rank if ranks is not None else 0
    torch.save(gradients[0], folder / f"{mode}{number}.pt")
    facts = {"held": held(policy), "seconds": seconds[1:], "gradient_bytes": gradients[0].nbytes}
    (folder / f"{mode}{number}.json").write_text(json.dumps(facts))
    if ranks is not None:
        ranks.leave()


def run(folder: Path, mode: str, decisions: int, rounds: int) -> list[dict[str, Any]]:
    """All ranks of one mode; what each says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = 1 if mode == "one" else WORLD
    children = []
    for number in range(world):
        given = {"WORLD_SIZE": str(world), "RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def work(given: dict[str, str] = given) -> None:
            os.environ.update(given)
            rank(folder, mode, decisions, rounds)

        children.append(forked(work, folder / f"{mode}{number}.log"))
    for number, child in enumerate(children):
        if os.waitpid(child, 0)[1]:
            raise ChildProcessError((folder / f"{mode}{number}.log").read_text())
    return [json.loads((folder / f"{mode}{n}.json").read_text()) for n in range(world)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    decisions, rounds = (32, 1) if arguments.quick else (128, 5)
    with tempfile.TemporaryDirectory(prefix="ratchet-ranks-") as scratch:
        folder = Path(scratch)
        said = {mode: run(folder, mode, decisions, rounds) for mode in MODES}
        alone = torch.load(folder / "one0.pt", weights_only=True)
        rows: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            found = [torch.load(folder / f"{mode}{n}.pt", weights_only=True) for n in range(len(said[mode]))]
            slowest = [max(times) for times in zip(*(s["seconds"] for s in said[mode]), strict=True)]
            rows[mode] = {
                "processes": len(found),
                "gradient_error": max(float((g - alone).norm() / alone.norm()) for g in found),
                "ranks_equal": all(torch.equal(g, found[0]) for g in found),
                "seconds_per_update": median(slowest),
                "spread": [min(slowest), max(slowest)],
                "weights_held_bytes": max(s["held"] for s in said[mode]),
                "gradient_bytes_per_step": said[mode][0]["gradient_bytes"],
            }
    for mode, row in rows.items():
        print(
            f"{mode:8s} {row['processes']} process(es): gradient off by {row['gradient_error']:.1e}, "
            f"{row['seconds_per_update']:.1f} s per update of {decisions} decisions, "
            f"{row['weights_held_bytes'] / 1e6:.0f} MB of weights each"
        )
    report = {
        "command": " ".join(["python", "-m", "benchmarks.learner.ranks", *sys.argv[1:]]),
        "machine": machine(),
        "repeats": rounds,
        "decisions": decisions,
        "rows": rows,
    }
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "ranks.json").write_text(json.dumps(report, indent=1) + "\n")
    worst = max(row["gradient_error"] for row in rows.values())
    equal = all(row["ranks_equal"] for row in rows.values())
    print(
        f"ranks: gradients of two processes off by {worst:.1e} of one's (goal <= {GOAL:.0e}), "
        f"{'equal' if equal else 'DIFFERENT'} on both ranks"
    )
    return 0 if worst <= GOAL and equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
