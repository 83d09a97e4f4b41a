"""What happens when something is lost while an arm moves: the sender, the state, the clock, a person's hand.

It is the reason for a command filter of its own. Pinned: silence brakes and then holds with an event, and motion comes
back with the ramp; a state that stops arriving holds; an emergency stop, a value that is not finite and a second sender
latch until a named person clears them, and never while the stop is pressed; a dead-man switch that is not held stops; a
policy node killed with SIGKILL and a simulation that stands still leave the arm at rest. Determinism: only the order of
events is asserted, never how fast this machine is; how fast it is stands in benchmarks/runtime/fault_to_hold.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ratchet_msgs import msg, srv
from ratchet_msgs.action import RunTask
from std_msgs.msg import Bool

from ratchet_ros.messages import qos
from ratchet_ros.messages.times import to_time
from ratchet_vla.records import Mark
from tests.ros2_ws.arm import Rig, small_action
from tests.ros2_ws.graph import ROOT, Graph, Watcher, active


@pytest.fixture
def make(ros: None) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def build(name: str = "franka_fr3", **parameters: Any) -> Rig:
        made.append(Rig(name, **parameters))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def move(rig: Rig) -> Any:
    return rig.send(msg.Command.ACTION, small_action(rig.contract, rig.arm))


def codes(rig: Rig) -> list[str]:
    return [e.code for e in rig.events]


def clear(rig: Rig, person: str = "Ada") -> Any:
    return rig.watcher.call(srv.ClearFault, "/safety_node/clear_fault", srv.ClearFault.Request(person=person))


def test_silence_brakes_then_holds_and_motion_comes_back_with_the_ramp(make: Callable[..., Rig]) -> None:
    rig = make()
    move(rig)
    rig.watcher.until(lambda: "safety.command_lost" in codes(rig), "the loss")
    own = [a for a in rig.applied if a.number == 0]
    assert own
    assert all(a.marks & msg.Applied.HELD for a in own)
    rig.watcher.until(
        lambda: rig.safety.command_filter and rig.safety.command_filter.safety.state.value == "holding", "a hold"
    )
    action = small_action(rig.contract, rig.arm)
    action[0] = rig.contract.action.dims[0].high
    back = rig.send(msg.Command.ACTION, action)
    assert Mark(back.marks) & (Mark.RAMPED | Mark.CLIPPED)
    assert 0.0 < back.action[0] < 0.1 * action[0]


def test_a_state_that_stops_arriving_holds_the_arm(make: Callable[..., Rig]) -> None:
    rig = make()
    move(rig)
    rig.arm.broken = "silent"
    while "safety.observation_age" not in codes(rig):
        move(rig)
    rig.arm.broken = ""
    rig.watcher.until(lambda: rig.safety.clock.now() - rig.intake().aligner.state_stamp() < 0.05, "new states")
    while not move(rig).sent:
        pass


def test_silence_during_a_hold_is_told_as_silence(make: Callable[..., Rig]) -> None:
    """Whoever looks must not read of an old state, which is long fresh again, where the truth is that nobody sends."""
    rig = make()
    move(rig)
    rig.arm.broken = "silent"
    while "safety.observation_age" not in codes(rig):
        move(rig)
    rig.arm.broken = ""
    command_filter = rig.safety.command_filter
    assert command_filter is not None
    rig.watcher.until(lambda: command_filter.safety.cause == "safety.command_lost", "the loss")
    assert command_filter.safety.state.value == "holding"
    rig.watcher.until(lambda: "safety.command_lost" in codes(rig), "the event")
    while not move(rig).sent:
        pass


@pytest.mark.parametrize("profile", [qos.STATUS, 10], ids=["latched", "as ros2 topic pub does"])
def test_the_e_stop_latches_and_a_named_person_clears_it(make: Callable[..., Rig], profile: Any) -> None:
    rig = make()
    button = rig.watcher.node.create_publisher(Bool, "e_stop", profile)
    rig.watcher.until(lambda: button.get_subscription_count() > 0, "an ear for the button")
    move(rig)
    button.publish(Bool(data=True))
    rig.watcher.until(lambda: "safety.e_stop" in codes(rig), "the stop")
    while move(rig).action:
        pass
    assert clear(rig).code == "safety.e_stop"
    button.publish(Bool(data=False))
    rig.watcher.until(lambda: not rig.safety._e_stop_pressed, "the release")
    assert not move(rig).sent  # released, still latched
    assert clear(rig, " ").code == "safety.no_operator"
    assert clear(rig).success
    assert "safety.cleared" in codes(rig) or rig.watcher.until(lambda: "safety.cleared" in codes(rig), "the event")
    assert move(rig).sent


def test_an_e_stop_pressed_before_the_node_is_active_counts(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.safety.trigger_deactivate()
    rig.watcher.node.create_publisher(Bool, "e_stop", qos.STATUS).publish(Bool(data=True))
    rig.watcher.until(lambda: rig.safety._e_stop_pressed, "the latched message")
    rig.safety.trigger_activate()
    assert not move(rig).sent


def test_a_value_that_is_not_finite_latches(make: Callable[..., Rig]) -> None:
    rig = make("ur5e")
    move(rig)
    action = small_action(rig.contract, rig.arm)
    action[2] = np.nan
    rig.send(msg.Command.ACTION, action)
    rig.watcher.until(lambda: "safety.not_finite" in codes(rig), "the fault")
    assert next(e for e in rig.events if e.code == "safety.not_finite").latched
    for topic, got in rig.arm.got.items():
        for message in got:
            assert np.isfinite(getattr(message, "data", [0.0])).all(), topic


def test_a_second_sender_latches_and_old_numbers_are_dropped(make: Callable[..., Rig]) -> None:
    rig = make()
    move(rig)
    rig.command.publish(msg.Command(session=rig.session, number=1, kind=msg.Command.HOLD))
    rig.watcher.until(lambda: "safety.sequence" in codes(rig), "the dropped command")
    assert not any(e.latched for e in rig.events)
    rig.session = 8
    move(rig)
    rig.watcher.until(lambda: "safety.second_sender" in codes(rig), "the fault")
    assert next(e for e in rig.events if e.code == "safety.second_sender").latched


def test_motion_needs_the_dead_mans_switch(make: Callable[..., Rig]) -> None:
    rig = make(dead_man=True, dead_man_timeout=2.0)
    move(rig)
    rig.watcher.until(lambda: "safety.dead_man" in codes(rig), "the missing hand")
    operator = rig.watcher.node.create_publisher(msg.OperatorInput, "operator", qos.INPUT)
    rig.watcher.until(lambda: operator.get_subscription_count() == 1, "the node's ear")

    def held() -> bool:
        operator.publish(msg.OperatorInput(stamp=to_time(time.time()), person="Ada", dead_man=True))
        return bool(move(rig).action)

    rig.watcher.until(held, "motion")
    operator.publish(msg.OperatorInput(stamp=to_time(time.time()), person="Ada", dead_man=False))
    while move(rig).action:
        pass


def test_an_action_of_another_size_is_a_fault(make: Callable[..., Rig]) -> None:
    rig = make()
    move(rig)
    rig.send(msg.Command.ACTION, np.zeros(3, np.float32))
    rig.watcher.until(lambda: "safety.bad_action" in codes(rig), "the fault")


CONTRACT = str(ROOT / "robots" / "metaworld.yaml")


def start_policy(graph: Graph) -> None:
    graph.start(
        "policy_node",
        contract=CONTRACT,
        use_sim_time=True,
        clock_timeout=2.0,
        policy_python=str(ROOT / ".venv" / "bin" / "python"),
        policy_module="ratchet_vla.testing.fake_policy_worker",
        policy_options='{"image_size": 96, "chunk": 20}',
        judge="none",
    )


@pytest.fixture
def free(ros: None, tmp_path: Path) -> Iterator[tuple[Graph, Watcher]]:
    """A simulated arm that runs by itself, the safety node, and a policy node with a fake policy; the arm moves."""
    graph, watcher = Graph(tmp_path), Watcher()
    graph.start("sim_robot_node", contract=CONTRACT, task="door-open", speed=0.5)
    graph.start("safety_node", contract=CONTRACT, use_sim_time=True, clock_timeout=2.0)
    start_policy(graph)
    active(watcher, "sim_robot_node", "safety_node", "policy_node")
    yield graph, watcher
    for process in graph.processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
    graph.stop()
    watcher.close()


def test_a_killed_policy_node_and_a_clock_that_stops_leave_the_arm_at_rest(free: tuple[Graph, Watcher]) -> None:
    graph, watcher = free
    applied = watcher.collect(msg.Applied, "applied", qos.EVENTS)
    status = watcher.collect(msg.SafetyStatus, "safety_status", qos.STATUS)
    watcher.goal(RunTask, "/policy_node/run_task", RunTask.Goal(task="move", instruction="move", horizon=100_000))
    watcher.until(lambda: sum(bool(a.action) for a in applied) > 20, "motion")
    graph.processes["policy_node"].kill()
    watcher.until(lambda: status[-1].cause == "safety.command_lost", "the loss")
    watcher.until(lambda: status[-1].state == "holding", "a hold")
    watcher.until(lambda: not applied[-1].action, "the hold on its own topic")
    assert not status[-1].latched
    # A new policy node moves the arm again; then the simulation stands still in the middle of it.
    applied.clear()
    start_policy(graph)
    active(watcher, "policy_node")
    watcher.goal(RunTask, "/policy_node/run_task", RunTask.Goal(task="move", instruction="move", horizon=100_000))
    watcher.until(lambda: sum(bool(a.action) for a in applied) > 20, "motion again")
    graph.processes["sim_robot_node"].send_signal(signal.SIGSTOP)
    watcher.until(lambda: status[-1].cause in ("safety.clock_paused", "safety.command_lost"), "the clock that stands")
    watcher.until(lambda: status[-1].state == "holding", "rest")
    assert not status[-1].latched
    # Nothing moved meanwhile: where the simulation goes on, so does the task, and nobody has to clear anything.
    applied.clear()
    graph.processes["sim_robot_node"].send_signal(signal.SIGCONT)
    watcher.until(lambda: sum(bool(a.action) for a in applied) > 20, "motion once more")
    watcher.until(lambda: status[-1].state == "running", "the end of the ramp")
