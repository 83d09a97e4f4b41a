"""What a button or a scene says becomes an episode's label; a word too much is a lesson that nobody meant.

Pinned: a person's word counts however the attempt ended, but only with a name; the first button counts; the scene is
heard for its own task, after the goal began, and waited for where its news may still be on the way. No node, no clock:
messages are handed in.
"""

from __future__ import annotations

import threading

import pytest
from ratchet_msgs import msg

from ratchet_ros.messages.times import to_time
from ratchet_ros.policy.labeller import RosLabeller
from ratchet_vla.records import ControlTick, Mark
from ratchet_vla.runtime.control.labelling import Attempt, SuccessLabel
from ratchet_vla.runtime.control.outcome import Termination

PERIOD = 0.05
STOPPED = Attempt(Termination.FAILURE, 4, 0)


def pressed(labeller: RosLabeller, button: int, person: str) -> None:
    labeller.operator(msg.OperatorInput(judge=button, person=person))


def scene(
    stamp: float, *, solved: bool = False, task: str = "door-open", text: str = "open the door"
) -> msg.SceneStatus:
    status = msg.SceneStatus(task=task, instruction=text, success=solved)
    status.header.stamp = to_time(stamp)
    return status


def test_a_named_person_ends_the_attempt_and_labels_it() -> None:
    labeller = RosLabeller("operator", PERIOD, 0.0)
    labeller.begin(1.0)
    assert labeller.outcome() is None
    assert labeller.label(STOPPED) == SuccessLabel()
    pressed(labeller, msg.OperatorInput.JUDGE_FAILURE, " Ada ")
    pressed(labeller, msg.OperatorInput.JUDGE_SUCCESS, "Ada")  # the next report, while the arm brakes
    assert labeller.outcome() is False
    assert labeller.label(STOPPED) == SuccessLabel(False, "human:Ada")
    labeller.begin(2.0)
    assert labeller.outcome() is None


@pytest.mark.parametrize("person", ["", "  ", "robot:1"])
def test_a_button_without_a_name_ends_the_attempt_and_labels_nothing(person: str) -> None:
    labeller = RosLabeller("operator", PERIOD, 0.0)
    labeller.begin(1.0)
    pressed(labeller, msg.OperatorInput.JUDGE_SUCCESS, person)
    assert labeller.outcome() is True
    assert labeller.label(Attempt(Termination.SUCCESS, 4, 0)) == SuccessLabel()


def test_buttons_say_nothing_where_the_scene_labels() -> None:
    labeller = RosLabeller("scene", PERIOD, 0.0)
    labeller.begin(1.0)
    pressed(labeller, msg.OperatorInput.JUDGE_SUCCESS, "Ada")
    assert labeller.outcome() is None
    assert labeller.label(Attempt(Termination.HORIZON, 4, 0)) == SuccessLabel(False, "simulator")
    assert labeller.label(Attempt(Termination.CANCELLED, 4, 0)) == SuccessLabel()
    assert labeller.label(Attempt(Termination.SUCCESS, 4, 1)) == SuccessLabel()


def test_a_scene_is_asked_for_its_own_task_only() -> None:
    labeller = RosLabeller("scene", PERIOD, 0.0)

    def code(task: str, text: str) -> str:
        refusal = labeller.refusal(task, text)
        return "" if refusal is None else refusal.code

    assert code("door-open", "open the door") == "goal.no_scene"
    labeller.scene(scene(1.0))
    assert code("door-open", "open the door") == ""
    assert code("push", "open the door") == "goal.other_task"
    assert code("door-open", "stand still") == "goal.other_instruction"
    labeller.scene(scene(1.05, solved=True))
    assert code("door-open", "open the door") == "goal.already_solved"
    assert RosLabeller("none", PERIOD, 0.0).refusal("anything", "at all") is None


def test_the_news_of_a_reset_is_waited_for() -> None:
    labeller = RosLabeller("scene", PERIOD, 0.0)
    labeller.scene(scene(1.0, solved=True))
    waiting = threading.Thread(target=labeller.settle, args=("door-open", "open the door", 60.0))
    waiting.start()
    labeller.scene(scene(1.05))
    waiting.join(30.0)
    assert not waiting.is_alive()
    labeller.scene(scene(1.1, solved=True))
    labeller.settle("door-open", "open the door", 0.01)  # nothing comes: it goes on, and the goal is refused
    assert labeller.refusal("door-open", "open the door") is not None


def test_no_news_is_waited_for_where_nothing_was_sent() -> None:
    """In lock-step only a command makes the simulation go on: after a second hold it has nothing to tell."""
    labeller = RosLabeller("scene", PERIOD, 60.0)
    labeller.begin(1.0)
    labeller.scene(scene(1.05))
    labeller.ticked(ControlTick(1.1, 1.1, 3, None, None, Mark.HELD, -1, -1, "", {}))
    asking = threading.Thread(target=labeller.outcome, daemon=True)
    asking.start()
    asking.join(30.0)
    assert not asking.is_alive()
