"""A promotion or a rollback that does not reach the arm is worse than none: people believe that it was made.

Pinned: a tag that moves, appears late or is moved back reaches the running policy without being asked; a swap that is
refused is tried again and said; a tag that cannot be followed is refused at the start. Deterministic: events and
conditions, no sleeps; the policy is FakePolicy, its adapters are called "0" and "1".
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.inference.tag_watcher import TagWatcher
from tests.agent.runtime.inference.test_process import ask, eventually, serving


def move(folder: Path, tag: str, text: str) -> None:
    """As `Tags.move` does it: a new file takes the old one's name."""
    (folder / "tags").mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    scratch.write_text(text)
    scratch.rename(folder / "tags" / tag)


class Calls:
    """What was called, with something to wait on."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.count = list(answers), 0
        self.changed = threading.Condition()

    def __call__(self) -> bool:
        with self.changed:
            self.count += 1
            self.changed.notify_all()
            return self.answers.pop(0) if self.answers else True

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.count >= count, 60.0)


def test_every_move_is_seen_once_and_a_refused_one_again(tmp_path: Path) -> None:
    calls = Calls(True, False, True)
    watcher = TagWatcher(tmp_path / "tags" / "active", 0.001, calls, again=0.001)
    move(tmp_path, "active", "one")
    calls.wait(1)
    move(tmp_path, "active", "two")
    calls.wait(3)
    move(tmp_path, "active", "two")  # the same text in a new file: moved there and back
    calls.wait(4)
    watcher.stop()
    assert calls.count == 4


def test_a_running_policy_follows_its_tag(tmp_path: Path) -> None:
    with serving(store=str(tmp_path), follow="1") as client:
        base = client.adapter_id
        assert ask(client).adapter_id == base  # type: ignore[union-attr]
        move(tmp_path, "1", "there")
        eventually(client, lambda: client.adapter_id != base)
        chosen = client.adapter_id
        assert ask(client, 1).adapter_id == chosen  # type: ignore[union-attr]
        client.swap("base").result(60.0)
        move(tmp_path, "1", "again")
        eventually(client, lambda: client.adapter_id == chosen)
        assert client.status().error == ""


def test_a_tag_that_leads_nowhere_is_said_and_the_policy_serves_on(tmp_path: Path) -> None:
    move(tmp_path, "missing", "there from the start")
    with serving(store=str(tmp_path), follow="missing") as client:
        for sequence in range(1000):
            reply = ask(client, sequence)
            assert reply.adapter_id == client.base_hash  # type: ignore[union-attr]
            if client.status().error:
                break
        assert "adapter.unknown" in client.status().error


@pytest.mark.parametrize("options", [{"follow": "active"}, {"store": "/tmp", "follow": "../active"}])
def test_what_cannot_be_followed_is_refused_at_the_start(options: dict[str, object]) -> None:
    with pytest.raises(RatchetError) as refused, serving(**options):  # type: ignore[arg-type]
        pass
    assert refused.value.code == "policy.cannot_follow"
