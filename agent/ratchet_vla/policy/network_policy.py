"""What both families of policies share: one network whose frozen base has an identity, and the checks of their inputs.

Knows the base's tensors and hash, with or without adapters attached, and the shapes that a batch must have. Knows no
action head, no sampling and no file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from tokenizers import Tokenizer
from torch import Tensor, nn

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.computing import Computing
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.protocol import PolicyInput


class NetworkPolicy(Computing):
    """A policy around one network.

    A subclass sets `config` (with `facts()` for the base's hash), `statistics` (a dataclass) and `network`.
    """

    network: Any
    statistics: Any

    def __init__(self, spec: PolicySpec, tokenizer: Tokenizer, preparation: Preparation) -> None:
        self.tokenizer = tokenizer
        self._spec = spec
        self._preparation = preparation
        self._base_hash = ""

    @property
    def spec(self) -> PolicySpec:
        """What the policy demands of a robot."""
        return self._spec

    @property
    def takes_any_size(self) -> bool:
        """Whether images of any size go in, to be resized as in training."""
        return self._preparation.any_size()

    @property
    def module(self) -> nn.Module:
        """The network whose linear layers carry adapters."""
        network: nn.Module = self.network
        return network

    @property
    def device(self) -> torch.device:
        """Where the network's tensors live."""
        return next(self.module.parameters()).device

    @property
    def base_hash(self) -> str:
        """SHA-256 over configuration, statistics, tokenizer and base tensors; adapters attached later do not count.

        Computed once: whoever changes the base's tensors afterwards calls `base_changed`.
        """
        if not self._base_hash:
            self._base_hash = self._hash_base()
        return self._base_hash

    def _hash_base(self) -> str:
        # Every adapter id and every stored episode names this hash: order and form of what goes in are a file format.
        identity = {
            "config": self.config.facts(),
            "spec": dataclasses.asdict(self._spec),
            "statistics": dataclasses.asdict(self.statistics),
            "tokenizer": json.loads(self.tokenizer.to_str()),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for name, tensor in sorted(self.base_tensors().items()):
            stored = self.as_stored(name, tensor.detach()).cpu().contiguous()
            digest.update(f"{name}:{stored.dtype}:{tuple(stored.shape)}".encode())
            # Flattened first, because a tensor without axes has no bytes to view.
            digest.update(stored.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's own tensors by their published names, with or without adapters attached.

        Raises:
            RatchetError: policy.merged while an adapter is merged into them.
        """
        for name, module in self.module.named_modules():
            if isinstance(module, LoraLayer) and module.merged:
                what = "an adapter is merged into the base's tensors"
                raise RatchetError("policy.merged", what, where=name, fix="unmerge it first")
        # PEFT wraps an adapted layer: the base's weight moves below `base_layer`, the adapter's stand beside it.
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.module.state_dict().items()
            if ".lora_" not in name
        }

    def base_changed(self) -> None:
        """Tell that the base's tensors were written: its hash is computed anew."""
        self._base_hash = ""

    def _checked(self, batch: PolicyInput) -> tuple[Tensor, Tensor | None]:
        """Images (B, V, H, W, 3) uint8 and state (B, S) float32 or None, on the policy's device; see `check_input`."""
        return check_input(batch, self._spec, self.takes_any_size, self.device)

    def _require_chunk_shape(self, name: str, tensor: Tensor, rows: int) -> None:
        """Refuse a tensor that is not (rows, K, D)."""
        expected = (rows, self._spec.chunk, len(self._spec.action_names))
        if tuple(tensor.shape) != expected:
            raise RatchetError("policy.bad_input", f"{name} is {tuple(tensor.shape)}, expected {expected}", where=name)


def require_temperature(temperature: float) -> None:
    """Refuse what is no temperature to sample at.

    Raises:
        RatchetError: policy.bad_temperature.
    """
    if not 0 < temperature < math.inf:
        raise RatchetError("policy.bad_temperature", f"temperature {temperature} is not above 0", fix="use predict")


def check_input(
    batch: PolicyInput, spec: PolicySpec, any_size: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Images (B, V, H, W, 3) uint8 and state (B, S) float32 on a device, refused where they are not the policy's.

    any_size: take images of any one size.

    Raises:
        RatchetError: policy.bad_input.
    """
    rows = len(batch)
    images = _checked_images(batch, spec, any_size)
    if not rows:
        raise RatchetError("policy.bad_input", "the batch is empty", fix="give at least one observation")
    if not spec.state:
        return images.to(device), None
    expected = (rows, spec.state_size)
    state = batch.state
    if state is None or tuple(state.shape) != expected:
        actual = None if state is None else tuple(state.shape)
        raise RatchetError(
            "policy.bad_input", f"state is {actual}, expected {expected}", where=f"state {', '.join(spec.state)}"
        )
    if not bool(torch.isfinite(state).all()):
        raise RatchetError("policy.bad_input", "the state is not finite", where=", ".join(spec.state))
    return images.to(device), state.to(device, torch.float32)


def _checked_images(batch: PolicyInput, spec: PolicySpec, any_size: bool) -> Tensor:
    images = torch.as_tensor(batch.images)
    expected: tuple[int, ...] = (len(batch), len(spec.cameras), spec.image_size, spec.image_size, 3)
    if any_size and images.ndim == 5 and min(images.shape) > 0:
        expected = (*expected[:2], *images.shape[2:4], 3)
    if tuple(images.shape) != expected or images.dtype != torch.uint8:
        raise RatchetError(
            "policy.bad_input",
            f"images are {tuple(images.shape)} {images.dtype}, expected {expected} uint8",
            where=f"cameras {', '.join(spec.cameras)}",
            fix="give every camera in the policy's order, at its image size",
        )
    return images
