"""From the robot's episode store to the learner: what people have verified, their labels, and sessions that ended.

Knows the store, its annotations and the outbox. Knows no robot, no policy and no socket. What was handed over is known
from the outbox, so a process that was killed goes on without sending anything twice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ratchet_vla.episodes.library.annotations import SIMULATOR, Annotations, LabelStatus
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.link.robot.outbox import Outbox, history
from ratchet_vla.link.session_records import EPISODE, LABEL, SESSION, label_record, session_record
from ratchet_vla.runtime.session.manifest import FILE, Session

MODES = ("collect", "rollout")  # episodes sampled for learning; deployments and demonstrations stay on the robot


class Dispatcher:
    """Call `look` now and then, from one thread.

    Args:
        sessions: folder of sessions as `Session.start` makes them; None where nobody keeps any.
    """

    def __init__(self, store: EpisodeStore, outbox: Outbox, sessions: Path | None = None) -> None:
        self.store, self._outbox, self._sessions = store, outbox, sessions
        self._annotations = Annotations(store)
        self._label_sent: dict[str, tuple[bool | None, str]] = {}  # episode -> the label that the learner has
        self._labels_sent: dict[str, int] = {}  # episode -> how many labels were sent
        for item in history(outbox.root):
            if item.type == LABEL:
                self._label_sent[item.meta["episode"]] = (item.meta["success"], item.meta["person"])
                self._labels_sent[item.meta["episode"]] = self._labels_sent.get(item.meta["episode"], 0) + 1

    def look(self) -> int:
        """Hand over what is new; returns how many files.

        Raises:
            RatchetError: link.outbox_full, link.disk_full; what was not handed over is at the next look.
        """
        before = self._outbox.accepted
        for card in self.store.cards().values():
            if card.mode not in MODES:
                continue
            status = self._annotations.status(card.id)
            if status.state == "verified" and not self._outbox.knows(f"episode/{card.id}"):
                meta = {"session": card.session, "task": card.task, "adapter": card.adapter_id}
                self._outbox.put(self.store.path(card.id), EPISODE, f"episode/{card.id}", meta, keep=True)
            if self._outbox.knows(f"episode/{card.id}"):
                self._label(card.id, status)
        self._end_sessions()
        return self._outbox.accepted - before

    def _label(self, episode: str, status: LabelStatus) -> None:
        """An annotator's label where it is not the one that the learner has. The simulator's is in the file itself."""
        label: tuple[bool | None, str] = (None, "")
        if status.state == "verified" and status.source != SIMULATOR:
            label = (status.success, status.source.removeprefix("human:"))
        elif status.state == "verified" and episode not in self._label_sent:
            return
        if label == self._label_sent.get(episode, (None, "")):
            return
        number = self._labels_sent.get(episode, 0) + 1
        annotator = label[1] or "withdrawn"
        meta = {"episode": episode, "success": label[0], "person": label[1]}
        self._outbox.put(label_record(episode, label[0], annotator), LABEL, f"label/{episode}/{number}", meta)
        self._label_sent[episode] = label
        self._labels_sent[episode] = number

    def _end_sessions(self) -> None:
        folders = sorted(self._sessions.iterdir()) if self._sessions is not None and self._sessions.is_dir() else []
        for folder in folders:
            key = f"session/{folder.name}"
            if self._outbox.knows(key) or not (folder / FILE).is_file():
                continue
            try:
                manifest = Session.read(folder)
            except RatchetError:
                continue  # being written, or damaged: `ratchet session status` says which
            if not manifest.ended:
                continue
            episodes = of_session(self.store, manifest.session)
            record = session_record(manifest.session, True, dataclasses.asdict(manifest), episodes)
            self._outbox.put(record, SESSION, key, {"session": manifest.session})


def of_session(store: EpisodeStore, session: str) -> list[dict[str, Any]]:
    """A session's episodes, oldest first, as its manifest lists them: name and SHA-256 (its id) of each."""
    cards = [c for c in store.cards().values() if c.session == session]
    return [{"key": c.name or c.id, "sha": c.id} for c in cards]


def recorded(store: str, session: str) -> list[dict[str, Any]]:
    """The same of a store that may not be there yet. store: its folder, empty for none."""
    try:
        return of_session(EpisodeStore(store), session) if store else []
    except RatchetError as error:
        if error.code != "episode.no_store":
            raise
        return []
