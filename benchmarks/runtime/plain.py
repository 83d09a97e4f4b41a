"""The straightforward way to run a policy's weights, for benchmarks and tests to compare against.

transformers' LlamaModel and PEFT's layers as they come, sharing every parameter with a PrismaticPolicy: dense mask, all
positions through all layers, the whole vocabulary's logits at every position, ids that are no action masked to -inf as
the published code does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ratchet_vla.policy.discrete.action_tokens import BINS
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.protocol import PolicyInput


class Plain:
    """A policy's network through the libraries' modules. Attach adapters to the policy before making this."""

    def __init__(self, policy: PrismaticPolicy) -> None:
        self.policy, self.network, config = policy, policy.network, policy.config
        self.dtype = torch.bfloat16 if config.compute_dtype == "bfloat16" else torch.float32
        llama = LlamaConfig(
            vocab_size=config.padded_vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
        with torch.device("meta"):
            self.model = LlamaModel(llama).eval()
        self.model.rotary_emb = LlamaRotaryEmbedding(llama)
        trunk = self.network.language_model.model
        self.model.embed_tokens = trunk.embed_tokens
        self.model.norm.weight = trunk.norm.weight
        for theirs, ours in zip(self.model.layers, trunk.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(theirs.self_attn, name, getattr(ours.self_attn, name))
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(theirs.mlp, name, getattr(ours.mlp, name))
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(theirs, name).weight = getattr(ours, name).weight

    def logits(self, batch: PolicyInput) -> Tensor:
        """(B, T, padded vocabulary) float32, of every position."""
        net, config = self.network, self.policy.config
        ids, mask = self.policy.prompt(batch.instructions)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            pixels = net.vision_backbone.prepare(torch.as_tensor(batch.images))
            embedded = self.model.embed_tokens(ids)
            said = mask[..., None].to(embedded.dtype)
            said[:, 0] = 0
            text = (embedded * said).sum(1) / said.sum(1).clamp(min=1)
            projector = net.projector
            patches = projector.fc2(functional.gelu(projector.fc1(net.vision_backbone(pixels, text))))
            if projector.fc3 is not None:
                patches = projector.fc3(functional.gelu(patches))
            count = patches.shape[1]
            if config.placeholders == "learned":
                slots = net.placeholders.expand(len(batch), -1, -1)
            else:
                slots = embedded.new_zeros(len(batch), self.policy.actions, config.hidden)
            parts = [embedded[:, :1], patches.to(embedded.dtype), embedded[:, 1:]]
            if batch.state is not None:
                state = net.state_projector(self.policy.normalised_state(batch.state))
                parts.append(state[:, None].to(embedded.dtype))
            sequence = torch.cat([*parts, slots], 1)
            length = sequence.shape[1]
            seen = torch.cat([mask[:, :1], mask.new_ones(len(batch), count), mask[:, 1:]], 1)
            seen = functional.pad(seen, (0, length - seen.shape[1]), value=True)
            allowed = seen[:, None, None, :].expand(-1, 1, length, length)
            if config.attention == "causal":
                allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
            allowed = allowed | torch.eye(length, dtype=torch.bool)
            dense = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
            hidden = self.model(
                inputs_embeds=sequence,
                attention_mask=dense,
                position_ids=(seen.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
            out: Tensor = net.language_model.lm_head(hidden).float()
        return out

    def log_softmax(self, batch: PolicyInput, temperature: float) -> Tensor:
        """(B, K, D, padded vocabulary): log-probabilities over all ids, -inf for those that are no action."""
        spec, rows = self.policy.spec, self.policy.config.action_rows
        logits = self.logits(batch)[:, -self.policy.actions - 1 : -1] / temperature
        other = torch.ones(logits.shape[-1], dtype=torch.bool)
        other[rows] = False
        log_probs = logits.masked_fill(other, -torch.inf).log_softmax(-1)
        return log_probs.reshape(len(log_probs), spec.chunk, len(spec.action_names), -1)

    def log_prob(self, batch: PolicyInput, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """As `Policy.log_prob`."""
        rows = self.policy.config.action_rows
        everything = self.log_softmax(batch, temperature)
        actions = everything[..., rows]
        return everything.gather(-1, tokens[..., None] + rows.start)[..., 0], -(actions.exp() * actions).sum(-1)

    @torch.no_grad()
    def sample(self, batch: PolicyInput, temperature: float) -> Tensor:
        """Sampled actions (B, K, D), physical units."""
        probabilities = self.log_softmax(batch, temperature).exp()
        ids = torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])
        return self.policy.actions_of(ids - (self.policy.config.vocabulary - BINS))
