"""Checkpoints in LeRobot's form: SmolVLA, pi0 and pi0.5 read from their files, without LeRobot.

Knows config.json and the processors' files with their statistics; `lerobot_shapes` knows the network in the tensors.
LeRobot's files name features, not units or fields: the caller states which contract they meant.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import lerobot_shapes as shapes
from ratchet_vla.policy.checkpoints.flow_weights import fill
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.weights import Header, read_headers, read_tensors, read_weights
from ratchet_vla.policy.discrete.text import load_tokenizer
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.presets import spec_for

KINDS = ("smolvla", "pi0", "pi05")


@dataclass(frozen=True)
class Found:
    """A LeRobot checkpoint's configuration, translated.

    features: its image features in order. headers: of its tensors, under this project's names.
    """

    config: FlowConfig
    spec: PolicySpec
    statistics: FlowStatistics
    features: tuple[str, ...]
    tokenizer: Path
    headers: dict[str, Header]


def read(
    reference: str | Path,
    *,
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str],
    tokenizer: str | Path = "",
    vlm: str | Path = "",
    gripper: tuple[float, float] | None = None,
) -> Found:
    """Translate a checkpoint's configuration and statistics; weights are read by their headers only.

    reference: a folder, or a hub id that is in the cache.
    contract: the robot of the training data. Statistics are in its driver's commands: `command_scale` makes them
    physical. cameras: the contract's cameras in the order of the checkpoint's image features (empty cameras left out).
    state: the contract's state fields in the order of the checkpoint's state.
    tokenizer: folder or file of its tokenizer; SmolVLA and pi0 checkpoints hold none and name one on the hub.
    vlm: SmolVLA only, folder with the configuration of its SmolVLM; SmolVLM2-500M's head sizes if absent.
    gripper: the data's numbers for open and closed; the contract's own if absent.

    Raises:
        RatchetError: policy.bad_checkpoint, policy.unsupported, policy.missing_statistics, policy.wrong_statistics,
            policy.wrong_state, policy.wrong_cameras, policy.no_checkpoint, policy.not_downloaded, and of the weights.
    """
    folder = locate(reference)
    path = folder / "config.json"
    if not path.is_file():
        raise RatchetError("policy.bad_checkpoint", "no config.json", where=str(folder), fix="name a LeRobot folder")
    try:
        raw = json.loads(path.read_text())
        kind = raw["type"]
        if kind not in KINDS:
            raise RatchetError(
                "policy.unsupported",
                f"LeRobot policy of type '{kind}'",
                where=str(path),
                fix=f"one of {', '.join(KINDS)}",
            )
        shapes.refuse_options(raw, str(path))
        headers = {shapes.place(kind, name): h for name, h in read_headers(folder).items()}
        features = tuple(
            name for name, f in raw["input_features"].items() if f["type"] == "VISUAL" and "empty_camera" not in name
        )
        config = (shapes.smolvla if kind == "smolvla" else shapes.pi0)(raw, headers, vlm)
        size = shapes.image_size(raw, kind)
        spec = _spec(raw, contract, cameras, state, features, size, gripper, str(path))
        statistics = _statistics(folder, raw, spec, contract)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise RatchetError(
            "policy.bad_checkpoint",
            f"not a LeRobot configuration that is known: {type(error).__name__} {error}",
            where=str(path),
            fix="save the policy with LeRobot 0.4.4 or later",
        ) from None
    return Found(config, spec, statistics, features, _tokenizer(folder, tokenizer), headers)


def load(
    reference: str | Path,
    *,
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str],
    tokenizer: str | Path = "",
    vlm: str | Path = "",
    gripper: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
) -> FlowPolicy:
    """A LeRobot checkpoint as a policy. dtype: of the parameters in memory; None takes the checkpoint's own.

    Other arguments and errors as `read`.
    """
    folder = locate(reference)
    found = read(folder, contract=contract, cameras=cameras, state=state, tokenizer=tokenizer, vlm=vlm, gripper=gripper)
    config = found.config
    if dtype is torch.bfloat16:  # products cannot be finer than what they are of
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    with torch.device("meta"):
        policy = FlowPolicy(config, found.spec, found.statistics, load_tokenizer(found.tokenizer))
    kind = json.loads((folder / "config.json").read_text())["type"]
    tensors = {shapes.place(kind, name): value for name, value in read_weights(folder).items()}
    own = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
    fill(policy, tensors, str(folder), dtype or own)
    return policy


def _spec(
    raw: Mapping[str, Any],
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str],
    features: Sequence[str],
    size: int,
    gripper: tuple[float, float] | None,
    where: str,
) -> PolicySpec:
    if len(cameras) != len(features):
        raise RatchetError(
            "policy.wrong_cameras",
            f"the checkpoint takes {len(features)} images, {len(cameras)} cameras were named",
            where=where,
            fix=f"name one camera of the contract for each of {', '.join(features)}",
        )
    for camera in cameras:
        contract.camera(camera)
    fields = {s.name: s.size for s in contract.state}
    taken = raw["input_features"].get("observation.state", {"shape": [0]})["shape"][0]
    given = sum(fields.get(name, 0) for name in state)
    if given != taken or not all(name in fields for name in state):
        raise RatchetError(
            "policy.wrong_state",
            f"the checkpoint takes {taken} state values, {', '.join(state) or 'no field'} has {given}",
            where=where,
            fix=f"name fields of the contract in the checkpoint's order: {', '.join(fields)}",
        )
    dims = raw["output_features"]["action"]["shape"][0]
    if dims != contract.action.size:
        raise RatchetError(
            "policy.wrong_statistics",
            f"the checkpoint gives {dims} action dimensions, the contract has {contract.action.size}",
            where=where,
            fix="give the contract of the robot that the checkpoint was trained on",
        )
    spec = spec_for(contract, cameras=cameras, state=state, chunk=raw["n_action_steps"], statistics_key=raw["type"])
    if gripper and contract.action.gripper:
        spec = dataclasses.replace(spec, gripper_open=gripper[0], gripper_closed=gripper[1])
    return dataclasses.replace(spec, image_size=size, bins=0)


def _statistics(folder: Path, raw: Mapping[str, Any], spec: PolicySpec, contract: RobotContract) -> FlowStatistics:
    action = _affine(folder, "policy_postprocessor.json", "unnormalizer_processor", "action", "ACTION")
    state: tuple[list[float], list[float]] = ([], [])
    if spec.state:
        state = _affine(folder, "policy_preprocessor.json", "normalizer_processor", "observation.state", "STATE")
    scales = [d.command_scale for d in contract.action.dims]
    if len(action[0]) != len(scales) or len(state[0]) != spec.state_size:
        raise RatchetError(
            "policy.wrong_statistics",
            f"statistics have {len(action[0])} action and {len(state[0])} state values, the contract {len(scales)} and "
            f"{spec.state_size}",
            where=str(folder),
            fix="give the contract of the robot that the checkpoint was trained on",
        )
    return FlowStatistics(
        key=spec.statistics_key,
        units=spec.action_units,
        action_offset=tuple(v * s for v, s in zip(action[0], scales, strict=True)),
        action_scale=tuple(v * s for v, s in zip(action[1], scales, strict=True)),
        state_offset=tuple(state[0]),
        state_scale=tuple(state[1]),
    )


def _affine(folder: Path, file: str, step: str, feature: str, kind: str) -> tuple[list[float], list[float]]:
    """Offset and scale of one feature, as LeRobot's normaliser computes with its statistics."""
    path = folder / file
    if not path.is_file():
        raise RatchetError(
            "policy.missing_statistics",
            f"no {file}: the checkpoint's numbers have no scale",
            where=str(folder),
            fix="convert it with LeRobot's migration, which writes the statistics beside the weights",
        )
    steps = [s for s in json.loads(path.read_text())["steps"] if s.get("registry_name") == step]
    if len(steps) != 1 or "state_file" not in steps[0]:
        raise RatchetError(
            "policy.missing_statistics", f"{file} names no statistics for its {step}", where=str(folder), fix="add them"
        )
    mode = steps[0]["config"]["norm_map"][kind]
    stats = read_tensors(folder / steps[0]["state_file"])
    pairs = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
    pairs["QUANTILE10"] = ("q10", "q90")
    if mode not in pairs:
        raise RatchetError(
            "policy.missing_statistics",
            f"{feature} is normalised by {mode}, so its numbers have no scale",
            where=str(path),
            fix="use a checkpoint that was trained on normalised data",
        )
    names = [f"{feature}.{n}" for n in pairs[mode]]
    absent = [n for n in names if n not in stats]
    if absent:
        raise RatchetError(
            "policy.missing_statistics",
            f"{', '.join(absent)} are missing: LeRobot would silently leave {feature} as it is",
            where=str(folder / steps[0]["state_file"]),
            fix="add the statistics of the training data",
        )
    one, two = (stats[n].double().flatten() for n in names)
    if mode != "MEAN_STD":
        one, two = (one + two) / 2, (two - one) / 2
    return one.tolist(), two.clamp(min=1e-8).tolist()


def _tokenizer(folder: Path, given: str | Path) -> Path:
    if given and Path(given).is_file():
        return Path(given)
    if given:
        return locate(given) / "tokenizer.json"
    own = folder / "tokenizer.json"
    if own.is_file():
        return own
    path = folder / "policy_preprocessor.json"
    steps = json.loads(path.read_text())["steps"] if path.is_file() else []
    names = [s["config"].get("tokenizer_name") for s in steps if s.get("registry_name") == "tokenizer_processor"]
    if not names or not names[0]:
        raise RatchetError("policy.bad_checkpoint", "no tokenizer", where=str(folder), fix="name one with tokenizer")
    return locate(names[0]) / "tokenizer.json"
