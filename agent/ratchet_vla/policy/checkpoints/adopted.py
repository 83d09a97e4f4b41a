"""A published checkpoint taken into use: what its own files do not say, stated once, so that every command can open it.

Knows the record that adoption writes (`adopted.json`) and which loader a checkpoint needs. The weights stay where they
are: a folder of a few lines stands for a checkpoint of any size. Knows no network and reads no weights by itself.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import lerobot
from ratchet_vla.policy.checkpoints import openvla as published
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.own import AnyPolicy
from ratchet_vla.policy.checkpoints.weights import files_of
from ratchet_vla.policy.configuration import tuples_for_lists
from ratchet_vla.policy.discrete.network import PrismaticConfig
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.images import OPENVLA, Preparation
from ratchet_vla.storage.documents import write_json

__all__ = ["Record", "Stated", "adopt", "load"]

RECORD = "adopted.json"
FORMAT = 1
Kind = Literal["ratchet", "openvla", "lerobot", "adapter", "unknown"]


@dataclass(frozen=True)
class Stated:
    """What a published file does not say and its user has to; see `openvla.load` and `lerobot.load`.

    dtype: of the parameters in memory; "own" takes the checkpoint's.
    """

    cameras: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    attention: Literal["", "bidirectional", "causal"] = ""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    statistics_key: str = ""
    chunk: int = 0
    tokenizer: str = ""
    vlm: str = ""
    gripper: tuple[float, float] | None = None
    images: Preparation = OPENVLA
    dtype: Literal["own", "float32", "bfloat16"] = "own"


@dataclass(frozen=True)
class Record:
    """checkpoint: folder or hub id. contract: the robot of its training data. weights: file -> bytes, as adopted."""

    checkpoint: str
    kind: Kind
    contract: RobotContract
    stated: Stated
    weights: dict[str, int]


def kind_of(folder: Path) -> Kind:
    """Which form a folder has, by its configuration files."""
    path = folder / "config.json"
    if not path.is_file():
        return "adapter" if (folder / "adapter_config.json").is_file() else "unknown"
    try:
        raw = json.loads(path.read_text())
    except ValueError:
        return "unknown"
    if not isinstance(raw, dict):
        return "unknown"
    if "format" in raw and "policy" in raw:
        return "ratchet"
    if raw.get("type") and "input_features" in raw:
        return "lerobot"
    return "openvla" if "norm_stats" in raw or "text_config" in raw or "n_action_bins" in raw else "unknown"


def adopt(reference: str | Path, contract: RobotContract, stated: Stated, folder: Path) -> Record:
    """Write the record of a published checkpoint into a folder, which then names it everywhere. Inspect it first.

    contract: the robot of its training data.

    Raises:
        RatchetError: policy.not_published for what needs no adoption, or is no checkpoint; policy.exists;
        policy.no_checkpoint, policy.not_downloaded, policy.missing_shards.
    """
    found = locate(reference)
    kind = kind_of(found)
    if kind not in ("openvla", "lerobot"):
        fix = "give the folder itself with --policy" if kind == "ratchet" else "name an OpenVLA or a LeRobot checkpoint"
        raise RatchetError("policy.not_published", f"its form is '{kind}'", where=str(found), fix=fix)
    if (folder / "config.json").exists() or (folder / RECORD).exists():
        raise RatchetError("policy.exists", "the folder holds a policy", where=str(folder), fix="name a new folder")
    whole = dataclasses.replace(stated, tokenizer=_absolute(stated.tokenizer), vlm=_absolute(stated.vlm))
    record = Record(_absolute(str(reference)), kind, contract, whole, sizes(found))
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": FORMAT,
        **{n: getattr(record, n) for n in ("checkpoint", "kind", "weights")},
        "stated": dataclasses.asdict(record.stated),
        "contract": contract.to_dict(),
    }
    write_json(folder / RECORD, data, indent=1)
    return record


def _absolute(name: str) -> str:
    """A path that is good from every folder; hub ids stay."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every weight file, parts beside the model included."""
    return {p.name: p.stat().st_size for p in (*files_of(folder), *sorted(folder.glob("*--*checkpoint.pt")))}


