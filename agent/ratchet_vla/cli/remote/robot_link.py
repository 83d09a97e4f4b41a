"""A robot's end of the link in one folder: files out, adapters in, the learner's status kept, the robot's own written.

Knows the client and the robot's folder. Knows no robot: `robot` and `sync` say what runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.link.robot.client import LinkClient
from ratchet_vla.link.robot.fetch import Fetcher
from ratchet_vla.link.robot.learner_tag_watcher import LearnerTagWatcher
from ratchet_vla.link.robot.outbox import Outbox
from ratchet_vla.runtime.session import rollout_requests
from ratchet_vla.storage.documents import write_json

STATUS = "status.json"
log = logging.getLogger("ratchet.remote")


class Link:
    """A robot's end of the link in one folder: its client, with adapters coming in and the learner's status kept.

    Use as a context manager, or `start` and `stop`.
    """

    def __init__(
        self, options: remote.LearnerOptions, address: str, folder: Path, outbox: Outbox, store: FolderStore
    ) -> None:
        """folder: the robot's. Raises RatchetError link.no_key and others."""
        self._options = options
        self._folder = folder
        self._tag_watcher = LearnerTagWatcher(store, store.resolve)
        fetcher = Fetcher(store, folder / "incoming", on_adapter=self._tag_watcher.on_adapter, reserve=options.reserve)
        try:
            self.client = LinkClient(
                address,
                options.name,
                outbox,
                keys=options.pair(),
                learner=options.public(),
                fetcher=fetcher,
                on_state=self._on_state,
            )
        except BaseException:
            self._tag_watcher.stop()
            raise

    def start(self) -> None:
        """Connect, in a thread of the client's own."""
        self.client.start()

    def stop(self) -> None:
        """Disconnect; files that wait stay in the outbox."""
        self.client.stop()
        self._tag_watcher.stop()

    def __enter__(self) -> Link:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def show(self, **entries: Any) -> None:
        """Write the status file, for `ratchet status --robot`; losing it loses nothing.

        Args:
            entries: doing, error, adapter, session and more.
        """
        status = self.client.status()
        heard_s = status.heard if status.heard < 1e9 else None  # None: never, for which JSON has no number
        document = {
            "robot": self._options.name,
            "error": "",
            "link": {"up": status.up, "heard": heard_s, "error": status.error},
            "outbox": {"waiting": status.waiting, "bytes": status.waiting_bytes, "delivered": status.delivered},
            "refused": status.refused,
            "fetching": status.fetching,
            "order": self.client.state.get("order"),
            "written": time.time(),
            **entries,
        }
        document["error"] = document["error"] or status.error
        try:
            write_json(self._folder / STATUS, document, durable=False)
        except OSError as error:
            log.warning("no status file: %s", error)

    def _on_state(self, state: Mapping[str, Any]) -> None:
        self._tag_watcher.on_state(state)
        try:
            rollout_requests.write(self._folder, state)
        except OSError as error:  # the collecting process keeps to the status before
            log.warning("the learner's status could not be kept: %s", error)
