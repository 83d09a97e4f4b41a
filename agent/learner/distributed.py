"""The learner on several GPUs: ranks share the micro-batches of an optimiser step, and the frozen base may be sharded.

Knows torch.distributed, FSDP and how rollout batches cross between ranks (arrays, never pickle). Knows no loss.
Losses of micro-batches add up to the step's loss (`minibatch.Minibatch.slots`), so the sum of the ranks' gradients is
the gradient of one process, up to the order of additions. Start one process per GPU with `accelerate launch` or
`torchrun`.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import distributed, nn

from agent.errors import RatchetError
from agent.learner.minibatch import Diagnostics, Minibatch
from agent.learner.rollouts import EpisodeSpec, RolloutBatch


class Ranks:
    """This process among its peers. The process group must have been initialised (`accelerate.PartialState` does).

    Raises:
        RatchetError: learner.no_process_group.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        if not distributed.is_initialized():
            raise RatchetError(
                "learner.no_process_group",
                "this process belongs to no group",
                fix="start it with accelerate launch or torchrun",
            )
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device(device)

    def share(self, parts: Sequence[Minibatch]) -> list[tuple[Minibatch, float]]:
        """This rank's micro-batches with their factors: every rank gets equally many, because a sharded base makes all
        ranks take part in every forward. Ranks with nothing left repeat the first one with factor 0."""
        rounds = -(-len(parts) // self.world)
        own = [(p, 1.0) for p in parts[self.rank :: self.world]]
        return own + [(parts[0], 0.0)] * (rounds - len(own))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum over ranks, in one message."""
        trained = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in trained])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def add(self, diagnostics: Diagnostics) -> Diagnostics:
        """Sum of everybody's diagnostics."""
        names = [f.name for f in dataclasses.fields(diagnostics)]
        mine = torch.tensor([float(getattr(diagnostics, n)) for n in names], dtype=torch.float64, device=self.device)
        everybody = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(everybody, mine)
        total = Diagnostics()
        for values in everybody:
            facts = zip(names, values.tolist(), strict=True)
            total = total + Diagnostics(**{n: type(getattr(diagnostics, n))(v) for n, v in facts})
        return total

    def gather(self, batch: RolloutBatch) -> RolloutBatch:
        """Every rank's episodes in the order of ranks, the same on all of them."""
        mine = torch.frombuffer(bytearray(pack(batch)), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        distributed.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        longest = int(max(s.item() for s in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        received = [torch.empty_like(padded) for _ in range(self.world)]
        distributed.all_gather(received, padded)
        parts = [unpack(r[: int(n)].cpu().numpy().tobytes()) for r, n in zip(received, sizes, strict=True)]
        return concatenate(parts)


def shard_base(layers: Iterable[nn.Module], adapter: Sequence[nn.Parameter]) -> None:
    """Shard the frozen weights of each layer over all ranks with FSDP; a layer is whole only while it runs.

    layers: modules that are called as such in the forward, transformer layers as a rule.
    adapter: trainable parameters, which stay whole on every rank: they are small, and hot swap writes them in place.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        mine = {p for p in layer.parameters() if any(p is a for a in adapter)}
        fully_shard(layer, ignored_params=mine)


_ARRAYS = (
    "images",
    "state",
    "instruction",
    "tokens",
    "log_prob",
    "feature",
    "valid",
    "episode",
    "success",
    "steps",
    "group",
)


def pack(batch: RolloutBatch) -> bytes:
    """A batch as an uncompressed npz without objects; texts and specs travel as JSON."""
    facts = {
        "instructions": batch.instructions,
        "temperature": batch.temperature,
        "adapter_id": batch.adapter_id,
        "specs": [dataclasses.asdict(s) for s in batch.specs],
        "seconds": batch.seconds,
    }
    out = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(out, allow_pickle=False, facts=text, **{n: getattr(batch, n) for n in _ARRAYS})
    return out.getvalue()


def unpack(data: bytes) -> RolloutBatch:
    """Inverse of `pack`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        facts = json.loads(file["facts"].tobytes().decode())
        specs = [EpisodeSpec(**s) for s in facts.pop("specs")]
        return RolloutBatch(**{n: file[n] for n in _ARRAYS}, **facts, specs=specs)


def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """Several batches of one adapter and temperature as one.

    Raises:
        RatchetError: learner.off_policy where they were sampled by different adapters or at different temperatures.
    """
    first = parts[0]
    if any((p.adapter_id, p.temperature) != (first.adapter_id, first.temperature) for p in parts):
        raise RatchetError("learner.off_policy", "the ranks' episodes come from different policies")
    texts = sorted({t for p in parts for t in p.instructions})
    place = {t: i for i, t in enumerate(texts)}
    instruction = [np.array([place[p.instructions[i]] for i in p.instruction], np.int64) for p in parts]
    offsets = np.cumsum([0, *(len(p.success) for p in parts[:-1])])
    joined = {n: np.concatenate([getattr(p, n) for p in parts]) for n in _ARRAYS if n not in ("instruction", "episode")}
    return RolloutBatch(
        **joined,
        instruction=np.concatenate(instruction),
        episode=np.concatenate([p.episode + o for p, o in zip(parts, offsets, strict=True)]),
        instructions=texts,
        temperature=first.temperature,
        adapter_id=first.adapter_id,
        specs=[s for p in parts for s in p.specs],
        seconds=max(p.seconds for p in parts),
    )
