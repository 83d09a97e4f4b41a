"""Checkpoints in LeRobot's form: SmolVLA, pi0 and pi0.5 read from their files, without LeRobot.

Knows config.json, the processors' files with their statistics, and tensor names. Sizes are read off the tensors'
shapes. Knows no network code. LeRobot's files name features, not units or fields: the caller states which contract
they meant.
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
from ratchet_vla.policy.checkpoints.flow_weights import fill
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.weights import Header, read_headers, read_tensors, read_weights
from ratchet_vla.policy.discrete.text import load_tokenizer
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.policy import FlowPolicy, FlowStatistics
from ratchet_vla.policy.flow.trunk import Sizes
from ratchet_vla.policy.images import OPENPI, SMOLVLA
from ratchet_vla.policy.presets import spec_for

KINDS = ("smolvla", "pi0", "pi05")
_SMOLVLM = "model.vlm_with_expert."
_PALIGEMMA = "model.paligemma_with_expert."
_PLACES = {
    "smolvla": {
        _SMOLVLM + "vlm.model.vision_model.": "vision.tower.",
        _SMOLVLM + "vlm.model.connector.modality_projection.proj.": "vision.proj.",
        _SMOLVLM + "vlm.model.text_model.embed_tokens.": "embed_tokens.",
        _SMOLVLM + "vlm.model.text_model.": "language.",
        _SMOLVLM + "lm_expert.": "expert.",
        "model.": "",
    },
    "pi0": {
        _PALIGEMMA + "paligemma.model.vision_tower.vision_model.": "vision.tower.",
        _PALIGEMMA + "paligemma.model.vision_tower.": "vision.tower.",
        _PALIGEMMA + "paligemma.model.multi_modal_projector.linear.": "vision.linear.",
        _PALIGEMMA + "paligemma.model.language_model.embed_tokens.": "embed_tokens.",
        _PALIGEMMA + "paligemma.model.language_model.": "language.",
        _PALIGEMMA + "gemma_expert.model.": "expert.",
        "model.": "",
    },
}
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


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
        _refuse_options(raw, str(path))
        headers = {_place(kind, name): h for name, h in read_headers(folder).items()}
        features = tuple(
            name for name, f in raw["input_features"].items() if f["type"] == "VISUAL" and "empty_camera" not in name
        )
        config = (_smolvla if kind == "smolvla" else _pi0)(raw, headers, vlm)
        size = _image_size(raw, kind)
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
    tensors = {_place(kind, name): value for name, value in read_weights(folder).items()}
    own = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
    fill(policy, tensors, str(folder), dtype or own)
    return policy


def _place(kind: str, name: str) -> str:
    """Our name of a tensor, or its own where we have none."""
    for theirs, ours in _PLACES["smolvla" if kind == "smolvla" else "pi0"].items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _refuse_options(raw: Mapping[str, Any], where: str) -> None:
    refused = {
        "adapt_to_pi_aloha": "conversion to pi's own Aloha joints",
        "use_delta_joint_actions_aloha": "joint deltas for Aloha",
        "use_relative_actions": "actions relative to the state",
        "add_image_special_tokens": "special tokens around images",
        "use_peft": "an adapter inside the checkpoint",
    }
    for name, what in refused.items():
        if raw.get(name):
            raise RatchetError("policy.unsupported", f"{name}: {what}", where=where, fix="use a checkpoint without")


def _stack(headers: Mapping[str, Header], name: str, head: int, form: Any, epsilon: float) -> Sizes:
    first = f"{name}.layers.0."
    rows = {k: headers[f"{first}{k}.weight"].shape for k in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")}
    layers = len({k.split(".")[2] for k in headers if k.startswith(f"{name}.layers.")})
    return Sizes(
        width=rows["self_attn.q_proj"][1],
        layers=layers,
        heads=rows["self_attn.q_proj"][0] // head,
        groups=rows["self_attn.k_proj"][0] // head,
        head=head,
        hidden=rows["mlp.up_proj"][0],
        form=form,
        epsilon=epsilon,
        adaptive=f"{first}input_layernorm.dense.weight" in headers,
    )


def _vision(headers: Mapping[str, Header], heads: int) -> dict[str, Any]:
    patch = headers["vision.tower.embeddings.patch_embedding.weight"].shape
    places = headers["vision.tower.embeddings.position_embedding.weight"].shape[0]
    layers = {k.split(".")[4] for k in headers if k.startswith("vision.tower.encoder.layers.")}
    return {
        "hidden_size": patch[0],
        "intermediate_size": headers["vision.tower.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": round(places**0.5) * patch[2],
        "patch_size": patch[2],
        "hidden_act": "gelu_pytorch_tanh",
    }


def _common(raw: Mapping[str, Any], headers: Mapping[str, Header]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for h in headers.values():
        sizes[h.dtype] = sizes.get(h.dtype, 0) + 1
    return {
        "vocabulary": headers["embed_tokens.weight"].shape[0],
        "horizon": raw["chunk_size"],
        "action_width": raw["max_action_dim"],
        "state_width": raw["max_state_dim"],
        "prompt_length": raw["tokenizer_max_length"],
        "steps": raw.get("num_steps") or raw["num_inference_steps"],
        "compute_dtype": _DTYPES.get(max(sizes, key=lambda k: sizes[k]), "float32"),
    }


def _smolvla(raw: Mapping[str, Any], headers: Mapping[str, Header], vlm: str | Path) -> FlowConfig:
    head, heads, epsilon = 64, 12, 1e-5  # SmolVLM2-500M's
    if vlm:
        parts = json.loads((locate(vlm) / "config.json").read_text())
        text, head_count = parts["text_config"], parts["vision_config"]["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        heads, epsilon = head_count, text["rms_norm_eps"]
    every = raw["self_attn_every_n_layers"] if "cross" in raw["attention_mode"] else 0
    if every < 0 or raw.get("num_expert_layers", -1) > 0 or raw.get("prefix_length", -1) > 0:
        raise RatchetError("policy.unsupported", "an expert of fewer layers, or a padded prefix", where="config.json")
    options = _vision(headers, heads)
    joined = headers["vision.proj.weight"].shape[1]
    return FlowConfig(
        vision="smolvlm",
        vision_options={**options, "shuffle": round((joined / options["hidden_size"]) ** 0.5)},
        language=_stack(headers, "language", head, "llama", epsilon),
        expert=_stack(headers, "expert", head, "llama", epsilon),
        prompt="{instruction}\n",
        image_scale="root",
        crossed=every,
        order="causal",
        state="prefix",
        images=dataclasses.asdict(SMOLVLA) if raw["resize_imgs_with_padding"] else {},
        **_common(raw, headers),
    )


def _pi0(raw: Mapping[str, Any], headers: Mapping[str, Header], _: str | Path) -> FlowConfig:
    """Gemma's one group of keys gives the width of a head; SigLIP-so400m has 16 heads."""
    words = raw["type"] == "pi05"
    head = headers["language.layers.0.self_attn.k_proj.weight"].shape[0]
    return FlowConfig(
        vision="siglip",
        vision_options=_vision(headers, 16),
        language=_stack(headers, "language", head, "gemma", 1e-6),
        expert=_stack(headers, "expert", head, "gemma", 1e-6),
        prompt="Task: {instruction}, State: {state};\nAction: " if words else "{instruction}\n",
        state="words" if words else "suffix",
        time="adaptive" if words else "concat",
        images=dataclasses.asdict(OPENPI),
        **_common(raw, headers),
    )


def _image_size(raw: Mapping[str, Any], kind: str) -> int:
    sizes = raw["resize_imgs_with_padding"] if kind == "smolvla" else raw["image_resolution"]
    if not sizes:
        sizes = next(f["shape"][1:] for f in raw["input_features"].values() if f["type"] == "VISUAL")
    if sizes[0] != sizes[1]:
        raise RatchetError(
            "policy.unsupported", f"images of {sizes[0]} x {sizes[1]}: not a square", where="config.json"
        )
    return int(sizes[0])


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
