"""What flow policies (pi0, SmolVLA) keep for the backward pass of one chunk sample.

Knows the two stacks' arithmetic: per token and layer the coefficients that `benchmarks/science/plan_coefficients.py`
counted on the real modules. The language model runs once per sample, the expert once per step of the stochastic flow.
Opens no weights.
"""

from __future__ import annotations

from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.trunk import Sizes

# Bytes per token and layer, bfloat16 products, base frozen, adapter on all linear layers: per unit of width, of the
# MLP's width, of the queries' and of the keys' width, of the rank; and what each head and each norm keeps.
WIDTH = 12.0
HIDDEN = 8.0
QUERY = 4.0
KEY = 4.0
RANK = 14.0
HEAD = 4.0
NORMS = 8.0
MASK = 2.0  # bytes per pair of tokens and layer: what may be seen, in the products' type
VISION = 38.4  # bytes per patch, block and unit of width, of transformers' own towers


def prefix_tokens(config: FlowConfig, patches: int, prompt: int) -> int:
    """Tokens of the language model: images, words, and the state where it stands behind them."""
    return patches + min(prompt, config.prompt_length) + (config.state == "prefix")


def suffix_tokens(config: FlowConfig) -> int:
    """Tokens of the expert: noisy actions, and the state where it stands before them."""
    return config.horizon + (config.state == "suffix")


def layer(sizes: Sizes, tokens: int, others: int, rank: int) -> float:
    """Bytes that one layer keeps of `tokens` that see each other and `others` besides."""
    query = sizes.heads * sizes.head
    key = sizes.groups * sizes.head
    each = WIDTH * sizes.width + HIDDEN * sizes.hidden + QUERY * query + KEY * key + RANK * rank
    return (each + HEAD * sizes.heads + NORMS) * tokens + MASK * tokens * (tokens + others)


def language(config: FlowConfig, tokens: int, rank: int, checkpointing: bool) -> float:
    """Bytes of the language model's pass; its last layer makes keys and values only."""
    sizes = config.language
    full_layers = config.language.layers - 1
    layer_bytes = layer(sizes, tokens, 0, rank)
    if not checkpointing:
        return layer_bytes * full_layers
    input_bytes = (
        4.0 * sizes.width + 2 * KEY * sizes.groups * sizes.head
    ) * tokens  # each layer's input, keys and values
    return input_bytes * full_layers + layer_bytes


def expert(config: FlowConfig, tokens: int, language_tokens: int, rank: int, checkpointing: bool) -> float:
    """Bytes of the expert over all steps of the flow; each joins the language model's keys and values to its own.

    seen: tokens of the language model.
    """
    sizes = config.expert
    joined = 2 * KEY / 2 * sizes.groups * sizes.head * language_tokens
    step = (layer(sizes, tokens, language_tokens, rank) + joined) * sizes.layers
    return step if checkpointing else step * config.sample_steps


def once(config: FlowConfig, rank: int, checkpointing: bool) -> float:
    """Bytes that are kept whatever the batch: the adapter's weights in the products' type, anew for every step."""

    def adapter_bytes(sizes: Sizes) -> float:
        query = sizes.heads * sizes.head
        key = sizes.groups * sizes.head
        sides = 2 * (sizes.width + query) + 2 * (sizes.width + key) + 3 * (sizes.width + sizes.hidden)
        return 2.0 * rank * sides

    steps = 1 if checkpointing else config.sample_steps
    return (
        adapter_bytes(config.language) * config.language.layers
        + adapter_bytes(config.expert) * config.expert.layers * steps
    )


def vision(config: FlowConfig, patches: int) -> float:
    """Bytes of the vision tower with an adapter on it, `patches` before some are joined; no tower recomputes."""
    options = config.vision_options
    if config.vision == "film_conv":
        return 0.0
    return VISION * patches * float(options["hidden_size"] * options["num_hidden_layers"])
