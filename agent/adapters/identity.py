"""What an adapter is and how its id is computed.

Knows tensors, PEFT's LoRA configuration fields and what an adapter is bound to (base, statistics, action space).
Knows no module, no file and no running policy.

Id, version 1: SHA-256 over a sequence of records, each preceded by its length as 8 bytes little-endian:
`ratchet.adapter.v1`; base hash; statistics hash; action-space hash (the hex digests as ASCII); canonical configuration
(JSON, sorted keys, no spaces); then for each tensor in sorted order of its PEFT name: name, safetensors dtype
(`F32`, `F16`, `BF16`), shape as decimal numbers joined by `,`, and the row-major little-endian bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from agent.contract import PolicySpec
from agent.errors import RatchetError
from agent.policy.protocol import Policy

FORMAT = "ratchet.adapter.v1"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Fields of PEFT's LoraConfig that decide what the tensors mean. `target_modules` is a set to PEFT.
_MEANING: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
}
# Fields that decide nothing once the tensors exist: training, provenance, and where PEFT found the layers.
_IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
_PLAIN_INIT = (True, False, "gaussian", "orthogonal")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_config(config: Mapping[str, Any], where: str = "adapter_config.json") -> dict[str, Any]:
    """The part of a PEFT configuration that decides what the adapter computes, in one normal form.

    Raises:
        RatchetError: adapter.unsupported_config for any method but plain LoRA (DoRA, bias, modules_to_save, ...).
    """

    def refuse(field: str, value: Any) -> RatchetError:
        return RatchetError(
            "adapter.unsupported_config",
            f"{field}={value!r} is not supported",
            where=where,
            fix="use a plain LoRA adapter: weights A and B on linear or convolution layers, nothing else",
        )

    method = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if method != "LORA":
        raise refuse("peft_type", method)
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise refuse("init_lora_weights", config["init_lora_weights"])
    for field, value in config.items():
        if field in _MEANING or field in _IRRELEVANT or field in ("peft_type", "init_lora_weights"):
            continue
        if value not in (None, False, "none", {}, []):
            raise refuse(field, value)
    found = {field: config.get(field, default) for field, default in _MEANING.items()}
    targets = found["target_modules"]
    if not isinstance(targets, str):
        found["target_modules"] = sorted(targets) if targets else []
    for field in ("rank_pattern", "alpha_pattern"):
        found[field] = {str(key): _number(value) for key, value in (found[field] or {}).items()}
    found["lora_alpha"] = _number(found["lora_alpha"])
    if not isinstance(found["r"], int) or found["r"] < 1:
        raise refuse("r", found["r"])
    return {"peft_type": "LORA", **found, "use_rslora": bool(found["use_rslora"])}


def _number(value: float) -> float | int:
    """16 and 16.0 are the same rank or alpha, and must give the same text."""
    return int(value) if float(value).is_integer() else float(value)


@dataclass(frozen=True)
class Binding:
    """What an adapter was made for; it may run on nothing else.

    base_hash: SHA-256 of the frozen base model, hex.
    statistics: the normalisation statistics in force, as plain JSON data.
    action_space: the action space the policy speaks, as plain JSON data.
    """

    base_hash: str
    statistics: Mapping[str, Any]
    action_space: Mapping[str, Any]

    @cached_property
    def statistics_hash(self) -> str:
        return digest(self.statistics)

    @cached_property
    def action_space_hash(self) -> str:
        return digest(self.action_space)

    def require(self, other: Binding, where: str = "") -> None:
        """Refuse an adapter bound to `other` on a policy bound to this.

        Raises:
            RatchetError: adapter.wrong_action_space, adapter.wrong_statistics, adapter.wrong_base. A base hash covers
                its statistics: where both differ it is another base, or the same one with other statistics, which is
                another base as well.
        """
        base = self.base_hash != other.base_hash
        statistics = self.statistics_hash != other.statistics_hash
        action = self.action_space_hash != other.action_space_hash
        if not (base or statistics or action):
            return
        named = {
            "base model": (base, other.base_hash, self.base_hash),
            "statistics": (statistics, other.statistics_hash, self.statistics_hash),
            "action space": (action, other.action_space_hash, self.action_space_hash),
        }
        what = ", ".join(f"{name} {a[:12]} instead of {b[:12]}" for name, (bad, a, b) in named.items() if bad)
        if action and not (base and statistics):
            code, fix = "adapter.wrong_action_space", "use an adapter trained for this robot's action space"
        elif statistics and not (action or base):
            code, fix = "adapter.wrong_statistics", "statistics are frozen with the base: use those it was trained with"
        else:
            code, fix = "adapter.wrong_base", "name the base that the adapter was trained on, with --policy FOLDER"
        raise RatchetError(code, f"adapter was made for {what}", where=where, fix=fix)


def action_space_of(spec: PolicySpec) -> dict[str, Any]:
    """The fields of a PolicySpec that give its actions their meaning."""
    fields = ("control_mode", "rotation", "frame", "action_names", "action_units", "chunk", "control_hz", "bins")
    gripper = ("gripper_dim", "gripper_open", "gripper_closed")
    return {name: _plain(getattr(spec, name)) for name in fields + gripper}


def binding_of(policy: Policy) -> Binding:
    """What adapters for this policy are bound to.

    Statistics come from the policy's `statistics` (a dataclass or mapping); a policy without that attribute is bound by
    its statistics key, and by its base hash, which covers the statistics.
    """
    spec = policy.spec
    statistics: dict[str, Any] = {"key": spec.statistics_key}
    if hasattr(policy, "statistics"):
        statistics["values"] = _plain(policy.statistics)
    return Binding(policy.base_hash, statistics, action_space_of(spec))


def _plain(value: Any) -> Any:
    """Arrays, tensors, dataclasses and tuples as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def adapter_id(tensors: Mapping[str, Tensor], config: Mapping[str, Any], binding: Binding) -> str:
    """The content address of an adapter, 64 hex digits; see the module's head for the exact bytes.

    Raises:
        RatchetError: adapter.wrong_dtype for anything but float32, float16 and bfloat16; adapter.unsupported_config.
    """
    sha = hashlib.sha256()

    def record(data: Any, size: int) -> None:
        sha.update(struct.pack("<Q", size))
        sha.update(data)

    texts = [FORMAT, binding.base_hash, binding.statistics_hash, binding.action_space_hash]
    for text in [*texts, canonical_json(canonical_config(config))]:
        encoded = text.encode()
        record(encoded, len(encoded))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        for text in (name, dtype_name(tensor, name), shape):
            encoded = text.encode()
            record(encoded, len(encoded))
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        record(data, data.nbytes)
    return sha.hexdigest()


def dtype_name(tensor: Tensor, name: str) -> str:
    if tensor.dtype not in DTYPES:
        raise RatchetError(
            "adapter.wrong_dtype",
            f"{tensor.dtype} is not an adapter's dtype",
            where=name,
            fix=f"use one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}",
        )
    return DTYPES[tensor.dtype]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, complete and immutable: what the store keeps, the link sends and the swapper takes.

    tensors: PEFT name (`base_model.model.<layer>.lora_A.weight`) -> tensor on the CPU; never written to.
    config: PEFT configuration fields, JSON data, in canonical form.
    binding: what it was made for.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    binding: Binding

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", canonical_config(self.config))

    @cached_property
    def id(self) -> str:
        return adapter_id(self.tensors, self.config, self.binding)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
