"""Dynamic weight expansion: one adapter per task, chosen by the task. It cannot forget and it cannot transfer.

Source: arXiv 2603.11653. The hot swap makes it cheap: an adapter is a pointer away.
"""

from __future__ import annotations

from collections.abc import Sequence

from ratchet_vla.learner.methods.base import SeqFT


class Expansion(SeqFT):
    """A fresh adapter for each task; evaluation of a task runs the adapter that was trained for it, the base before."""

    name = "expansion"

    def begin_task(self, stage: int, seed: int) -> None:
        """Begin a fresh adapter; the first task takes the one that the run began with."""
        if stage:
            self.lora.reset(seed % 2**31)

    def acting(self, ids: Sequence[str], stage: int, task: str) -> str:
        """The adapter that was trained on the task; the base before that, and on held-out tasks."""
        own_stage = self.tasks.index(task) + 1 if task in self.tasks else 0
        return ids[own_stage] if 0 < own_stage <= stage else ids[0]
