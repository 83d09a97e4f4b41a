"""What training a base with a low-rank adapter will need: memory on the GPU and the host, disk, network, time.

Knows the networks' shapes, counted without memory, and coefficients that `benchmarks/plan_coefficients.py` measured on
the real modules: bytes that a layer keeps per token for its backward pass. Knows no robot and opens no weights. Times
are arithmetic over a card's rated speed at a stated share of it; they are marked so, because they were not measured
here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from agent.errors import RatchetError
from agent.policy import presets
from agent.policy.network import PrismaticConfig, PrismaticNetwork

GIB = 2**30
# Bytes kept for the backward pass, bfloat16 products, base frozen, adapter on all linear layers; see the module's head.
# Of the trunk per token and layer: per unit of width and of the MLP's width. Of a ViT per patch and block, per unit of
# width. Of the head per action token and vocabulary row of an action.
KEPT_WIDTH, KEPT_HIDDEN, KEPT_VISION, KEPT_RANK = 16.0, 8.0, 57.0, 14.0
CARDS: Mapping[str, float] = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9}
RESERVED = 1.2e9  # CUDA context, kernels' workspace and fragmentation
RATED = 989e12  # bfloat16 operations per second of an H100, dense
SHARE = 0.4  # of the rated speed that a training step is assumed to reach
# Size of an episode's file over its frames' bytes: lossless, because learning on-policy from altered pixels is not
# exact. Measured on recorded Meta-World episodes (6.1 of 27.6 kB per decision); camera noise compresses less.
LOSSLESS = 0.22


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    rank: of the adapter. batch: chunk samples per forward and backward (micro batch). samples: chunk samples per
    update. steps: optimiser steps that these are split into. images: camera images per sample.
    adapt_vision: the adapter covers the vision towers too; False keeps their patches from one pass to the next.
    checkpointing: layers recompute in the backward pass what they would keep.
    base_bits: of the frozen base's weights, 16 or 8; 8 is arithmetic only, no 8-bit base can be loaded.
    """

    rank: int = 32
    batch: int = 8
    samples: int = 65536  # the published update: 8 steps of 8,192
    steps: int = 8
    images: int = 1
    prompt: int = 30
    adapt_vision: bool = True
    checkpointing: bool = False
    base_bits: Literal[16, 8] = 16

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "samples", "steps", "images", "prompt"):
            if getattr(self, name) < 1:
                raise RatchetError("plan.bad_option", f"{name} = {getattr(self, name)} is not above 0", where="plan")


@dataclass(frozen=True)
class Plan:
    """All sizes in bytes, times in seconds.

    parameters, adapter_parameters: numbers of weights. tokens: of the trunk per sample.
    fits: card -> whether the GPU's part fits it.
    """

    parameters: int
    adapter_parameters: int
    tokens: int
    weights: float
    adapter: float
    optimiser: float
    activations: float
    reserved: float
    host: float
    disk: float
    network_adapter: float
    network_episodes: float
    seconds: float
    fits: Mapping[str, bool]

    @property
    def gpu(self) -> float:
        return self.weights + self.adapter + self.optimiser + self.activations + self.reserved


def bases() -> dict[str, PrismaticConfig]:
    """Bases by the name that `ratchet plan --base` takes."""
    return {"openvla-oft-7b": presets.openvla_oft_7b("bidirectional"), "small": presets.small()}


@dataclass(frozen=True)
class _Counted:
    base: int
    adapter: int
    adapter_vision: int
    patches: int
    features: int


def count(config: PrismaticConfig, rank: int, adapt_vision: bool) -> tuple[int, int]:
    """Weights of the base, and of an adapter on all its linear and convolution layers."""
    found = _shapes(config)
    return found.base, rank * (found.adapter + (found.adapter_vision if adapt_vision else 0))


def _shapes(config: PrismaticConfig) -> _Counted:
    key = json.dumps(config.facts(), sort_keys=True, default=list)
    if key not in _COUNTED:
        with torch.device("meta"):
            network = PrismaticNetwork(config, actions=56, state=0, dims=7)
        sums = {True: 0, False: 0}
        for name, module in network.named_modules():
            vision = name.startswith("vision_backbone")
            if isinstance(module, nn.Linear):
                sums[vision] += module.in_features + module.out_features
            elif isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                sums[vision] += module.in_channels * kernel + module.out_channels
        tower = network.vision_backbone
        base = sum(p.numel() for p in network.parameters())
        _COUNTED[key] = _Counted(base, sums[False], sums[True], int(tower.patches), int(tower.features))
    return _COUNTED[key]


