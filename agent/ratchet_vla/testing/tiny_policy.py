"""A stand-in policy of a few linear layers, so that adapter tests need no VLA: same protocol, milliseconds per test."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ratchet_vla.adapters.identity import Adapter, Binding, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.contract import PolicySpec
from ratchet_vla.policy.protocol import Chunks, PolicyInput

CHUNK = 2
DIMS = 3
BINS = 8

SPEC = PolicySpec(
    cameras=("front",),
    image_size=4,
    state=(),
    state_size=0,
    control_mode="ee_delta",
    rotation="none",
    frame="base",
    action_names=("x", "y", "z"),
    action_units=("m", "m", "m"),
    gripper_dim=None,
    gripper_open=None,
    gripper_closed=None,
    chunk=CHUNK,
    control_hz=10.0,
    statistics_key="tiny",
    bins=BINS,
)


class TinyNet(nn.Module):
    """A convolution and three linear layers: (B, 3, 4, 4) images in, (B, CHUNK * DIMS * BINS) logits out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        self.first = nn.Linear(36, width)
        self.second = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, CHUNK * DIMS * BINS, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of a batch."""
        features = self.stem(images).flatten(1)
        out: Tensor = self.lm_head(torch.tanh(self.second(torch.tanh(self.first(features)))))
        return out


class TinyPolicy:
    """Actions are softmax means over the bins: they move with every weight, unlike an argmax."""

    def __init__(self, seed: int = 0, statistics: dict[str, list[float]] | None = None, width: int = 16) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = TinyNet(width).eval()
        self.spec = SPEC
        self.statistics = statistics or {"q01": [-1.0, -1.0, -1.0], "q99": [1.0, 1.0, 1.0]}
        sha = hashlib.sha256(repr(self.statistics).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            sha.update(name.encode() + tensor.numpy().tobytes())
        self.base_hash = sha.hexdigest()

    takes_any_size = False
    gives_probabilities = False
    sampled_shape = (CHUNK, DIMS)

    def actions_of(self, sampled: Tensor) -> Tensor:
        """Refuse: nothing is sampled from this policy."""
        raise NotImplementedError("nothing is sampled from this policy")

    def logits(self, batch: PolicyInput) -> Tensor:
        """(B, CHUNK, DIMS, BINS), of the first camera's image."""
        images = torch.as_tensor(batch.images)[:, 0].permute(0, 3, 1, 2).float() / 255.0
        out: Tensor = self.module(images)
        return out.view(-1, CHUNK, DIMS, BINS)

    @torch.no_grad()
    def predict(self, batch: PolicyInput) -> Chunks:
        """Means over the bins, in [-1, 1], and the likeliest bins as tokens."""
        probabilities = self.logits(batch).softmax(-1)
        return Chunks((probabilities * torch.linspace(-1, 1, BINS)).sum(-1), probabilities.argmax(-1), None)

    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        """Refuse: what this policy stands in for predicts only."""
        raise NotImplementedError("adapter tests predict only")

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Refuse: what this policy stands in for predicts only."""
        raise NotImplementedError("adapter tests predict only")


def batch(seed: int = 0) -> PolicyInput:
    """Two observations of one camera, from a seed."""
    images = torch.randint(0, 256, (2, 1, 4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PolicyInput(images, None, ["a", "b"])


def tiny(rank: int = 4, alpha: float = 8, **options: object) -> tuple[TinyPolicy, Lora]:
    """Make a policy with LoRA on its layers. options: as of `lora_config`."""
    policy = TinyPolicy()
    return policy, attach(policy.module, lora_config(rank, alpha, **options))  # type: ignore[arg-type]


def randomised(lora: Lora, binding: Binding, seed: int, scale: float = 0.3) -> Adapter:
    """An adapter with non-zero A and B for these layers; the running one is left alone."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(p.shape, generator=generator) * scale).to(p.dtype) for name, p in lora.parameters.items()
    }
    return Adapter(tensors, lora.config, binding)


def made(seed: int = 1, scale: float = 0.3) -> Adapter:
    """Make an adapter for `TinyPolicy` that changes its answers."""
    policy, lora = tiny()
    return randomised(lora, binding_of(policy), seed, scale)
