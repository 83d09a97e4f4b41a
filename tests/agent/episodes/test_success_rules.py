"""A success that nobody earned teaches the policy to do nothing; a failure that it did not cause teaches it fear.

Pinned: which goals are refused before anything moves, at which ends a machine may say how an attempt went, and which
recorded labels of a machine are doubted. Values only; nothing runs.
"""

from __future__ import annotations

import numpy as np
import pytest

from ratchet_vla.episodes.success_rules import doubt, machine_label, require_goal, require_same, require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Mark, Observation, Step
from ratchet_vla.runtime.control.outcome import Termination


@pytest.mark.parametrize(
    ("task", "instruction", "code"),
    [("", "open the door", "no_task"), ("door-open", "", "no_instruction"), ("door-open", " \n", "no_instruction")],
)
def test_a_goal_without_words_is_refused(task: str, instruction: str, code: str) -> None:
    with pytest.raises(RatchetError) as caught:
        require_goal(task, instruction)
    assert caught.value.code == f"goal.{code}"


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -0.1])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(RatchetError, match=r"goal\.bad_temperature"):
        require_temperature(temperature)
    require_temperature(0.0)
    require_temperature(1.6)


def test_the_scene_judges_its_own_task_in_its_own_words_only() -> None:
    require_same("door-open", "open the door", "door-open", "open the door")
    with pytest.raises(RatchetError, match=r"goal\.other_task.*handle-press"):
        require_same("button-press", "press the button", "handle-press", "press the handle")
    with pytest.raises(RatchetError, match=r"goal\.other_instruction.*open the door"):
        require_same("door-open", "stand still", "door-open", "open the door")


def test_a_machine_speaks_of_finished_attempts_of_the_policy_alone() -> None:
    words = {t: machine_label(t.value, decisions=3, human_ticks=0) for t in Termination}
    known = {Termination.SUCCESS: True, Termination.HORIZON: False}
    assert words == {t: known.get(t) for t in Termination}
    assert machine_label("success", decisions=0, human_ticks=0) is None
    assert machine_label("success", decisions=3, human_ticks=1) is None
    assert machine_label("horizon", decisions=3, human_ticks=40) is None
    assert machine_label("cut_off", decisions=3, human_ticks=0) is None


def episode(termination: str, success: bool, marks: Mark = Mark.NONE) -> Episode:
    seen = Observation({}, {}, "open the door", 0.0, 0)
    chunk = ActionChunk(np.zeros((2, 4), np.float32), None, None, "", 1.0, 0.0, 0)
    tick = ControlTick(0.0, 0.0, 0, None, None, marks, 0, 0, "", {})
    steps = [Step(seen, chunk, np.ones(2, bool), 0.0, True, 2)]
    return Episode("door-open", "open the door", steps, success, "simulator", ticks=[tick], termination=termination)


def test_what_a_machine_could_not_know_is_doubted_later_too() -> None:
    assert doubt(episode("success", True)) == ""
    assert doubt(episode("horizon", False)) == ""
    assert "fault" in doubt(episode("fault", False))
    assert "cancelled" in doubt(episode("cancelled", False))
    assert doubt(episode("horizon", True))
    assert doubt(episode("success", False))
    assert doubt(episode("", True))
    assert "a person drove" in doubt(episode("success", True, Mark.HUMAN))
    idle = episode("success", True)
    idle.steps.clear()
    assert "decided nothing" in doubt(idle)
