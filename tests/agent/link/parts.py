"""What the link's tests are put together from: keys, a learner's end and a robot's end in one folder.

Nothing is fake but the network faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.link import keys
from ratchet_vla.link.learner.artifact_server import ArtifactServer
from ratchet_vla.link.learner.inbox import Inbox
from ratchet_vla.link.learner.server import LinkServer
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.fetch import Fetcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Journal


class LearnerEnd:
    """Server, inbox, journal and store in a folder; `start` again after `stop` is a restarted learner."""

    def __init__(self, root: Path, *, plain: bool = False) -> None:
        self.root = root
        self.plain = plain
        self.keys = root / "keys"
        if not plain and not self.keys.exists():
            keys.make(self.keys, "learner")
        self.pair = None if plain else keys.load(self.keys / "learner.key_secret")
        self.store = FolderStore(root / "adapters", create=True)
        self.address = "tcp://127.0.0.1:*"

    def start(self, files: Files | None = None, tamper: Any = None) -> LearnerEnd:
        self.journal = Journal(self.root / "journal.jsonl", files)
        self.inbox = Inbox(self.root / "inbox", self.journal, reserve=0, files=files)
        self.server = LinkServer(
            self.address,
            self.inbox,
            ArtifactServer(self.store),
            keys=self.pair,
            allow=None if self.plain else self.keys,
            tamper=tamper,
        )
        self.server.start()
        self.address = self.server.address
        return self

    def stop(self) -> None:
        self.server.stop()
        self.inbox.close()
        self.journal.close()

    def received(self) -> list[str]:
        return [e.data["key"] for e in self.journal.of("received")]


class RobotEnd:
    """Outbox, client, fetcher and store of one robot; its key is on the learner's list unless said otherwise."""

    def __init__(self, root: Path, learner: LearnerEnd, name: str = "robot-1", allowed: bool = True) -> None:
        self.root = root
        self.name = name
        self.learner = learner
        self.pair = None
        if not learner.plain:
            self.pair = keys.make(root / "keys", name)
            if allowed:
                keys.allow(learner.keys, root / "keys" / f"{name}.key")
        self.outbox = Outbox(root / "outbox", reserve=0)
        self.store = FolderStore(root / "adapters", create=True)
        self.offered: list[str] = []

    def start(self, **options: Any) -> RobotEnd:
        fetcher = Fetcher(self.store, self.root / "incoming", on_adapter=self.offered.append, reserve=0)
        options = {"beat": 0.05, "patience": 0.2, **options}
        public = self.learner.pair.public if self.learner.pair else None
        self.client = LinkClient(
            self.learner.address, self.name, self.outbox, keys=self.pair, learner=public, fetcher=fetcher, **options
        )
        self.client.start()
        return self

    def wait(self, predicate: Callable[[], bool], timeout: float = 30.0) -> None:
        """For something of either side: the client tells its own changes, the rest is looked at now and then."""
        deadline = time.monotonic() + timeout
        while not self.client.wait(predicate, 0.05):
            assert time.monotonic() < deadline, self.client.status()

    def stop(self) -> None:
        self.client.stop()

    def close(self) -> None:
        self.outbox.close()


@contextmanager
def both(root: Path, *, plain: bool = False, **options: Any) -> Iterator[tuple[LearnerEnd, RobotEnd]]:
    """A running learner's and a running robot's end."""
    learner = LearnerEnd(root / "learner", plain=plain).start()
    robot = RobotEnd(root / "robot", learner).start(**options)
    try:
        yield learner, robot
    finally:
        robot.stop()
        robot.close()
        learner.stop()
