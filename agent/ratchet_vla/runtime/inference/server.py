"""A VLA, discrete or flow, with hot-swappable adapters behind the ChunkServer protocol; for the policy's process only.

Knows checkpoints, LoRA shapes, the adapter store and image fitting. Knows no sockets and no robot.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from torch import Tensor

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import attach, lora_config, room_for
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.contract import RobotContract, require_compatible
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import device, threads
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints.own import AnyPolicy
from ratchet_vla.policy.commands import policy_actions, robot_actions
from ratchet_vla.policy.computing import name_of
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.fixed_shapes import StaticPredictor
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import Chunks, Policy, PolicyInput
from ratchet_vla.records import Float32, UInt8
from ratchet_vla.runtime.inference.chunk_server import ChunkServer, Inferred
from ratchet_vla.runtime.inference.source import Ahead

__all__ = ["PolicyServer", "RealTimeChunking"]


@runtime_checkable
class RealTimeChunking(Protocol):
    """A policy that completes a chunk whose first actions are already on their way (arXiv 2506.07339)."""

    def predict_ahead(self, batch: PolicyInput, previous_actions: Tensor, delay: int) -> Chunks:
        """committed: (1, P, D) float32, physical units; of these the first `delay` are certain to be executed."""
        ...


class PolicyServer:
    """One policy, batches of one.

    swapper: None where no adapter can be exchanged. static: predicts greedy chunks with fixed shapes; on a GPU the
    swapper must then exchange by copy.
    """

    def __init__(
        self,
        policy: Policy,
        contract: RobotContract,
        swapper: HotSwapper | None,
        store: FolderStore | None,
        image_fit: str = "exact",
        static: StaticPredictor | None = None,
    ) -> None:
        self._static = static
        self.policy, self.spec, self.base_hash = policy, policy.spec, policy.base_hash
        self.warnings = [f"{m.code}: {m.message}" for m in require_compatible(policy.spec, contract)]
        self._contract, self._swapper, self._store, self._fit = contract, swapper, store, image_fit
        sizes = {(contract.camera(n).height, contract.camera(n).width) for n in self.spec.cameras}
        if image_fit not in ("exact", "crop_resize"):
            raise RatchetError(
                "policy.image_fit", f"no way to fit images called {image_fit!r}", fix="exact, crop_resize"
            )
        square = (self.spec.image_size, self.spec.image_size)
        resizes = len(sizes) == 1 and policy.takes_any_size
        if image_fit == "exact" and sizes - {square} and not resizes:
            raise RatchetError(
                "policy.image_size",
                f"cameras give {sorted(sizes)}, the policy takes {self.spec.image_size} x {self.spec.image_size}",
                where=contract.name,
                fix="have the driver deliver that size, or set image_fit to crop_resize if it was trained so",
            )

    @property
    def computing(self) -> str:
        """What products are computed in and why, in words; empty for a policy that does not tell."""
        choice = getattr(self.policy, "choice", None)
        return "" if choice is None else f"{choice.name}: {choice.reason}"

    @property
    def adapter_id(self) -> str:
        return self._swapper.current_id if self._swapper else self.base_hash

    def infer(
        self,
        images: list[UInt8],
        state: Float32,
        instruction: str,
        temperature: float,
        noise: Float32 | None,
        ahead: Ahead | None,
    ) -> Inferred:
        fitted = np.stack([self._fitted(image) for image in images])[None]
        batch = PolicyInput(fitted, torch.from_numpy(state)[None] if self.spec.state else None, [instruction])
        if self._swapper is None:
            return self._answer(batch, temperature, noise, ahead, self.base_hash)
        with self._swapper.running() as adapter_id:
            return self._answer(batch, temperature, noise, ahead, adapter_id)

    def swap(self, reference: str, expected_id: str) -> dict[str, Any]:
        if self._swapper is None:
            raise RatchetError("adapter.no_store", "this policy runs without adapters", fix="start it with a store")
        report = self._swapper.swap(reference, expected_id=expected_id or None)
        return dataclasses.asdict(report)

    def adapters(self) -> list[dict[str, Any]]:
        tags = self._store.tags() if self._store is not None else {}
        rows: list[dict[str, Any]] = [
            {
                "id": self.base_hash,
                "tags": ["base", *sorted(t for t, target in tags.items() if target == BASE)],
                "task": "",
                "stage": 0,
                "active": self.adapter_id == self.base_hash,
            }
        ]
        if self._store is None:
            return rows
        for name in self._store.ids():
            card = self._store.card(name)
            rows.append(
                {
                    "id": name,
                    "tags": sorted(t for t, target in tags.items() if target == name),
                    "task": card.provenance.task,
                    "stage": card.provenance.stage,
                    "active": name == self.adapter_id,
                }
            )
        return rows

    def _answer(
        self, batch: PolicyInput, temperature: float, noise: Float32 | None, ahead: Ahead | None, adapter_id: str
    ) -> Inferred:
        if temperature > 0.0:
            if noise is None:
                raise RatchetError("policy.no_noise", "sampling needs the noise that the request brings")
            chunks = self.policy.sample(batch, temperature, torch.from_numpy(noise)[None])
        else:
            chunks = self._greedy(batch, ahead)
        actions = robot_actions(chunks.actions[0].float().cpu().numpy(), self.spec, self._contract)
        tokens = None if chunks.tokens is None else chunks.tokens[0].cpu().numpy()  # bins, or a flow's chain
        log_prob = None if chunks.log_prob is None else chunks.log_prob[0].float().cpu().numpy()
        return Inferred(actions, tokens, log_prob, adapter_id, name_of(self.policy))

    def _greedy(self, batch: PolicyInput, ahead: Ahead | None) -> Chunks:
        previous_actions = None
        if ahead is not None and isinstance(self.policy, RealTimeChunking):
            previous_actions = torch.from_numpy(policy_actions(ahead.previous_actions, self.spec, self._contract))[None]
        if self._static is not None:
            guide = None
            if previous_actions is not None and ahead is not None and isinstance(self.policy, FlowPolicy):
                guide = self.policy.guide(previous_actions, ahead.delay)
            return self._static.chunks(batch, guide)
        if previous_actions is not None and ahead is not None and isinstance(self.policy, RealTimeChunking):
            return self.policy.predict_ahead(batch, previous_actions, ahead.delay)
        return self.policy.predict(batch)

    def _fitted(self, image: UInt8) -> UInt8:
        """Exact images pass; others are cropped to the middle square and averaged down to the policy's size."""
        size = self.spec.image_size
        if self._fit == "exact":
            return image
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        return np.asarray(cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def open_prismatic(options: dict[str, Any], contract: RobotContract) -> ChunkServer:
    """Open a VLA.

    options: policy (folder), store (folder of adapters, "" for none), adapter (id or tag, "" for the base alone), rank,
    alpha, targets (shape of the adapter layers where the store has no adapter to take it from), threads, device,
    image_fit, follow (a tag whose moves the running policy follows at once, see `tag_watcher`), static ("auto": fixed
    shapes, as CUDA graphs on a GPU, wherever the policy allows it; "off").

    Raises:
        RatchetError: whatever checkpoint, compatibility check, store and swapper refuse.
    """
    crowded = threads.use(int(options.get("threads", 1)))
    policy = adopted.load(Path(options["policy"]), device.choose(options.get("device", "")))
    static = None
    if options.get("static", "auto") != "off" and not _one_by_one(policy):
        static = StaticPredictor(policy)
    copies = static is not None and policy.device.type == "cuda"  # a captured graph reads the same memory for ever
    swapper, store = None, None
    if options.get("store"):
        store = FolderStore(Path(options["store"]))
        swapper = HotSwapper(
            policy, attach(policy.module, _lora(options, store, policy)), store=store, mode="copy" if copies else "flip"
        )
        if options.get("adapter"):
            swapper.swap(
                store.resolve(options["adapter"]) if options["adapter"] != swapper.base_id else swapper.base_id
            )
    elif options.get("adapter") and options["adapter"] != policy.base_hash:
        raise RatchetError("adapter.no_store", "an adapter is named but no store", fix="name the store")
    server = PolicyServer(policy, contract, swapper, store, options.get("image_fit", "exact"), static)
    if crowded:
        server.warnings.append(f"policy.threads: {crowded}")
    cameras = [contract.camera(name) for name in policy.spec.cameras]
    blank = [np.zeros((c.height, c.width, 3), np.uint8) for c in cameras]
    for _ in range(2):  # the first forwards allocate and are slow; that must not happen while an arm moves
        server.infer(blank, np.zeros(policy.spec.state_size, np.float32), "go", 0.0, None, None)
    return server


def _one_by_one(policy: AnyPolicy) -> bool:
    return isinstance(policy, PrismaticPolicy) and policy.config.decoding == "autoregressive"


def _lora(options: dict[str, Any], store: FolderStore, policy: AnyPolicy) -> Any:
    """The shape of the adapter layers: that of the adapter to run, else of a stored one of this base, else as the
    options say. An adapter to run that was made for another base is refused as that: its layers may not be here."""
    ids = store.ids()
    chosen = options.get("adapter", "")
    if chosen and chosen in {*ids, *store.tags()} and store.resolve(chosen) != BASE:
        binding_of(policy).require(store.card(chosen).binding, where=str(options["policy"]))
        return room_for(store.get(chosen).config)
    mine = next((i for i in ids if store.card(i).base_hash == policy.base_hash), None)
    if mine is not None:
        return room_for(store.get(mine).config)
    return lora_config(
        int(options.get("rank", 32)), float(options.get("alpha", 32.0)), options.get("targets", "all-linear")
    )
