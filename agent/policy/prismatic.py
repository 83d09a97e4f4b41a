"""The discrete VLA: OpenVLA-OFT's architecture, from 7 billion parameters down to 3 million, as one class.

Knows the network, its attention mask, sampling and log-probabilities. Knows no file (checkpoint.py), no adapter and no
robot. A chunk of K actions of D dimensions is decoded in ONE forward: K x D placeholder positions after the prompt, 256
action tokens each. Sequence: first prompt token, image patches, rest of the prompt, [state,] placeholders. (The
published code appends a stop token that nothing attends to; it is left out.)
Logits are computed at the action positions and over the 256 action rows of the head alone.
Source: OpenVLA-OFT (arXiv 2502.19645), discrete variant of arXiv 2603.11653.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear as LoraLinear
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from agent.contract import PolicySpec
from agent.errors import RatchetError
from agent.policy.action_tokens import BINS, Statistics, decode, encode, normalise, unnormalise
from agent.policy.protocol import Chunks, PolicyInput
from agent.policy.text import Prompt
from agent.policy.vision import make_tower


@dataclass(frozen=True)
class PrismaticConfig:
    """Sizes and conventions of one checkpoint; all of it is part of the base's hash.

    vision, vision_options: name and arguments of the tower (vision.py).
    attention: which mask the checkpoint was trained with; there is no default, because the wrong one changes a quarter
        of the tokens without an error.
    placeholders: "zero" embeddings as published, or "learned" ones.
    vocabulary: ids of the text model before padding; the last 256 are action tokens.
    padded_vocabulary: rows of the head.
    projector: "mlp3" as published for fused towers, "mlp2" for single ones.
    prompt, bos, pad, end_token, prompt_length: see text.py.
    compute_dtype: "float32", or "bfloat16" for autocast of everything but the log-softmax.
    """

    vision: str
    vision_options: Mapping[str, Any]
    attention: Literal["bidirectional", "causal"]
    placeholders: Literal["zero", "learned"]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    padded_vocabulary: int
    projector: Literal["mlp2", "mlp3"]
    prompt: str
    bos: int
    pad: int
    end_token: int
    prompt_length: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


class Projector(nn.Module):
    """Patch features -> token embeddings, under the published parameter names."""

    def __init__(self, features: int, hidden: int, kind: str) -> None:
        super().__init__()
        middle = 4 * features if kind == "mlp3" else hidden
        self.fc1 = nn.Linear(features, middle)
        self.fc2 = nn.Linear(middle, hidden)
        self.fc3 = nn.Linear(hidden, hidden) if kind == "mlp3" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(functional.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(functional.gelu(x))


class LanguageModel(nn.Module):
    """transformers' Llama with its head, under the published parameter names."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        llama = LlamaConfig(
            vocab_size=config.padded_vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="sdpa",
        )
        self.model = LlamaModel(llama)
        self.lm_head = nn.Linear(config.hidden, config.padded_vocabulary, bias=False)


class PrismaticNetwork(nn.Module):
    """Everything with parameters; the module that adapters attach to."""

    def __init__(self, config: PrismaticConfig, actions: int, state: int) -> None:
        super().__init__()
        self.vision_backbone = make_tower(config.vision, config.vision_options)
        self.projector = Projector(self.vision_backbone.features, config.hidden, config.projector)
        self.language_model = LanguageModel(config)
        if state:
            self.state_projector = nn.Linear(state, config.hidden)
        if config.placeholders == "learned":
            self.placeholders = nn.Parameter(torch.randn(actions, config.hidden) * 0.02)


