"""A wrong label teaches a robot the wrong thing: who may say what, and when it counts, is fixed here.

Pinned: nothing is overwritten, the buttons beside the arm count as a person's label, disagreement keeps an episode from
the learner, second readers, settlements, the simulator as one reader, proposals that are no labels. Deterministic: ids
are those of seeded episodes.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ratchet_vla.episodes.file.writer import write_episode
from ratchet_vla.episodes.library.annotations import Proposal, Seen, Verification
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from tests.agent.episodes.samples import episode, small_contract

CONTRACT = small_contract(8)


def store_of(root: Path, *outcomes: bool | None) -> tuple[Verification, list[str]]:
    store = EpisodeStore(root, create=True)
    ids = []
    for i, outcome in enumerate(outcomes):
        path = store.folder("s") / f"{i}.mcap"
        made = episode(CONTRACT, seed=i, steps=1, success=outcome, task=f"task{i % 2}")
        ids.append(write_episode(path, made, CONTRACT, created="2026-01-01T00:00:00+00:00", clock_offset=0.0))
        store.add(path, ids[-1])
    return Verification(store), ids


def test_a_person_decides_about_a_robots_episode(tmp_path: Path) -> None:
    said, (one, two) = store_of(tmp_path, None, None)
    assert said.standing(one).state == "unjudged"
    seen = Seen(1.0, 4.2, ("wrist",), "page")
    label = said.judge(one[:10], "failure", "  Ada  Byron ", note=" dropped it ", seen=seen)
    assert (label.person, label.note, label.seen) == ("Ada Byron", "dropped it", seen)
    standing = Verification(EpisodeStore(tmp_path)).standing(one)
    assert (standing.state, standing.success, standing.source) == ("verified", False, "human:Ada Byron")
    read = said.read(one)
    assert (read.success, read.success_source) == (False, "human:Ada Byron")
    with pytest.raises(RatchetError, match=r"episode\.not_verified"):
        said.read(two)
    assert [c.id for c, _ in said.verified()] == [one]
    assert [c.id for c, _ in said.verified(task="task1")] == []


def recorded(root: Path, source: str, success: bool | None) -> tuple[Verification, str]:
    store = EpisodeStore(root, create=True)
    made = episode(CONTRACT, seed=1, steps=1, success=success)
    made.success_source = source
    digest = write_episode(store.folder("s") / "0.mcap", made, CONTRACT)
    store.add(store.folder("s") / "0.mcap", digest)
    return Verification(store), digest


def test_what_the_buttons_beside_the_arm_said_is_a_label(tmp_path: Path) -> None:
    said, one = recorded(tmp_path, "human:ada", False)
    (label,) = said.labels(one)
    assert (label.person, label.verdict, label.seen.via) == ("ada", "failure", "operator")
    assert (said.standing(one).state, said.standing(one).source) == ("verified", "human:ada")
    assert said.proposal(said.store.card(one)) is None  # a second reader is not told
    said.judge(one, "success", "bob")
    assert said.standing(one).state == "disputed"
    # Entered again, as after a crash: nothing is said twice.
    said.store.add(said.store.path(one), one)
    assert len(said.labels(one)) == 2


def test_a_button_without_a_name_judges_nothing_and_loses_nothing(tmp_path: Path) -> None:
    said, one = recorded(tmp_path, "human: ", True)
    assert (said.labels(one), said.standing(one).state) == ([], "unjudged")


def test_changing_ones_mind_keeps_both(tmp_path: Path) -> None:
    said, (one,) = store_of(tmp_path, None)
    said.judge(one, "failure", "ada")
    said.judge(one, "success", "ada")
    assert said.standing(one).success is True
    assert [label.verdict for label in said.labels(one)] == ["failure", "success"]


def test_disagreement_keeps_it_from_the_learner(tmp_path: Path) -> None:
    said, (one,) = store_of(tmp_path, None)
    said.judge(one, "failure", "ada")
    with pytest.raises(RatchetError, match=r"episode\.no_dispute"):
        said.judge(one, "success", "bob", settles=True)
    said.judge(one, "success", "bob")
    assert said.standing(one).state == "disputed"
    assert list(said.verified()) == []
    assert [(c.id, o) for c, o in said.disagreements()] == [(one, {"ada": "failure", "bob": "success"})]
    said.judge(one, "failure", "cleo", settles=True)
    standing = said.standing(one)
    assert (standing.state, standing.success, standing.source) == ("verified", False, "human:cleo")
    assert said.agreement() == (1, 3)


@pytest.mark.parametrize(
    ("opinions", "state", "success"),
    [
        ((), "verified", True),
        (("success",), "verified", True),
        (("failure",), "disputed", None),
        (("discard",), "discarded", None),
        (("discard", "success"), "disputed", None),
    ],
)
def test_the_simulator_is_one_reader(
    tmp_path: Path, opinions: tuple[str, ...], state: str, success: bool | None
) -> None:
    said, (one,) = store_of(tmp_path, True)
    for name, opinion in zip("ab", opinions, strict=False):
        said.judge(one, opinion, name)
    standing = said.standing(one)
    assert (standing.state, standing.success) == (state, success)


def test_second_readers(tmp_path: Path) -> None:
    said, ids = store_of(tmp_path, *[None] * 12)
    said.require_second_reader(0.5)
    chosen = [i for i in ids if int(i[:8], 16) < 2**31]
    assert 0 < len(chosen) < 12
    for one in ids:
        said.judge(one, "success", "ada")
        said.judge(one, "success", "ada")  # the same person twice is still one reader
    assert {i for i in ids if said.standing(i).state == "second_reader"} == set(chosen)
    said.judge(chosen[0], "success", "bob")
    assert said.standing(chosen[0]).source == "human:ada+bob"
    with pytest.raises(RatchetError, match=r"episode\.bad_share"):
        said.require_second_reader(1.5)


def test_a_proposal_is_no_label(tmp_path: Path) -> None:
    said, (one, two) = store_of(tmp_path, None, False)
    said.propose(Proposal(one, True, "detector:gripper", 0.8))
    cards = said.store.cards()
    assert said.proposal(cards[one]) == Proposal(one, True, "detector:gripper", 0.8)
    assert said.proposal(cards[two]) == Proposal(two, False, "simulator")
    assert said.standing(one).state == "unjudged"
    with pytest.raises(RatchetError, match=r"episode\.bad_source"):
        said.propose(Proposal(one, True, "human:me"))


@pytest.mark.parametrize(
    ("reference", "verdict", "person", "code"),
    [
        ("0000", "success", "ada", "episode.unknown"),
        (None, "maybe", "ada", "episode.bad_verdict"),
        (None, "success", "  ", "episode.no_person"),
        (None, "success", "human:ada", "episode.no_person"),
    ],
)
def test_refused_judgements_leave_no_entry(
    tmp_path: Path, reference: str | None, verdict: str, person: str, code: str
) -> None:
    said, (one,) = store_of(tmp_path, None)
    before = said.store.index.head
    with pytest.raises(RatchetError) as refused:
        said.judge(reference or one, verdict, person)
    assert refused.value.code == code
    assert said.store.index.head == before


def test_readers_at_the_same_time_never_overwrite_each_other(tmp_path: Path) -> None:
    said, ids = store_of(tmp_path, *[None] * 4)
    barrier = threading.Barrier(4)

    def read(name: str) -> None:
        mine = Verification(EpisodeStore(tmp_path))
        barrier.wait()
        for one in ids:
            mine.judge(one, "success", name)

    threads = [threading.Thread(target=read, args=(f"reader {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in ids:
        assert sorted(label.person for label in said.labels(one)) == [f"reader {i}" for i in range(4)]
    said.store.index.entries()  # still chained
