"""Policies and observations for the tests of ratchet_vla.policy: small, seeded, from the repository's own contracts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticConfig, PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.presets import small, small_flow, spec_for
from ratchet_vla.policy.protocol import Policy, PolicyInput

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "oft_one_image"
WORDS = ["open the drawer", "close the window", "pick up the bowl", "press the button from the top"]
TOKENIZER = train_tokenizer(WORDS, 300)


def tiny_config(compute_dtype: str = "float32", **changes: Any) -> PrismaticConfig:
    config = small(
        image_size=32,
        hidden=32,
        layers=2,
        heads=2,
        channels=(8, 8, 16, 16),
        prompt_length=24,
        compute_dtype=compute_dtype,
    )
    return dataclasses.replace(config, **changes)


def metaworld_spec(chunk: int = 2, state: bool = True) -> PolicySpec:
    contract = RobotContract.load(ROOT / "robots/metaworld.yaml")
    fields = [s.name for s in contract.state] if state else []
    spec = spec_for(contract, cameras=["corner2"], state=fields, chunk=chunk, statistics_key="test")
    return dataclasses.replace(spec, image_size=32)


def statistics(spec: PolicySpec, **changes: Any) -> Statistics:
    fields: dict[str, Any] = {
        "key": spec.statistics_key,
        "units": spec.action_units,
        "q01": (-0.04, -0.03, -0.02, -1.0),
        "q99": (0.03, 0.04, 0.02, 1.0),
        "mask": (True, True, True, False),
        "state_mean": tuple(0.1 * i for i in range(spec.state_size)),
        "state_std": tuple(0.5 + i for i in range(spec.state_size)),
    }
    return Statistics(**{**fields, **changes})


def policy(compute_dtype: str = "float32", seed: int = 0, state: bool = True, **changes: Any) -> PrismaticPolicy:
    """A policy of 60 thousand parameters whose outputs differ clearly from one input to the next."""
    spec = metaworld_spec(state=state)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PrismaticPolicy(tiny_config(compute_dtype, **changes), spec, statistics(spec), TOKENIZER)
        with torch.no_grad():
            made.network.language_model.lm_head.weight.normal_(std=0.3)
            made.network.language_model.model.embed_tokens.weight.normal_(std=0.5)
    return made


def batch(of: Policy, count: int = 3, seed: int = 0) -> PolicyInput:
    generator = torch.Generator().manual_seed(seed)
    size, views = of.spec.image_size, len(of.spec.cameras)
    images = torch.randint(0, 256, (count, views, size, size, 3), generator=generator, dtype=torch.uint8)
    state = torch.randn(count, of.spec.state_size, generator=generator) if of.spec.state else None
    return PolicyInput(images, state, [WORDS[i % len(WORDS)] for i in range(count)])


def flow_spec(chunk: int = 2, state: bool = True) -> PolicySpec:
    return dataclasses.replace(metaworld_spec(chunk, state), bins=0)


def flow_statistics(spec: PolicySpec, **changes: Any) -> FlowStatistics:
    fields: dict[str, Any] = {
        "key": spec.statistics_key,
        "units": spec.action_units,
        "action_offset": (0.01, 0.0, -0.01, 0.0),
        "action_scale": (0.02, 0.03, 0.02, 1.0),
        "state_offset": tuple(0.1 * i for i in range(spec.state_size)),
        "state_scale": tuple(0.5 + i for i in range(spec.state_size)),
    }
    return FlowStatistics(**{**fields, **changes})


def flow(compute_dtype: str = "float32", seed: int = 0, **changes: Any) -> FlowPolicy:
    """A flow policy of 60 thousand parameters whose outputs differ clearly from one input to the next."""
    spec = flow_spec()
    config = small_flow(
        state=spec.state_size,
        actions=4,
        chunk=2,
        image_size=32,
        hidden=32,
        expert=32,
        layers=2,
        heads=2,
        channels=(8, 8, 16, 16),
        vocabulary=300,
        prompt_length=24,
        compute_dtype=compute_dtype,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = FlowPolicy(dataclasses.replace(config, **changes), spec, flow_statistics(spec), TOKENIZER)
        with torch.no_grad():
            made.network.action_out_proj.weight.normal_(std=0.2)
            made.network.embed_tokens.weight.normal_(std=0.5)
            for stack in (made.network.language, made.network.expert):
                for module in stack.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight.normal_(std=0.2)
    return made
