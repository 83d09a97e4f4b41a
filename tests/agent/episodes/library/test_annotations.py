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
from ratchet_vla.episodes.library.annotations import Annotations, Proposal, Viewed
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from tests.agent.episodes.samples import episode, small_contract

CONTRACT = small_contract(8)


def store_of(root: Path, *outcomes: bool | None) -> tuple[Annotations, list[str]]:
    store = EpisodeStore(root, create=True)
    ids = []
    for i, outcome in enumerate(outcomes):
        path = store.folder("s") / f"{i}.mcap"
        made = episode(CONTRACT, seed=i, steps=1, success=outcome, task=f"task{i % 2}")
        ids.append(write_episode(path, made, CONTRACT, created="2026-01-01T00:00:00+00:00", clock_offset=0.0))
        store.add(path, ids[-1])
    return Annotations(store), ids


def test_a_person_decides_about_a_robots_episode(tmp_path: Path) -> None:
    annotations, (one, two) = store_of(tmp_path, None, None)
    assert annotations.status(one).state == "unjudged"
    viewed = Viewed(1.0, 4.2, ("wrist",), "page")
    label = annotations.annotate(one[:10], "failure", "  Ada  Byron ", note=" dropped it ", viewed=viewed)
    assert (label.annotator, label.note, label.viewed) == ("Ada Byron", "dropped it", viewed)
    status = Annotations(EpisodeStore(tmp_path)).status(one)
    assert (status.state, status.success, status.source) == ("verified", False, "human:Ada Byron")
    read = annotations.read(one)
    assert (read.success, read.success_source) == (False, "human:Ada Byron")
    with pytest.raises(RatchetError, match=r"episode\.not_verified"):
        annotations.read(two)
    assert [c.id for c, _ in annotations.verified()] == [one]
    assert [c.id for c, _ in annotations.verified(task="task1")] == []


def recorded(root: Path, source: str, success: bool | None) -> tuple[Annotations, str]:
    store = EpisodeStore(root, create=True)
    made = episode(CONTRACT, seed=1, steps=1, success=success)
    made.success_source = source
    digest = write_episode(store.folder("s") / "0.mcap", made, CONTRACT)
    store.add(store.folder("s") / "0.mcap", digest)
    return Annotations(store), digest


def test_what_the_buttons_beside_the_arm_said_is_a_label(tmp_path: Path) -> None:
    annotations, one = recorded(tmp_path, "human:ada", False)
    (label,) = annotations.labels(one)
    assert (label.annotator, label.value, label.viewed.via) == ("ada", "failure", "operator")
    assert (annotations.status(one).state, annotations.status(one).source) == ("verified", "human:ada")
    assert annotations.proposal(annotations.store.card(one)) is None  # a second reader is not told
    annotations.annotate(one, "success", "bob")
    assert annotations.status(one).state == "disputed"
    # Entered again, as after a crash: nothing is said twice.
    annotations.store.add(annotations.store.path(one), one)
    assert len(annotations.labels(one)) == 2


def test_a_button_without_a_name_judges_nothing_and_loses_nothing(tmp_path: Path) -> None:
    annotations, one = recorded(tmp_path, "human: ", True)
    assert (annotations.labels(one), annotations.status(one).state) == ([], "unjudged")


def test_changing_ones_mind_keeps_both(tmp_path: Path) -> None:
    annotations, (one,) = store_of(tmp_path, None)
    annotations.annotate(one, "failure", "ada")
    annotations.annotate(one, "success", "ada")
    assert annotations.status(one).success is True
    assert [label.value for label in annotations.labels(one)] == ["failure", "success"]


def test_disagreement_keeps_it_from_the_learner(tmp_path: Path) -> None:
    annotations, (one,) = store_of(tmp_path, None)
    annotations.annotate(one, "failure", "ada")
    with pytest.raises(RatchetError, match=r"episode\.no_dispute"):
        annotations.annotate(one, "success", "bob", settles=True)
    annotations.annotate(one, "success", "bob")
    assert annotations.status(one).state == "disputed"
    assert list(annotations.verified()) == []
    assert [(c.id, o) for c, o in annotations.disagreements()] == [(one, {"ada": "failure", "bob": "success"})]
    annotations.annotate(one, "failure", "cleo", settles=True)
    status = annotations.status(one)
    assert (status.state, status.success, status.source) == ("verified", False, "human:cleo")
    assert annotations.agreement() == (1, 3)


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
    annotations, (one,) = store_of(tmp_path, True)
    for name, opinion in zip("ab", opinions, strict=False):
        annotations.annotate(one, opinion, name)
    status = annotations.status(one)
    assert (status.state, status.success) == (state, success)


def test_second_readers(tmp_path: Path) -> None:
    annotations, ids = store_of(tmp_path, *[None] * 12)
    annotations.require_second_reader(0.5)
    chosen = [i for i in ids if int(i[:8], 16) < 2**31]
    assert 0 < len(chosen) < 12
    for one in ids:
        annotations.annotate(one, "success", "ada")
        annotations.annotate(one, "success", "ada")  # the same person twice is still one reader
    assert {i for i in ids if annotations.status(i).state == "second_reader"} == set(chosen)
    annotations.annotate(chosen[0], "success", "bob")
    assert annotations.status(chosen[0]).source == "human:ada+bob"
    with pytest.raises(RatchetError, match=r"episode\.bad_share"):
        annotations.require_second_reader(1.5)


def test_a_proposal_is_no_label(tmp_path: Path) -> None:
    annotations, (one, two) = store_of(tmp_path, None, False)
    annotations.propose(Proposal(one, True, "detector:gripper", 0.8))
    cards = annotations.store.cards()
    assert annotations.proposal(cards[one]) == Proposal(one, True, "detector:gripper", 0.8)
    assert annotations.proposal(cards[two]) == Proposal(two, False, "simulator")
    assert annotations.status(one).state == "unjudged"
    with pytest.raises(RatchetError, match=r"episode\.bad_source"):
        annotations.propose(Proposal(one, True, "human:me"))


@pytest.mark.parametrize(
    ("reference", "value", "annotator", "code"),
    [
        ("0000", "success", "ada", "episode.unknown"),
        (None, "maybe", "ada", "episode.unknown_label"),
        (None, "success", "  ", "episode.no_annotator"),
        (None, "success", "human:ada", "episode.no_annotator"),
    ],
)
def test_refused_labels_leave_no_entry(
    tmp_path: Path, reference: str | None, value: str, annotator: str, code: str
) -> None:
    annotations, (one,) = store_of(tmp_path, None)
    before = annotations.store.index.head
    with pytest.raises(RatchetError) as refused:
        annotations.annotate(reference or one, value, annotator)
    assert refused.value.code == code
    assert annotations.store.index.head == before


def test_readers_at_the_same_time_never_overwrite_each_other(tmp_path: Path) -> None:
    annotations, ids = store_of(tmp_path, *[None] * 4)
    barrier = threading.Barrier(4)

    def read(name: str) -> None:
        mine = Annotations(EpisodeStore(tmp_path))
        barrier.wait()
        for one in ids:
            mine.annotate(one, "success", name)

    threads = [threading.Thread(target=read, args=(f"reader {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in ids:
        assert sorted(label.annotator for label in annotations.labels(one)) == [f"reader {i}" for i in range(4)]
    annotations.store.index.entries()  # still chained