def read_record(folder: Path) -> Record:
    """Raises RatchetError policy.bad_checkpoint for a record that is malformed, and as `RobotContract.from_dict`."""
    path = folder / RECORD
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw["format"] != FORMAT or raw["kind"] not in ("openvla", "lerobot"):
            raise ValueError(f"format {raw['format']} of kind '{raw['kind']}' is not known")
        said = raw["stated"]
        given: dict[str, Any] = tuples_for_lists(said)
        given["images"] = Preparation.of(said["images"])
        stated = Stated(**given)
        weights = {str(name): int(size) for name, size in raw["weights"].items()}
        contract = RobotContract.from_dict(raw["contract"], str(path), rules=False)
        return Record(str(raw["checkpoint"]), raw["kind"], contract, stated, weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError(
            "policy.bad_checkpoint", f"the record is malformed: {error}", where=str(path), fix="adopt it again"
        ) from None


def load(folder: str | Path, device: str | torch.device = "cpu") -> AnyPolicy:
    """Any policy that a command may name: a folder that this project wrote, or one that adoption wrote.

    Raises:
        RatchetError: policy.not_adopted for a published checkpoint that is named directly; policy.changed_checkpoint
        where the weights' files are others than those adopted; and what the loaders refuse.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        _require_adopted(folder)
        return checkpoint.load(folder, device)
    record = read_record(folder)
    found = locate(record.checkpoint)
    now = sizes(found)
    changed = sorted(n for n in {*now, *record.weights} if now.get(n) != record.weights.get(n))
    if changed:
        raise RatchetError(
            "policy.changed_checkpoint",
            f"{len(changed)} weight files are not those that were adopted: {', '.join(changed[:3])}",
            where=str(found),
            fix="inspect and adopt it again; adapters are bound to the base that they were trained on",
        )
    policy = open_published(found, record.kind, record.contract, record.stated)
    policy.network.to(device)
    policy.settle()
    return policy


def read(folder: str | Path) -> tuple[PrismaticConfig | FlowConfig, PolicySpec]:
    """What any policy that `load` takes is: its network's configuration and its spec; no weights are read.

    Raises:
        RatchetError: policy.not_adopted, and what the readers of the forms refuse.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        _require_adopted(folder)
        config, spec, _ = checkpoint.read(folder)
        return config, spec
    record = read_record(folder)
    stated = record.stated
    place = locate(record.checkpoint)
    if record.kind == "lerobot":
        flow = lerobot.read(place, contract=record.contract, **_lerobot_options(stated))
        return flow.config, flow.spec
    discrete = published.read(place, contract=record.contract, **_openvla_options(stated, str(place)))
    return discrete.config, discrete.spec


def _require_adopted(folder: Path) -> None:
    kind = kind_of(folder)
    if kind in ("openvla", "lerobot"):
        raise RatchetError(
            "policy.not_adopted",
            f"a published checkpoint ({kind}) does not say everything that is needed to run it",
            where=str(folder),
            fix=f"ratchet adopt {folder} --robot CONTRACT --out FOLDER, and name that folder",
        )


def _lerobot_options(stated: Stated) -> dict[str, Any]:
    return {name: getattr(stated, name) for name in ("cameras", "state", "tokenizer", "vlm", "gripper")}


def _openvla_options(stated: Stated, where: str) -> dict[str, Any]:
    if not stated.attention and stated.decoding == "parallel":
        raise RatchetError(
            "policy.attention_unstated",
            "nobody said which attention mask the checkpoint was trained with",
            where=where,
            fix="state bidirectional or causal",
        )
    names = ("cameras", "state", "statistics_key", "chunk", "decoding", "images")
    return {"attention": stated.attention or "causal", **{name: getattr(stated, name) for name in names}}


def open_published(folder: str | Path, kind: Kind, contract: RobotContract, stated: Stated) -> AnyPolicy:
    """A published checkpoint with everything stated; raises what `openvla.load` and `lerobot.load` raise."""
    dtype = None if stated.dtype == "own" else getattr(torch, stated.dtype)
    if kind == "lerobot":
        return lerobot.load(folder, contract=contract, dtype=dtype, **_lerobot_options(stated))
    return published.load(folder, contract=contract, dtype=dtype, **_openvla_options(stated, str(folder)))