class PrismaticPolicy:
    """A discrete VLA that implements the Policy protocol.

    Construct with `checkpoint.load(folder)`, or from parts: `PrismaticPolicy(config, spec, statistics, tokenizer)`,
    with random weights. `presets.py` has the 7B and the small configuration.
    """

    def __init__(self, config: PrismaticConfig, spec: PolicySpec, statistics: Statistics, tokenizer: Tokenizer) -> None:
        if spec.bins != BINS:
            raise RatchetError(
                "policy.no_probabilities",
                f"the head has {spec.bins} bins per action, this class needs {BINS}",
                fix="a regression (L1) head gives no probabilities; use the discrete checkpoint",
            )
        if spec.state and len(statistics.state_mean) != spec.state_size:
            raise RatchetError(
                "policy.missing_statistics",
                f"the policy takes {spec.state_size} state values, statistics have {len(statistics.state_mean)}",
                where=statistics.key,
                fix="add state_mean and state_std of the training data",
            )
        self.config, self.statistics, self.tokenizer = config, statistics, tokenizer
        self._spec = spec
        self.actions = spec.chunk * len(spec.action_names)
        self.network = PrismaticNetwork(config, self.actions, spec.state_size if spec.state else 0).eval()
        self.prompt = Prompt(
            tokenizer,
            config.prompt,
            bos=config.bos,
            pad=config.pad,
            end_token=config.end_token,
            length=config.prompt_length,
        )
        self._base_hash = ""

    @property
    def spec(self) -> PolicySpec:
        return self._spec

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
            digest = hashlib.sha256()
            facts = {
                "config": dataclasses.asdict(self.config),
                "spec": dataclasses.asdict(self._spec),
                "statistics": self.statistics.as_dict(),
                "tokenizer": json.loads(self.tokenizer.to_str()),
            }
            digest.update(json.dumps(facts, sort_keys=True).encode())
            for name, tensor in sorted(self.base_tensors().items()):
                raw = tensor.detach().cpu().contiguous()
                digest.update(f"{name}:{raw.dtype}:{tuple(raw.shape)}".encode())
                digest.update(
                    raw.view(torch.uint8).numpy().data if raw.ndim else raw.reshape(1).view(torch.uint8).numpy().data
                )
            self._base_hash = digest.hexdigest()
        return self._base_hash

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's own tensors by their published names, with or without adapters attached."""
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.network.state_dict().items()
            if ".lora_" not in name
        }

    # What the Policy protocol asks for.

    @torch.no_grad()
    def predict(self, batch: PolicyInput) -> Chunks:
        hidden = self._hidden(batch)
        tokens = self._logits(hidden).argmax(-1)
        return Chunks(self.actions_of(tokens), tokens, torch.zeros(tokens.shape), hidden.float().mean(1))

    @torch.no_grad()
    def sample(self, batch: PolicyInput, temperature: float, noise: Tensor) -> Chunks:
        self._require_temperature(temperature)
        hidden = self._hidden(batch)
        log_prob = (self._logits(hidden) / temperature).log_softmax(-1)
        # Inverse CDF in float64: rounding must never select a bin of probability zero beyond the last one.
        cumulative = log_prob.double().exp().cumsum(-1)
        threshold = noise.to(cumulative)[..., None] * cumulative[..., -1:]
        tokens = (cumulative <= threshold).sum(-1).clamp(max=BINS - 1)
        chosen = log_prob.gather(-1, tokens[..., None])[..., 0]
        return Chunks(self.actions_of(tokens), tokens, chosen, hidden.float().mean(1))

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        self._require_temperature(temperature)
        log_prob = (self.logits(batch) / temperature).log_softmax(-1)
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        return log_prob.gather(-1, tokens.to(log_prob.device)[..., None])[..., 0], entropy

    # What training and checks use.

    def logits(self, batch: PolicyInput) -> Tensor:
        """(B, K, D, 256) float32 over the bins, with gradient."""
        return self._logits(self._hidden(batch))

    def actions_of(self, tokens: Tensor) -> Tensor:
        """Bins (…, D) -> physical actions (…, D) float32."""
        return unnormalise(decode(tokens), self.statistics).float()

    def tokens_of(self, actions: Tensor) -> Tensor:
        """Physical actions (…, D) -> bins (…, D); values beyond the statistics take the outermost bin."""
        return encode(normalise(actions, self.statistics))

    def hidden_states(self, pixels: Tensor, ids: Tensor, mask: Tensor, state: Tensor | None = None) -> Tensor:
        """(B, K*D, hidden): final hidden states from which the action tokens are read.

        pixels: as the tower's `prepare` gives them. ids, mask: (B, L) prompt ids and True where not padding.
        state: (B, S) normalised; None where the policy takes none.
        """
        net, config = self.network, self.config
        model = net.language_model.model
        embedded = model.embed_tokens(ids)
        weight = mask[..., None].to(embedded.dtype)
        weight[:, 0] = 0  # the first token says nothing about the task
        text = (embedded * weight).sum(1) / weight.sum(1).clamp(min=1)
        patches = net.projector(net.vision_backbone(pixels, text)).to(embedded.dtype)
        batch, count = patches.shape[:2]
        if config.placeholders == "learned":
            slots = net.placeholders.expand(batch, -1, -1)
        else:
            slots = embedded.new_zeros(batch, self.actions, config.hidden)
        parts = [embedded[:, :1], patches, embedded[:, 1:]]
        if state is not None:
            parts.append(net.state_projector(state)[:, None].to(embedded.dtype))
        sequence = torch.cat([*parts, slots], 1)
        seen = torch.cat([mask[:, :1], mask.new_ones(batch, count), mask[:, 1:]], 1)
        seen = functional.pad(seen, (0, sequence.shape[1] - seen.shape[1]), value=True)
        hidden = model(
            inputs_embeds=sequence,
            attention_mask=self._attention(seen, sequence.dtype),
            position_ids=(seen.long().cumsum(1) - 1).clamp(min=0),  # padding takes no position
            use_cache=False,
        ).last_hidden_state
        # The token of a position is read one position earlier, as in any language model.
        out: Tensor = hidden[:, -self.actions - 1 : -1]
        return out

    def action_logits(self, hidden: Tensor) -> Tensor:
        """(…, hidden) -> (…, 256) float32: the head's action rows alone, also under an adapter."""
        rows = slice(self.config.vocabulary - BINS, self.config.vocabulary)
        return linear_rows(self.network.language_model.lm_head, hidden, rows).float()

    def normalised_state(self, state: Tensor) -> Tensor:
        """(B, S) physical -> (B, S) in standard deviations of the training data."""
        mean = torch.tensor(self.statistics.state_mean, device=state.device)
        return (state - mean) / torch.tensor(self.statistics.state_std, device=state.device)

    def _attention(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        batch, length = seen.shape
        allowed = seen[:, None, None, :].expand(batch, 1, length, length)
        if self.config.attention == "causal":
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        # A row that may see nothing would be NaN: let every position see at least itself.
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=seen.device)
        return torch.zeros(allowed.shape, dtype=dtype, device=seen.device).masked_fill(~allowed, torch.finfo(dtype).min)

    def _hidden(self, batch: PolicyInput) -> Tensor:
        images, state = self._check(batch)
        ids, mask = (t.to(self.device) for t in self.prompt(batch.instructions))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"):
            pixels = self.network.vision_backbone.prepare(images)
            return self.hidden_states(pixels, ids, mask, None if state is None else self.normalised_state(state))

    def _logits(self, hidden: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"):
            logits = self.action_logits(hidden)
        return logits.reshape(len(logits), self._spec.chunk, len(self._spec.action_names), BINS)

    def _check(self, batch: PolicyInput) -> tuple[Tensor, Tensor | None]:
        images = torch.as_tensor(batch.images)
        size, views = self._spec.image_size, len(self._spec.cameras)
        expected = (len(batch), views, size, size, 3)
        if tuple(images.shape) != expected or images.dtype != torch.uint8:
            raise RatchetError(
                "policy.bad_input",
                f"images are {tuple(images.shape)} {images.dtype}, expected {expected} uint8",
                where=f"cameras {', '.join(self._spec.cameras)}",
                fix="give every camera in the policy's order, at its image size",
            )
        if not self._spec.state:
            return images.to(self.device), None
        if batch.state is None or tuple(batch.state.shape) != (len(batch), self._spec.state_size):
            got = None if batch.state is None else tuple(batch.state.shape)
            raise RatchetError(
                "policy.bad_input",
                f"state is {got}, expected {(len(batch), self._spec.state_size)}",
                where=f"state {', '.join(self._spec.state)}",
            )
        if not bool(torch.isfinite(batch.state).all()):
            raise RatchetError("policy.bad_input", "the state is not finite", where=", ".join(self._spec.state))
        return images.to(self.device), batch.state.to(self.device, torch.float32)

    @staticmethod
    def _require_temperature(temperature: float) -> None:
        if not temperature > 0:
            raise RatchetError("policy.bad_temperature", f"temperature {temperature} is not above 0", fix="use predict")


def linear_rows(layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Some output rows of a linear layer: plain, or wrapped by PEFT's LoRA (merged or not).

    Equal to `layer(x)[..., rows]` without computing the other rows.
    """
    if not isinstance(layer, LoraLinear):
        assert isinstance(layer, nn.Linear)
        return functional.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    out = linear_rows(layer.get_base_layer(), x, rows)
    if layer.disable_adapters or layer.merged:
        return out
    for name in layer.active_adapters:
        if name in layer.lora_A:
            low = functional.linear(x.to(layer.lora_A[name].weight.dtype), layer.lora_A[name].weight)
            out = out + functional.linear(low, layer.lora_B[name].weight[rows]) * layer.scaling[name]
    return out
