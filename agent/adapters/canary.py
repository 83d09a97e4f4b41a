"""Trying an adapter on one observation before it may run.

Knows how to run a second policy over the same base memory, and what an acceptable answer is. Knows no swap, no store.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from agent.adapters.arena import Arena
from agent.adapters.lora import Lora, peft_config
from agent.contract import PolicySpec
from agent.errors import RatchetError
from agent.policy.protocol import Policy, PolicyInput


class Canary:
    """One observation and a shadow of the policy to answer it; the running policy goes on meanwhile."""

    def __init__(self, policy: Policy, lora: Lora, observation: PolicyInput | None = None) -> None:
        """observation: a batch of one; None makes a synthetic one (`canary_input`)."""
        self._spec = policy.spec
        self._observation = observation or canary_input(policy.spec)
        self._shadow = shadow_policy(policy)
        self._lora = Lora(self._shadow.module, peft_config(lora.config))

    def actions(self, arena: Arena, expected: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
        """(1, K, D) float32 on the CPU, physical units: the answer of the adapter in `arena`. One caller at a time.

        expected: what it must be, within `tolerance`.

        Raises:
            RatchetError: adapter.canary_failed for a wrong shape, a value that is not finite, or another answer.
        """
        self._lora.point_at(arena)
        with torch.no_grad():
            actions = self._shadow.predict(self._observation).actions.detach().float().cpu()
        wanted = (1, self._spec.chunk, len(self._spec.action_names))
        what = ""
        if tuple(actions.shape) != wanted:
            what = f"actions of shape {tuple(actions.shape)} instead of {wanted}"
        elif not bool(torch.isfinite(actions).all()):
            what = "NaN or infinite actions"
        elif expected is not None and not torch.allclose(actions, expected.float().cpu(), rtol=0.0, atol=tolerance):
            what = f"actions differ by {float((actions - expected.float().cpu()).abs().max()):.3g} from those expected"
        if what:
            raise RatchetError(
                "adapter.canary_failed",
                f"the canary observation gave {what}",
                fix="the running adapter was kept; check how this one was trained and exported",
            )
        return actions


def shadow_policy(policy: Policy) -> Policy:
    """A second policy over the same base memory, so that one adapter can be tried while another runs.

    Parameters are new objects over the old storage: pointing one policy's layers elsewhere leaves the other alone.
    """
    memo: dict[int, object] = {}
    for parameter in policy.module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in policy.module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(policy, memo)


def canary_input(spec: PolicySpec) -> PolicyInput:
    """A synthetic observation: one smooth colour ramp per camera, state zero. (1, V, H, W, 3) uint8, (1, S) float32."""
    size = spec.image_size
    ramp = torch.arange(size, dtype=torch.float32) * (255.0 / max(size - 1, 1))
    image = torch.stack(
        [ramp.expand(size, size), ramp[:, None].expand(size, size), torch.full((size, size), 127.0)], -1
    )
    images = image.to(torch.uint8).expand(1, max(len(spec.cameras), 1), size, size, 3).contiguous()
    state = torch.zeros(1, spec.state_size) if spec.state_size else None
    return PolicyInput(images, state, ["pick up the object"])
