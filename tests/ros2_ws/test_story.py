"""The week at an arm, told once with the commands of docs/story.md: each joint with the real part on either side.

Pinned: episodes of the real nodes, recorded by the real recorder and labelled by a person on the real page, reach the
learner through the real sync agent; they make an update, the gate that cannot measure holds, a person promotes, the arm
swaps while it moves, learns once more and is rolled back. Every process is killed once and started again: nothing that
was recorded is lost or doubled, nothing is learned from that nobody labelled. The arm's first life runs on one ROS
release, its second on another. Determinism: lock-step; what the arm does decides nothing here, a person's word does;
waiting is for lines, files and topics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.product.week import AT_THE_ARM, ROOT, Beside, Week, eventually
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore

JAZZY = str(ROOT / ".venv-jazzy" / "bin" / "python")
ENDLESS = 100_000  # control periods of a motion that ends when somebody ends it


class Told(Week):
    """The week, with what the test waits for. named: episodes that a goal's result said were recorded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.named: list[str] = []

    def start_arm(self, **environment: str) -> None:
        """The nodes, up to the moment when they would take a goal."""
        before = self.beside.statuses
        self.up = self.start("ratchet up", **environment)
        self.up.until("started")
        self.beside.wait_for(lambda: self.beside.statuses > before, "the new nodes' status")
        told = self.beside.do("await", nodes=["sim_robot_node", "safety_node", "policy_node"], patience=60.0)
        assert "result" in told, told

    def try_once(self) -> None:
        """Put the scene back, let the policy try, have it recorded.

        By the printed commands once, then by their requests from a process that is there already.
        """
        if not self.named:
            assert self.say("ratchet ctl reset")[0] == 0
            code, out = self.say("ratchet ctl run", "--json")
            assert code == 0, out
            result = json.loads(out.splitlines()[-1])
        else:
            assert "result" in self.beside.do("reset", initial_state=3)
            result = self.beside.do("run", horizon=24)["result"]
        assert (result["outcome"], result["termination"], result["code"]) == ("unjudged", "horizon", "")
        self.named.append(result["episode"])

    def move(self) -> int:
        """The arm is in motion, and goes on until somebody ends it."""
        number = self.beside.ask("run", horizon=ENDLESS)
        self.beside.see(lambda s: s["motion"] == "running" and s["ticks"] > 10, "motion")
        return number

    def label(self, *values: str) -> None:
        """The oldest episodes without a label."""
        for value in values:
            card = eventually(self.page.next, "an episode to label")
            self.page.label(card["id"], value)

    def update_and_promotion(self) -> str:
        """The batch is complete: an update, a gate that cannot measure, a person who promotes; the adapter's id."""
        assert self.learner is not None
        self.learner.until("update ")
        self.learner.until(": hold")
        self.learner.until("waiting for a person")
        candidate = FolderStore("runs/learner/adapters").tags()["candidate"]
        assert self.say("ratchet adapters promote")[0] == 0
        self.learner.until(f"{candidate[:12]} is active, by a person")
        self.beside.see(lambda s: s["adapter_id"] == candidate, "the promoted adapter at the arm")
        return candidate

    def the_power_goes(self) -> None:
        """At the arm, in motion: everything at once."""
        assert self.up is not None
        self.move()
        assert set(self.up.children()) == set(AT_THE_ARM)
        self.up.kill_all()
        self.beside.kill()  # waits for an answer that nobody gives any more
        self.beside = Beside(ROOT)


@pytest.fixture
def week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.chdir(tmp_path)
    made = Told(tmp_path)
    yield made
    made.end()


