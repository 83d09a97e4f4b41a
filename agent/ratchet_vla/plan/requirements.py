"""What training a base with a low-rank adapter will need: memory on the GPU and the host, disk, network, time.

Knows the networks' shapes, counted without memory, and coefficients that `benchmarks/science/plan_coefficients.py`
measured on the real modules: bytes that a layer keeps per token for its backward pass. Knows no robot and opens no
weights. Times are arithmetic over a card's rated speed at a stated share of it; they are marked so, because they were
not measured here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ratchet_vla.errors import RatchetError
from ratchet_vla.plan import flow as plan_flow
from ratchet_vla.policy import presets
from ratchet_vla.policy.discrete.network import PrismaticConfig, PrismaticNetwork
from ratchet_vla.policy.flow.network import FlowConfig, FlowNetwork

AnyConfig = PrismaticConfig | FlowConfig
GIB = 2**30
# Bytes kept for the backward pass, bfloat16 products, base frozen, adapter on all linear layers; see the module's head.
# Of the trunk per token and layer: per unit of width and of the MLP's width. Of a ViT per patch and block, per unit of
# width. Of the head per action token and vocabulary row of an action.
KEPT_WIDTH = 16.0
KEPT_HIDDEN = 8.0
KEPT_VISION = 57.0
KEPT_RANK = 14.0
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
        """Bytes of GPU memory at the peak of a step."""
        return self.weights + self.adapter + self.optimiser + self.activations + self.reserved


def bases() -> dict[str, AnyConfig]:
    """Bases by the name that `ratchet plan --base` takes."""
    return {
        "openvla-oft-7b": presets.openvla_oft_7b("bidirectional"),
        "pi0": presets.pi0_base(),
        "smolvla": presets.smolvla_base(),
        "small": presets.small(),
        "small-flow": presets.small_flow(state=4, actions=4, chunk=5),
    }


@dataclass(frozen=True)
class _Counted:
    base: int
    adapter: int
    adapter_vision: int
    patches: int
    features: int
    stacks: tuple[int, int]
    vision: int


@dataclass(frozen=True)
class Shape:
    """What a robot adds to a discrete base: chunk and dims of its actions, state values it takes.

    A flow's are its configuration's.
    """

    chunk: int = 8
    dims: int = 7
    state: int = 0


def count(config: AnyConfig, rank: int, adapt_vision: bool, shape: Shape = Shape()) -> tuple[int, int]:
    """Weights of the base, and of an adapter on all its linear and convolution layers."""
    counts = _shapes(config, shape)
    return counts.base, rank * (counts.adapter + (counts.adapter_vision if adapt_vision else 0))


def _shapes(config: AnyConfig, shape: Shape) -> _Counted:
    key = json.dumps([config.facts(), dataclasses.astuple(shape)], sort_keys=True, default=list)
    if key not in _COUNTED:
        with torch.device("meta"):
            network: nn.Module
            if isinstance(config, FlowConfig):
                network = FlowNetwork(config)
            else:
                network = PrismaticNetwork(config, shape.chunk * shape.dims, shape.state, shape.dims)
        sums = {True: 0, False: 0}
        for name, module in network.named_modules():
            vision = name.startswith(("vision_backbone", "vision."))
            if isinstance(module, nn.Linear):
                sums[vision] += module.in_features + module.out_features
            elif isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                sums[vision] += module.in_channels * kernel + module.out_channels
        base = sum(parameter.numel() for parameter in network.parameters())
        if isinstance(network, FlowNetwork):
            modules = (network.language, network.expert, network.vision)
            stacks = [sum(parameter.numel() for parameter in part.parameters()) for part in modules]
            patches = _patches(network.config)
            features = network.config.language.width
        else:
            stacks = [base, 0, 0]
            tower = network.vision_backbone
            patches = int(tower.patches)
            features = int(tower.features)
        _COUNTED[key] = _Counted(base, sums[False], sums[True], patches, features, (stacks[0], stacks[1]), stacks[2])
    return _COUNTED[key]


def _patches(config: FlowConfig) -> int:
    """Tokens per image, and the tower's own patches where it joins some."""
    options = config.vision_options
    if config.vision == "film_conv":
        return int((options["image_size"] // 2 ** len(options["channels"])) ** 2)
    return int((options["image_size"] // options["patch_size"] // options.get("shuffle", 1)) ** 2)


_COUNTED: dict[str, _Counted] = {}  # a network of 7 billion shapes takes seconds to make


def kept_trunk(config: PrismaticConfig, tokens: int, rank: int) -> float:
    """Bytes that the trunk keeps of one sample for its backward pass."""
    layer = KEPT_WIDTH * config.hidden + KEPT_HIDDEN * config.intermediate + KEPT_RANK * rank
    return layer * tokens * config.layers


def kept_once(config: PrismaticConfig, rank: int) -> float:
    """Bytes that the trunk keeps whatever the batch: its adapter's weights in the products' type."""
    hidden = config.hidden
    intermediate = config.intermediate
    return 2.0 * rank * (4 * 2 * hidden + 3 * (hidden + intermediate)) * config.layers


@dataclass(frozen=True)
class _Kept:
    """tokens: of the trunk per sample. each, once: bytes per sample, and whatever the batch. work: operations."""

    tokens: int
    each: float
    once: float
    work: float


def _kept(config: AnyConfig, options: Options, shape: Shape) -> _Kept:
    shapes = _shapes(config, shape)
    actions = shape.chunk * shape.dims
    patches = shapes.patches * options.images
    if isinstance(config, FlowConfig):
        tokens = plan_flow.prefix_tokens(config, patches, options.prompt)
        suffix = plan_flow.suffix_tokens(config)
        recompute = options.checkpointing
        each = plan_flow.language(config, tokens, options.rank, recompute)
        each += plan_flow.expert(config, suffix, tokens, options.rank, recompute)
        tower_patches = patches * int(config.vision_options.get("shuffle", 1)) ** 2
        if options.adapt_vision:
            each += plan_flow.vision(config, tower_patches)
        work = 1.0 * shapes.stacks[0] * tokens + shapes.stacks[1] * suffix * config.sample_steps
        work = 2.0 * (work + (shapes.vision * tower_patches if config.vision != "film_conv" else 0))
        return _Kept(tokens, each, plan_flow.once(config, options.rank, recompute), work)
    tokens = patches + options.prompt + actions
    trunk = kept_trunk(config, tokens, options.rank)
    vision = 0.0
    if options.adapt_vision and config.vision == "fused_dinov2_siglip":
        vision_options = config.vision_options
        vision = (
            KEPT_VISION
            * patches
            * (
                vision_options["dino_width"] * vision_options["dino_depth"]
                + vision_options["siglip_width"] * vision_options["siglip_depth"]
            )
        )
    if options.checkpointing:
        trunk = 4.0 * config.hidden * tokens * config.layers + trunk / config.layers
        if vision:
            vision_options = config.vision_options
            blocks = vision_options["dino_depth"] + vision_options["siglip_depth"]
            vision = vision / blocks + 4.0 * patches * (
                vision_options["dino_width"] * vision_options["dino_depth"]
                + vision_options["siglip_width"] * vision_options["siglip_depth"]
            )
    head = 4.0 * 4 * 256 * actions
    return _Kept(tokens, trunk + vision + head, kept_once(config, options.rank), 2.0 * shapes.base * tokens)


def make(config: AnyConfig, options: Options, shape: Shape = Shape()) -> Plan:
    """Plan one update.

    Raises:
        RatchetError: plan.unknown_tower for a base whose vision was not measured.
    """
    if not isinstance(config, FlowConfig) and config.vision not in ("fused_dinov2_siglip", "film_conv"):
        raise RatchetError("plan.unknown_tower", f"no figures for the vision tower '{config.vision}'", where="plan")
    base, adapter = count(config, options.rank, options.adapt_vision, shape)
    shapes = _shapes(config, shape)
    kept = _kept(config, options, shape)
    activations = kept.each * options.batch + kept.once
    # Frozen vision runs once per sample and update; its patches are kept on the host between passes.
    frame = options.images * 3.0 * config.vision_options["image_size"] ** 2
    cached = 0.0 if options.adapt_vision else 2.0 * shapes.patches * options.images * shapes.features
    weights = base * options.base_bits / 8 * (1.02 if options.base_bits == 8 else 1.0)
    adapter_bytes = 4.0 * adapter  # float32 weights
    optimiser = 3 * adapter_bytes  # gradient and Adam's two moments
    passes = 2 + (1 if options.checkpointing else 0)
    seconds = kept.work * passes * options.samples / (RATED * SHARE)
    host = options.samples * (frame + cached) + 2 * adapter_bytes + 4 * GIB
    total = weights + adapter_bytes + optimiser + activations + RESERVED
    return Plan(
        parameters=base,
        adapter_parameters=adapter,
        tokens=kept.tokens,
        weights=weights,
        adapter=adapter_bytes,
        optimiser=optimiser,
        activations=activations,
        reserved=RESERVED,
        host=host,
        disk=2.0 * base + options.samples * frame * LOSSLESS + adapter_bytes + optimiser,
        network_adapter=4.0 * adapter,
        network_episodes=options.samples * frame * LOSSLESS,
        seconds=seconds,
        fits={name: total <= size for name, size in CARDS.items()},
    )


def smallest(config: AnyConfig, options: Options, card: float, shape: Shape = Shape()) -> Options | None:
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
        if make(config, changed, shape).gpu <= card:
            return changed
    return None
