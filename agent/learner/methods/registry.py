"""Seq. FT and the methods it is compared with, by the names that the command line uses."""

from __future__ import annotations

from agent.errors import RatchetError
from agent.learner.methods.base import SeqFT
from agent.learner.methods.ewc import EWC
from agent.learner.methods.expansion import Expansion
from agent.learner.methods.full import FullFineTuning
from agent.learner.methods.oracle import Oracle
from agent.learner.methods.replay import DarkReplay, ExpertReplay
from agent.learner.methods.retain import Retain
from agent.learner.methods.slca import SLCA
from agent.learner.methods.supervised import Supervised

METHODS: dict[str, type[SeqFT]] = {
    method.name: method
    for method in (SeqFT, EWC, ExpertReplay, DarkReplay, Retain, SLCA, Expansion, Oracle, FullFineTuning, Supervised)
}


def method_named(name: str) -> type[SeqFT]:
    """Raises RatchetError learn.unknown_method."""
    if name not in METHODS:
        raise RatchetError("learn.unknown_method", f"no method '{name}'", fix=f"methods: {', '.join(METHODS)}")
    return METHODS[name]
