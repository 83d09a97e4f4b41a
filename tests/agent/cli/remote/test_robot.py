"""What a simulated robot runs is sent to the learner and kept here; a kill between the two must not make two of it.

Pinned: file and store hold the same bytes under the episode's place in its order; run again after a crash, the robot
gives what the store has; the outbox may take its file away, and another session's episode is another one.
Deterministic: episodes of random numbers from a seed.
"""

from __future__ import annotations

from pathlib import Path

from ratchet_vla.cli.remote.robot import keep
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.storage.documents import hash_file
from tests.agent.episodes.samples import episode, same, small_contract

CONTRACT = small_contract(8)


def test_kept_and_sent_are_one(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "episodes", create=True)
    ran = episode(CONTRACT)
    ran.meta |= {"order": "run/3", "slot": 2}
    sent, again = tmp_path / "sent.mcap", tmp_path / "again.mcap"
    keep(store, sent, ran, CONTRACT, "morning")
    card = store.card("morning/run/3/2")
    assert hash_file(sent) == card.id == hash_file(store.path(card.id))
    assert same(store.read(card.id), ran)
    ran.seed += 1  # whatever a second run makes of it, the first one counts
    keep(EpisodeStore(tmp_path / "episodes"), again, ran, CONTRACT, "morning")
    assert hash_file(again) == card.id
    assert len(store.cards()) == 1
    sent.unlink()
    again.unlink()
    assert [type(found) for found in store.verify()] == [Card]
    keep(store, sent, ran, CONTRACT, "evening")
    assert len(store.cards()) == 2
    assert hash_file(sent) != card.id
