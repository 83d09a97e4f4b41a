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
        if stage:
            self.lora.reset(seed % 2**31)

    def acting(self, ids: Sequence[str], stage: int, task: str) -> str:
        own = self.tasks.index(task) + 1 if task in self.tasks else 0
        return ids[own] if 0 < own <= stage else ids[0]
