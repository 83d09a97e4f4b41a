"""One update: a batch of on-policy episodes in, changed adapter parameters and diagnostics out.

Knows optimiser, minibatches, micro-batches and which loss to call. The losses are in grpo.py and ppo.py.
Knows no environment, no store and no schedule of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.update import grpo, ppo
from ratchet_vla.learner.update.minibatch import Diagnostics, Minibatch, flatten
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.policy.computing import computing_as, name_of
from ratchet_vla.policy.protocol import Policy

__all__ = ["UpdateConfig", "Updater"]

FLOAT16_LOSS_SCALE = 2.0**14
"""Factor on the loss while float16 gradients are computed, divided out again; a power of two rounds nothing."""


@dataclass(frozen=True)
class UpdateConfig:
    """How a batch becomes optimiser steps. Defaults are the published recipe's (arXiv 2603.11653)."""

    algorithm: Literal["grpo", "ppo"] = "grpo"
    """Which loss: grpo compares episodes within a group, ppo gives credit per chunk with a value head."""
    learning_rate: float = 2e-5
    """AdamW learning rate of the adapter; > 0."""
    weight_decay: float = 0.01
    """AdamW weight decay of the adapter."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    warmup_steps: int = 0
    """Optimiser steps over which a task's learning rate rises linearly to its value. Adam's first steps have full size
    whatever the gradient's, so without it the first update of a task moves the policy most."""
    gradient_clip: float = 1.0
    """Largest gradient norm over all adapter parameters."""
    minibatches: int = 8
    """Optimiser steps per pass over the batch."""
    passes: int = 1
    """Passes over the batch; each sample is used this often."""
    micro_size: int = 64
    """Samples per forward and backward; gradients of micro-batches add up, so it changes memory, not the result."""
    checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping what they made: memory for a third more time."""
    success_reward: float = 5.0
    """Reward of an episode that succeeded; failures get 0."""
    target_kl: float = 0.0
    """Stop the pass when the mean KL per token (k3, nats) from the sampling policy exceeds this; 0 never stops."""
    value_passes: int = 4
    """Passes of the value head alone over the batch before advantages are computed (ppo only)."""
    grpo: grpo.GrpoConfig = field(default_factory=grpo.GrpoConfig)
    ppo: ppo.PpoConfig = field(default_factory=ppo.PpoConfig)


@dataclass
class Padded:
    """A rollout batch as (E, C, ...): episodes padded to the longest, and the row of each chunk (-1 for padding)."""

    row: Tensor
    old_log_prob: Tensor
    valid: Tensor
    present: Tensor


def pad(batch: RolloutBatch) -> Padded:
    """Arrange the flat decisions by episode and chunk."""
    episodes = len(batch.success)
    episode = torch.from_numpy(batch.episode)
    chunk_counts = np.bincount(batch.episode, minlength=episodes)
    # Decisions stand in order of time within their episode, so the position is a count from its start.
    position = torch.from_numpy(np.concatenate([np.arange(count) for count in chunk_counts]))  # (N,)
    chunks = int(position.max()) + 1
    row = torch.full((episodes, chunks), -1, dtype=torch.int64)
    row[episode, position] = torch.arange(len(episode))
    chunk_steps, dims = batch.log_prob.shape[1:]
    old_log_prob = torch.zeros(episodes, chunks, chunk_steps, dims)
    old_log_prob[episode, position] = torch.from_numpy(batch.log_prob)
    valid = torch.zeros(episodes, chunks, chunk_steps, dtype=torch.bool)
    valid[episode, position] = torch.from_numpy(batch.valid)
    return Padded(row, old_log_prob, valid, row >= 0)


class Updater:
    """Owns the optimiser of one adapter (and of the value head) for the length of one task.

    Args:
        policy: its trainable parameters are the adapter's.
        parameters: the adapter's tensors.
        generator: order of samples; part of the resumable state.
        ranks: the processes that share each optimiser step; all get the same batches. None for one process.
        groups: parameter groups for the optimiser, with learning rates of their own; one group if absent.
        on_gradient: called when the gradient of a step's policy loss is complete.
        extra_losses: terms to add to each step's loss, one after the other, so that each frees its memory.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        config: UpdateConfig,
        generator: torch.Generator,
        ranks: Ranks | None = None,
        *,
        groups: list[dict[str, Any]] | None = None,
        on_gradient: Callable[[], None] = lambda: None,
        extra_losses: Callable[[torch.Generator], Iterable[Tensor]] = lambda generator: (),
    ) -> None:
        if not parameters:
            raise RatchetError("learner.no_parameters", "nothing to train", fix="attach an adapter first")
        if config.checkpointing:
            recompute = getattr(policy.module, "set_checkpointing", None)
            if recompute is None:
                raise RatchetError("learner.no_checkpointing", "this policy cannot recompute layers", where="update")
            recompute(True)
        self.policy = policy
        self.ranks = ranks
        self.parameters = list(parameters)
        self.config = config
        self.generator = generator
        self.on_gradient = on_gradient
        self.extra_losses = extra_losses
        self.optimizer = torch.optim.AdamW(
            groups or self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eps=config.adam_epsilon,
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1 / (config.warmup_steps + 1), total_iters=config.warmup_steps
        )
        self.value_head: ppo.ValueHead | None = None
        self.value_optimizer: torch.optim.AdamW | None = None

    def update(self, batch: RolloutBatch) -> dict[str, float]:
        """Change the adapter once; returns what to log. The policy computes in the dtype that the batch was sampled in.

        Raises:
            RatchetError: learner.no_samples where nothing distinguishes the episodes (nothing was changed then);
                learner.not_finite, after which earlier steps of this update stand: go back to a checkpoint.
        """
        started = time.perf_counter()
        padded = pad(batch)
        samples, masked_share = self._samples(batch, padded)
        diagnostics_sum = Diagnostics()
        steps = 0
        norms = []
        for minibatch in self._minibatches(samples):
            with computing_as(self.policy, batch.compute_dtype):
                diagnostics, norm = self._step(batch, padded, minibatch)
            diagnostics_sum = diagnostics_sum + diagnostics
            steps = steps + 1
            norms.append(norm)
            # Checked after the step: the figure is of the policy as it was before it.
            if self.config.target_kl and diagnostics.kl / max(diagnostics.tokens, 1) > self.config.target_kl:
                break
        means = diagnostics_sum.means()
        means["policy_loss"] /= max(steps, 1)
        means["value_loss"] /= max(steps, 1)
        return {
            **means,
            "loss": means["policy_loss"],
            "optimizer_steps": steps,
            "gradient_norm": float(np.mean(norms)),
            "masked_groups": masked_share,
            "samples": len(samples),
            "seconds_update": time.perf_counter() - started,
        }

    def _minibatches(self, samples: Minibatch) -> Iterator[Minibatch]:
        """Pass after pass; a pass is shuffled when it begins, so that one that never begins draws no numbers."""
        for _ in range(self.config.passes):
            yield from samples.shuffled(self.config.minibatches, self.generator)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the adapter's own tensors that the next update depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "value_head": self.value_head.state_dict() if self.value_head else None,
            "value_optimizer": self.value_optimizer.state_dict() if self.value_optimizer else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        if state["value_head"] is not None:
            self._make_value_head(state["value_head"]["norm.weight"].shape[0])
            assert self.value_head is not None
            assert self.value_optimizer is not None
            self.value_head.load_state_dict(state["value_head"])
            self.value_optimizer.load_state_dict(state["value_optimizer"])

    def _samples(self, batch: RolloutBatch, padded: Padded) -> tuple[Minibatch, float]:
        score = torch.from_numpy(batch.success).float() * self.config.success_reward
        if self.config.algorithm == "grpo":
            targets = grpo.targets(score, torch.from_numpy(batch.group), padded.valid, self.config.grpo)
            return flatten(targets, padded.old_log_prob, padded.valid), targets.masked_share
        value = self._fit_values(batch, padded, score)
        reward = torch.zeros_like(value)
        last = padded.present.sum(1) - 1
        # Success is worth 1 to the value head whatever the score's scale, so that its clip keeps its meaning.
        reward[torch.arange(len(last)), last] = torch.from_numpy(batch.success).float()
        # A horizon reached without success is a failure, not a cut.
        terminated = torch.ones(len(last), dtype=torch.bool)
        targets = ppo.targets(
            reward, value, padded.present, torch.zeros(len(last)), terminated, padded.valid, self.config.ppo
        )
        return flatten(targets, padded.old_log_prob, padded.valid, value), 0.0

    def _make_value_head(self, features: int) -> None:
        seeded = torch.Generator().manual_seed(0)
        self.value_head = ppo.ValueHead(features)
        with torch.no_grad():
            # Written over with a generator of its own: the global one would tie the head to what ran before it.
            for parameter in (self.value_head.hidden.weight, self.value_head.hidden.bias):
                bound = features**-0.5
                parameter.uniform_(-bound, bound, generator=seeded)
        self.value_optimizer = torch.optim.AdamW(
            self.value_head.parameters(), lr=self.config.ppo.value_learning_rate, weight_decay=self.config.weight_decay
        )

    def _fit_values(self, batch: RolloutBatch, padded: Padded, score: Tensor) -> Tensor:
        """Values of every chunk, (E, C), 0 for padding, by the head as it was before it saw this batch's outcomes.

        The head then takes its own steps on the batch's returns; it reads stored features, so this costs milliseconds.
        """
        if batch.feature.shape[1] == 0:
            raise RatchetError(
                "learner.no_feature", "this policy gives no feature for a value head", fix="use algorithm grpo"
            )
        is_new_head = self.value_head is None
        if is_new_head:
            self._make_value_head(batch.feature.shape[1])
        head = self.value_head
        optimizer = self.value_optimizer
        assert head is not None
        assert optimizer is not None
        feature = torch.from_numpy(batch.feature)

        def values() -> Tensor:
            with torch.no_grad():
                flat = head(feature)
            padded_values = torch.zeros(padded.row.shape)
            padded_values[padded.present] = flat[padded.row[padded.present]]
            return padded_values

        value = values()  # (E, C)
        successes = torch.from_numpy(batch.success).float()[:, None].expand_as(value)  # (E, C)
        chunks_left = padded.present.sum(1, keepdim=True) - 1 - torch.arange(value.shape[1])[None]  # (E, C)
        returns = (self.config.ppo.gamma ** chunks_left.clamp(min=0)) * successes
        target = torch.zeros(len(feature))  # (N,)
        target[padded.row[padded.present]] = returns[padded.present]
        for _ in range(self.config.value_passes * (5 if is_new_head else 1)):
            for rows in torch.randperm(len(feature), generator=self.generator).split(256):  # type: ignore[no-untyped-call]
                loss = ppo.huber(head(feature[rows]) - target[rows], self.config.ppo.huber_delta).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        # The very first head knows nothing; its fit on this batch is still better than advantages without a baseline.
        return values() if is_new_head else value

    def _step(self, batch: RolloutBatch, padded: Padded, minibatch: Minibatch) -> tuple[Diagnostics, float]:
        total = Diagnostics()
        # A power of two, so that nothing is rounded; without it most gradients are too small for float16's exponent.
        loss_scale = FLOAT16_LOSS_SCALE if name_of(self.policy) == "float16" else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = list(minibatch.micro(self.config.micro_size))
        shares = [(micro_batch, 1.0) for micro_batch in micro_batches]
        if self.ranks:
            shares = self.ranks.share(micro_batches)
        for micro_batch, factor in shares:
            rows = padded.row[micro_batch.index[:, 0], micro_batch.index[:, 1]].numpy()
            tokens = torch.from_numpy(batch.tokens[rows])
            log_prob, entropy = self.policy.log_prob(batch.policy_input(rows), tokens, batch.temperature)
            # (M, K, D) each. The batch's own numbers live on the host; these are as small.
            log_prob = log_prob.cpu()
            entropy = entropy.cpu()
            try:
                loss, diagnostics = self._loss(log_prob, entropy, micro_batch)
            except RatchetError as error:
                if self.ranks is None or error.code != "learner.not_finite":
                    raise
                # The other ranks are on their way to the sum of gradients: take part, and let all refuse this step.
                loss = log_prob.sum() * float("nan")
                diagnostics = Diagnostics()
            (loss * (factor * loss_scale)).backward()  # type: ignore[no-untyped-call]
            if factor:
                total = total + diagnostics
        if loss_scale != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(loss_scale)
        if self.ranks:
            self.ranks.add_gradients(self.parameters)
            total = self.ranks.add(total)
        # Extra terms are the same on every rank: before the sum over ranks they would count once per rank. They come
        # after on_gradient too, which reads the gradient of the policy loss alone.
        self.on_gradient()
        for extra_term in self.extra_losses(self.generator):
            extra_term.backward()  # type: ignore[no-untyped-call]
        gradient_norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip))
        if not np.isfinite(gradient_norm):
            raise RatchetError(
                "learner.not_finite",
                "the gradient is not finite; this optimiser step was not taken",
                where=self.config.algorithm,
                fix="go back to the last checkpoint and lower the learning rate",
            )
        self.optimizer.step()
        self.schedule.step()
        return total, gradient_norm

    def _loss(self, log_prob: Tensor, entropy: Tensor, micro: Minibatch) -> tuple[Tensor, Diagnostics]:
        if self.config.algorithm == "grpo":
            return grpo.loss(log_prob, entropy, micro, self.config.grpo)
        assert micro.old_value is not None
        return ppo.loss(log_prob, entropy, micro.old_value, micro, self.config.ppo)