@pytest.mark.timeout(900)  # a busy machine takes ten times as long as a quiet one
def test_the_week_at_an_arm(week: Told) -> None:
    week.make_keys()
    week.learner = week.start("ratchet learner")
    week.start_arm(RATCHET_ROS_PYTHON=JAZZY)
    assert week.up is not None
    # The adapter that is trained from acts as the base; the arm runs it under its own id.
    requested = eventually(lambda: week.learner_state().training, "a rollout request")
    week.in_force(requested)

    # The first round. Whoever is not needed at the moment dies.
    week.try_once()
    week.open_page()
    week.label("success")
    week.up.kill_child("sync")
    week.up.until("sync ended with status -9")
    week.try_once()
    week.label("failure")
    week.learner.kill()
    week.learner = week.start("ratchet learner")  # the arm does not wait for it
    week.try_once()
    assert week.review is not None
    week.review.kill()
    week.open_page()
    week.label("success")
    week.try_once()
    week.try_once()

    # The last label completes the batch; the arm is in motion when the promoted adapter reaches it.
    motion = week.move()
    week.label("failure")
    first = week.update_and_promotion()
    ticks = week.beside.status["ticks"]
    moved = week.beside.see(lambda s: s["ticks"] > ticks + 20, "motion with it")
    assert (moved["running"], moved["motion_cause"]) == (True, "")
    week.beside.cancel()
    result = week.beside.answer(motion)["result"]
    assert (result["termination"], result["adapter_id"], result["missed"]) == ("cancelled", first, 0)
    week.named.append(result["episode"])
    week.label("success", "success")  # of the adapter before, and of both: neither is learned from
    week.in_force(first)

    # The second round. What is needed dies.
    week.try_once()
    assert week.say("ratchet ctl label")[0] == 0
    motion = week.move()
    week.up.kill_child("recorder")
    week.up.kill_child("policy")
    result = week.beside.answer(motion)["result"]
    assert (result["termination"], result["code"], result["episode"]) == ("fault", "policy.crashed", "")
    assert week.say("ratchet ctl clear")[0] == 0
    week.beside.see(lambda s: s["restarts"] == 1, "a new policy process")
    week.in_force(first)
    week.try_once()
    week.label("discard", "failure")  # what the recorder left when it died comes first
    week.the_power_goes()
    week.start_arm()
    week.in_force(first)
    week.try_once()
    week.label("discard", "success")
    week.try_once()
    week.label("failure")
    second = week.update_and_promotion()
    assert len({requested, first, second}) == 3
    assert week.say("ratchet adapters rollback")[0] == 0
    week.learner.until(f"active was set to {first[:12]} by a person")
    week.in_force(first)

    # The sync agent writes its status once in a while.
    eventually(lambda: first[:12] in week.say("ratchet status --robot")[1], "the robot's status")
    assert (week.up.end(), week.learner.end()) == (0, 0)
    week.review.end()
    check_the_books(week, first, second)


def check_the_books(week: Told, first: str, second: str) -> None:
    """Nothing lost, nothing doubled, nothing learned from that nobody labelled."""
    code, told = week.say("ratchet status --learner")
    assert code in (0, 1)
    for words in ("success 2/4 (4 accepted)", "waiting for a person"):
        assert words in told
    code, told = week.say("ratchet episodes verify")
    assert (code, "0 problems" in told) == (0, True), told
    sessions = json.loads(week.say("ratchet session status", "--json")[1])["sessions"]
    assert [bool(s["ended"]) for s in sessions] == [True]  # it went on after the power cut
    store = EpisodeStore("runs/robot/episodes")
    annotations = Annotations(store)
    names = [card.name for card in store.cards().values()]
    assert [names.count(name) for name in week.named] == [1] * len(week.named)
    statuses = {card.id: annotations.status(card.id) for card in store.cards().values()}
    assert sorted(s.state for s in statuses.values()) == ["discarded"] * 2 + ["verified"] * 10
    state = week.learner_state()
    verified = {episode for episode, status in statuses.items() if status.state == "verified"}
    assert set(state.arrivals) == verified
    assert {a.sha: a.success for a in state.arrivals.values()} == {e: statuses[e].success for e in verified}
    assert {a.source for a in state.arrivals.values()} == {"human:Ada", "human:ada"}
    assert state.counts() == {"accepted": 8, "waiting": 0, "replay": 2, "unruled": 0, "used": 8}
    assert state.reasons() == {"inbox.other_adapter": 1, "inbox.mixed_adapters": 1}
    used = [sha for batch in state.retired for sha in batch]
    assert len(used) == len(set(used)) == 8
    assert state.active == first
    card = FolderStore("runs/learner/adapters").card(second).provenance
    assert (card.parent, card.task, card.gate["decision"]) == (first, "button-press", "hold")
    assert set(week.commands) == week.used
