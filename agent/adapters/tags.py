"""Tags: small files that point at adapter ids, and the append-only log of their moves.

Knows names, moves and their order. Knows no adapter: ids are just text here. A tag's file holds its latest move and is
the truth; the log takes that move over before the next one replaces it, so that no crash between the two loses one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from agent.adapters.files import Files
from agent.adapters.protocol import BASE, Problem, TagMove
from agent.errors import RatchetError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID_LIKE = re.compile(r"[0-9a-f]{4,64}")


class Tags:
    """The tags of one store; the caller holds the store's lock around `move`."""

    def __init__(self, folder: Path, log: Path, scratch: Path, files: Files) -> None:
        self._folder = folder
        self._log = log
        self._scratch = scratch
        self._files = files

    def all(self) -> dict[str, str]:
        """Tag -> id or BASE, sorted by tag."""
        return {name: move.new for name, move in self._current().items()}

    def get(self, name: str) -> str | None:
        move = self._read(self._folder / name) if _NAME.fullmatch(name) else None
        return move.new if move else None

    def has(self, name: str) -> bool:
        """Whether the tag was ever set; also where its file is damaged, which must not read as the base."""
        return (self._folder / name).exists()

    def move(self, name: str, new: str, action: str, reason: str) -> TagMove:
        """Write a tag. The rename is the moment at which it happens; nothing that could fail comes after it."""
        if not _NAME.fullmatch(name) or _ID_LIKE.fullmatch(name) or name == BASE:
            raise RatchetError(
                "adapter.bad_tag",
                f"{name!r} cannot be a tag",
                fix="use letters, digits, '.', '_' or '-', at most 64; nothing that reads like an id, and not 'base'",
            )
        moves = self._complete_log()
        sequence = max((m.sequence for m in moves), default=0) + 1
        time = datetime.now(UTC).isoformat(timespec="seconds")
        move = TagMove(sequence, name, action, self.get(name), new, reason, time)
        scratch = self._scratch / f"tag-{sequence}"
        self._files.create(scratch, _line(move))
        self._files.rename(scratch, self._folder / name)
        return move

    def history(self, name: str | None = None) -> list[TagMove]:
        """Moves, oldest first: the log's and the latest one of each tag."""
        moves = {move.sequence: move for move in self._logged()[0]}
        moves.update({move.sequence: move for move in self._current().values()})
        return [moves[s] for s in sorted(moves) if name in (None, moves[s].tag)]

    def before(self, name: str) -> str:
        """What a rollback of this tag leads to.

        Raises:
            RatchetError: adapter.no_previous.
        """
        line = self.line(name)
        if len(line) < 2:
            raise RatchetError(
                "adapter.no_previous",
                "nothing to roll back to" + (": the base is active" if line == [BASE] else ""),
                where=f"tag '{name}'",
                fix=f"tags: {', '.join(self.all()) or 'none'}; set the tag to the adapter you want",
            )
        return line[-2]

    def line(self, name: str) -> list[str]:
        """What a tag pointed at, oldest first, without what was rolled back; `active` began at the base."""
        line = [BASE] if name == "active" else []
        for move in self.history(name):
            if move.action == "rollback":
                line.pop()
            elif not line or line[-1] != move.new:
                line.append(move.new)
        return line

    def verify(self, known: set[str]) -> list[Problem]:
        """Damaged tags and log lines, and tags that point at nothing."""
        problems = []
        for path in sorted(self._folder.iterdir()):
            move = self._read(path)
            if move is None:
                problems.append(Problem("adapter.bad_tag", str(path), "the tag's file is damaged"))
            elif move.new not in {*known, BASE}:
                problems.append(Problem("adapter.dangling_tag", str(path), f"points at {move.new[:12]}, not stored"))
        _, good, size = self._logged()
        if good < size:
            problems.append(
                Problem("adapter.torn_history", str(self._log), f"{size - good} bytes of a cut line", fatal=False)
            )
        return problems

    def _current(self) -> dict[str, TagMove]:
        moves = {path.name: self._read(path) for path in sorted(self._folder.iterdir())}
        return {name: move for name, move in moves.items() if move is not None}

    def _read(self, path: Path) -> TagMove | None:
        return _parse(path.read_bytes()) if path.is_file() else None

    def _logged(self) -> tuple[list[TagMove], int, int]:
        """Readable moves, the bytes they take up to the first damaged line, and the log's size."""
        data = self._log.read_bytes() if self._log.is_file() else b""
        moves, good = [], 0
        for line in data.splitlines(keepends=True):
            move = _parse(line) if line.endswith(b"\n") else None
            if move is None:
                break
            moves.append(move)
            good += len(line)
        return moves, good, len(data)

    def _complete_log(self) -> list[TagMove]:
        """Cut a torn last line and append the tags' latest moves, before one of them is replaced."""
        moves, good, size = self._logged()
        if good < size:
            self._files.truncate(self._log, good)
        logged = {move.sequence for move in moves}
        for move in sorted(self._current().values(), key=lambda m: m.sequence):
            if move.sequence not in logged:
                self._files.append(self._log, _line(move))
                moves.append(move)
        return moves


def _line(move: TagMove) -> bytes:
    return (json.dumps(dataclasses.asdict(move), sort_keys=True) + "\n").encode()


def _parse(line: bytes) -> TagMove | None:
    try:
        return TagMove(**json.loads(line))
    except (ValueError, TypeError):
        return None
