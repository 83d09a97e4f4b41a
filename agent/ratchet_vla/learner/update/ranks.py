"""The learner on several GPUs: ranks share episodes and the micro-batches of a step, and the base may be sharded.

Knows torch.distributed, FSDP and how rollout batches cross between ranks (arrays and JSON, never pickle). Knows no
loss. Losses of micro-batches add up to the step's loss (`minibatch.Minibatch.slots`), so the sum of the ranks'
gradients is the gradient of one process, up to the order of additions. Start one process per GPU with
`accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import Outcomes, RolloutBatch, one_dtype
from ratchet_vla.learner.rollouts.collection import ChunkEnv, run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.learner.update.minibatch import Diagnostics, Minibatch
from ratchet_vla.policy.protocol import Policy

# The longest silence between ranks. The learner's service may wait days for a robot's episodes; a rank that dies is
# noticed by its closed connections and not by this.
PATIENCE = timedelta(days=30)
PIECE = 1 << 28  # bytes per message between ranks


def join(device: str = "cpu") -> Ranks | None:
    """Join the processes that `accelerate launch` or `torchrun` started; None where this one is alone.

    device: "cpu", or "cuda": each rank then takes the GPU of its local number. Gradients of GPUs travel by NCCL,
    everything else by gloo through the hosts' memory, so that a batch of frames costs no GPU memory.

    Raises:
        RatchetError: learner.no_gpu where this rank has no GPU of its own, learner.no_process_group where the others
            cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    chosen = torch.device("cpu")
    if device != "cpu":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RatchetError(
                "learner.no_gpu",
                f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}",
                fix="start at most one process per GPU",
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RatchetError(
            "learner.no_process_group",
            f"the other ranks cannot be reached: {str(error).splitlines()[0]}",
            fix="start all of them with accelerate launch or torchrun",
        ) from None
    return Ranks(chosen)


class Ranks:
    """This process among its peers. The process group must have been initialised (`join` does).

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
        self._sharded: list[Any] = []

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks to people."""
        return self.rank == 0

    def leave(self) -> None:
        """End the group; call it once, when the work is over."""
        distributed.destroy_process_group()

    def own(self, count: int) -> slice:
        """This rank's part of `count` things in order; parts follow one another and differ by one at most."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

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

    def gather(self, batch: RolloutBatch | None) -> RolloutBatch:
        """Every rank's episodes in the order of ranks, the same on all of them. None: this rank has none.

        Raises:
            RatchetError: learner.off_policy where the ranks sampled under different adapters.
        """
        mine = b"" if batch is None else pack(batch)
        parts = []
        for source in range(self.world):
            data = self.broadcast(mine, source)
            parts += [unpack(data)] if data else []
        return concatenate(parts)

    def exchange(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank. One sender after the other, so that no rank pads to the longest."""
        return [self.broadcast(data, source) for source in range(self.world)]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of one rank, on all of them; what the others pass is not looked at."""
        size = torch.tensor([len(data)])
        distributed.broadcast(size, source)
        if not int(size):
            return b""
        mine = self.rank == source
        content = bytearray(data) if mine else bytearray(int(size))
        for piece in torch.frombuffer(content, dtype=torch.uint8).split(PIECE):  # type: ignore[no-untyped-call]
            distributed.broadcast(piece, source)
        return data if mine else bytes(content)

    def agree(self, what: str, value: Any) -> None:
        """Refuse to go on where ranks differ in something that must be the same: plain data.

        Raises:
            RatchetError: learner.ranks_differ.
        """
        found = self.exchange(json.dumps(value, sort_keys=True).encode())
        odd = [rank for rank, other in enumerate(found) if other != found[0]]
        if odd:
            raise RatchetError(
                "learner.ranks_differ",
                f"{what} of rank {odd[0]} is {found[odd[0]].decode()[:80]}, of rank 0 {found[0].decode()[:80]}",
                fix="give all ranks the same command, the same release and a folder that all of them see",
            )

    def shard(self, policy: Policy, lora: Lora) -> None:
        """Shard the frozen weights of a policy's layers over all ranks; `whole` has them back for a while. The
        adapter's own parameters stay whole.

        Raises:
            RatchetError: learner.cannot_shard for a network without layers that can be sharded.
        """
        layers = layers_of(policy.module)
        self.agree("the base", policy.base_hash)
        lora.effect()  # hash and norms are taken over whole weights, and kept
        if not layers:
            raise RatchetError(
                "learner.cannot_shard", "this policy's layers cannot be sharded", fix="leave --shard out: it is small"
            )
        shard_base(layers, lora.trainable())
        self._sharded = layers

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The sharded weights are whole inside, and forwards need no other rank: for rollouts, of which every rank has
        its own number. All ranks enter and leave together."""
        for layer in self._sharded:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._sharded:
                layer.set_reshard_after_forward(True)
                layer.reshard()


def share_episodes(
    ranks: Ranks | None, policy: Policy, env: ChunkEnv, specs: Sequence[EpisodeSpec], **options: Any
) -> tuple[Outcomes, RolloutBatch | None]:
    """`collection.run_episodes` by all ranks together: each runs its part in its own `env`, all get the whole, in the
    order of `specs`. options: those of `run_episodes`."""
    if ranks is None:
        return run_episodes(policy, env, specs, **options)
    part = specs[ranks.own(len(specs))]
    outcomes = Outcomes(np.zeros(0, bool), np.zeros(0, np.int64), 0.0)
    batch: RolloutBatch | None = None
    with ranks.whole():
        if part:
            outcomes, batch = run_episodes(policy, env, part, **options)
    mine = {"success": outcomes.success.tolist(), "steps": outcomes.steps.tolist(), "seconds": outcomes.seconds}
    found = [json.loads(data) for data in ranks.exchange(json.dumps(mine).encode())]
    everything = Outcomes(
        np.array([ok for f in found for ok in f["success"]], bool),
        np.array([n for f in found for n in f["steps"]], np.int64),
        max(f["seconds"] for f in found),
    )
    return everything, ranks.gather(batch) if options.get("keep", True) else None


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of the trunk and of the vision towers that hold most of the weights and are called as modules."""
    lists = [m for n, m in module.named_modules() if n.rsplit(".", 1)[-1] in ("layers", "blocks")]
    return [layer for m in lists if isinstance(m, nn.ModuleList | nn.Sequential) for layer in m if _callable(layer)]


def _callable(layer: nn.Module) -> bool:
    return type(layer).forward is not nn.Module.forward


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
        "compute_dtype": batch.compute_dtype,
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
    one_dtype({p.compute_dtype for p in parts}, "ranks")
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
        compute_dtype=first.compute_dtype,
        specs=[s for p in parts for s in p.specs],
        seconds=max(p.seconds for p in parts),
    )
