"""Configurations as data: the published 7B model and the small built-in one; the same class runs both.

Knows sizes only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.discrete.policy import PrismaticConfig
from ratchet_vla.policy.discrete.text import OPENVLA_PROMPT
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.trunk import Sizes
from ratchet_vla.policy.images import OPENPI, OPENVLA, SMOLVLA

__all__ = ["openvla_oft_7b", "pi0_base", "small", "small_flow", "smolvla_base", "spec_for"]


def openvla_oft_7b(attention: str) -> PrismaticConfig:
    """OpenVLA-OFT, discrete head: fused DINOv2-L and SigLIP-so400m at 224 px, Llama-2 7B."""
    return PrismaticConfig(
        vision="fused_dinov2_siglip",
        vision_options={
            "image_size": 224,
            "patch": 14,
            "dino_width": 1024,
            "dino_depth": 24,
            "dino_heads": 16,
            "dino_hidden": 4096,
            "registers": 4,
            "siglip_width": 1152,
            "siglip_depth": 27,
            "siglip_heads": 16,
            "siglip_hidden": 4304,
        },
        attention=attention,  # type: ignore[arg-type]
        placeholders="zero",
        hidden=4096,
        layers=32,
        heads=32,
        intermediate=11008,
        vocabulary=32000,
        padded_vocabulary=32064,
        projector="mlp3",
        prompt=OPENVLA_PROMPT,
        bos=1,
        pad=32000,
        end_token=29871,
        compute_dtype="bfloat16",
        images=dataclasses.asdict(OPENVLA),
    )


def small(
    *,
    image_size: int = 96,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 4,
    channels: Sequence[int] = (32, 64, 96, 128),
    text_vocabulary: int = 512,
    prompt_length: int = 16,
    compute_dtype: str = "bfloat16",
) -> PrismaticConfig:
    """The built-in VLA: about 3 million parameters, a chunk in a few milliseconds on a CPU."""
    return PrismaticConfig(
        vision="film_conv",
        vision_options={"image_size": image_size, "channels": list(channels), "text": hidden, "coordinates": True},
        attention="bidirectional",
        placeholders="learned",
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=hidden * 8 // 3 // 32 * 32,
        vocabulary=text_vocabulary + BINS,
        padded_vocabulary=text_vocabulary + BINS,
        projector="mlp2",
        prompt="{instruction}",
        bos=1,
        pad=0,
        end_token=-1,
        prompt_length=prompt_length,
        compute_dtype=compute_dtype,  # type: ignore[arg-type]
    )


def small_flow(
    *,
    state: int,
    actions: int,
    chunk: int,
    image_size: int = 96,
    hidden: int = 192,
    expert: int = 128,
    layers: int = 4,
    heads: int = 4,
    channels: Sequence[int] = (32, 64, 96, 128),
    vocabulary: int = 512,
    prompt_length: int = 16,
    compute_dtype: str = "bfloat16",
) -> FlowConfig:
    """The built-in flow VLA: the small VLA's vision tower and trunk, with an expert beside it as in pi0."""

    def sizes(width: int) -> Sizes:
        inner = width * 8 // 3 // 32 * 32
        return Sizes(width, layers, heads, heads, hidden // heads, inner, "llama", 1e-6)

    return FlowConfig(
        vision="film_conv",
        vision_options={"image_size": image_size, "channels": list(channels)},
        language=sizes(hidden),
        expert=sizes(expert),
        vocabulary=vocabulary,
        horizon=chunk,
        action_width=actions,
        state_width=max(state, 1),
        prompt="{instruction}",
        prompt_length=prompt_length,
        state="suffix" if state else "none",
        shock_correlation=0.9,
        start="zeros",
        compute_dtype=compute_dtype,  # type: ignore[arg-type]
    )


def smolvla_base() -> FlowConfig:
    """SmolVLA's sizes: SmolVLM2-500M's first 16 layers, an expert of three quarters of its width."""
    language = Sizes(960, 16, 15, 5, 64, 2560, "llama", 1e-5)
    return FlowConfig(
        vision="smolvlm",
        vision_options={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
            "shuffle": 4,
        },
        language=language,
        expert=dataclasses.replace(language, width=720, hidden=2048),
        vocabulary=49280,
        horizon=50,
        action_width=32,
        state_width=32,
        prompt="{instruction}\n",
        prompt_length=48,
        image_scale="root",
        crossed=2,
        order="causal",
        state="prefix",
        images=dataclasses.asdict(SMOLVLA),
        compute_dtype="bfloat16",
    )


def pi0_base() -> FlowConfig:
    """pi0's sizes: PaliGemma 3B, an expert of 300 M."""
    language = Sizes(2048, 18, 8, 1, 256, 16384, "gemma", 1e-6)
    return FlowConfig(
        vision="siglip",
        vision_options={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
        },
        language=language,
        expert=dataclasses.replace(language, width=1024, hidden=4096),
        vocabulary=257152,
        horizon=50,
        action_width=32,
        state_width=32,
        prompt="{instruction}\n",
        prompt_length=48,
        images=dataclasses.asdict(OPENPI),
        compute_dtype="bfloat16",
    )


def spec_for(
    contract: RobotContract, *, cameras: Sequence[str], state: Sequence[str], chunk: int, statistics_key: str
) -> PolicySpec:
    """The demands of a policy that is trained on data of this contract."""
    fields = {s.name: s.size for s in contract.state}
    gripper = contract.action.gripper
    return PolicySpec(
        cameras=tuple(cameras),
        image_size=contract.camera(cameras[0]).height,
        state=tuple(state),
        state_size=sum(fields[s] for s in state),
        control_mode=contract.action.control_mode,
        rotation=contract.action.rotation,
        frame=contract.action.frame,
        action_names=tuple(d.name for d in contract.action.dims),
        action_units=tuple(d.unit for d in contract.action.dims),
        gripper_dim=gripper.dim if gripper else None,
        gripper_open=gripper.open if gripper else None,
        gripper_closed=gripper.closed if gripper else None,
        chunk=chunk,
        control_hz=contract.control_hz,
        statistics_key=statistics_key,
        bins=BINS,
    )
