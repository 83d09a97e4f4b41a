"""Starting and ending sessions from outside the robot's process: wishes as files, a session's list of episodes.

Knows the robot's folder and the outbox. Knows no robot and no policy. The manifest is `session.py`'s.

    session.wish      what a person asked for; taken away once it is done
    session.current   the session that is open, so that a process killed in mid-session goes on with it
    sessions/<id>/    session.json (manifest), episodes.json (key and hash of each, once it is over)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.adapters.files import Files
from agent.contract import RobotContract
from agent.errors import RatchetError
from agent.link.disk import disk_errors
from agent.link.outbox import Outbox, history
from agent.link.parcels import EPISODE, SESSION, session_parcel
from agent.runtime.session import Session

WISH, CURRENT, SESSIONS, EPISODES = "session.wish", "session.current", "sessions", "episodes.json"


class SessionDesk:
    """Belongs to the robot's process; `look` is called whenever it has a moment.

    Args:
        adapter: the id that is in force now.
        calibrations: camera -> calibration id in force.
    """

    def __init__(
        self,
        folder: Path,
        contract: RobotContract,
        outbox: Outbox,
        base_hash: str,
        adapter: Callable[[], str],
        *,
        calibrations: Mapping[str, str] | None = None,
        files: Files | None = None,
    ) -> None:
        self.folder, self._contract, self._outbox = folder, contract, outbox
        self._base_hash, self._adapter, self._calibrations = base_hash, adapter, dict(calibrations or {})
        self._files = files or Files()
        self.session: Session | None = None
        current = _read(folder / CURRENT)
        if current is not None:
            place = folder / SESSIONS / str(current["session"])
            self.session = Session(place, Session.read(place))

    @property
    def id(self) -> str:
        """The open session's id, empty for none."""
        return self.session.id if self.session else ""

    def look(self) -> None:
        """Do what was wished for, and note a new adapter.

        Raises:
            RatchetError: session.calibration, link.disk_full; the wish stays.
        """
        wish = _read(self.folder / WISH)
        if wish is not None:
            if wish.get("action") == "start":
                self.start(dict(wish.get("notes") or {}))
            elif wish.get("action") == "stop":
                self.stop(str(wish.get("reason") or "stopped"))
            with disk_errors(self.folder):
                self._files.remove(self.folder / WISH)
        if self.session is not None:
            self.session.adapter(self._adapter())

    def start(self, notes: Mapping[str, Any]) -> None:
        """Open a session; where one is open, nothing."""
        if self.session is not None:
            return
        with disk_errors(self.folder):
            session = Session.start(
                self.folder / SESSIONS,
                self._contract,
                base_hash=self._base_hash,
                adapter_id=self._adapter(),
                calibrations=self._calibrations,
                notes=dict(notes),
            )
            self._replace(CURRENT, {"session": session.id})
        self.session = session

    def stop(self, reason: str) -> None:
        """End the open session and tell the learner, after its episodes; where none is open, nothing."""
        if self.session is None:
            return
        session = self.session
        session.stop(reason)
        manifest = dataclasses.asdict(session.manifest)
        episodes = episodes_of(self._outbox.root, session.id)
        self._replace(f"{SESSIONS}/{session.id}/{EPISODES}", episodes)
        parcel = session_parcel(session.id, True, manifest, episodes)
        self._outbox.put(parcel, SESSION, f"session/{session.id}", {"session": session.id})
        with disk_errors(self.folder):
            self._files.remove(self.folder / CURRENT)
        self.session = None

    def _replace(self, name: str, data: Mapping[str, Any] | list[dict[str, Any]]) -> None:
        scratch = self.folder / f"{name}.tmp"
        self._files.remove(scratch)
        self._files.create(scratch, (json.dumps(data) + "\n").encode())
        self._files.rename(scratch, self.folder / name)


def wish(folder: Path, action: str, **details: Any) -> None:
    """Ask the robot's process to `start` or `stop` a session; it does so when it next looks, or when it starts.

    Raises:
        RatchetError: session.no_robot where the folder is not a robot's.
    """
    if not folder.is_dir():
        raise RatchetError(
            "session.no_robot", "no such robot folder", where=str(folder), fix="start `ratchet robot` there first"
        )
    files = Files()
    scratch = folder / f"{WISH}.tmp"
    with disk_errors(folder):
        files.remove(scratch)
        files.create(scratch, (json.dumps({"action": action, **details}) + "\n").encode())
        files.rename(scratch, folder / WISH)


def episodes_of(outbox: Path, session: str) -> list[dict[str, Any]]:
    """A session's episodes, oldest first: key and SHA-256 of each that the outbox accepted."""
    items = (i for i in history(outbox) if i.type == EPISODE and i.meta.get("session") == session)
    return [{"key": i.key, "sha": i.sha} for i in items]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RatchetError("session.unreadable", str(error), where=str(path), fix="remove the file") from None
    return raw if isinstance(raw, dict) else None
