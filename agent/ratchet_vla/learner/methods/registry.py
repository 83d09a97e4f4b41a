"""Seq. FT and the methods it is compared with, by the names that the command line uses."""

from __future__ import annotations

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.methods.cnn import SmallCNN
from ratchet_vla.learner.methods.ewc import EWC
from ratchet_vla.learner.methods.expansion import Expansion
from ratchet_vla.learner.methods.full import FullFineTuning
from ratchet_vla.learner.methods.oracle import Oracle
from ratchet_vla.learner.methods.replay import DarkReplay, ExpertReplay
from ratchet_vla.learner.methods.retain import Retain
from ratchet_vla.learner.methods.slca import SLCA
from ratchet_vla.learner.methods.supervised import Supervised

__all__ = ["METHODS", "method_named"]

METHODS: dict[str, type[SeqFT]] = {
    method.name: method
    for method in (
        SeqFT,
        EWC,
        ExpertReplay,
        DarkReplay,
        Retain,
        SLCA,
        Expansion,
        Oracle,
        FullFineTuning,
        SmallCNN,
        Supervised,
    )
}
"""Every method that a study may name, by its name."""


def method_named(name: str) -> type[SeqFT]:
    """The method of a name. Raises RatchetError learn.unknown_method."""
    if name not in METHODS:
        raise RatchetError("learn.unknown_method", f"no method '{name}'", fix=f"methods: {', '.join(METHODS)}")
    return METHODS[name]
