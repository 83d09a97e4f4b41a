"""When a success counts: what must hold before an attempt begins, and when a machine's label holds afterwards.

Knows the words of an episode's record. Knows no robot, no scene and no policy: every path that runs episodes asks here
before it moves and after it ended, and the learner's intake asks again.
"""

from __future__ import annotations

import math

from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode, Mark

# Ends at which a machine that watches the scene knows the outcome. After every other one (cancelled, a fault, a hold
# that did not end, a recording that was cut off) the attempt was not the policy's to finish, and nobody knows.
OUTCOMES = {"success": True, "horizon": False}


def require_goal(task: str, instruction: str) -> None:
    """Refuse what no policy can be asked to do.

    Raises:
        RatchetError: goal.no_task, goal.no_instruction.
    """
    if not task.strip():
        raise RatchetError("goal.no_task", "the goal names no task", fix="name the task that the episode belongs to")
    if not instruction.strip():
        raise RatchetError(
            "goal.no_instruction", "the policy is told nothing", where=task, fix="say the task in words (--instruction)"
        )


def require_temperature(temperature: float) -> None:
    """Refuse what no policy can sample at; 0 acts greedily. Raises RatchetError goal.bad_temperature."""
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise RatchetError(
            "goal.bad_temperature",
            f"{temperature} is no sampling temperature",
            fix="give 0 to act greedily, or a finite number above 0",
        )


def require_same(task: str, instruction: str, scene_task: str, scene_instruction: str) -> None:
    """Refuse a goal that the scene would count as another one.

    Raises:
        RatchetError: goal.other_task, goal.other_instruction.
    """
    if task != scene_task:
        raise RatchetError(
            "goal.other_task",
            f"the goal is {task!r}, the scene watches for {scene_task!r}",
            fix=f"reset the scene to {task!r}, or run {scene_task!r}",
        )
    if instruction != scene_instruction:
        raise RatchetError(
            "goal.other_instruction",
            f"the policy would be told {instruction!r}, the scene watches for {scene_instruction!r}",
            where=task,
            fix=f'say "{scene_instruction}", or run without a labeller',
        )


def already_solved(task: str) -> RatchetError:
    """The refusal of a scene in which nothing is left to do."""
    return RatchetError(
        "goal.already_solved",
        "the task is solved before anything has moved",
        where=task,
        fix="put the scene back first",
    )


def machine_label(termination: str, decisions: int, human_ticks: int) -> bool | None:
    """Whether the policy succeeded, as far as a machine that watches the scene may say; None where it may not.

    termination: why the attempt ended. decisions: answers of the policy of which at least one action was sent.
    human_ticks: control periods under a person's command.
    """
    if decisions < 1 or human_ticks > 0:
        return None
    return OUTCOMES.get(termination)


def doubt(episode: Episode) -> str:
    """Why the simulator's word on a recorded episode does not count; empty where it does."""
    human_ticks = sum(bool(tick.marks & Mark.HUMAN) for tick in episode.ticks)
    if human_ticks:
        return f"a person drove {human_ticks} of its {len(episode.ticks)} control periods"
    decisions = sum(bool(step.steps_run) for step in episode.steps)
    if not decisions:
        return "the policy decided nothing in it"
    success = machine_label(episode.termination, decisions, human_ticks)
    if success is None or success is not episode.success:
        ended = episode.termination or "nobody knows how"
        return f"it is called a {'success' if episode.success else 'failure'}, and ended: {ended}"
    return ""
