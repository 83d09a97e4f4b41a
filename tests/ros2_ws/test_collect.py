"""Rollout request, session and a person's label must reach the episode through the nodes, or they are lost.

Pinned, with simulated arm, safety node and policy node as processes: nothing is collected outside a session or against
the request; an episode takes task, instruction, temperature and noise from the request and the session's id; two
episodes have noise of their own; a button that ends an attempt, a button after it, and `ratchet ctl label` are labels
in the store, with a name to each; stopping the session writes its episodes into the manifest. The learner's status is
the file that its sync agent writes; the policy is a fake. Determinism: lock-step; waiting is for events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ratchet_msgs import msg
from ratchet_msgs.action import RunTask

from ratchet_ros.messages import qos
from ratchet_vla.episodes.library.annotations import Annotations, Label
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.runtime.session import rollout_requests
from ratchet_vla.runtime.session.manifest import Session
from tests.ros2_ws.graph import ROOT, Graph, Watcher, active, ratchet

CONTRACT = str(ROOT / "robots" / "metaworld.yaml")
REQUEST: dict[str, Any] = {
    "id": "run/1", "task": "door-open", "instruction": "open the door", "temperature": 1.6, "noise_correlation": 0.5,
    "stage": 0, "update": 0, "groups": 24, "group_size": 1, "horizon": 24, "seed": 7, "slots": 0, "have": 0,
}  # fmt: skip


class Arm:
    """The graph, with the files that a sync agent would write."""

    def __init__(self, folder: Path) -> None:
        self.robot, self.graph, self.watcher = folder / "robot", Graph(folder), Watcher()
        timed: dict[str, Any] = {"contract": CONTRACT, "use_sim_time": True, "lock_step": True}
        self.graph.start("sim_robot_node", contract=CONTRACT, task="door-open", initial_state=3, lock_step=True)
        self.graph.start("safety_node", **timed)
        self.graph.start(
            "policy_node",
            **timed,
            policy_python=str(ROOT / ".venv" / "bin" / "python"),
            policy_module="ratchet_vla.testing.fake_policy_worker",
            policy_options='{"image_size": 96, "chunk": 8}',
            judge="operator",
            mode="collect",
            robot=str(self.robot),
            session="manual",
            ordered=True,
            episodes=str(self.robot / "episodes"),
        )
        self.applied = self.watcher.collect(msg.Applied, "applied", qos.EVENTS)
        status = self.watcher.collect(msg.PolicyStatus, "policy_status", qos.STATUS)
        self.operator = self.watcher.node.create_publisher(msg.OperatorInput, "operator", qos.INPUT)
        active(self.watcher, "sim_robot_node", "safety_node", "policy_node")
        self.watcher.until(lambda: status and status[-1].adapter_id, "the policy's adapter")
        self.adapter = status[-1].adapter_id

    def request(self, phase: str = "collecting", **changes: Any) -> None:
        request = {**REQUEST, "adapter": self.adapter, **changes} if phase == "collecting" else None
        rollout_requests.write(self.robot, {"phase": phase, "mode": "robot", "order": request})

    def start(self, **goal: Any) -> Any:
        return self.watcher.goal(RunTask, "/policy_node/run_task", RunTask.Goal(**{"temperature": -1.0, **goal}))

    def run(self, **goal: Any) -> Any:
        return self.watcher.result(self.start(**goal)).result

    def press(self, judge: int, person: str) -> None:
        self.operator.publish(msg.OperatorInput(person=person, judge=judge))

    def labels(self, name: str) -> list[Label]:
        annotations = Annotations(EpisodeStore(self.robot / "episodes"))
        return annotations.labels(annotations.store.resolve(name))


@pytest.fixture(scope="module")
def arm(ros: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arm]:
    made = Arm(tmp_path_factory.mktemp("collect"))
    yield made
    codes = made.graph.stop()
    made.watcher.close()
    assert set(codes.values()) == {0}, {n: made.graph.log(n) for n in codes}


def test_nothing_is_collected_outside_a_session(arm: Arm) -> None:
    arm.request()
    assert arm.run().code == "session.none"
    code, told = ratchet(
        "session", "start", "--robot", str(arm.robot), "--contract", str(ROOT / "robots" / "ur5e.yaml")
    )
    assert (code, told["error"]["code"]) == (2, "session.other_contract")
    code, told = ratchet("session", "start", "--robot", str(arm.robot), "--note", "new cups")
    assert code == 0
    assert Session.read(arm.robot / "sessions" / told["session"]).notes == {"note": "new cups"}


def test_what_could_not_be_learned_from_moves_nothing(arm: Arm) -> None:
    arm.applied.clear()
    for goal, changes, code in (
        ({"temperature": 0.0}, {}, "order.greedy"),
        ({"temperature": 1.0}, {}, "order.other_temperature"),
        ({"task": "push"}, {}, "order.other_task"),
        ({}, {"adapter": "a" * 64}, "order.other_adapter"),
        ({}, {"phase": "waiting"}, "order.none"),
    ):
        arm.request(**changes)
        result = arm.run(**goal)
        assert (result.termination, result.code) == ("refused", code)
    assert not [a for a in arm.applied if a.number]


def test_an_episode_takes_everything_from_the_order(arm: Arm) -> None:
    arm.request()
    results = [arm.run(), arm.run(), arm.run(seed=5)]
    assert [r.termination for r in results] == ["horizon"] * 3
    assert {r.outcome for r in results} == {RunTask.Result.OUTCOME_UNJUDGED}
    store = EpisodeStore(arm.robot / "episodes")
    read = [store.read(r.episode, images=False) for r in results]
    session = json.loads((arm.robot / "session.current").read_text())["session"]
    for result, episode in zip(results, read, strict=True):
        card = store.card(result.episode)
        assert (card.session, card.mode, card.name) == (session, "collect", result.episode)
        assert result.episode.startswith(session)
        assert (episode.task, episode.instruction) == ("door-open", "open the door")
        assert {s.chunk.temperature for s in episode.steps} == {1.6}
        assert episode.meta["order"] == "run/1"
        assert sum(t.chunk_sequence >= 0 for t in episode.ticks) == 24
    assert len({e.seed for e in read}) == 3  # none shares its noise
    assert read[2].seed == 5  # unless it is asked for


def test_the_button_that_ends_an_attempt_is_its_label(arm: Arm) -> None:
    arm.request(horizon=100_000)
    arm.applied.clear()
    handle = arm.start()
    arm.watcher.until(lambda: sum(bool(a.action) for a in arm.applied) > 10, "motion")
    future = handle.get_result_async()

    def ended() -> bool:  # the operator's topic is best effort, and a hand presses for a while
        arm.press(msg.OperatorInput.JUDGE_SUCCESS, "Ada")
        return bool(future.done())

    arm.watcher.until(ended, "the end of the attempt")
    result = future.result().result
    assert (result.termination, result.outcome_source) == ("success", "human:Ada")
    assert [(x.annotator, x.value, x.viewed.via) for x in arm.labels(result.episode)] == [
        ("Ada", "success", "operator")
    ]
    # Released and pressed again at rest: she has changed her mind. What was held on said nothing more.
    arm.press(msg.OperatorInput.JUDGE_NONE, "Ada")

    def changed() -> bool:
        arm.press(msg.OperatorInput.JUDGE_FAILURE, "Ada")
        return len(arm.labels(result.episode)) == 2

    arm.watcher.until(changed, "the second label")
    assert [x.value for x in arm.labels(result.episode)] == ["success", "failure"]


def test_a_person_labels_from_another_terminal(arm: Arm) -> None:
    arm.request()
    first, last = arm.run(), arm.run()
    assert ratchet("ctl", "label", "success", "--annotator", "Bob", "--note", "barely")[0] == 0
    assert [(x.annotator, x.value, x.note) for x in arm.labels(last.episode)] == [("Bob", "success", "barely")]
    assert ratchet("ctl", "label", "failure", "--annotator", "Bob", "--episode", first.episode)[0] == 0
    assert [(x.annotator, x.value) for x in arm.labels(first.episode)] == [("Bob", "failure")]
    code, told = ratchet("ctl", "label", "success")
    assert (code, told["error"]["code"]) == (2, "episode.no_annotator")
    code, told = ratchet("ctl", "label", "success", "--annotator", "Bob", "--episode", "nothing")
    assert (code, told["error"]["code"]) == (2, "episode.unknown")


def test_the_manifest_lists_the_sessions_episodes(arm: Arm) -> None:
    code, told = ratchet("session", "stop", "--robot", str(arm.robot), "--reason", "lunch")
    assert code == 0
    manifest = Session.read(arm.robot / "sessions" / told["session"])
    cards = EpisodeStore(arm.robot / "episodes").cards()
    assert [e["sha"] for e in manifest.episodes] == [c.id for c in cards.values()]
    assert len(manifest.episodes) == 6
    assert (manifest.reason, [i for _, i in manifest.adapters]) == ("lunch", [arm.adapter])
    assert arm.run().code == "session.none"
