"""`ratchet sync`: a robot's sync agent: verified episodes out, adapters and rollout requests in, beside the arm."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.cli.remote.robot_link import Link
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session import robot_folder
from ratchet_vla.runtime.session.dispatch import Dispatcher

log = logging.getLogger("ratchet.sync")


@dataclass
class SyncAgent(remote.LearnerOptions):
    """Send verified episodes and ended sessions to the learner; bring its adapters and rollout request to the robot.

    Commands to copy:

        ratchet sync --robot runs/robot --learner tcp://192.0.2.7:5544

        ratchet review --store runs/robot/episodes        (in another terminal: only what a person labelled is sent)

    `ratchet up --learner` and `ratchet run --learner` start one by themselves; alone it sends what is labelled while
    the robot is off. Holds no model and touches no robot: what runs the arm follows the store's tag `active`. Works on
    without the learner; killed at any moment, the same command goes on.
    """

    robot: Path = remote.FOLDER
    """Folder of the robot: outbox, sessions, the learner's last known status. One sync agent per folder."""
    episodes: Path | None = None
    """Folder of the episode store that the robot records into; <robot>/episodes if absent."""
    adapters: Path | None = None
    """Folder of the adapter store that the robot's policy reads; <robot>/adapters if absent."""
    learner: str = remote.ADDRESS
    """The learner's address."""
    every: float = 2.0
    """Seconds between two looks at the episode store for new labels."""
    drain: float = 5.0
    """Seconds to go on after it was told to end, for what still waits for the learner."""
    parent: int = 0
    """Id of a process with which this one ends too; 0 for none."""

    def run(self) -> int:
        remote.log_to_stderr()
        self.check_keys()
        episodes_folder = self.episodes or self.robot / "episodes"
        episodes = EpisodeStore(episodes_folder, create=True)
        episodes.require_some(waits=True)  # the recorder may start later; what lies there is not passed over
        store = FolderStore(self.adapters or self.robot / "adapters", create=True)
        outbox = self.outbox(self.robot)
        dispatcher = Dispatcher(episodes, outbox, self.robot / robot_folder.SESSIONS)
        stopping = threading.Event()
        remote.on_stop(stopping.set)
        try:
            with Link(self, self.learner, self.robot, outbox, store) as link:
                Console().print(
                    f"sync agent {self.name}: {episodes_folder} -> {self.learner}, outbox {len(outbox)} files"
                )
                while not (stopping.is_set() or self._orphaned()):
                    self._round(link, episodes, dispatcher, store)
                    link.client.wait(stopping.is_set, self.every)
                self._round(link, episodes, dispatcher, store)  # the end of the session came while it was told to stop
                link.client.wait(lambda: not len(outbox), self.drain)
        finally:
            outbox.close()
        return 0

    def _orphaned(self) -> bool:
        """Whether the process that started this one is gone, killed without a word."""
        return self.parent > 0 and os.getppid() != self.parent

    def _round(self, link: Link, episodes: EpisodeStore, dispatcher: Dispatcher, store: FolderStore) -> None:
        """Look once for what is to be sent, and write down how it stands."""
        error = ""
        try:
            episodes.require_some(waits=True)
            count = dispatcher.look()
            if count:
                log.info("%d files handed over", count)
        except RatchetError as caught:
            error = str(caught)
            log.warning("%s", caught)
        current = robot_folder.read(self.robot / robot_folder.CURRENT)
        link.show(
            doing="sync",
            error=error,
            adapter=store.tags().get("active", ""),
            session="" if current is None else str(current["session"]),
            pid=os.getpid(),
        )
        status = link.client.status()
        report = {"doing": "sync", "waiting": status.waiting, "waiting_bytes": status.waiting_bytes}
        link.client.report({**report, "error": error[:300]})
