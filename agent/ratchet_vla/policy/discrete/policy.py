"""The discrete VLA: OpenVLA's and OpenVLA-OFT's architecture, from 7 billion parameters down to 3 million.

Knows prompts, statistics, sampling and log-probabilities around the network (network.py). Knows no file
(checkpoints/), no adapter and no robot. A chunk of K actions of D dimensions is decoded in ONE forward: K x D
placeholder positions, each with one distribution over 256 action tokens. Logits are computed at these positions and for
these tokens alone; the published code computes all positions and all words, with equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.action_tokens import BINS, Statistics, decode, encode, normalise, unnormalise
from ratchet_vla.policy.discrete.network import PrismaticConfig, PrismaticNetwork
from ratchet_vla.policy.discrete.text import Prompt
from ratchet_vla.policy.images import prepare
from ratchet_vla.policy.network_policy import NetworkPolicy, require_temperature
from ratchet_vla.policy.protocol import Chunks, PolicyInput

__all__ = ["PrismaticConfig", "PrismaticNetwork", "PrismaticPolicy"]


class PrismaticPolicy(NetworkPolicy):
    """A discrete VLA that implements the Policy protocol.

    Construct with `checkpoint.load(folder)`, or from parts: `PrismaticPolicy(config, spec, statistics, tokenizer)`,
    with random weights. `presets.py` has the 7B and the small configuration.

    Raises:
        RatchetError: policy.no_probabilities, policy.missing_statistics, policy.wrong_statistics, policy.bad_config,
            policy.unknown_vision_tower.
    """

    config: PrismaticConfig
    statistics: Statistics
    network: PrismaticNetwork

    def __init__(self, config: PrismaticConfig, spec: PolicySpec, statistics: Statistics, tokenizer: Tokenizer) -> None:
        _require_head(config, spec)
        _require_statistics(spec, statistics)
        if tokenizer.get_vocab_size() > config.padded_vocabulary:
            raise RatchetError(
                "policy.bad_config",
                f"the tokenizer has {tokenizer.get_vocab_size()} ids, the model {config.padded_vocabulary}",
                fix="use the tokenizer that the checkpoint came with",
            )
        super().__init__(spec, tokenizer, config.preparation())
        self.config = config
        self.statistics = statistics
        dims = len(spec.action_names)
        state_size = spec.state_size if spec.state else 0
        self.actions = spec.chunk * dims
        self.network = PrismaticNetwork(config, self.actions, state_size, dims).eval()
        self.prompt = Prompt(
            tokenizer,
            config.prompt,
            bos=config.bos,
            pad=config.pad,
            end_token=config.end_token,
            length=config.prompt_length,
        )

    @property
    def sampled_shape(self) -> tuple[int, int]:
        """(K, D): bins, as `sample` returns them in `Chunks.tokens`."""
        return self._spec.chunk, len(self._spec.action_names)

    @property
    def gives_probabilities(self) -> bool:
        """Whether samples can be learned from; False for a regression head."""
        return self.config.head == "tokens"

    # What the Policy protocol asks for.

    @torch.no_grad()
    def predict(self, batch: PolicyInput) -> Chunks:
        if self.config.head == "l1":
            hidden = self._hidden(batch)  # (B, K*D, hidden)
            with self.autocast():
                values = self.network.action_head(hidden.to(self.compute_dtype)).float()  # (B, K, D) normalised
            return Chunks(unnormalise(values, self.statistics).float(), None, None, hidden.float().mean(1))
        if self.config.decoding == "autoregressive":
            tokens, hidden = self._one_by_one(batch, lambda logits, _: logits.argmax(-1))
        else:
            hidden = self._hidden(batch)
            tokens = self._logits(hidden).argmax(-1)
        zeros = torch.zeros(tokens.shape, device=tokens.device)
        return Chunks(self.actions_of(tokens), tokens, zeros, hidden.float().mean(1))

    @torch.no_grad()
    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        self._require_probabilities()
        require_temperature(temperature)
        self._require_chunk_shape("noise", noise, len(batch))
        if self.config.decoding == "autoregressive":
            flat_noise = noise.flatten(1)  # (B, K*D)
            log_probs: list[Tensor] = []

            def choose(logits: Tensor, index: int) -> Tensor:
                chosen, token_log_prob = _draw(logits, temperature, flat_noise[:, index])
                log_probs.append(token_log_prob)
                return chosen

            tokens, hidden = self._one_by_one(batch, choose)
            log_prob = torch.stack(log_probs, 1).view(tokens.shape)
        else:
            hidden = self._hidden(batch)
            tokens, log_prob = _draw(self._logits(hidden), temperature, noise)
        return Chunks(self.actions_of(tokens), tokens, log_prob, hidden.float().mean(1))

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self._require_probabilities()
        require_temperature(temperature)
        self._require_chunk_shape("tokens", tokens, len(batch))
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < BINS:
            raise RatchetError("policy.bad_input", f"tokens are not all in [0, {BINS})", fix="give bins, not token ids")
        log_probs = (self.logits(batch, tokens) / temperature).log_softmax(-1)  # (B, K, D, 256)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, K, D)
        return log_probs.gather(-1, tokens.to(log_probs.device)[..., None])[..., 0], entropy

    # What training and checks use.

    def logits(self, batch: PolicyInput, tokens: Tensor | None = None) -> Tensor:
        """(B, K, D, 256) float32 over the bins, with gradient.

        tokens: (B, K, D) bins; where each token follows those before it, they stand before the one that is read.
        """
        self._require_probabilities()
        if self.config.decoding == "parallel":
            return self._logits(self._hidden(batch))
        if tokens is None:
            raise RatchetError("policy.bad_input", "each token depends on those before it", fix="give the tokens")
        return self._logits(self._hidden(batch, tokens.to(self.device).flatten(1)))

    def actions_of(self, sampled: Tensor) -> Tensor:
        """Bins (…, D) -> physical actions (…, D) float32."""
        return unnormalise(decode(sampled), self.statistics).float()

    def tokens_of(self, actions: Tensor) -> Tensor:
        """Physical actions (…, D) -> bins (…, D); values beyond the statistics take the outermost bin."""
        return encode(normalise(actions, self.statistics))

    def hidden_states(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, state: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """(B, K*D, hidden): final hidden states from which the action tokens are read, with gradient.

        pixels: as the tower's `prepare` gives them. ids, mask: (B, L) prompt ids and True where not padding.
        state: (B, S) normalised; None where the policy takes none. given: (B, K*D) bins before the one that is read.
        """
        hidden: Tensor = self.network(pixels, ids, mask, state, self.compute_dtype, given)
        return hidden

    def action_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, 256) float32: the head's action rows alone, also under an adapter."""
        return self.network.action_logits(hidden)

    def normalised_state(self, state: Tensor) -> Tensor:
        """(B, S) physical -> (B, S) in standard deviations of the training data."""
        mean = torch.tensor(self.statistics.state_mean, device=state.device)  # (S,)
        deviation = torch.tensor(self.statistics.state_std, device=state.device)  # (S,)
        normalised = (state - mean) / deviation
        if self.config.state_style == "own":
            return normalised
        return normalised.clamp(-1, 1)

    def _hidden(self, batch: PolicyInput, given: Tensor | None = None) -> Tensor:
        pixels, ids, mask, state = self.inputs(batch)
        with self.autocast():
            return self.hidden_states(pixels, ids, mask, state, given)

    def _one_by_one(self, batch: PolicyInput, choose: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        pixels, ids, mask, state = self.inputs(batch)
        with self.autocast():
            tokens, hidden = self.network.one_by_one(pixels, ids, mask, state, self.compute_dtype, choose)
        return tokens.view(len(batch), self._spec.chunk, len(self._spec.action_names)), hidden

    def inputs(self, batch: PolicyInput) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pixels, prompt ids and mask, normalised state: what the network takes, on its device."""
        images, state = self._checked(batch)
        ids, mask = self.prompt(batch.instructions)
        if self.device.type == "cpu":
            # Padding that all rows share changes nothing but the time; a GPU prefers one shape for all batches.
            used = mask.any(0)  # (L,)
            ids = ids[:, used]
            mask = mask[:, used]
        if self._preparation.any_size():
            # A float copy of whole grey levels: the towers take bytes.
            prepared = prepare(images, self._spec.image_size, self._preparation)  # (B, V, 3, size, size)
            images = (prepared * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
        pixels = self.network.vision_backbone.prepare(images)
        if state is not None:
            state = self.normalised_state(state)
        return pixels, ids.to(self.device), mask.to(self.device), state

    def _logits(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            logits = self.action_logits(hidden)
        return logits.reshape(len(logits), self._spec.chunk, len(self._spec.action_names), BINS)

    def _require_probabilities(self) -> None:
        if not self.gives_probabilities:
            raise RatchetError(
                "policy.no_probabilities",
                "this checkpoint's regression (L1) head gives actions without probabilities, so nothing can be learned "
                "from its samples",
                where=self._spec.statistics_key,
                fix="use it for prediction only; learn with a discrete checkpoint",
            )


def _require_head(config: PrismaticConfig, spec: PolicySpec) -> None:
    bins = BINS if config.head == "tokens" else 0
    if spec.bins != bins:
        raise RatchetError(
            "policy.no_probabilities",
            f"the head has {spec.bins} bins per action, a head of {config.head} has {bins}",
            fix="a regression (L1) head gives no probabilities; use the discrete checkpoint",
        )


def _require_statistics(spec: PolicySpec, statistics: Statistics) -> None:
    if spec.state and len(statistics.state_mean) != spec.state_size:
        raise RatchetError(
            "policy.missing_statistics",
            f"the policy takes {spec.state_size} state values, statistics have {len(statistics.state_mean)}",
            where=statistics.key,
            fix="add state_mean and state_std of the training data",
        )
    for name, in_statistics, in_spec in (
        ("key", statistics.key, spec.statistics_key),
        ("units", statistics.units, spec.action_units),
    ):
        if in_statistics != in_spec:
            raise RatchetError(
                "policy.wrong_statistics",
                f"the statistics' {name} is {in_statistics!r}, the policy's actions have {in_spec!r}",
                where=statistics.key,
                fix="take the statistics that the checkpoint was trained with",
            )


def _draw(logits: Tensor, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Bins (…) by the inverse distribution function at `noise` (…), and their log-probabilities."""
    log_prob = (logits / temperature).log_softmax(-1)  # (…, 256)
    # In float64: rounding must never select a bin of probability zero beyond the last one.
    cumulative = log_prob.exp().double().cumsum(-1)  # (…, 256)
    threshold = noise.to(cumulative)[..., None] * cumulative[..., -1:]
    tokens = (cumulative <= threshold).sum(-1).clamp(max=BINS - 1)
    return tokens, log_prob.gather(-1, tokens[..., None])[..., 0]
