"""Decisions for tests: random observations, and what a tiny policy samples on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ratchet_vla.learner.retention.decisions import Decisions
from ratchet_vla.policy.protocol import Policy, PolicyInput


def decisions(policy: Policy, count: int = 12, tasks: Sequence[str] = ("push", "pull"), seed: int = 0) -> Decisions:
    """`count` decisions, spread over the tasks in turn."""
    generator = np.random.default_rng(seed)
    spec = policy.spec
    shape = (count, len(spec.cameras), spec.image_size, spec.image_size, 3)
    state = generator.normal(0, 0.1, (count, spec.state_size if spec.state else 0)).astype(np.float32)
    instruction = np.arange(count, dtype=np.int64) % len(tasks)
    texts = tuple(f"{task} the block" for task in tasks)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    batch = PolicyInput(images, torch.from_numpy(state), [texts[i] for i in instruction])
    noise = torch.from_numpy(generator.random((count, spec.chunk, len(spec.action_names)), np.float32))
    sampled = policy.sample(batch, 1.0, noise).tokens
    assert sampled is not None
    return Decisions(images, state, instruction, texts, tuple(tasks), sampled.numpy())
