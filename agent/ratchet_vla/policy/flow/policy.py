"""Flow-matching VLAs (pi0, pi0.5, SmolVLA, the small built-in one) behind the Policy protocol, with true likelihoods.

Knows prompts, statistics, sampling and log-probabilities around the network (network.py). Knows no file, no
adapter and no robot. What is sampled is a chain: the points that a stochastic flow passes through from noise to actions
(sde.py). Its probability is known exactly, step by step, so the same learner serves these policies as the discrete
ones. `Chunks.tokens` holds the chain, (B, N + 1, H, A) float32, where discrete policies have their bins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer
from scipy.special import ndtri
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.computing import Computing
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow import sde as flow_sde
from ratchet_vla.policy.flow.network import FlowConfig, FlowNetwork, Prefix
from ratchet_vla.policy.flow.text import FlowPrompt
from ratchet_vla.policy.images import prepare
from ratchet_vla.policy.protocol import Chunks, PolicyInput

__all__ = ["FlowPolicy", "FlowStatistics"]


@dataclass(frozen=True)
class FlowStatistics:
    """Normalisation, frozen with the base: normalised = (physical - offset) / scale, per value.

    key: which data they come from. units: per action dimension.
    """

    key: str
    units: tuple[str, ...]
    action_offset: tuple[float, ...]
    action_scale: tuple[float, ...]
    state_offset: tuple[float, ...] = ()
    state_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (*self.action_offset, *self.action_scale, *self.state_offset, *self.state_scale)
        same = len(self.units) == len(self.action_offset) == len(self.action_scale) > 0
        if not same or len(self.state_offset) != len(self.state_scale):
            what = "every action dimension needs a unit, an offset and a scale, every state value the latter two"
        elif not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            what = "statistics must be finite numbers"
        elif not all(v > 0 for v in (*self.action_scale, *self.state_scale)):
            what = "a scale is not above 0"
        else:
            return
        raise RatchetError(
            "policy.missing_statistics", what, where=self.key or "statistics", fix="take those of the training data"
        )


class FlowPolicy(Computing):
    """A flow policy that implements the Policy protocol.

    Construct with `lerobot.load(folder)`, `checkpoint.load(folder)`, or from parts, with random weights.

    Raises:
        RatchetError: policy.missing_statistics, policy.wrong_statistics, policy.bad_config,
        policy.unknown_vision_tower.
    """

    config: FlowConfig
    gives_probabilities = True

    def __init__(self, config: FlowConfig, spec: PolicySpec, statistics: FlowStatistics, tokenizer: Tokenizer) -> None:
        dims, state = len(spec.action_names), spec.state_size if spec.state else 0
        if len(statistics.units) != dims or len(statistics.state_offset) != state:
            raise RatchetError(
                "policy.missing_statistics",
                f"statistics have {len(statistics.units)} action and {len(statistics.state_offset)} state values, "
                f"the policy {dims} and {state}",
                where=statistics.key,
                fix="take those of the training data",
            )
        if statistics.key != spec.statistics_key or statistics.units != spec.action_units:
            raise RatchetError(
                "policy.wrong_statistics",
                f"statistics '{statistics.key}' in {statistics.units} for a policy of '{spec.statistics_key}' in "
                f"{spec.action_units}",
                fix="take the statistics that the checkpoint was trained with",
            )
        if dims > config.action_width or state > config.state_width or spec.chunk > config.horizon or spec.bins:
            raise RatchetError(
                "policy.bad_config",
                f"{dims} actions, {state} state values, chunk {spec.chunk}, {spec.bins} bins do not fit a flow of "
                f"{config.action_width}, {config.state_width}, {config.horizon}, none",
                where="model",
            )
        if bool(state) != (config.state != "none"):
            raise RatchetError("policy.bad_config", "the state's place and the state's fields disagree", where="model")
        if tokenizer.get_vocab_size() > config.vocabulary:
            raise RatchetError(
                "policy.wrong_vocabulary",
                f"the tokenizer has {tokenizer.get_vocab_size()} ids, the model {config.vocabulary}",
                fix="use the tokenizer that the checkpoint came with",
            )
        self.config, self.statistics, self.tokenizer = config, statistics, tokenizer
        self._spec, self._preparation = spec, config.preparation()
        self.network = FlowNetwork(config).eval()
        self.prompt = FlowPrompt(tokenizer, config.prompt, config.prompt_length)
        self._base_hash = ""

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    @property
    def takes_any_size(self) -> bool:
        """Whether images of any size go in, to be resized as in training."""
        return self._preparation.any_size()

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def base_hash(self) -> str:
        """SHA-256 over configuration, statistics, tokenizer and base tensors; adapters attached later do not count."""
        if not self._base_hash:
            facts = {
                "config": self.config.facts(),
                "spec": dataclasses.asdict(self._spec),
                "statistics": dataclasses.asdict(self.statistics),
                "tokenizer": json.loads(self.tokenizer.to_str()),
            }
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
            for name, tensor in sorted(self.base_tensors().items()):
                raw = self.as_stored(name, tensor.detach()).cpu().contiguous()
                digest.update(f"{name}:{raw.dtype}:{tuple(raw.shape)}".encode())
                digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
            self._base_hash = digest.hexdigest()
        return self._base_hash

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's own tensors, with or without adapters attached.

        Raises:
            RatchetError: policy.merged while an adapter is merged into them.
        """
        merged = [n for n, m in self.network.named_modules() if isinstance(m, LoraLayer) and m.merged]
        if merged:
            raise RatchetError(
                "policy.merged", "an adapter is merged into the base's tensors", where=merged[0], fix="unmerge it first"
            )
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.network.state_dict().items()
            if ".lora_" not in name
        }

    def base_changed(self) -> None:
        """Tell that the base's tensors were written: its hash is computed anew."""
        self._base_hash = ""

    # What the Policy protocol asks for.

    @torch.no_grad()
    def predict(
        self, batch: PolicyInput, guide: rtc.Guide | None = None, noise: Tensor | None = None, steps: int = 0
    ) -> Chunks:
        """One answer without randomness.

        guide: what the chunk has to go on from (real-time chunking); its actions are normalised, see `normalised`.
        noise: (B, H, A) where the flow starts; the configuration's own start if absent. steps: 0 for the
        configuration's.
        """
        prefix = self.prefix(batch)
        velocity = self.velocity(prefix)
        if guide is not None:
            velocity = rtc.guided(velocity, guide)
        start = self.start(len(batch)) if noise is None else noise.to(self.device)
        x = flow_sde.integrate(velocity, start, steps or self.config.steps)
        actions = self.actions_of(x)
        return Chunks(actions, None, torch.zeros(actions.shape, device=actions.device), prefix.summary.float())

    def predict_ahead(self, batch: PolicyInput, previous_actions: Tensor, delay: int) -> Chunks:
        """A chunk that goes on from the one that is being executed (real-time chunking).

        previous_actions: (B, P, D) physical, in this policy's numbers: the running plan from the observation's moment
        on.
        delay: of these, how many will have been sent before this answer is in force. The pull fades over the others.
        """
        return self.predict(batch, self.guide(previous_actions, delay))

    def guide(self, previous_actions: Tensor, delay: int) -> rtc.Guide:
        """What `predict` needs to go on from a plan; arguments as `predict_ahead`."""
        return rtc.Guide(self.normalised(previous_actions.to(self.device)), delay, horizon=previous_actions.shape[1])

    @property
    def sampled_shape(self) -> tuple[int, int, int]:
        """Shape of one decision's chain, as `sample` returns it in `Chunks.tokens`."""
        return self.config.sample_steps + 1, self.config.horizon, self.config.action_width

    @torch.no_grad()
    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        """temperature multiplies the flow's noise; noise seeds every number that is drawn."""
        self._require_temperature(temperature)
        expected = (len(batch), self._spec.chunk, len(self._spec.action_names))
        if tuple(noise.shape) != expected:
            raise RatchetError("policy.bad_input", f"noise is {tuple(noise.shape)}, expected {expected}", where="noise")
        first, shocks = self._draws(noise)
        prefix = self.prefix(batch)
        level = self.config.noise_level * temperature
        velocity = self.velocity(prefix)
        chain, density = flow_sde.sample(velocity, first, shocks, level, self._mixing())
        log_prob, _ = self._folded(density, density)
        return Chunks(self.actions_of(chain[:, -1]), chain, log_prob, prefix.summary.float())

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Of given chains (B, N + 1, H, A); their sum over (K, D) is the exact log-density of the chain."""
        self._require_temperature(temperature)
        config = self.config
        expected = (len(batch), config.sample_steps + 1, config.horizon, config.action_width)
        if tuple(tokens.shape) != expected or not tokens.is_floating_point():
            raise RatchetError(
                "policy.bad_input",
                f"the chain is {tuple(tokens.shape)} {tokens.dtype}, expected {expected} float32",
                where="tokens",
                fix="give what sample() returned as tokens",
            )
        if not bool(torch.isfinite(tokens).all()):
            raise RatchetError("policy.bad_input", "the chain is not finite", where="tokens")
        velocity = self.velocity(self.prefix(batch))
        chain = tokens.to(self.device, torch.float32)
        level = config.noise_level * temperature
        return self._folded(*flow_sde.log_density(velocity, chain, level, self._mixing()))

    def _mixing(self) -> Tensor:
        return flow_sde.mixing(self.config.horizon, self.config.shock_correlation).to(self.device)

    # What training, chunking and checks use.

    def loss(self, batch: PolicyInput, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """(B, H, A) flow-matching loss with gradient.

        actions: (B, K, D) physical. noise: (B, H, A) standard normal. time: (B,) in (0, 1].
        """
        wanted = self.normalised(actions.to(self.device))
        velocity = self.velocity(self.prefix(batch))
        return flow_sde.matching_loss(velocity, wanted, noise.to(self.device), time.to(self.device))

    def normalised(self, actions: Tensor) -> Tensor:
        """Physical actions (B, K', D) -> what the network sees, (B, H, A): last step repeated, zeros beside."""
        config, s = self.config, self.statistics
        offset = torch.tensor(s.action_offset, device=actions.device)
        x = (actions.float() - offset) / torch.tensor(s.action_scale, device=actions.device)
        short = config.horizon - x.shape[1]
        if short > 0:
            x = torch.cat([x, x[:, -1:].expand(-1, short, -1)], 1)
        return nn.functional.pad(x[:, : config.horizon], (0, config.action_width - x.shape[2]))

    def actions_of(self, sampled: Tensor) -> Tensor:
        """(B, H, A) -> physical actions (B, K, D) float32."""
        s, dims = self.statistics, len(self._spec.action_names)
        kept = sampled[:, : self._spec.chunk, :dims].float()
        scale = torch.tensor(s.action_scale, device=sampled.device)
        return kept * scale + torch.tensor(s.action_offset, device=sampled.device)

    def prefix(self, batch: PolicyInput) -> Prefix:
        """The language model's pass over some observations; every step of a flow reads it."""
        pixels, ids, mask, state = self.inputs(batch)
        with self.autocast():
            return self.network.prefix(pixels, ids, mask, state, self.compute_dtype)

    def inputs(self, batch: PolicyInput) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pixels, prompt ids and mask, padded normalised state: what the network takes, on its device."""
        images, state = self._check(batch)
        width = 0 if state is None else state.shape[1]
        if state is not None:
            s = self.statistics
            offset = torch.tensor(s.state_offset, device=state.device)
            state = (state - offset) / torch.tensor(s.state_scale, device=state.device)
        said = state if self.config.state == "words" else None
        ids, mask = self.prompt(batch.instructions, said, fixed=self.device.type != "cpu")
        pixels = prepare(images, self._spec.image_size, self._preparation)
        if state is not None:
            state = nn.functional.pad(state, (0, self.config.state_width - width))
        return pixels, ids.to(self.device), mask.to(self.device), state

    def velocity(self, prefix: Prefix) -> flow_sde.Velocity:
        """Where noisy actions move, given what the language model left, with gradient."""

        def at(x: Tensor, time: Tensor) -> Tensor:
            with self.autocast():
                return self.network.velocity(prefix, x, time, self.compute_dtype)

        def again(x: Tensor, time: Tensor) -> Tensor:
            found: Tensor = torch_checkpoint(at, x, time, use_reentrant=False)
            return found

        return again if self.network.checkpointing and torch.is_grad_enabled() else at

    def _folded(self, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, A) -> (B, K, D) with the same sum: what padding holds is spread evenly over the real actions."""
        steps, dims = self._spec.chunk, len(self._spec.action_names)

        def fold(x: Tensor) -> Tensor:
            real = x[:, :steps, :dims]
            rest = x.sum((1, 2)) - real.sum((1, 2))
            return real + rest[:, None, None] / (steps * dims)

        return fold(log_prob), fold(entropy)

    def start(self, rows: int) -> Tensor:
        """(B, H, A) what prediction starts from."""
        shape = (1, self.config.horizon, self.config.action_width)
        if self.config.start == "zeros":
            start = torch.zeros(shape)
        else:
            start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return start.expand(rows, -1, -1).to(self.device)

    def _draws(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """First point (B, H, A) and shocks (B, N, H, A), standard normal, each row from its own noise alone.

        The real actions' first point is the noise itself through the normal distribution's inverse, so that whatever
        correlation a caller gave it stays; everything else comes from a generator that is seeded with the row.
        """
        c, (_, steps, dims) = self.config, noise.shape
        rows = np.ascontiguousarray(noise.detach().cpu().numpy().astype(np.float32))
        drawn = []
        for row in rows:
            key = np.frombuffer(hashlib.sha256(row.tobytes()).digest()[:16], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            points = generator.standard_normal((c.sample_steps + 1, c.horizon, c.action_width), np.float32)
            tiny = 2.0**-25
            points[0, :steps, :dims] = ndtri(row.astype(np.float64).clip(tiny, 1 - tiny))
            drawn.append(points)
        all_points = torch.from_numpy(np.stack(drawn)).to(self.device)
        return all_points[:, 0], all_points[:, 1:]

    def _check(self, batch: PolicyInput) -> tuple[Tensor, Tensor | None]:
        return check_input(batch, self._spec, self._preparation.any_size(), self.device)

    @staticmethod
    def _require_temperature(temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise RatchetError("policy.bad_temperature", f"temperature {temperature} is not above 0", fix="use predict")


def check_input(
    batch: PolicyInput, spec: PolicySpec, any_size: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Images (B, V, H, W, 3) uint8 and state (B, S) float32 on a device, refused where they are not the policy's.

    any_size: take images of any one size.

    Raises:
        RatchetError: policy.bad_input.
    """
    images = torch.as_tensor(batch.images)
    size, views = spec.image_size, len(spec.cameras)
    expected: tuple[int, ...] = (len(batch), views, size, size, 3)
    if any_size and images.ndim == 5 and min(images.shape) > 0:
        expected = (len(batch), views, *images.shape[2:4], 3)
    if tuple(images.shape) != expected or images.dtype != torch.uint8:
        raise RatchetError(
            "policy.bad_input",
            f"images are {tuple(images.shape)} {images.dtype}, expected {expected} uint8",
            where=f"cameras {', '.join(spec.cameras)}",
            fix="give every camera in the policy's order, at its image size",
        )
    if not len(batch):
        raise RatchetError("policy.bad_input", "the batch is empty", fix="give at least one observation")
    if not spec.state:
        return images.to(device), None
    if batch.state is None or tuple(batch.state.shape) != (len(batch), spec.state_size):
        got = None if batch.state is None else tuple(batch.state.shape)
        raise RatchetError(
            "policy.bad_input",
            f"state is {got}, expected {(len(batch), spec.state_size)}",
            where=f"state {', '.join(spec.state)}",
        )
    if not bool(torch.isfinite(batch.state).all()):
        raise RatchetError("policy.bad_input", "the state is not finite", where=", ".join(spec.state))
    return images.to(device), batch.state.to(device, torch.float32)


def small_statistics(values: Any, state: Any, spec: PolicySpec) -> FlowStatistics:
    """Mean and deviation of demonstrations: actions (M, K, D) and states (M, S), physical units, as numpy arrays."""
    flat = np.asarray(values, np.float64).reshape(-1, len(spec.action_names))
    states = np.asarray(state, np.float64).reshape(-1, spec.state_size)
    return FlowStatistics(
        key=spec.statistics_key,
        units=spec.action_units,
        action_offset=tuple(map(float, flat.mean(0))),
        action_scale=tuple(map(float, np.maximum(flat.std(0), 1e-4))),
        state_offset=tuple(map(float, states.mean(0))) if spec.state else (),
        state_scale=tuple(map(float, np.maximum(states.std(0), 1e-4))) if spec.state else (),
    )
