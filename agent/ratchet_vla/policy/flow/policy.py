"""Flow-matching VLAs (pi0, pi0.5, SmolVLA, the small built-in one) behind the Policy protocol, with true likelihoods.

Knows prompts, statistics, sampling and log-probabilities around the network (network.py). Knows no file, no
adapter and no robot. What is sampled is a chain: the points that a stochastic flow passes through from noise to actions
(sde.py). Its probability is known exactly, step by step, so the same learner serves these policies as the discrete
ones. `Chunks.tokens` holds the chain, (B, N + 1, H, A) float32, where discrete policies have their bins.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from scipy.special import ndtri
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.flow import rtc
from ratchet_vla.policy.flow import sde as flow_sde
from ratchet_vla.policy.flow.network import FlowConfig, FlowNetwork, Prefix
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.flow.text import FlowPrompt
from ratchet_vla.policy.images import prepare
from ratchet_vla.policy.network_policy import NetworkPolicy, require_temperature
from ratchet_vla.policy.protocol import Chunks, PolicyInput

__all__ = ["FlowPolicy"]

# How close to 0 and 1 the uniform noise counts as it is: half the spacing of float32 below 1.
_TINY = 2.0**-25


class FlowPolicy(NetworkPolicy):
    """A flow policy that implements the Policy protocol.

    Construct with `lerobot.load(folder)`, `checkpoint.load(folder)`, or from parts, with random weights.

    Raises:
        RatchetError: policy.missing_statistics, policy.wrong_statistics, policy.bad_config,
        policy.unknown_vision_tower.
    """

    config: FlowConfig
    statistics: FlowStatistics
    network: FlowNetwork
    gives_probabilities = True

    def __init__(self, config: FlowConfig, spec: PolicySpec, statistics: FlowStatistics, tokenizer: Tokenizer) -> None:
        _require_statistics(spec, statistics)
        _require_fit(config, spec)
        if tokenizer.get_vocab_size() > config.vocabulary:
            raise RatchetError(
                "policy.wrong_vocabulary",
                f"the tokenizer has {tokenizer.get_vocab_size()} ids, the model {config.vocabulary}",
                fix="use the tokenizer that the checkpoint came with",
            )
        super().__init__(spec, tokenizer, config.preparation())
        self.config = config
        self.statistics = statistics
        self.network = FlowNetwork(config).eval()
        self.prompt = FlowPrompt(tokenizer, config.prompt, config.prompt_length)

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
        start = self.start(len(batch)) if noise is None else noise.to(self.device)  # (B, H, A)
        end = flow_sde.integrate(velocity, start, steps or self.config.steps)  # (B, H, A)
        actions = self.actions_of(end)  # (B, K, D)
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
        require_temperature(temperature)
        self._require_chunk_shape("noise", noise, len(batch))
        first, shocks = self._draws(noise)  # (B, H, A), (B, N, H, A)
        prefix = self.prefix(batch)
        level = self.config.noise_level * temperature
        velocity = self.velocity(prefix)
        chain, density = flow_sde.sample(velocity, first, shocks, level, self._mixing())  # (B, N + 1, H, A), (B, H, A)
        log_prob, _ = self._folded(density, density)
        return Chunks(self.actions_of(chain[:, -1]), chain, log_prob, prefix.summary.float())

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Of given chains (B, N + 1, H, A); their sum over (K, D) is the exact log-density of the chain."""
        require_temperature(temperature)
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
        target = self.normalised(actions.to(self.device))  # (B, H, A)
        velocity = self.velocity(self.prefix(batch))
        return flow_sde.matching_loss(velocity, target, noise.to(self.device), time.to(self.device))

    def normalised(self, actions: Tensor) -> Tensor:
        """Physical actions (B, K', D) -> what the network sees, (B, H, A): last step repeated, zeros beside."""
        horizon = self.config.horizon
        offset = torch.tensor(self.statistics.action_offset, device=actions.device)  # (D,)
        scale = torch.tensor(self.statistics.action_scale, device=actions.device)  # (D,)
        scaled = (actions.float() - offset) / scale  # (B, K', D)
        missing_steps = horizon - scaled.shape[1]
        if missing_steps > 0:
            scaled = torch.cat([scaled, scaled[:, -1:].expand(-1, missing_steps, -1)], 1)  # (B, H, D)
        return nn.functional.pad(scaled[:, :horizon], (0, self.config.action_width - scaled.shape[2]))

    def actions_of(self, sampled: Tensor) -> Tensor:
        """(B, H, A) -> physical actions (B, K, D) float32."""
        real = sampled[:, : self._spec.chunk, : len(self._spec.action_names)].float()  # (B, K, D)
        offset = torch.tensor(self.statistics.action_offset, device=sampled.device)  # (D,)
        scale = torch.tensor(self.statistics.action_scale, device=sampled.device)  # (D,)
        return real * scale + offset

    def prefix(self, batch: PolicyInput) -> Prefix:
        """The language model's pass over some observations; every step of a flow reads it."""
        pixels, ids, mask, state = self.inputs(batch)
        with self.autocast():
            return self.network.prefix(pixels, ids, mask, state, self.compute_dtype)

    def inputs(self, batch: PolicyInput) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pixels, prompt ids and mask, padded normalised state: what the network takes, on its device."""
        images, state = self._checked(batch)
        if state is not None:
            offset = torch.tensor(self.statistics.state_offset, device=state.device)  # (S,)
            state = (state - offset) / torch.tensor(self.statistics.state_scale, device=state.device)  # (B, S)
        worded_state = state if self.config.state == "words" else None
        # A GPU prefers one shape for all batches; on a CPU padding costs time and changes nothing.
        ids, mask = self.prompt(batch.instructions, worded_state, fixed=self.device.type != "cpu")
        pixels = prepare(images, self._spec.image_size, self._preparation)  # (B, V, 3, size, size)
        if state is not None:
            state = nn.functional.pad(state, (0, self.config.state_width - state.shape[1]))
        return pixels, ids.to(self.device), mask.to(self.device), state

    def velocity(self, prefix: Prefix) -> flow_sde.Velocity:
        """Where noisy actions move, given what the language model left, with gradient."""

        def direct(actions: Tensor, time: Tensor) -> Tensor:
            with self.autocast():
                return self.network.velocity(prefix, actions, time, self.compute_dtype)

        def recomputed(actions: Tensor, time: Tensor) -> Tensor:
            velocity: Tensor = torch_checkpoint(direct, actions, time, use_reentrant=False)
            return velocity

        if self.network.checkpointing and torch.is_grad_enabled():
            return recomputed
        return direct

    def _folded(self, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, A) -> (B, K, D) with the same sum: what padding holds is spread evenly over the real actions."""
        steps = self._spec.chunk
        dims = len(self._spec.action_names)

        def fold(density: Tensor) -> Tensor:
            real = density[:, :steps, :dims]  # (B, K, D)
            padding = density.sum((1, 2)) - real.sum((1, 2))  # (B,)
            return real + padding[:, None, None] / (steps * dims)

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
        config = self.config
        _, steps, dims = noise.shape
        points_shape = (config.sample_steps + 1, config.horizon, config.action_width)
        rows = np.ascontiguousarray(noise.detach().cpu().numpy().astype(np.float32))
        drawn = []
        for row in rows:
            key = np.frombuffer(hashlib.sha256(row.tobytes()).digest()[:16], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            points = generator.standard_normal(points_shape, np.float32)  # (N + 1, H, A)
            # The normal distribution's inverse is infinite at 0 and 1.
            points[0, :steps, :dims] = ndtri(row.astype(np.float64).clip(_TINY, 1 - _TINY))
            drawn.append(points)
        all_points = torch.from_numpy(np.stack(drawn)).to(self.device)  # (B, N + 1, H, A)
        return all_points[:, 0], all_points[:, 1:]


def _state_size(spec: PolicySpec) -> int:
    """S; 0 where the policy takes no state."""
    return spec.state_size if spec.state else 0


def _require_statistics(spec: PolicySpec, statistics: FlowStatistics) -> None:
    dims = len(spec.action_names)
    state_size = _state_size(spec)
    if len(statistics.units) != dims or len(statistics.state_offset) != state_size:
        raise RatchetError(
            "policy.missing_statistics",
            f"statistics have {len(statistics.units)} action and {len(statistics.state_offset)} state values, "
            f"the policy {dims} and {state_size}",
            where=statistics.key,
            fix="take those of the training data",
        )
    if statistics.key != spec.statistics_key or statistics.units != spec.action_units:
        raise RatchetError(
            "policy.wrong_statistics",
            f"statistics '{statistics.key}' in {statistics.units} for a policy of '{spec.statistics_key}' in "
            f"{spec.action_units}",
            where=statistics.key,
            fix="take the statistics that the checkpoint was trained with",
        )


def _require_fit(config: FlowConfig, spec: PolicySpec) -> None:
    dims = len(spec.action_names)
    state_size = _state_size(spec)
    too_wide = dims > config.action_width or state_size > config.state_width
    if too_wide or spec.chunk > config.horizon or spec.bins:
        raise RatchetError(
            "policy.bad_config",
            f"{dims} actions, {state_size} state values, chunk {spec.chunk}, {spec.bins} bins do not fit a flow of "
            f"{config.action_width}, {config.state_width}, {config.horizon}, none",
            where="model",
            fix="give configuration and demands of one checkpoint",
        )
    if bool(state_size) != (config.state != "none"):
        raise RatchetError(
            "policy.bad_config",
            f"the network takes its state as '{config.state}', the policy names {state_size} state values",
            where="model",
            fix='name state fields, or set state to "none"',
        )
