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
    own_device = torch.device("cpu")
    if device != "cpu":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise RatchetError(
                "learner.no_gpu",
                f"rank {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
                fix="start at most one process per GPU",
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RatchetError(
            "learner.no_process_group",
            f"the other ranks cannot be reached: {str(error).splitlines()[0]}",
            fix="start all of them with accelerate launch or torchrun",
        ) from None
    return Ranks(own_device)


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
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()
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

    def share(self, micro_batches: Sequence[Minibatch]) -> list[tuple[Minibatch, float]]:
        """This rank's micro-batches with their factors.

        Every rank gets equally many, because a sharded base makes all ranks take part in every forward. Ranks with
        nothing left repeat the first one with factor 0.
        """
        rounds = -(-len(micro_batches) // self.world)
        own_shares = [(part, 1.0) for part in micro_batches[self.rank :: self.world]]
        return own_shares + [(micro_batches[0], 0.0)] * (rounds - len(own_shares))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum over ranks, in one message."""
        trained = list(parameters)
        gradients = []
        for parameter in trained:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(gradient.float().flatten())
        flat_gradient = torch.cat(gradients)  # one message: latency counts more than size for an adapter
        distributed.all_reduce(flat_gradient)
        summed_gradients = torch.split(flat_gradient, [parameter.numel() for parameter in trained])
        for parameter, summed in zip(trained, summed_gradients, strict=True):
            parameter.grad = summed.view_as(parameter).to(parameter.dtype)

    def add(self, diagnostics: Diagnostics) -> Diagnostics:
        """Sum of everybody's diagnostics."""
        own_figures = dataclasses.asdict(diagnostics)
        # float64 holds counts of tokens exactly up to 2^53.
        own_sums = torch.tensor([float(figure) for figure in own_figures.values()], dtype=torch.float64)
        own_sums = own_sums.to(self.device)
        sums_by_rank = [torch.empty_like(own_sums) for _ in range(self.world)]
        distributed.all_gather(sums_by_rank, own_sums)
        total = Diagnostics()
        for rank_sums in sums_by_rank:
            pairs = zip(own_figures.items(), rank_sums.tolist(), strict=True)
            total = total + Diagnostics(**{name: type(own_figure)(value) for (name, own_figure), value in pairs})
        return total

    def gather(self, batch: RolloutBatch | None) -> RolloutBatch:
        """Every rank's episodes in the order of ranks, the same on all of them. None: this rank has none.

        Raises:
            RatchetError: learner.off_policy where the ranks sampled under different adapters.
        """
        own_data = b"" if batch is None else pack(batch)
        batches = []
        for source in range(self.world):
            rank_data = self.broadcast(own_data, source)
            batches += [unpack(rank_data)] if rank_data else []
        return concatenate(batches)

    def exchange(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank. One sender after the other, so that no rank pads to the longest."""
        return [self.broadcast(data, source) for source in range(self.world)]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of one rank, on all of them; what the others pass is not looked at."""
        size = torch.tensor([len(data)])
        distributed.broadcast(size, source)
        if not int(size):
            return b""
        is_source = self.rank == source
        content = bytearray(data) if is_source else bytearray(int(size))
        for piece in torch.frombuffer(content, dtype=torch.uint8).split(PIECE):  # type: ignore[no-untyped-call]
            distributed.broadcast(piece, source)
        return data if is_source else bytes(content)

    def agree(self, what: str, value: Any) -> None:
        """Refuse to go on where ranks differ in something that must be the same: plain data.

        Raises:
            RatchetError: learner.ranks_differ.
        """
        encoded_by_rank = self.exchange(json.dumps(value, sort_keys=True).encode())
        differing_ranks = [rank for rank, encoded in enumerate(encoded_by_rank) if encoded != encoded_by_rank[0]]
        if differing_ranks:
            differing = encoded_by_rank[differing_ranks[0]].decode()[:80]
            raise RatchetError(
                "learner.ranks_differ",
                f"{what} of rank {differing_ranks[0]} is {differing}, of rank 0 {encoded_by_rank[0].decode()[:80]}",
                fix="give all ranks the same command, the same release and a folder that all of them see",
            )

    def shard(self, policy: Policy, lora: Lora) -> None:
        """Shard the frozen weights of a policy's layers over all ranks; `whole` has them back for a while.

        The adapter's own parameters stay whole.

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
        """Keep the sharded weights whole inside, so that forwards need no other rank.

        For rollouts, of which every rank has its own number. All ranks enter and leave together.
        """
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
    """Run `collection.run_episodes` by all ranks together.

    Each rank runs its part in its own `env`, all get the whole, in the order of `specs`. options: those of
    `run_episodes`.
    """
    if ranks is None:
        return run_episodes(policy, env, specs, **options)
    own_specs = specs[ranks.own(len(specs))]
    outcomes = Outcomes(np.zeros(0, bool), np.zeros(0, np.int64), 0.0)
    batch: RolloutBatch | None = None
    with ranks.whole():
        if own_specs:
            outcomes, batch = run_episodes(policy, env, own_specs, **options)
    own_outcomes = {"success": outcomes.success.tolist(), "steps": outcomes.steps.tolist(), "seconds": outcomes.seconds}
    outcomes_by_rank = [json.loads(data) for data in ranks.exchange(json.dumps(own_outcomes).encode())]
    all_outcomes = Outcomes(
        np.concatenate([np.array(outcome["success"], bool) for outcome in outcomes_by_rank]),
        np.concatenate([np.array(outcome["steps"], np.int64) for outcome in outcomes_by_rank]),
        max(outcome["seconds"] for outcome in outcomes_by_rank),
    )
    keeps_decisions = options.get("keep", True)
    return all_outcomes, ranks.gather(batch) if keeps_decisions else None


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of the trunk and of the vision towers that hold most of the weights and are called as modules."""
    layers: list[nn.Module] = []
    for name, container in module.named_modules():
        is_stack = name.rsplit(".", 1)[-1] in ("layers", "blocks")
        if is_stack and isinstance(container, nn.ModuleList | nn.Sequential):
            layers += filter(_callable, container)
    return layers


def _callable(layer: nn.Module) -> bool:
    # A module without a forward only holds others; FSDP would never see it run.
    return type(layer).forward is not nn.Module.forward


def shard_base(layers: Iterable[nn.Module], adapter: Sequence[nn.Parameter]) -> None:
    """Shard the frozen weights of each layer over all ranks with FSDP; a layer is whole only while it runs.

    layers: modules that are called as such in the forward, transformer layers as a rule.
    adapter: trainable parameters, which stay whole on every rank: they are small, and hot swap writes them in place.
    """
    from torch.distributed.fsdp import fully_shard

    adapter_ids = {id(parameter) for parameter in adapter}
    for layer in layers:
        own_adapter = {parameter for parameter in layer.parameters() if id(parameter) in adapter_ids}
        fully_shard(layer, ignored_params=own_adapter)


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
    plain = {
        "instructions": batch.instructions,
        "temperature": batch.temperature,
        "adapter_id": batch.adapter_id,
        "compute_dtype": batch.compute_dtype,
        "specs": [dataclasses.asdict(spec) for spec in batch.specs],
        "seconds": batch.seconds,
    }
    buffer = io.BytesIO()
    plain_bytes = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    arrays = {name: getattr(batch, name) for name in _ARRAYS}
    np.savez(buffer, allow_pickle=False, facts=plain_bytes, **arrays)
    return buffer.getvalue()


def unpack(data: bytes) -> RolloutBatch:
    """Inverse of `pack`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        plain = json.loads(file["facts"].tobytes().decode())
        specs = [EpisodeSpec(**spec) for spec in plain.pop("specs")]
        return RolloutBatch(**{array_name: file[array_name] for array_name in _ARRAYS}, **plain, specs=specs)


def concatenate(parts: Sequence[RolloutBatch]) -> RolloutBatch:
    """Several batches of one adapter and temperature as one.

    Raises:
        RatchetError: learner.off_policy where they were sampled by different adapters or at different temperatures.
    """
    first = parts[0]
    if any((part.adapter_id, part.temperature) != (first.adapter_id, first.temperature) for part in parts):
        raise RatchetError("learner.off_policy", "the ranks' episodes come from different policies")
    one_dtype({part.compute_dtype for part in parts}, "ranks")
    instructions = sorted({text for part in parts for text in part.instructions})
    number_of_text = {text: number for number, text in enumerate(instructions)}
    # Each part numbers its instructions and episodes from 0: renumber the former by text, shift the latter.
    renumbered = []
    shifted = []
    episodes_before = 0
    for part in parts:
        new_numbers = np.array([number_of_text[text] for text in part.instructions], np.int64)
        renumbered.append(new_numbers[part.instruction])
        shifted.append(part.episode + episodes_before)
        episodes_before += len(part.success)
    as_they_are = [name for name in _ARRAYS if name not in ("instruction", "episode")]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in as_they_are}
    return RolloutBatch(
        **arrays,
        instruction=np.concatenate(renumbered),
        episode=np.concatenate(shifted),
        instructions=instructions,
        temperature=first.temperature,
        adapter_id=first.adapter_id,
        compute_dtype=first.compute_dtype,
        specs=[spec for part in parts for spec in part.specs],
        seconds=max(part.seconds for part in parts),
    )
