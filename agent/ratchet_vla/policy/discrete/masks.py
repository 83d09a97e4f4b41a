"""Telling whether a checkpoint was trained with the attention mask that it is run with.

Knows two masks and how sure a model is under each. A model that runs with the mask of its training is far surer of its
tokens; under the other one its probability spreads over tokens that are no actions and over actions that mean nothing.
The check needs a few observations that look like the training data; on random ones no model is sure of anything.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.layers.linear import linear
from ratchet_vla.policy.protocol import PolicyInput

MARGIN = 0.3  # nats per token: clear for a model that is unsure by its labels, such as smoothed ones
TRAINED = 1.0 - math.log(BINS)  # nats per token: less sure, and the model knows next to nothing about what it sees
FACTOR, LEAST = 1.5, 0.05  # times as surprised, and nats per token at least: clear for a model that is sure


@dataclass(frozen=True)
class MaskReport:
    """How sure the model is under both masks.

    stated: mean over tokens of the best action's log-probability among ALL the head's tokens, nats, under the mask that
        the policy states; other: under the other one. Both <= 0.
    """

    attention: str
    stated: float
    other: float

    @property
    def fits(self) -> bool | None:
        """True or False where one mask is clearly surer, None where the observations cannot tell."""
        worse, better = sorted((self.stated, self.other))
        clear = better - worse >= MARGIN or (better - worse >= LEAST and worse <= FACTOR * better)
        if not clear:
            return None
        return self.stated > self.other if better >= TRAINED else None


@torch.no_grad()
def check(policy: PrismaticPolicy, batch: PolicyInput) -> MaskReport:
    """Run both masks over some observations; the policy is left as it is.

    Raises:
        RatchetError: policy.no_probabilities for a regression head; policy.bad_input.
    """
    if policy.config.head != "tokens":
        raise RatchetError(
            "policy.no_probabilities", "a regression head gives nothing to compare", fix="skip the check"
        )
    network = policy.network
    config = policy.network.config
    other = "causal" if config.attention == "bidirectional" else "bidirectional"
    if config.decoding == "autoregressive":
        return MaskReport(config.attention, 0.0, -float("inf"))  # only one mask is possible
    pixels, ids, mask, state = policy.inputs(batch)
    sure = []
    try:
        for attention in (config.attention, other):
            network.config = dataclasses.replace(config, attention=attention)  # type: ignore[arg-type]
            with policy.autocast():
                hidden = policy.hidden_states(pixels, ids, mask, state)
                logits = linear(network.language_model.lm_head, hidden).float()
            best = logits.log_softmax(-1)[..., config.action_rows].amax(-1)
            sure.append(float(best.mean()))
    finally:
        network.config = config
    return MaskReport(config.attention, sure[0], sure[1])


def require(policy: PrismaticPolicy, batch: PolicyInput) -> MaskReport:
    """Refuse a policy whose mask does not fit.

    Raises:
        RatchetError: policy.attention_mismatch, and as `check`.
    """
    report = check(policy, batch)
    if report.fits is False:
        other = "causal" if report.attention == "bidirectional" else "bidirectional"
        raise RatchetError(
            "policy.attention_mismatch",
            f"with {report.attention} attention the best action has log-probability {report.stated:.2f} on average, "
            f"with {other} {report.other:.2f}",
            where=policy.spec.statistics_key,
            fix=f"state attention={other!r} for this checkpoint",
        )
    return report
