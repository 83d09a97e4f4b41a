"""A LeRobot checkpoint's network: which of our tensors each of its tensors is, and the sizes that their shapes tell.

Knows tensor names, shapes and the options of config.json that change the network. Knows no statistics and no robot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.weights import Header
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.trunk import Sizes
from ratchet_vla.policy.images import OPENPI, SMOLVLA

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


def place(kind: str, name: str) -> str:
    """Our name of a tensor, or its own where we have none."""
    for theirs, ours in _PLACES["smolvla" if kind == "smolvla" else "pi0"].items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def refuse_options(raw: Mapping[str, Any], where: str) -> None:
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


def smolvla(raw: Mapping[str, Any], headers: Mapping[str, Header], vlm: str | Path) -> FlowConfig:
    head, heads, epsilon = 64, 12, 1e-5  # SmolVLM2-500M's
    if vlm:
        parts = json.loads((locate(vlm) / "config.json").read_text())
        text = parts["text_config"]
        head_count = parts["vision_config"]["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        heads = head_count
        epsilon = text["rms_norm_eps"]
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


def pi0(raw: Mapping[str, Any], headers: Mapping[str, Header], _: str | Path) -> FlowConfig:
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


def image_size(raw: Mapping[str, Any], kind: str) -> int:
    sizes = raw["resize_imgs_with_padding"] if kind == "smolvla" else raw["image_resolution"]
    if not sizes:
        sizes = next(f["shape"][1:] for f in raw["input_features"].values() if f["type"] == "VISUAL")
    if sizes[0] != sizes[1]:
        raise RatchetError(
            "policy.unsupported", f"images of {sizes[0]} x {sizes[1]}: not a square", where="config.json"
        )
    return int(sizes[0])
