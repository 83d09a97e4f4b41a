"""A stand-in policy whose adapters weigh 109 MB though it is small itself: for measuring how adapters travel.

Knows the policy's protocol only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratchet_vla.adapters.identity import Adapter, binding_of
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.contract import PolicySpec
from ratchet_vla.policy.protocol import Chunks, PolicyInput

WIDTH, OUT, RANK, LAYERS = 65536, 16, 32, 13  # 109 MB of float32 in the adapter, half of that in the base


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, OUT) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


class WidePolicy:
    """Stand-in whose adapters are large for its own size: wide, flat layers behind the policy's protocol."""

    spec = PolicySpec(
        cameras=("front",), image_size=4, state=(), state_size=0, control_mode="ee_delta", rotation="none",
        frame="base", action_names=("x",), action_units=("m",), gripper_dim=None, gripper_open=None,
        gripper_closed=None, chunk=1, control_hz=10.0, statistics_key="wide", bins=8,
    )  # fmt: skip
    base_hash = "ab" * 32

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module: nn.Module = Wide()

    takes_any_size = False
    gives_probabilities = False
    sampled_shape = (1, 1)

    def actions_of(self, sampled: Tensor) -> Tensor:
        raise NotImplementedError("nothing is sampled from this policy")

    @torch.no_grad()
    def predict(self, batch: PolicyInput) -> Chunks:
        out: Tensor = self.module(torch.ones(len(batch), WIDTH))
        return Chunks(out[:, :1, None], None, None)

    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        return self.predict(batch)

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this policy only stands for its adapters' size")


def wide() -> tuple[WidePolicy, Lora]:
    policy = WidePolicy()
    return policy, attach(policy.module, lora_config(RANK, float(RANK), r"layers\.\d+"))


def large_adapter(seed: int) -> Adapter:
    policy, lora = wide()
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(p.shape, generator=generator) * 0.01 for n, p in lora.parameters.items()}
    return Adapter(tensors, lora.config, binding_of(policy))
