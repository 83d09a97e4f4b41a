"""Checkpoints in the published OpenVLA and OpenVLA-OFT form: what their files say, in this project's terms.

Knows the published configuration's fields, sizes that it leaves to its libraries, statistics per suite, and the parts
that lie beside the weights (regression head, state projector). Knows no network code: the published names of tensors
are those of `own`. A published file names neither units nor cameras nor the attention mask: the caller states them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.own import load_tensors
from ratchet_vla.policy.checkpoints.weights import component, is_adapter, read_weights
from ratchet_vla.policy.discrete.action_tokens import BINS, Statistics
from ratchet_vla.policy.discrete.policy import PrismaticConfig, PrismaticPolicy
from ratchet_vla.policy.discrete.text import OPENVLA_PROMPT, load_tokenizer
from ratchet_vla.policy.images import OPENVLA, Preparation
from ratchet_vla.policy.presets import spec_for

Attention = Literal["bidirectional", "causal"]
Decoding = Literal["parallel", "autoregressive"]
# Parts of variants that are not supported, by the name of the file that holds them.
_FOREIGN = {
    "noisy_action_projector": "a diffusion head",
    "vision_backbone": "FiLM layers in the vision towers",
}

# What the published file leaves out because the libraries that read it know it: timm's models and Llama-2's defaults.
_TIMM: dict[str, dict[str, int]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"width": 1024, "depth": 24, "heads": 16},
    "vit_so400m_patch14_siglip_224": {"width": 1152, "depth": 27, "heads": 16},
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "pad_token_id": 32000,
}
_PADDED_ROWS = 64  # the head's rows beyond the vocabulary, OpenVLA's `pad_to_multiple_of`
_EMPTY_TOKEN = 29871  # Llama's lone space, which every training prompt ended with
_SIGLIP_MLP = 3.7362  # timm's mlp_ratio of the so400m shape


@dataclass(frozen=True)
class Published:
    """A published configuration, translated. `tokens` in published files are ids: id - `first_action_id` is our bin."""

    config: PrismaticConfig
    spec: PolicySpec
    statistics: Statistics

    @property
    def first_action_id(self) -> int:
        return self.config.vocabulary - BINS


def read(
    reference: str | Path,
    *,
    attention: Attention,
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str] = (),
    statistics_key: str = "",
    chunk: int = 0,
    decoding: Decoding = "parallel",
    images: Preparation = OPENVLA,
) -> Published:
    """Translate a checkpoint's configuration and statistics; no weights are read.

    reference: a folder, or a hub id that is in the cache.
    attention: the mask the checkpoint was trained with. The file does not say, and the published code's own kernels
        disagree (SDPA attends both ways, eager and flash attention 2 are causal). `masks.check` tells a wrong choice.
    contract: the robot of the training data. Published statistics are in its driver's commands, so its
        `command_scale` turns them into physical units; its gripper is the published one, 1 = open and 0 = closed.
    cameras: the contract's cameras in the order of the checkpoint's image inputs.
    state: the contract's state fields in the order of the checkpoint's proprioception, where it takes any.
    statistics_key: which of the file's statistics; may be empty where it has one set only or names one itself.
    chunk: K; 0 where the file says it (`action_chunk`), and for autoregressive decoding, which gives one action.
    decoding: "autoregressive" for OpenVLA, "parallel" for OpenVLA-OFT; their files look alike.
    images: how its training images were made; the published evaluation's way unless said.

    Raises:
        RatchetError: policy.bad_checkpoint, policy.missing_statistics, policy.wrong_statistics, policy.unsupported,
            policy.no_probabilities, policy.is_adapter, policy.no_checkpoint, policy.not_downloaded,
            contract.unknown_camera.
    """
    folder = locate(reference)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise is_adapter(folder)
        raise RatchetError(
            "policy.bad_checkpoint", "no config.json", where=str(folder), fix="name a folder with a checkpoint"
        )
    for name, what in _FOREIGN.items():
        if list(folder.glob(f"{name}--*checkpoint.pt")):
            raise RatchetError(
                "policy.unsupported", f"the checkpoint has {what}", where=str(folder), fix="use a variant without"
            )
    try:
        raw = json.loads(path.read_text())
        beside = folder / "dataset_statistics.json"
        if beside.is_file():  # of the data it was fine-tuned on; takes precedence in the published code too
            raw["norm_stats"] = json.loads(beside.read_text())
        head = component(folder, "action_head")
        proprio = component(folder, "proprio_projector")
        options = {
            "attention": attention,
            "decoding": decoding,
            "head": "tokens" if head is None else "l1",
            "state_style": "own" if proprio is None else "oft",
            "images": dataclasses.asdict(images),
        }
        taken = 0 if proprio is None else proprio["fc1.weight"].shape[1]
        return _translate(raw, str(path), options, contract, cameras, state, taken, statistics_key, chunk)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RatchetError(
            "policy.bad_checkpoint",
            f"config.json is not a published OpenVLA configuration: {type(error).__name__} {error}",
            where=str(path),
            fix="for a folder that this project wrote, use ratchet_vla.policy.checkpoints.own.load",
        ) from None


def load(
    reference: str | Path,
    *,
    attention: Attention,
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str] = (),
    statistics_key: str = "",
    chunk: int = 0,
    decoding: Decoding = "parallel",
    images: Preparation = OPENVLA,
    dtype: torch.dtype | None = None,
) -> PrismaticPolicy:
    """A published checkpoint as a policy: config.json, tokenizer.json and model.safetensors, whole or in shards.

    dtype: of the parameters in memory; None takes the checkpoint's own (bfloat16 for the published 7B models: 15 GB).
    Other arguments and errors as `read`, and those of `weights` and `own.load_tensors`.
    """
    folder = locate(reference)
    found = read(
        folder,
        attention=attention,
        contract=contract,
        cameras=cameras,
        state=state,
        statistics_key=statistics_key,
        chunk=chunk,
        decoding=decoding,
        images=images,
    )
    tensors = read_weights(folder)
    for name, place in (("action_head", "action_head."), ("proprio_projector", "state_projector.")):
        part = component(folder, name) or {}
        tensors |= {place + key.removeprefix("model."): value for key, value in part.items()}
    config = found.config
    if dtype is torch.bfloat16:  # products cannot be finer than what they are of
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    with torch.device("meta"):
        policy = PrismaticPolicy(config, found.spec, found.statistics, load_tokenizer(folder / "tokenizer.json"))
    own = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
    load_tensors(policy, tensors, str(folder), dtype or own)
    return policy


def _translate(
    raw: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
    contract: RobotContract,
    cameras: Sequence[str],
    state: Sequence[str],
    taken: int,
    statistics_key: str,
    chunk: int,
) -> Published:
    bins = raw.get("n_action_bins", BINS)
    if bins != BINS:
        raise RatchetError("policy.no_probabilities", f"{bins} action bins, this class needs {BINS}", where=where)
    text = {**_LLAMA, **(raw.get("text_config") or raw["text"])}
    heads = text["num_attention_heads"]
    if text.get("num_key_value_heads", heads) != heads or text.get("rope_scaling"):
        raise RatchetError("policy.bad_checkpoint", "grouped heads and scaled positions are not supported", where=where)
    dtype = raw.get("torch_dtype") or raw["dtype"]
    if dtype not in ("float32", "bfloat16"):
        raise RatchetError("policy.bad_checkpoint", f"dtype {dtype} is not supported", where=where)
    vision = _vision(raw)
    config = PrismaticConfig(
        vision="fused_dinov2_siglip",
        vision_options=vision,
        placeholders="zero",
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"] - raw.get("pad_to_multiple_of", _PADDED_ROWS),
        padded_vocabulary=text["vocab_size"],
        projector="mlp3",
        prompt=OPENVLA_PROMPT,
        bos=text["bos_token_id"],
        pad=text["pad_token_id"],
        end_token=_EMPTY_TOKEN,
        rope_theta=float(text["rope_theta"]),
        rms_norm_eps=float(text["rms_norm_eps"]),
        compute_dtype=dtype,
        **options,
    )
    key, statistics = _statistics(raw, where, contract, statistics_key or raw.get("unnorm_key", ""), taken)
    alone = config.decoding == "autoregressive"
    steps = chunk or (1 if alone else raw.get("action_chunk", 0))
    if not steps:
        raise RatchetError(
            "policy.bad_checkpoint", "the file does not say how long a chunk is", where=where, fix="give chunk"
        )
    for camera in cameras:
        contract.camera(camera)
    fields = {s.name: s.size for s in contract.state}
    given = sum(fields.get(name, 0) for name in state)
    if given != taken or not all(name in fields for name in state):
        raise RatchetError(
            "policy.wrong_state",
            f"the checkpoint takes {taken} state values, {', '.join(state) or 'no field'} has {given}",
            where=where,
            fix=f"name fields of the contract in the checkpoint's order: {', '.join(fields)}",
        )
    spec = spec_for(contract, cameras=cameras, state=state, chunk=steps, statistics_key=key)
    gripper = contract.action.gripper is not None
    spec = dataclasses.replace(
        spec,
        image_size=vision["image_size"],
        gripper_open=1.0 if gripper else None,
        gripper_closed=0.0 if gripper else None,
        bins=BINS if config.head == "tokens" else 0,
    )
    return Published(config, spec, statistics)


def _vision(raw: Mapping[str, Any]) -> dict[str, int]:
    """Options of the fused tower, from timm's names or, in files of test sizes, from sizes that both towers share."""
    if "vision" in raw:
        sizes = raw["vision"]
        shared = {"width": sizes["embed_dim"], "depth": sizes["depth"], "heads": sizes["num_heads"]}
        dino = shared
        siglip = shared
        image_size = sizes["image_size"]
    else:
        dino, siglip = (_TIMM[name] for name in raw["timm_model_ids"])
        image_size = raw["image_sizes"][0]
    return {
        "image_size": image_size,
        "patch": 14,
        **{f"dino_{k}": v for k, v in dino.items()},
        "dino_hidden": 4 * dino["width"],
        "registers": 4,
        **{f"siglip_{k}": v for k, v in siglip.items()},
        "siglip_hidden": int(_SIGLIP_MLP * siglip["width"]),
    }


