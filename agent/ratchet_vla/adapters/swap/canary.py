"""Canary check: a candidate adapter answers one observation before it may become the running one.

Knows how to run a second policy over the same base memory, and which answers are acceptable. Knows no swap, no store.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ratchet_vla.adapters.lora.arena import Arena
from ratchet_vla.adapters.lora.layers import Lora, peft_config
from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.protocol import Policy, PolicyInput


class Canary:
    """One observation and a shadow of the policy to answer it; the running policy goes on meanwhile."""

    def __init__(self, policy: Policy, lora: Lora, observation: PolicyInput | None = None) -> None:
        """observation: a batch of one; None makes a synthetic one (`canary_input`)."""
        self._spec = policy.spec
        self._observation = observation or canary_input(policy.spec)
        self._shadow = shadow_policy(policy)
        self._lora = Lora(self._shadow.module, peft_config(lora.config))

    def actions(self, arena: Arena, expected: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
        """Predict one action chunk with the adapter in `arena`. Not thread-safe: one caller at a time.

        Args:
            arena: the candidate's tensors; the shadow policy is pointed at them, the running policy is not touched.
            expected: (1, K, D) the chunk that it must predict; None accepts any finite one.
            tolerance: largest absolute difference from `expected`, physical units.

        Returns:
            (1, K, D) float32 on the CPU, physical units.

        Raises:
            RatchetError: adapter.canary_failed for a wrong shape, a value that is not finite, or another chunk than
                the expected one.
        """
        self._lora.point_at(arena)
        with torch.no_grad():
            actions = self._shadow.predict(self._observation).actions.detach().float().cpu()
        expected_shape = (1, self._spec.chunk, len(self._spec.action_names))
        complaint = ""
        if tuple(actions.shape) != expected_shape:
            complaint = f"actions of shape {tuple(actions.shape)} instead of {expected_shape}"
        elif not bool(torch.isfinite(actions).all()):
            complaint = "NaN or infinite actions"
        elif expected is not None and not torch.allclose(actions, expected.float().cpu(), rtol=0.0, atol=tolerance):
            complaint = (
                f"actions differ by {float((actions - expected.float().cpu()).abs().max()):.3g} from those expected"
            )
        if complaint:
            raise RatchetError(
                "adapter.canary_failed",
                f"the canary observation gave {complaint}",
                fix="the running adapter was kept; check how this one was trained and exported",
            )
        return actions


def shadow_policy(policy: Policy) -> Policy:
    """A second policy over the same base memory, so that one adapter can be tried while another runs.

    Parameters are new objects over the old storage: pointing one policy's layers elsewhere leaves the other alone.
    """
    # deepcopy consults the memo first, so everything listed here is shared instead of copied: a 7B base is never
    # duplicated.
    deepcopy_memo: dict[int, object] = {}
    for parameter in policy.module.parameters():
        deepcopy_memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in policy.module.buffers():
        deepcopy_memo[id(buffer)] = buffer
    return copy.deepcopy(policy, deepcopy_memo)


def canary_input(spec: PolicySpec) -> PolicyInput:
    """A synthetic observation: one smooth colour ramp per camera, state zero. (1, V, H, W, 3) uint8, (1, S) float32."""
    size_px = spec.image_size
    ramp_row = torch.arange(size_px, dtype=torch.float32) * (255.0 / max(size_px - 1, 1))
    # A ramp across, a ramp down and a constant, so that no two channels are alike.
    image_hwc = torch.stack(
        [
            ramp_row.expand(size_px, size_px),
            ramp_row[:, None].expand(size_px, size_px),
            torch.full((size_px, size_px), 127.0),
        ],
        -1,
    )
    images_bvhwc = image_hwc.to(torch.uint8).expand(1, max(len(spec.cameras), 1), size_px, size_px, 3).contiguous()
    state_bs = torch.zeros(1, spec.state_size) if spec.state_size else None
    return PolicyInput(images_bvhwc, state_bs, ["go"])  # one word, because the smallest models take only a few tokens