_COUNTED: dict[str, _Counted] = {}  # a network of 7 billion shapes takes seconds to make


def kept_trunk(config: PrismaticConfig, tokens: int, rank: int) -> float:
    """Bytes that the trunk keeps of one sample for its backward pass."""
    layer = KEPT_WIDTH * config.hidden + KEPT_HIDDEN * config.intermediate + KEPT_RANK * rank
    return layer * tokens * config.layers


def kept_once(config: PrismaticConfig, rank: int) -> float:
    """Bytes that the trunk keeps whatever the batch: its adapter's weights in the products' type."""
    h, m = config.hidden, config.intermediate
    return 2.0 * rank * (4 * 2 * h + 3 * (h + m)) * config.layers


def make(config: PrismaticConfig, options: Options, chunk: int = 8, dims: int = 7) -> Plan:
    """Plan one update.

    Raises:
        RatchetError: plan.unknown_tower for a base whose vision was not measured.
    """
    if config.vision not in ("fused_dinov2_siglip", "film_conv"):
        raise RatchetError("plan.unknown_tower", f"no figures for the vision tower '{config.vision}'", where="plan")
    base, adapter = count(config, options.rank, options.adapt_vision)
    shapes = _shapes(config)
    patches = shapes.patches * options.images
    tokens = patches + options.prompt + chunk * dims
    trunk = kept_trunk(config, tokens, options.rank)
    layer_input = 4.0 * config.hidden * tokens
    vision = 0.0
    if options.adapt_vision and config.vision == "fused_dinov2_siglip":
        o = config.vision_options
        vision = KEPT_VISION * patches * (o["dino_width"] * o["dino_depth"] + o["siglip_width"] * o["siglip_depth"])
    if options.checkpointing:
        trunk = layer_input * config.layers + trunk / config.layers
        if vision:
            o = config.vision_options
            blocks = o["dino_depth"] + o["siglip_depth"]
            vision = vision / blocks + 4.0 * patches * (
                o["dino_width"] * o["dino_depth"] + o["siglip_width"] * o["siglip_depth"]
            )
    head = 4.0 * 4 * 256 * chunk * dims
    activations = (trunk + vision + head) * options.batch + kept_once(config, options.rank)
    # Frozen vision runs once per sample and update; its patches are kept on the host between passes.
    frame = options.images * 3.0 * config.vision_options["image_size"] ** 2
    cached = 0.0 if options.adapt_vision else 2.0 * patches * shapes.features
    weights = base * options.base_bits / 8 * (1.02 if options.base_bits == 8 else 1.0)
    mine = 4.0 * adapter  # float32 weights
    optimiser = 3 * mine  # gradient and Adam's two moments
    forward = 2.0 * base * tokens
    passes = 2 + (1 if options.checkpointing else 0)
    seconds = forward * passes * options.samples / (RATED * SHARE)
    host = options.samples * (frame + cached) + 2 * mine + 4 * GIB
    total = weights + mine + optimiser + activations + RESERVED
    return Plan(
        parameters=base,
        adapter_parameters=adapter,
        tokens=tokens,
        weights=weights,
        adapter=mine,
        optimiser=optimiser,
        activations=activations,
        reserved=RESERVED,
        host=host,
        disk=2.0 * base + options.samples * frame * LOSSLESS + mine + optimiser,
        network_adapter=2.0 * adapter,
        network_episodes=options.samples * frame * LOSSLESS,
        seconds=seconds,
        fits={name: total <= size for name, size in CARDS.items()},
    )


def smallest(config: PrismaticConfig, options: Options, card: float) -> Options | None:
    """The mildest change of options with which an update fits a card; None where none does."""
    for change in (
        {},
        {"checkpointing": True},
        {"checkpointing": True, "batch": max(options.batch // 4, 1)},
        {"checkpointing": True, "batch": 1},
        {"checkpointing": True, "batch": 1, "adapt_vision": False},
        {"checkpointing": True, "batch": 1, "adapt_vision": False, "base_bits": 8},
    ):
        changed = dataclasses.replace(options, **change)
        if make(config, changed).gpu <= card:
            return changed
    return None
