"""The sessions of one robot, kept by the process that runs it: opened, continued after a kill, ended, asked for.

Knows the robot's folder and the manifest. Knows no policy, no link and no recorder: who wants to hear of an end gives a
function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session import robot_folder
from ratchet_vla.runtime.session.manifest import Manifest, Session
from ratchet_vla.runtime.session.robot_folder import ANSWER, CURRENT, SESSIONS, WISH
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.files import Files


class SessionController:
    """One per robot's folder. `look` is called whenever the process has a moment between two episodes; `close` at its
    end.

    Args:
        kind: "nodes", "robot" or "run"; told to whoever asks.
        adapter: the id that is in force now.
        calibrations: camera -> calibration id in force.
        episodes: given a session's id, its episodes so far as plain data; for the manifest.
        store: folder that the episodes go to; empty for none.
        on_end: called with the manifest of each session that ended, such as to tell a learner; may be called again for
            one that was told already.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        contract: RobotContract,
        base_hash: str,
        adapter: Callable[[], str],
        *,
        calibrations: Mapping[str, str] | None = None,
        episodes: Callable[[str], list[dict[str, Any]]] = lambda session: [],
        store: str = "",
        on_end: Callable[[Manifest], None] = lambda manifest: None,
        files: Files | None = None,
    ) -> None:
        """Raises RatchetError session.busy, session.unreadable."""
        self.folder, self._contract, self._base_hash = folder, contract, base_hash
        self._adapter, self._calibrations, self._episodes = adapter, dict(calibrations or {}), episodes
        self._on_end, self._files = on_end, files or Files()
        self._presence, self._lock = robot_folder.occupy(folder, kind, contract, base_hash, store)
        self.session: Session | None = None
        try:
            self._go_on()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def id(self) -> str:
        """The open session's id, empty for none."""
        return self.session.id if self.session else ""

    def look(self) -> None:
        """Do what was wished for and say what became of it; note a new adapter.

        Raises:
            RatchetError: link.disk_full, link.io; the wish stays.
        """
        wish = robot_folder.read(self.folder / WISH)
        with disk_errors(self.folder):
            if wish is not None:
                self._answer(wish)
                self._files.remove(self.folder / WISH)
            if self.session is not None:
                self.session.adapter(self._adapter())

    def start(self, notes: Mapping[str, Any], checks: Mapping[str, Mapping[str, Any]] | None = None) -> str:
        """Open a session, unless one goes on that a killed process left open; its id.

        notes: who, where, what is special. checks: camera -> its newest look for having moved, with an override and
        who gave it.

        Raises:
            RatchetError: session.calibration, link.disk_full, link.io.
        """
        if self.session is not None:
            return self.session.id
        with disk_errors(self.folder):
            session = Session.start(
                self.folder / SESSIONS,
                self._contract,
                base_hash=self._base_hash,
                adapter_id=self._adapter(),
                calibrations=self._calibrations,
                checks=checks,
                notes=dict(notes),
            )
            robot_folder.replace(self.folder / CURRENT, {"session": session.id}, self._files)
        self.session = session
        return session.id

    def stop(self, reason: str) -> None:
        """End the open session, if there is one.

        Raises:
            RatchetError: link.disk_full, link.io, and what `on_end` raises; called again it goes on from there.
        """
        session = self.session
        if session is None:
            return
        with disk_errors(self.folder):
            session.stop(reason, self._episodes(session.id))
            self._on_end(session.manifest)
            self._files.remove(self.folder / CURRENT)
        self.session = None

    def close(self) -> None:
        """Leave the robot to another process. A session that is open stays open; `stop` it first where it is over."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- inside --------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """With the session that a process before left open; one of another robot or base is over."""
        current = robot_folder.read(self.folder / CURRENT)
        if current is None:
            return
        place = self.folder / SESSIONS / str(current["session"])
        session = Session(place, Session.read(place))
        same = (session.manifest.contract_id, session.manifest.base_hash) == (self._contract.id, self._base_hash)
        self.session = session
        if session.manifest.ended or not same:  # killed while it ended; or the folder has another robot now
            self.stop("cut off: another contract or base came after it")

    def _answer(self, wish: Mapping[str, Any]) -> None:
        """Only a wish that was meant for this process: one that a dead process left unread is nobody's any more."""
        if wish.get("process") != self._presence.process:
            return
        answer: dict[str, Any] = {"number": wish.get("number"), "session": "", "error": None}
        try:
            if wish.get("action") == "start":
                answer["session"] = self._wished_start(wish)
            elif wish.get("action") == "stop":
                answer["session"] = self._wished_stop(str(wish.get("reason") or "stopped"))
        except RatchetError as error:
            answer["error"] = error.as_dict()
        robot_folder.replace(self.folder / ANSWER, answer, self._files)

    def _wished_start(self, wish: Mapping[str, Any]) -> str:
        if self.session is not None:
            raise RatchetError("session.open", f"session {self.id} is open", fix="`ratchet session stop` ends it")
        return self.start(dict(wish.get("notes") or {}), dict(wish.get("checks") or {}))

    def _wished_stop(self, reason: str) -> str:
        if self.session is None:
            raise RatchetError("session.none", "no session is open", fix="`ratchet session start` opens one")
        ended = self.id
        self.stop(reason)
        return ended
