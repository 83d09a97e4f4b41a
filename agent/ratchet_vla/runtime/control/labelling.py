"""Who says whether a task is solved while the arm works on it, and what that word is worth once the attempt is over.

Knows questions, answers and how an attempt ended. Knows no loop, no simulator and no topic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ratchet_vla.episodes.success_rules import machine_label
from ratchet_vla.runtime.control.outcome import Termination

SIMULATOR = "simulator"


@dataclass(frozen=True)
class Attempt:
    """What a control loop knows of an attempt that is over.

    decisions: answers of the policy of which at least one action was sent. human_ticks: control periods under a
    person's command.
    """

    termination: Termination
    decisions: int
    human_ticks: int


@dataclass(frozen=True)
class SuccessLabel:
    """success, source: as in `records.Episode`; None and empty where nobody may say."""

    success: bool | None = None
    source: str = ""


class Labeller(Protocol):
    """Asked by a control loop, in its thread; must return at once (in lock-step it may wait for the scene)."""

    def outcome(self) -> bool | None:
        """Asked before the first period and after each: True where the task is solved, False where somebody ended the
        attempt as failed, None while it goes on."""
        ...

    def label(self, attempt: Attempt) -> SuccessLabel:
        """Asked once, when the arm has come to rest."""
        ...


class SceneLabeller:
    """The simulated scene's own predicate."""

    def __init__(self, solved: Callable[[], bool]) -> None:
        self._solved = solved

    def outcome(self) -> bool | None:
        return True if self._solved() else None

    def label(self, attempt: Attempt) -> SuccessLabel:
        return label_by_scene(attempt)


def label_by_scene(attempt: Attempt) -> SuccessLabel:
    """The scene's word, where it counts; see `episodes.success_rules.machine_label`."""
    success = machine_label(attempt.termination.value, attempt.decisions, attempt.human_ticks)
    return SuccessLabel(success, SIMULATOR if success is not None else "")
