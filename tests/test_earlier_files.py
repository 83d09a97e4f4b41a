"""What was stored before the packages moved must still load: robots and learners are updated while their files stay.

Pinned: adapters, episodes, a learner's folder and a run's checkpoint in `golden/earlier_files`, written by the code of
the layout before (`agent.learner`, `agent.episodes`, …), are read by this one, and go on from where they stood; ids are
computed from content to the same values. Fixed files; nothing here depends on a number that another processor would
round otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.library.store import Damage, EpisodeStore
from ratchet_vla.paths import ROBOTS
from tests.agent.learner.runs import start
from tests.agent.learner.service.test_learner import Bench

EARLIER = Path(__file__).with_name("golden") / "earlier_files"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The files where they may be changed."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


@pytest.mark.parametrize("folder", ["run", "service"])
def test_adapters_have_the_ids_that_they_had(copied: Path, folder: str) -> None:
    store = FolderStore(copied / folder / "adapters")
    assert store.ids()
    assert store.verify() == []
    for name in store.ids():
        assert store.get(name).id == name
        assert store.card(name).id == name


def test_contracts_have_the_ids_that_they_had() -> None:
    assert {name: RobotContract.load(ROBOTS / name).id for name in EXPECTED["contracts"]} == EXPECTED["contracts"]


def test_an_episode_is_read_whole(copied: Path) -> None:
    store = EpisodeStore(copied / "episodes")
    (card,) = store.cards().values()
    assert [found for found in store.verify() if isinstance(found, Damage)] == []
    episode = store.read(card.id)
    assert len(episode.steps) == 2
    assert episode.success
    assert episode.steps[0].chunk.adapter_id == "ab" * 32


def test_a_learner_goes_on_from_its_journal(copied: Path) -> None:
    bench = Bench(copied / "service")
    stood = json.loads(json.dumps(dataclasses.asdict(bench.service.state), default=str))
    assert stood == json.loads((copied / "ledger.json").read_text())
    bench.collect()
    state = bench.settle()
    bench.close()
    assert len(state.updates) == 2


def test_a_run_is_resumed_from_its_checkpoint(copied: Path) -> None:
    made: list[str] = []
    sequence = start(copied / "run", lambda kind, facts: made.append(kind))
    assert made.count("update") == 1  # of four, three were made before
    assert sequence.adapter_ids[:2] == EXPECTED["adapters"][:2]
    assert sequence.matrix.tasks == tuple(EXPECTED["matrix"]["tasks"])
    assert all(sequence.matrix.get(2, task) is not None for task in sequence.matrix.tasks)
