"""Filling a flow policy's network with tensors, each of which must fit.

Knows tensor names and which tensors of published files nothing depends on. Knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints.weights import wrong_dtype
from ratchet_vla.policy.flow.network import FlowConfig
from ratchet_vla.policy.flow.policy import FlowPolicy

_TIED = "model.paligemma_with_expert.paligemma.lm_head.weight"
# What no velocity depends on: heads over words, and of the language model's last layer all but what makes keys and
# values.
_UNUSED = re.compile(
    r".*lm_head\.weight|language\.norm\..*|expert\.embed_tokens\..*|vision\.tower\.head\..*|.*normalize_.*"
)


def unused(name: str, config: FlowConfig) -> bool:
    """True for tensors of published files that no velocity depends on."""
    last = f"language.layers.{config.language.layers - 1}."
    return bool(_UNUSED.fullmatch(name)) or name.startswith(last)


def fill(policy: FlowPolicy, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype) -> None:
    """Fill the network, which may be on the meta device; every tensor must fit, those without effect may be there or
    not.

    Raises:
        RatchetError: policy.bad_checkpoint naming missing, extra and misshapen tensors; policy.wrong_vocabulary;
            policy.wrong_dtype.
    """
    network = policy.network
    wanted = network.state_dict()
    given = dict(tensors)
    if "embed_tokens.weight" not in given and _TIED in given:  # some files keep the tied weight under the head's name
        given["embed_tokens.weight"] = given[_TIED]
    missing = [k for k in wanted if k not in given]
    extra = [k for k in given if k not in wanted and not unused(k, policy.config)]
    shapes = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    rows = "embed_tokens.weight"
    if rows in shapes and given[rows].shape[1:] == wanted[rows].shape[1:]:
        raise RatchetError(
            "policy.wrong_vocabulary",
            f"the weights have {len(given[rows])} tokens, the configuration {len(wanted[rows])}",
            where=where,
            fix="take configuration and tokenizer of these weights",
        )
    for name, keys in (("missing", missing), ("extra", extra), ("of another shape", shapes)):
        if keys:
            raise RatchetError(
                "policy.bad_checkpoint",
                f"tensors do not fit: {len(keys)} {name} ({', '.join(keys[:3])})",
                where=where,
                fix="check that configuration and weights are of one checkpoint",
            )
    whole = [k for k in wanted if not given[k].is_floating_point()]
    if whole:
        raise wrong_dtype(str(given[whole[0]].dtype).removeprefix("torch."), f"{where}: {whole[0]}")
    bad = [k for k in wanted if not bool(torch.isfinite(given[k]).all())]
    if bad:
        raise RatchetError("policy.bad_checkpoint", f"not finite: {', '.join(bad[:3])}", where=where)
    # A copy, because the file may change under a mapping of it; assigned, so that it is the only one.
    network.load_state_dict({k: given[k].to(dtype, copy=True).contiguous() for k in wanted}, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:
            _materialise(network, name, buffer)
    policy.base_changed()


def _materialise(network: torch.nn.Module, name: str, buffer: Tensor) -> None:
    """Positions that a tower counts itself: the only buffers there are, 0, 1, 2, ... along the last axis."""
    owner, _, leaf = name.rpartition(".")
    count = torch.arange(buffer.shape[-1], dtype=buffer.dtype).expand(buffer.shape).clone()
    network.get_submodule(owner).register_buffer(leaf, count, persistent=False)
