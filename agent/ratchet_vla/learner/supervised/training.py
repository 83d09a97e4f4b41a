"""Supervised training: makes a small base, and warm-starts adapters.

Knows samples, augmentation, schedule and checkpoints; objectives.py knows the losses. Knows neither simulator nor file
formats of episodes.
Order of samples and augmentation derive from (seed, step), so a killed run resumes to the same numbers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.objectives import Objective, objective_of
from ratchet_vla.learner.supervised.objectives import soft_targets as soft_targets
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Float32, Int64, UInt8
from ratchet_vla.storage.documents import replacing

__all__ = ["PretrainConfig", "Pretrainer", "Samples"]


class Samples(Protocol):
    """M supervised samples; `ratchet_sim.demonstrations.Demonstrations` has them."""

    images: UInt8
    state: Float32
    actions: Float32
    task: Int64
    start: Int64
    tasks: list[str]
    instructions: list[str]

    def __len__(self) -> int: ...


def rows_of_tasks(samples: Samples, names: Collection[str]) -> Int64:
    """Rows of the samples of these tasks, (R,); names without samples add none."""
    task_indices = [task_index for task_index, name in enumerate(samples.tasks) if name in names]
    return np.flatnonzero(np.isin(samples.task, task_indices))


def observations(samples: Samples, rows: Int64) -> PolicyInput:
    """What a policy sees of the samples at `rows`, as they were recorded."""
    state = torch.from_numpy(samples.state[rows]) if samples.state.shape[1] else None
    instructions = [samples.instructions[task_index] for task_index in samples.task[rows]]
    return PolicyInput(samples.images[rows], state, instructions)


@dataclass(frozen=True)
class PretrainConfig:
    """Supervised training."""

    steps: int = 2000
    """Optimiser steps."""
    stop_at: int = 0
    """Stop after so many of the schedule's steps, for a base that is imperfect on purpose; 0 goes to the end."""
    batch: int = 64
    """Samples per step."""
    learning_rate: float = 1e-3
    """Peak of a one-cycle schedule (warm-up over 5 % of the steps, cosine to zero)."""
    weight_decay: float = 0.02
    """AdamW weight decay."""
    smoothing: float = 2.0
    """Standard deviation, in bins, of the Gaussian that replaces the one-hot target (bins have neighbours)."""
    brightness: float = 0.15
    """Images are scaled by 1 +- this and shifted per channel by up to 255 times half of it."""
    shift: int = 4
    """Images are shifted by up to so many pixels, edges replicated."""
    state_noise: float = 0.02
    """Noise on the state, in its standard deviations over the data."""
    validation_share: float = 0.05
    """Share of initial states kept for validation."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    save_every: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Root of every random number."""


@dataclass(frozen=True)
class Progress:
    """One report: step, loss, what `Objective.measure` gives on validation, samples per second."""

    step: int
    loss: float
    validation_loss: float
    validation_error: float
    entropy: float
    samples_per_second: float


def augment(images: Tensor, config: PretrainConfig, generator: torch.Generator) -> Tensor:
    """(B, V, H, W, 3) uint8 -> the same, randomly scaled in brightness, tinted and shifted."""
    batch, views, height, width, _ = images.shape
    gain = 1 + config.brightness * (2 * torch.rand(batch, 1, 1, 1, 1, generator=generator) - 1)
    tint = 255 * config.brightness / 2 * (2 * torch.rand(batch, 1, 1, 1, 3, generator=generator) - 1)
    augmented = images.float() * gain + tint
    if config.shift:
        margin = config.shift
        channels_first = augmented.reshape(batch * views, height, width, 3).permute(0, 3, 1, 2)
        padded = functional.pad(channels_first, (margin,) * 4, "replicate")
        # One shift per sample: its views stay consistent with each other.
        offsets = torch.randint(0, 2 * margin + 1, (batch, 2), generator=generator).repeat_interleave(views, 0)
        shifted = []
        for image, (top, left) in zip(padded, offsets.tolist(), strict=True):
            shifted.append(image[:, top : top + height, left : left + width])
        augmented = torch.stack(shifted)  # (B * V, 3, H, W)
        augmented = augmented.permute(0, 2, 3, 1).reshape(batch, views, height, width, 3)
    return augmented.clamp(0, 255).to(torch.uint8)


