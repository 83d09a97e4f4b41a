"""The robot's side of a rollout request: the requested episodes, under the adapter that it names, each sent once.

Pinned: a request cut off and run again sends the same episodes once, a withdrawn request and a pause stop in
mid-rollout, a full disk holds the robot up and loses nothing, requests that cannot be read are refused. Deterministic:
fake environment and link, seeded; no sockets, no waiting.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learner.small_world import TASKS, FakeChunkEnv, read_episode, tiny_policy, write_episode
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.service.collector import Abandoned, Collector
from ratchet_vla.link.robot.client import LinkStatus
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.link.rollout_requests import RolloutRequest
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.storage.files import Files

REQUEST: dict[str, Any] = {
    "id": "run/1", "task": "door-open", "instruction": "open the door", "adapter": "a" * 64, "temperature": 1.0,
    "noise_correlation": 0.5, "stage": 0, "update": 0, "groups": 2, "group_size": 3, "horizon": 12, "seed": 0,
    "slots": 6, "have": 0,
}  # fmt: skip


class FakeLink:
    """The client as the collector sees it."""

    def __init__(self, request: dict[str, Any] | None) -> None:
        self.state: dict[str, Any] = {"order": request}
        self.version = "1"
        self.wanted: list[str] = []

    def status(self) -> LinkStatus:
        return LinkStatus(True, 0.0, "", 0, 0, 0, {}, [], self.version)

    def report(self, table: dict[str, Any]) -> None:
        assert table["doing"]

    def want(self, adapters: list[str]) -> None:
        self.wanted += adapters

    def wait(self, predicate: Any, timeout: float) -> bool:
        return bool(predicate())

    def nudge(self) -> None:
        return


class World:
    def __init__(self, folder: Path, files: Files | None = None, **options: Any) -> None:
        torch.set_num_threads(1)
        self.link = FakeLink(REQUEST)
        self.outbox = Outbox(folder / "outbox", reserve=0, files=files)
        self.served: list[str] = []
        policy, _ = tiny_policy()

        def serve(adapter: str) -> Policy:
            self.served.append(adapter)
            return policy

        self.collector = Collector(
            self.link, self.outbox, serve, lambda adapter: True, FakeChunkEnv(), TASKS,  # type: ignore[arg-type]
            write_episode, folder / "spool", files=files, meta=lambda: {"session": "s"}, **options,
        )  # fmt: skip

    def keys(self) -> list[str]:
        return [i.key for i in self.outbox.waiting()]


def request(**changes: Any) -> RolloutRequest:
    made = RolloutRequest.of({"order": {**REQUEST, **changes}})
    assert made is not None
    return made


def test_a_request_becomes_its_episodes(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.collector.work(request())
    items = world.outbox.waiting()
    assert [i.key for i in items] == [f"run/1/{n}" for n in range(6)]
    assert world.served == ["a" * 64]
    for n, item in enumerate(items):
        episode = read_episode(world.outbox.path(item))
        assert (episode.adapter_id, episode.meta["slot"], episode.meta["session"]) == ("a" * 64, n, "s")
        assert item.meta["success"] == episode.success
    world.collector.work(request())
    assert len(world.outbox) == 6
    assert world.served == ["a" * 64]
    world.outbox.close()


def test_a_request_that_was_cut_off_is_sent_once(tmp_path: Path) -> None:
    class Full(Files):
        left = 10**6

        def step(self, call: str, path: Path) -> None:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

    whole = World(tmp_path / "whole")
    whole.collector.work(request())
    expected = [i.sha for i in whole.outbox.waiting()]
    files = Full()
    world = World(tmp_path / "cut", files)
    files.left = 40
    with pytest.raises(RatchetError, match=r"link\.disk_full"):
        world.collector.work(request())
    assert 0 < len(world.outbox) < 6
    world.collector.work(request())
    assert [i.sha for i in world.outbox.waiting()] == expected
    whole.outbox.close()
    world.outbox.close()


def test_a_withdrawn_request_and_a_pause_stop_the_rollout(tmp_path: Path) -> None:
    world = World(tmp_path / "a")
    world.collector.pulse = lambda: world.link.state.update(order={**REQUEST, "id": "run/2"})
    with pytest.raises(Abandoned):
        world.collector.work(request())
    paused: list[bool] = []
    other = World(tmp_path / "b", paused=lambda: bool(paused))
    other.collector.pulse = lambda: paused.append(True)
    with pytest.raises(Abandoned):
        other.collector.work(request())
    assert world.keys() == other.keys() == []
    world.outbox.close()
    other.outbox.close()


def test_it_runs_requests_until_there_are_none(tmp_path: Path) -> None:
    world = World(tmp_path)
    rounds: list[int] = []

    def until() -> bool:
        rounds.append(len(world.outbox))
        if len(rounds) == 2:
            world.link.state["order"] = {**REQUEST, "id": "run/2", "update": 1}
            world.link.version = "2"
        return len(rounds) > 4

    world.collector.run(until)
    assert rounds == [0, 6, 12, 12, 12]
    assert len(set(world.keys())) == 12
    world.outbox.close()


def test_a_missing_adapter_is_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.collector._stored = lambda adapter: False
    count = [0]

    def until() -> bool:
        count[0] += 1
        return count[0] > 1

    world.collector.run(until)
    assert set(world.link.wanted) == {"a" * 64}
    assert world.keys() == []
    world.outbox.close()


@pytest.mark.parametrize("change", [{"groups": "2"}, {"seed": None}, {"adapter": 7}, {"temperature": "hot"}])
def test_requests_that_cannot_be_read_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RatchetError, match=r"robot\.bad_order"):
        request(**change)
    assert RolloutRequest.of({"order": None}) is None
    with pytest.raises(RatchetError, match=r"robot\.bad_order"):
        RolloutRequest.of({"order": {"id": "x"}})


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(RatchetError, match=r"robot\.unknown_task"):
        world.collector.work(request(task="nothing"))
    world.outbox.close()
