"""`ratchet courier`: the link for a real robot: verified episodes out, adapters in, beside whatever runs the arm."""

from __future__ import annotations

import json
import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.adapters.store import FolderStore
from agent.episodes.store import EpisodeStore
from agent.errors import RatchetError
from agent.link import keys as link_keys
from agent.link.client import LinkClient
from agent.link.fetch import Fetcher
from agent.link.follow import Follower
from agent.link.outbox import Outbox
from agent.runtime.dispatch import Dispatcher

log = logging.getLogger("ratchet.courier")


@dataclass
class Courier:
    """Send verified episodes and ended sessions to the learner; bring its adapters into the robot's store.

    Commands to copy:

        ratchet courier --episodes runs/episodes --adapters runs/robot/adapters --learner tcp://192.0.2.7:5544

        ratchet review --store runs/episodes        (in another terminal: only what a person judged is sent)

    Holds no model and touches no robot: the nodes that run the arm follow the store's tag `active`. Works on without
    the learner; killed at any moment, the same command goes on.
    """

    episodes: Path = Path("runs/episodes")
    """Episode store that the recorder writes to."""
    adapters: Path = Path("runs/robot/adapters")
    """Adapter store that the robot's policy reads."""
    sessions: Path | None = None
    """Folder of the robot's sessions; their ends are sent too."""
    name: str = "robot-1"
    """This robot's name, as on the learner's allow list."""
    learner: str = "tcp://127.0.0.1:5544"
    """The learner's address."""
    out: Path = Path("runs/courier")
    """Folder of outbox and status."""
    keys: Path | None = None
    """This robot's secret key; keys/<name>/<name>.key_secret if absent."""
    learner_key: Path = Path("keys/learner/learner.key")
    """The learner's public key."""
    plain: bool = False
    """No keys and no encryption; only with an address on 127.0.0.1."""
    outbox_gib: float = 50.0
    """GiB that may wait for the learner."""
    reserve_gib: float = 2.0
    """GiB of disk that stay free."""
    every: float = 2.0
    """Seconds between two looks at the episode store."""

    def run(self) -> int:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        reserve = int(self.reserve_gib * 1024**3)
        episodes = EpisodeStore(self.episodes, create=True)
        episodes.require_some(waits=True)  # the recorder may start later; what lies there is not passed over
        store = FolderStore(self.adapters, create=True)
        outbox = Outbox(self.out / "outbox", limit=int(self.outbox_gib * 1024**3), reserve=reserve)
        dispatcher = Dispatcher(episodes, outbox, self.sessions)
        follower = Follower(store, store.resolve)
        fetcher = Fetcher(store, self.out / "incoming", on_adapter=follower.on_adapter, reserve=reserve)
        pair = None if self.plain else link_keys.load(self.keys or Path("keys") / self.name / f"{self.name}.key_secret")
        client = LinkClient(
            self.learner,
            self.name,
            outbox,
            keys=pair,
            learner=None if self.plain else link_keys.load_public(self.learner_key),
            fetcher=fetcher,
            on_state=follower.on_state,
        )
        stopping: list[int] = []
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda number, _: stopping.append(number))
        client.start()
        Console().print(f"courier {self.name}: {self.episodes} -> {self.learner}, outbox {len(outbox)} files")
        error = ""
        try:
            while not stopping:
                try:
                    episodes.require_some(waits=True)
                    sent = dispatcher.look()
                    error = ""
                    if sent:
                        log.info("%d files handed over", sent)
                except RatchetError as caught:
                    error = str(caught)
                    log.warning("%s", caught)
                self._show(client, store, error)
                client.wait(lambda: bool(stopping), self.every)
        finally:
            client.stop()
            follower.stop()
            outbox.close()
        return 0

    def _show(self, client: LinkClient, store: FolderStore, error: str) -> None:
        """The status file, for `ratchet status --robot`."""
        link = client.status()
        client.report(
            {"doing": "courier", "waiting": link.waiting, "waiting_bytes": link.waiting_bytes, "error": error}
        )
        facts = {
            "robot": self.name,
            "doing": "courier",
            "error": error or link.error,
            "adapter": store.tags().get("active", ""),
            "session": "",
            "link": {"up": link.up, "heard": link.heard if link.heard < 1e9 else None, "error": link.error},
            "outbox": {"waiting": link.waiting, "bytes": link.waiting_bytes, "delivered": link.delivered},
            "refused": link.refused,
            "written": time.time(),
        }
        scratch = self.out / "status.json.tmp"
        try:
            scratch.write_text(json.dumps(facts) + "\n")
            scratch.rename(self.out / "status.json")
        except OSError as caught:
            log.warning("no status file: %s", caught)
