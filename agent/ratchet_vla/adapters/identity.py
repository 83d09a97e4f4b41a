"""Adapter identity: what an adapter consists of, and its content address (SHA-256).

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
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.storage.canonical import canonical_json, digest

__all__ = ["Adapter", "Binding", "adapter_id", "binding_of"]

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


def canonical_config(config: Mapping[str, Any], where: str = "adapter_config.json") -> dict[str, Any]:
    """The part of a PEFT configuration that decides what the adapter computes, in one normal form.

    Raises:
        RatchetError: adapter.unsupported_config for any method but plain LoRA (DoRA, bias, modules_to_save, ...).
    """

    def refuse(field_name: str, setting: Any) -> RatchetError:
        return RatchetError(
            "adapter.unsupported_config",
            f"{field_name}={setting!r} is not supported, only plain LoRA is",
            where=where,
            fix="use a plain LoRA adapter: weights A and B on linear or convolution layers, nothing else",
        )

    peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if peft_type != "LORA":
        raise refuse("peft_type", peft_type)
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise refuse("init_lora_weights", config["init_lora_weights"])
    # Unknown fields are accepted only at a value that switches them off: a new PEFT option must not change what is
    # computed unnoticed.
    for field, setting in config.items():
        if field in _MEANING or field in _IRRELEVANT or field in ("peft_type", "init_lora_weights"):
            continue
        if setting not in (None, False, "none", {}, []):
            raise refuse(field, setting)
    canonical = {field: config.get(field, default) for field, default in _MEANING.items()}
    targets = canonical["target_modules"]
    # PEFT stores a set, whose order changes from run to run.
    if not isinstance(targets, str):
        canonical["target_modules"] = sorted(targets) if targets else []
    for field in ("rank_pattern", "alpha_pattern"):
        canonical[field] = {
            str(layer_pattern): _number(setting) for layer_pattern, setting in (canonical[field] or {}).items()
        }
    canonical["lora_alpha"] = _number(canonical["lora_alpha"])
    if not isinstance(canonical["r"], int) or canonical["r"] < 1:
        raise refuse("r", canonical["r"])
    return {"peft_type": "LORA", **canonical, "use_rslora": bool(canonical["use_rslora"])}


def _number(value: float) -> float | int:
    """16 and 16.0 are the same rank or alpha, and must give the same text."""
    return int(value) if float(value).is_integer() else float(value)


@dataclass(frozen=True)
class Binding:
    """What an adapter was made for; it may run on nothing else.

    Attributes:
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
        base_differs = self.base_hash != other.base_hash
        statistics_differ = self.statistics_hash != other.statistics_hash
        action_space_differs = self.action_space_hash != other.action_space_hash
        if not (base_differs or statistics_differ or action_space_differs):
            return
        parts = {
            "base model": (base_differs, other.base_hash, self.base_hash),
            "statistics": (statistics_differ, other.statistics_hash, self.statistics_hash),
            "action space": (action_space_differs, other.action_space_hash, self.action_space_hash),
        }
        mismatches = ", ".join(
            f"{part_name} {adapter_hash[:12]} instead of {policy_hash[:12]}"
            for part_name, (differs, adapter_hash, policy_hash) in parts.items()
            if differs
        )
        if action_space_differs and not (base_differs and statistics_differ):
            code = "adapter.wrong_action_space"
            remedy = "use an adapter trained for this robot's action space"
        elif statistics_differ and not (action_space_differs or base_differs):
            code = "adapter.wrong_statistics"
            remedy = "statistics are frozen with the base: use those it was trained with"
        else:
            code = "adapter.wrong_base"
            remedy = "name the base that the adapter was trained on, with --policy FOLDER"
        raise RatchetError(code, f"adapter was made for {mismatches}", where=where, fix=remedy)


def action_space_of(spec: PolicySpec) -> dict[str, Any]:
    """The fields of a PolicySpec that give its actions their meaning."""
    motion_fields = ("control_mode", "rotation", "frame", "action_names", "action_units", "chunk", "control_hz", "bins")
    gripper_fields = ("gripper_dim", "gripper_open", "gripper_closed")
    return {field_name: _plain(getattr(spec, field_name)) for field_name in motion_fields + gripper_fields}


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
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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
    # The length in front of each record keeps ("ab", "c") and ("a", "bc") apart.
    hasher = hashlib.sha256()

    def record(content: Any, byte_count: int) -> None:
        hasher.update(struct.pack("<Q", byte_count))
        hasher.update(content)

    header_texts = [FORMAT, binding.base_hash, binding.statistics_hash, binding.action_space_hash]
    for text in [*header_texts, canonical_json(canonical_config(config))]:
        encoded = text.encode()
        record(encoded, len(encoded))
    for tensor_name in sorted(tensors):
        tensor = tensors[tensor_name].detach().cpu().contiguous()
        shape_text = ",".join(map(str, tensor.shape))
        for text in (tensor_name, dtype_name(tensor, tensor_name), shape_text):
            encoded = text.encode()
            record(encoded, len(encoded))
        # Raw bytes rather than values: bfloat16 has no numpy dtype, and -0.0 differs from 0.0.
        raw_bytes = tensor.reshape(-1).view(torch.uint8).numpy()
        record(raw_bytes, raw_bytes.nbytes)
    return hasher.hexdigest()


def dtype_name(tensor: Tensor, tensor_name: str) -> str:
    if tensor.dtype not in DTYPES:
        raise RatchetError(
            "adapter.wrong_dtype",
            f"{tensor.dtype} is not an adapter's dtype",
            where=tensor_name,
            fix=f"use one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}",
        )
    return DTYPES[tensor.dtype]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, complete and immutable: what the store keeps, the link sends and the swapper takes.

    Attributes:
        tensors: PEFT name (`base_model.model.<layer>.lora_A.weight`) -> tensor on the CPU; never written to.
        config: PEFT configuration fields, JSON data, in canonical form.
        binding: what it was made for.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    binding: Binding

    def __post_init__(self) -> None:
        # The class is frozen; normalising here keeps every instance's config, and thus its id, canonical.
        object.__setattr__(self, "config", canonical_config(self.config))

    @cached_property
    def id(self) -> str:
        return adapter_id(self.tensors, self.config, self.binding)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