class Pretrainer:
    """Trains a policy's own weights (or, with an adapter attached, the adapter's) on samples.

    Args:
        parameters: what is trained; everything else must be frozen by the caller.
        folder: checkpoint and log; None keeps nothing.
        weights: (M,) how often each sample is drawn, relative to the others; evenly if absent.
        objective: what is minimised; the policy's own cloning loss if absent.

    Raises:
        RatchetError: learn.too_few_samples, learn.bad_weights.
    """

    def __init__(
        self,
        policy: PrismaticPolicy | FlowPolicy,
        parameters: Sequence[nn.Parameter],
        samples: Samples,
        config: PretrainConfig,
        folder: Path | None = None,
        weights: Float32 | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.policy = policy
        self.samples = samples
        self.config = config
        self.folder = folder
        self.parameters = list(parameters)
        self.objective = objective or objective_of(policy, torch.from_numpy(samples.actions), config.smoothing)
        # Whole initial states are held out: frames of one episode resemble each other too much to be on both sides.
        initial_states = np.unique(samples.start)
        shuffled = np.random.default_rng(config.seed).permutation(len(initial_states))
        held_count = max(1, round(config.validation_share * len(initial_states)))
        is_held = np.isin(samples.start, initial_states[shuffled[:held_count]])
        self.train_rows = np.flatnonzero(~is_held)
        self.validation_rows = np.flatnonzero(is_held)
        if not len(self.train_rows):
            raise RatchetError("learn.too_few_samples", "no training samples are left", fix="record more episodes")
        self.weights = None
        if weights is not None:
            sample_weights = np.asarray(weights, np.float32)
            if sample_weights.shape != (len(samples),) or not (sample_weights >= 0).all() or not sample_weights.any():
                raise RatchetError("learn.bad_weights", "one weight per sample, none negative, not all zero")
            self.weights = torch.from_numpy(sample_weights[self.train_rows])
        self.state_scale = torch.from_numpy(samples.state.std(0)) if samples.state.shape[1] else None
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=0.05
        )
        self.step = 0
        self.last = min(config.stop_at or config.steps, config.steps)

    def run(self, on_progress: Callable[[Progress], None] = lambda progress: None, every: int = 50) -> None:
        """Train to the last step, from the checkpoint if the folder holds one."""
        self._resume()
        # The tails of smoothed targets are denormal, which CPUs handle in slow motion; the setting is the process's.
        torch.set_flush_denormal(True)
        try:
            self._train(on_progress, every)
        finally:
            torch.set_flush_denormal(False)
            self.policy.module.eval()

    def _train(self, on_progress: Callable[[Progress], None], every: int) -> None:
        self.policy.module.train()
        started_s = time.perf_counter()
        first_step = self.step
        while self.step < self.last:
            loss = self._train_step()
            self.step += 1
            if self.step % every == 0 or self.step == self.last:
                samples_per_second = (self.step - first_step) * self.config.batch / (time.perf_counter() - started_s)
                validation = self._validate()
                on_progress(Progress(self.step, loss, *validation, samples_per_second))
            if self.folder and (self.step % self.config.save_every == 0 or self.step == self.last):
                self._save()

    def _batch(self, rows: Int64, generator: torch.Generator | None) -> PolicyInput:
        images = torch.from_numpy(self.samples.images[rows])
        state = torch.from_numpy(self.samples.state[rows]) if self.samples.state.shape[1] else None
        if generator is not None:
            images = augment(images, self.config, generator)
            if state is not None and self.state_scale is not None:
                noise = torch.randn(state.shape, generator=generator)
                state = state + noise * self.config.state_noise * self.state_scale
        instructions = [self.samples.instructions[task_index] for task_index in self.samples.task[rows]]
        return PolicyInput(images, state, instructions)

    def _train_step(self) -> float:
        # A generator per step, so that resuming needs no stored state.
        # The factor is above any number of steps, so two seeds share no step's numbers.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        if self.weights is None:
            picks = torch.randint(0, len(self.train_rows), (self.config.batch,), generator=generator)
        else:
            picks = torch.multinomial(self.weights, self.config.batch, replacement=True, generator=generator)
        rows = self.train_rows[picks.numpy()]
        loss = self.objective.loss(self._batch(rows, generator), torch.from_numpy(rows), generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        if not torch.isfinite(gradient_norm):
            raise RatchetError(
                "learn.not_finite", "the gradient is not finite", where=f"step {self.step}", fix="lower learning_rate"
            )
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def _validate(self) -> tuple[float, float, float]:
        rows = self.validation_rows
        if not len(rows):
            return (float("nan"),) * 3
        # At most 256, evenly spread: a validation costs about as much as a few steps.
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(np.int64)]
        self.policy.module.eval()
        measured = self.objective.measure(self._batch(rows, None), torch.from_numpy(rows))
        self.policy.module.train()
        return measured

    def _fingerprint(self) -> str:
        weight_count = sum(parameter.numel() for parameter in self.parameters)
        identity = repr((asdict(self.config), len(self.samples), self.samples.tasks, weight_count))
        if self.weights is not None:
            identity += hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()
        return hashlib.sha256(identity.encode()).hexdigest()

    def _save(self) -> None:
        assert self.folder is not None
        state: dict[str, Any] = {
            "fingerprint": self._fingerprint(),
            "step": self.step,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with replacing(self.folder / "pretrain.pt") as file:
            torch.save(state, file)

    def _resume(self) -> None:
        path = self.folder / "pretrain.pt" if self.folder else None
        if path is None or not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["fingerprint"] != self._fingerprint():
            raise RatchetError(
                "learn.changed_run",
                "this folder holds a training with other settings",
                where=str(path),
                fix="new folder",
            )
        self.step = state["step"]
        with torch.no_grad():
            for parameter, stored in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