def _statistics(
    raw: Mapping[str, Any], where: str, contract: RobotContract, key: str, state: int
) -> tuple[str, Statistics]:
    known = raw.get("norm_stats") or {}
    if not key and len(known) == 1:
        key = next(iter(known))
    if key not in known:
        raise RatchetError(
            "policy.missing_statistics",
            f"no statistics '{key}'" if key else "the file has several statistics and none was named",
            where=where,
            fix=f"statistics there: {', '.join(sorted(known)) or 'none'}",
        )
    action = known[key]["action"]
    dims = contract.action.dims
    mask = action.get("mask", [True] * (len(action["q01"]) - 1) + [False])  # as the published code where none is given
    sizes = {len(action["q01"]), len(action["q99"]), len(mask)}
    if sizes != {len(dims)}:
        other = len(sizes) == 1
        raise RatchetError(
            "policy.wrong_statistics" if other else "policy.missing_statistics",
            f"statistics '{key}' have {sorted(sizes)} action dimensions, the contract has {len(dims)}",
            where=where,
            fix="give the contract of the robot that the checkpoint was trained on",
        )
    mean, std = _proprio(known[key].get("proprio"), state, key, where) if state else ((), ())
    # A dimension outside the mask is not scaled by anyone: it is the gripper, in the policy's own numbers.
    return key, Statistics(
        key=key,
        units=tuple(d.unit for d in dims),
        q01=tuple(float(q) * d.command_scale for q, d in zip(action["q01"], dims, strict=True)),
        q99=tuple(float(q) * d.command_scale for q, d in zip(action["q99"], dims, strict=True)),
        mask=tuple(bool(m) for m in mask),
        state_mean=mean,
        state_std=std,
    )


def _proprio(
    found: Mapping[str, Any] | None, state: int, key: str, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The published scaling of the state to [-1, 1] between its percentiles, as a mean and a deviation."""
    low, high = (list((found or {}).get(name, ())) for name in ("q01", "q99"))
    if {len(low), len(high)} != {state}:
        raise RatchetError(
            "policy.missing_statistics",
            f"statistics '{key}' describe {len(low)} state values, the checkpoint takes {state}",
            where=where,
            fix="take the statistics that lie beside the weights (dataset_statistics.json)",
        )
    mask = (found or {}).get("mask", [True] * state)
    pairs = [(float(a), float(b)) if m else (-1.0, 1.0) for a, b, m in zip(low, high, mask, strict=True)]
    return tuple((a + b) / 2 for a, b in pairs), tuple((b - a + 1e-8) / 2 for a, b in pairs)
