"""Checkpoints in the published OpenVLA-OFT form: what their config.json says, in this project's terms.

Knows the published configuration's fields, sizes that it leaves to its libraries, and sharded weight files. Knows no
network code. A published file names neither units nor cameras nor the attention mask: the caller states them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from agent.contract import PolicySpec, RobotContract
from agent.errors import RatchetError
from agent.policy.action_tokens import BINS, Statistics
from agent.policy.checkpoint import load_tensors, read_tensors
from agent.policy.presets import spec_for
from agent.policy.prismatic import PrismaticConfig, PrismaticPolicy
from agent.policy.text import OPENVLA_PROMPT, load_tokenizer

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
    folder: str | Path,
    *,
    attention: Literal["bidirectional", "causal"],
    contract: RobotContract,
    cameras: Sequence[str],
    statistics_key: str = "",
    chunk: int = 0,
) -> Published:
    """Translate a folder's config.json.

    attention: the mask the checkpoint was trained with. The file does not say, and the published code's own kernels
        disagree (SDPA attends both ways, eager and flash attention 2 are causal).
    contract: the robot of the training data. Published statistics are in its driver's commands, so its
        `command_scale` turns them into physical units; its gripper is the published one, 1 = open and 0 = closed.
    cameras: the contract's cameras in the order of the checkpoint's image inputs.
    statistics_key: which of the file's statistics; may be empty where it has one set only or names one itself.
    chunk: K; 0 where the file says it (`action_chunk`).

    Raises:
        RatchetError: policy.bad_checkpoint, policy.missing_statistics, policy.no_probabilities,
            contract.unknown_camera.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise RatchetError(
            "policy.bad_checkpoint", "no config.json", where=str(folder), fix="name a folder with a checkpoint"
        )
    try:
        raw = json.loads(path.read_text())
        return _translate(raw, str(path), attention, contract, cameras, statistics_key, chunk)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RatchetError(
            "policy.bad_checkpoint",
            f"config.json is not a published OpenVLA configuration: {type(error).__name__} {error}",
            where=str(path),
            fix="for a folder that this project wrote, use agent.policy.checkpoint.load",
        ) from None


def load(
    folder: str | Path,
    *,
    attention: Literal["bidirectional", "causal"],
    contract: RobotContract,
    cameras: Sequence[str],
    statistics_key: str = "",
    chunk: int = 0,
) -> PrismaticPolicy:
    """A published checkpoint as a policy: config.json, tokenizer.json and model.safetensors, whole or in shards.

    Arguments and errors as `read`.
    """
    folder = Path(folder)
    found = read(
        folder,
        attention=attention,
        contract=contract,
        cameras=cameras,
        statistics_key=statistics_key,
        chunk=chunk,
    )
    policy = PrismaticPolicy(found.config, found.spec, found.statistics, load_tokenizer(folder / "tokenizer.json"))
    load_tensors(policy, read_weights(folder), str(folder))
    return policy


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names.

    Raises:
        RatchetError: policy.bad_checkpoint where a file is missing or broken.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_tensors(folder / "model.safetensors")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError(
            "policy.bad_checkpoint", f"the list of weight files is malformed: {error}", where=str(index)
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise RatchetError("policy.bad_checkpoint", f"weight file outside the folder: {name}", where=str(index))
        tensors.update(read_tensors(folder / name))
    return tensors


def _translate(
    raw: Mapping[str, Any],
    where: str,
    attention: Literal["bidirectional", "causal"],
    contract: RobotContract,
    cameras: Sequence[str],
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
        attention=attention,
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
    )
    key, statistics = _statistics(raw, where, contract, statistics_key or raw.get("unnorm_key", ""))
    steps = chunk or raw.get("action_chunk", 0)
    if not steps:
        raise RatchetError(
            "policy.bad_checkpoint", "the file does not say how long a chunk is", where=where, fix="give chunk"
        )
    for camera in cameras:
        contract.camera(camera)
    spec = spec_for(contract, cameras=cameras, state=(), chunk=steps, statistics_key=key)
    gripper = contract.action.gripper is not None
    spec = dataclasses.replace(
        spec,
        image_size=vision["image_size"],
        gripper_open=1.0 if gripper else None,
        gripper_closed=0.0 if gripper else None,
    )
    return Published(config, spec, statistics)


def _vision(raw: Mapping[str, Any]) -> dict[str, int]:
    """Options of the fused tower, from timm's names or, in files of test sizes, from sizes that both towers share."""
    if "vision" in raw:
        sizes = raw["vision"]
        shared = {"width": sizes["embed_dim"], "depth": sizes["depth"], "heads": sizes["num_heads"]}
        dino, siglip, image_size = shared, shared, sizes["image_size"]
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


def _statistics(raw: Mapping[str, Any], where: str, contract: RobotContract, key: str) -> tuple[str, Statistics]:
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
    sizes = {len(action[name]) for name in ("q01", "q99", "mask")}
    if sizes != {len(dims)}:
        raise RatchetError(
            "policy.missing_statistics",
            f"statistics '{key}' have {sorted(sizes)} action dimensions, the contract has {len(dims)}",
            where=where,
            fix="give the contract of the robot that the checkpoint was trained on",
        )
    # A dimension outside the mask is not scaled by anyone: it is the gripper, in the policy's own numbers.
    return key, Statistics(
        key=key,
        units=tuple(d.unit for d in dims),
        q01=tuple(float(q) * d.command_scale for q, d in zip(action["q01"], dims, strict=True)),
        q99=tuple(float(q) * d.command_scale for q, d in zip(action["q99"], dims, strict=True)),
        mask=tuple(bool(m) for m in action["mask"]),
    )
