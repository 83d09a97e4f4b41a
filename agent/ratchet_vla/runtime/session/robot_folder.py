"""A robot's folder: who runs the robot now, and how somebody else asks that process for a session.

Knows files and one lock, which the kernel frees when the process dies. Knows no robot and no policy.

    robot.json       who runs here: process, contract, base, where its episodes go; true while the lock is held
    robot.lock       held by that process
    session.wish     what a person asked of it; it is answered once
    session.answer   what became of the wish
    session.current  the session that is open, so that a process killed in mid-session goes on with it
    sessions/<id>/   session.json, the manifest
    learner.json     the learner's last known status, see `rollout_requests`
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.files import Files

ROBOT, LOCK, WISH, ANSWER, CURRENT, SESSIONS = (
    "robot.json", "robot.lock", "session.wish", "session.answer", "session.current", "sessions",
)  # fmt: skip
LOOK, TRIES = 0.05, 5  # seconds between two looks for an answer or at the lock; looks at the lock


@dataclass(frozen=True)
class Presence:
    """Who runs a robot. process: drawn anew at every start. kind: "nodes", "robot" or "run". contract: as data.
    episodes: folder of the store that its episodes go to; empty for none."""

    process: str
    pid: int
    kind: str
    contract_id: str
    contract: dict[str, Any]
    base_hash: str
    episodes: str = ""

    def robot(self) -> RobotContract:
        """The contract that the robot runs under, as an object."""
        return RobotContract.from_dict(self.contract, "the running robot's contract", rules=False)


def occupy(
    folder: Path, kind: str, contract: RobotContract, base_hash: str, episodes: str = ""
) -> tuple[Presence, int]:
    """Say that this process runs the robot, until it dies or closes the descriptor that is returned.

    Raises:
        RatchetError: session.busy where another process runs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    for left in reversed(range(TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if left:
                time.sleep(LOOK)  # somebody may only be looking who runs here
                continue
            os.close(lock)
            raise RatchetError(
                "session.busy",
                "another process runs the robot of this folder",
                where=str(folder),
                fix="stop it, or give this robot a folder of its own",
            ) from None
    token = uuid.uuid4().hex
    presence = Presence(token, os.getpid(), kind, contract.id, contract.to_dict(), base_hash, episodes)
    replace(folder / ROBOT, asdict(presence))
    return presence, lock


def who(folder: Path) -> Presence:
    """Who runs this robot. Raises RatchetError session.no_robot where nobody does."""
    raw = read(folder / ROBOT) if folder.is_dir() else None
    if raw is None:
        raise RatchetError(
            "session.no_robot",
            "no robot has run in this folder",
            where=str(folder),
            fix="start `ratchet up`, `ratchet run` or `ratchet robot` with it first",
        )
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return Presence(**raw)
    finally:
        os.close(lock)
    raise RatchetError(
        "session.no_robot",
        "the robot's process has ended",
        where=f"{folder}, process {raw.get('pid')}",
        fix="start `ratchet up`, `ratchet run` or `ratchet robot` with this folder again",
    )


def ask(folder: Path, action: str, patience: float, **details: Any) -> str:
    """Ask the robot's process to `start` or `stop` a session; the session's id.

    patience: seconds for its answer, which comes between two episodes.

    Raises:
        RatchetError: session.no_robot, session.no_answer, and what the process refuses, such as session.open.
    """
    presence, number = who(folder), uuid.uuid4().hex
    replace(folder / WISH, {"number": number, "process": presence.process, "action": action, **details})
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        answer = read(folder / ANSWER)
        if answer is not None and answer.get("number") == number:
            if answer.get("error"):
                raise RatchetError(**answer["error"])
            return str(answer["session"])
        time.sleep(LOOK)
    Files().remove(folder / WISH)
    raise RatchetError(
        "session.no_answer",
        f"the robot's process (pid {presence.pid}) did not answer in {patience:g} s; nothing was changed",
        where=str(folder),
        fix="it answers between two episodes: end the running one, or ask again",
    )


def read(path: Path) -> dict[str, Any] | None:
    """One of the folder's files; None where there is none. Raises RatchetError session.unreadable."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RatchetError("session.unreadable", str(error), where=str(path), fix="remove the file") from None
    return raw if isinstance(raw, dict) else None


def replace(path: Path, data: Mapping[str, Any], files: Files | None = None) -> None:
    """Write one of the folder's files; exchanged at once, on the disk when this returns."""
    files = files or Files()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    files.remove(scratch)
    files.create(scratch, (json.dumps(dict(data)) + "\n").encode())
    files.rename(scratch, path)
