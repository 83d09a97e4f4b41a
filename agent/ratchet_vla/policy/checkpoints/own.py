"""A policy in one folder: model.safetensors, config.json (sizes, demands, frozen statistics), tokenizer.json.

Knows files and the published checkpoints' key names. Knows nothing of networks beyond their tensor names.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints.flow_weights import fill
from ratchet_vla.policy.checkpoints.weights import is_adapter, read_tensors, wrong_dtype
from ratchet_vla.policy.configuration import tuples_for_lists
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticConfig, PrismaticPolicy
from ratchet_vla.policy.discrete.text import load_tokenizer
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.flow.trunk import Sizes
from ratchet_vla.policy.layers.vision import FusedDinoSiglip

__all__ = ["AnyPolicy", "load", "save"]

FORMAT = 1


AnyPolicy = PrismaticPolicy | FlowPolicy
"""What `load` gives: a policy of either family."""


def save(policy: AnyPolicy, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the base (adapters excluded). The folder's files appear whole or not at all, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().cpu().to(dtype).contiguous() for n, t in policy.base_tensors().items()}
    flow = isinstance(policy, FlowPolicy)
    config = {
        "format": FORMAT,
        **({"kind": "flow"} if flow else {}),
        "model": dataclasses.asdict(policy.config),
        "policy": dataclasses.asdict(policy.spec),
        "statistics": dataclasses.asdict(policy.statistics),
    }
    save_file(tensors, folder / "model.tmp")
    (folder / "tokenizer.tmp").write_text(policy.tokenizer.to_str())
    (folder / "config.tmp").write_text(json.dumps(config, indent=1))
    for name in ("model.tmp", "tokenizer.tmp", "config.tmp"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    (folder / "model.tmp").rename(folder / "model.safetensors")
    (folder / "tokenizer.tmp").rename(folder / "tokenizer.json")
    (folder / "config.tmp").rename(folder / "config.json")


def read(
    folder: str | Path,
) -> tuple[PrismaticConfig | FlowConfig, PolicySpec, Statistics | FlowStatistics]:
    """Configuration of a policy that `save` wrote, discrete or flow; no weights are read.

    Raises:
        RatchetError: policy.bad_checkpoint (missing, truncated, wrong tensors, unknown fields),
            policy.missing_statistics.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise is_adapter(folder)
        raise RatchetError(
            "policy.bad_checkpoint", "no config.json", where=str(folder), fix="name a folder with a policy"
        )
    try:
        raw = json.loads(path.read_text())
        if raw.get("format") != FORMAT:
            raise RatchetError(
                "policy.bad_checkpoint",
                f"format {raw.get('format')} is not known",
                where=str(path),
                fix="update ratchet",
            )
        demands: dict[str, Any] = tuples_for_lists(raw["policy"])
        spec = PolicySpec(**demands)
        model = dict(raw["model"])
        kind = raw.get("kind", "tokens")
        config: PrismaticConfig | FlowConfig
        if kind == "flow":
            model |= {name: Sizes(**model[name]) for name in ("language", "expert")}
            config = FlowConfig(**model)
        elif kind == "tokens":
            config = PrismaticConfig(**model)
        else:
            raise ValueError(f"kind '{kind}' is not known")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError("policy.bad_checkpoint", f"config.json is malformed: {error}", where=str(path)) from None
    numbers = raw.get("statistics")
    if isinstance(config, FlowConfig):
        return config, spec, _flow_statistics(numbers, str(path))
    return config, spec, Statistics.from_dict(numbers, str(path))


def load(folder: str | Path, device: str | torch.device = "cpu") -> AnyPolicy:
    """Read a policy that `save` wrote, discrete or flow.

    Raises:
        RatchetError: policy.bad_checkpoint (missing, truncated, wrong tensors, unknown fields),
            policy.missing_statistics, policy.is_adapter.
    """
    folder = Path(folder)
    config, spec, statistics = read(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tensors = read_tensors(folder / "model.safetensors")
    policy: AnyPolicy
    if isinstance(config, FlowConfig):
        assert isinstance(statistics, FlowStatistics)
        policy = FlowPolicy(config, spec, statistics, tokenizer)
        fill(policy, tensors, str(folder), torch.float32)
    else:
        assert isinstance(statistics, Statistics)
        policy = PrismaticPolicy(config, spec, statistics, tokenizer)
        load_tensors(policy, tensors, str(folder))
    policy.network.to(device)
    return policy


def load_discrete(folder: str | Path, device: str | torch.device = "cpu") -> PrismaticPolicy:
    """As `load`, where only action tokens will do.

    Raises:
        RatchetError: policy.wrong_kind for a flow policy.
    """
    policy = load(folder, device)
    if isinstance(policy, FlowPolicy):
        raise RatchetError("policy.wrong_kind", "this is a flow policy", where=str(folder), fix="name a discrete one")
    return policy


def _flow_statistics(data: Mapping[str, Any] | None, where: str) -> FlowStatistics:
    try:
        fields: dict[str, Any] = tuples_for_lists(data or {})
        return FlowStatistics(**fields)
    except TypeError as error:
        raise RatchetError("policy.missing_statistics", f"statistics are malformed: {error}", where=where) from None


def load_tensors(
    policy: PrismaticPolicy, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype = torch.float32
) -> None:
    """Fill the network, which may be on the meta device; every tensor must fit. Tensors that no output depends on may
    be there or not.

    dtype: of the parameters in memory.

    Raises:
        RatchetError: policy.bad_checkpoint naming missing, extra and misshapen tensors; policy.wrong_vocabulary;
            policy.wrong_dtype.
    """
    tower = policy.network.vision_backbone
    wanted = policy.network.state_dict()
    extra = [
        k for k in tensors if k not in wanted and not (isinstance(tower, FusedDinoSiglip) and tower.unused(f".{k}"))
    ]
    missing = [k for k in wanted if k not in tensors]
    shapes = [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    rows = "language_model.model.embed_tokens.weight"
    if rows in shapes and tensors[rows].shape[1:] == wanted[rows].shape[1:]:
        raise RatchetError(
            "policy.wrong_vocabulary",
            f"the weights have {len(tensors[rows])} tokens, the configuration {len(wanted[rows])}",
            where=where,
            fix="action tokens are counted from the vocabulary's end: take the configuration of these weights",
        )
    if extra or missing or shapes:
        parts = [f"{len(v)} {n} ({', '.join(v[:3])}…)" for n, v in _named(missing, extra, shapes) if v]
        raise RatchetError(
            "policy.bad_checkpoint", f"tensors do not fit: {'; '.join(parts)}", where=where, fix="check configuration"
        )
    whole = [k for k in wanted if not tensors[k].is_floating_point()]
    if whole:
        raise wrong_dtype(str(tensors[whole[0]].dtype).removeprefix("torch."), f"{where}: {whole[0]}")
    bad = [k for k in wanted if not bool(torch.isfinite(tensors[k]).all())]
    if bad:
        raise RatchetError("policy.bad_checkpoint", f"not finite: {', '.join(bad[:3])}", where=where)
    # A copy, because the file may change under a mapping of it; assigned, so that it is the only one.
    policy.network.load_state_dict({k: tensors[k].to(dtype, copy=True).contiguous() for k in wanted}, assign=True)
    policy.base_changed()


def _named(missing: list[str], extra: list[str], shapes: list[str]) -> list[tuple[str, list[str]]]:
    return [("missing", missing), ("extra", extra), ("of another shape", shapes)]
