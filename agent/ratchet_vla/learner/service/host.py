"""The learner's process: link, inbox, journal and service put together, and the loop that drives them.

Knows threads, signals' wishes to stop and what to do when the disk is full. Knows no simulator; policy, gate and the
way to read an episode are arguments.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.specs import Task
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.learner import Gate, LearnerService
from ratchet_vla.learner.service.telemetry import Limits, Rates, Recorder, status
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.link.keys import KeyPair
from ratchet_vla.link.learner.artifact_server import ArtifactServer
from ratchet_vla.link.learner.inbox import Inbox
from ratchet_vla.link.learner.server import LinkServer
from ratchet_vla.records import Episode
from ratchet_vla.storage.documents import write_json
from ratchet_vla.storage.files import Files
from ratchet_vla.storage.journal import Journal

log = logging.getLogger("ratchet.learner")
LOOK = 1.0  # seconds between looks at what tells nothing by itself: tags that a person moves, the status file
PAUSE = 5.0  # seconds after a full disk or another refusal before the same step is tried again
STATUS = "status.json"


class LearnerHost:
    """A learner in one folder: journal.jsonl, inbox/, checkpoints/, adapters/, metrics.jsonl, status.json.

    Args:
        make_gate: given the store, the gate; called once.
        address, keys, allow: of the link, see `LinkServer`.
        pause: seconds until a refused step is tried again.
    """

    def __init__(
        self,
        folder: Path,
        config: ServiceConfig,
        trainer: Trainer,
        read: Callable[[Path], Episode],
        make_gate: Callable[[FolderStore], Gate],
        tasks: Mapping[str, Task],
        *,
        address: str,
        keys: KeyPair | None = None,
        allow: Path | None = None,
        reserve: int = 1024**3,
        limits: Limits | None = None,
        tensorboard: bool = True,
        files: Files | None = None,
        pause: float = PAUSE,
        on_step: Callable[[LearnerHost], None] = lambda host: None,
        tamper: Callable[[list[Any]], list[list[Any]]] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self._limits = limits or Limits()
        self._pause = pause
        self._on_step = on_step
        # Guards `_pending` and wakes `run`. The link's thread notifies after it has written a file and its `received`
        # event; the service and the status file belong to the thread that calls `run`.
        self._changed = threading.Condition()
        self._pending = True
        self._stopping = False  # written once and read without the lock: a bool is never half written
        self.journal = Journal(folder / "journal.jsonl", files)
        try:
            self.store = FolderStore(folder / "adapters", create=True, files=files)
            inbox = Inbox(
                folder / "inbox", self.journal, reserve=reserve, files=files, on_received=lambda event: self.wake()
            )
            self.service = LearnerService(
                folder, config, trainer, self.store, self.journal, inbox.path, read, make_gate(self.store), tasks,
                files=files,
            )  # fmt: skip
            self.server = LinkServer(
                address, inbox, ArtifactServer(self.store), keys=keys, allow=allow, on_change=self.wake, tamper=tamper
            )
        except BaseException:
            self.journal.close()
            raise
        self._inbox = inbox
        self._recorder = Recorder(folder, tensorboard=tensorboard)
        self._rates = Rates()
        self._shown = 0.0
        self.error = ""

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Work until `stop` is called or `until` holds between two steps."""
        try:
            self.server.start()
            self.journal.append("started", pid=os.getpid(), address=self.server.address)
            self._show()
            while not self._stopping and not until():
                self._turn()
        finally:
            self.server.stop()
            self._inbox.close()
            self._show(force=True)
            self._recorder.close()
            self.journal.close()

    def wake(self) -> None:
        """Something arrived: look at once. Any thread."""
        with self._changed:
            self._pending = True
            self._changed.notify_all()

    def all_robots_current(self) -> bool:
        """Whether every robot that is present has the state as it is now."""
        now_s = time.monotonic()
        return all(peer.version == self.server.version for peer in self.server.peers() if peer.present(now_s))

    def stop(self) -> None:
        """End `run` after the step that it is in. Any thread, and signal handlers' threads too."""
        self._stopping = True
        self.wake()

    def status(self) -> dict[str, Any]:
        """What the status file holds; see `telemetry.status`."""
        now_s = time.monotonic()
        peers = [
            {"name": peer.name, "age": round(now_s - peer.seen, 1), "software": peer.software, "report": peer.report}
            for peer in self.server.peers()
        ]
        free = shutil.disk_usage(self.folder).free
        state = self.service.state
        counts = asdict(self.server.counts)
        rates = self._rates.at(now_s, len(state.arrivals), counts["bytes"])
        figures = status(state, self.config.tasks, peers, counts, free, self._limits, rates)
        return {**figures, "address": self.server.address, "pid": os.getpid(), "error": self.error}

    def _turn(self) -> None:
        with self._changed:
            self._pending = False
        pause = LOOK
        try:
            busy = self.service.step()
            self.error = ""
        except RatchetError as error:
            log.warning("%s", error)
            self.error = str(error)
            busy = False
            pause = self._pause
        try:
            self.server.publish(self.service.published_state())
            self._recorder.take(self.journal.events)
        except (RatchetError, OSError) as error:
            self.error = str(error)
        self._on_step(self)
        self._show()
        if not busy:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopping, pause)

    def _show(self, force: bool = False) -> None:
        """The status file, at most once a second; losing it loses nothing."""
        now = time.monotonic()
        if not force and now - self._shown < LOOK:
            return
        self._shown = now
        try:
            write_json(self.folder / STATUS, self.status(), durable=False)
        except OSError as error:
            log.warning("no status file: %s", error)
