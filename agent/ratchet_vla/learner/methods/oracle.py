"""The multi-task oracle: all tasks at once with the same number of episodes in all.

Sequential learning is held against it.
"""

from __future__ import annotations

from ratchet_vla.learner.methods.base import SeqFT


class Oracle(SeqFT):
    """Every stage learns from all tasks; its matrix is meant to be read after the last stage only."""

    name = "oracle"
    sequential = False

    def tasks_of(self, stage: int) -> tuple[str, ...]:
        """All tasks, in every stage."""
        return self.tasks
