"""One rank of a distributed update in its own process: `python -m tests.agent.learner.ranks FOLDER RANK WORLD MODE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from agent.learner.distributed import Ranks, shard_base, unpack
from agent.learner.update import UpdateConfig, Updater
from tests.agent.learner.runs import tiny_with_adapter

CONFIG = {"learning_rate": 1e-3, "minibatches": 2, "micro_size": 7}


def main(folder: Path, rank: int, world: int, mode: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    try:
        policy, lora = tiny_with_adapter()
        ranks = Ranks()
        if mode.endswith("sharded"):
            whole = sum(p.numel() for p in policy.network.parameters())
            shard_base(policy.network.language_model.model.layers, lora.trainable())
            local = sum(
                (p.to_local() if hasattr(p, "to_local") else p).numel()  # type: ignore[operator]
                for p in policy.network.parameters()
            )
            assert local < whole
        mine = unpack((folder / f"batch{rank}.npz").read_bytes())
        batch = ranks.gather(mine)
        updater = Updater(
            policy,
            lora.trainable(),
            UpdateConfig(algorithm=mode.split("-")[0], **CONFIG),  # type: ignore[arg-type]
            torch.Generator().manual_seed(0),
            ranks,
        )
        logged = updater.update(batch)
        torch.save(lora.export(), folder / f"adapter{rank}.pt")
        (folder / f"logged{rank}.json").write_text(json.dumps(logged))
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
