"""The way to a learner: the options that every verb with a robot shares, and what is made of them.

Knows keys, folders and the client. Knows no robot: `up`, `run`, `robot` and `courier` say what runs.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.adapters.store import FolderStore
from agent.link import keys as link_keys
from agent.link.client import LinkClient
from agent.link.fetch import Fetcher
from agent.link.follow import Follower
from agent.link.outbox import Outbox
from agent.runtime import orders

STATUS = "status.json"
FOLDER = Path("runs/robot")
ADDRESS = "tcp://127.0.0.1:5544"
log = logging.getLogger("ratchet.remote")


@dataclass(kw_only=True)
class LearnerOptions:
    """How a robot reaches its learner."""

    name: str = "robot-1"
    """This robot's name, as on the learner's allow list."""
    keys: Path | None = None
    """This robot's secret key; keys/<name>/<name>.key_secret if absent."""
    learner_key: Path = Path("keys/learner/learner.key")
    """The learner's public key."""
    plain: bool = False
    """No keys and no encryption; only with an address on 127.0.0.1."""
    outbox_gib: float = 50.0
    """GiB that may wait for the learner; beyond it nothing more is collected."""
    reserve_gib: float = 2.0
    """GiB of disk that stay free."""

    @property
    def reserve(self) -> int:
        """Bytes of disk that stay free."""
        return int(self.reserve_gib * 1024**3)

    def check_keys(self) -> None:
        """Refuse what cannot connect, before anything is started. Raises RatchetError link.no_key and others."""
        self._pair()
        self._public()

    def _pair(self) -> link_keys.KeyPair | None:
        return None if self.plain else link_keys.load(self.keys or Path("keys") / self.name / f"{self.name}.key_secret")

    def _public(self) -> bytes | None:
        return None if self.plain else link_keys.load_public(self.learner_key)

    def outbox(self, folder: Path) -> Outbox:
        return Outbox(folder / "outbox", limit=int(self.outbox_gib * 1024**3), reserve=self.reserve)


class Link:
    """A robot's end of the link in one folder: its client, with adapters coming in and the learner's word kept.

    Use as a context manager, or `start` and `stop`.
    """

    def __init__(self, options: LearnerOptions, address: str, folder: Path, outbox: Outbox, store: FolderStore) -> None:
        """folder: the robot's. Raises RatchetError link.no_key and others."""
        self._options, self._folder = options, folder
        self._follower = Follower(store, store.resolve)
        fetcher = Fetcher(store, folder / "incoming", on_adapter=self._follower.on_adapter, reserve=options.reserve)
        try:
            self.client = LinkClient(
                address,
                options.name,
                outbox,
                keys=options._pair(),
                learner=options._public(),
                fetcher=fetcher,
                on_state=self._on_state,
            )
        except BaseException:
            self._follower.stop()
            raise

    def start(self) -> None:
        self.client.start()

    def stop(self) -> None:
        self.client.stop()
        self._follower.stop()

    def __enter__(self) -> Link:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def show(self, **facts: Any) -> None:
        """The status file, for `ratchet status --robot`; losing it loses nothing. facts: doing, error, adapter, session
        and more."""
        status, client = self.client.status(), self.client
        shown = {
            "robot": self._options.name,
            "error": "",
            "link": {"up": status.up, "heard": status.heard if status.heard < 1e9 else None, "error": status.error},
            "outbox": {"waiting": status.waiting, "bytes": status.waiting_bytes, "delivered": status.delivered},
            "refused": status.refused,
            "fetching": status.fetching,
            "order": client.state.get("order"),
            "written": time.time(),
            **facts,
        }
        shown["error"] = shown["error"] or status.error
        scratch = self._folder / f"{STATUS}.tmp"
        try:
            scratch.write_text(json.dumps(shown) + "\n")
            scratch.rename(self._folder / STATUS)
        except OSError as error:
            log.warning("no status file: %s", error)

    def _on_state(self, state: Mapping[str, Any]) -> None:
        self._follower.on_state(state)
        try:
            orders.write(self._folder, state)
        except OSError as error:  # the collecting process keeps to the word before
            log.warning("the learner's word could not be kept: %s", error)


def courier(options: LearnerOptions, address: str, folder: Path, episodes: Path, adapters: Path) -> list[str]:
    """The command of a courier for this robot, to run beside it."""
    command = [sys.executable, "-m", "agent.cli.main", "courier", "--robot", str(folder), "--learner", address]
    command += ["--episodes", str(episodes), "--adapters", str(adapters), "--name", options.name]
    command += ["--outbox-gib", str(options.outbox_gib), "--reserve-gib", str(options.reserve_gib)]
    if options.plain:
        return [*command, "--plain"]
    keys = [] if options.keys is None else ["--keys", str(options.keys)]
    return [*command, *keys, "--learner-key", str(options.learner_key)]
