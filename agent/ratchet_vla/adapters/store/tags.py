"""Tags of an adapter store: small files that point at adapter ids, and the append-only log of their moves.

Knows names, moves and their order. Knows no adapter: ids are just text here. A tag's file holds its latest move and is
the truth; the log takes that move over before the next one replaces it, so that no crash between the two loses one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from ratchet_vla.adapters.protocol import BASE, Problem, TagMove
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.files import Files

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
        return {tag_name: move.new for tag_name, move in self._current().items()}

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
        sequence = max((logged_move.sequence for logged_move in moves), default=0) + 1
        time_utc = datetime.now(UTC).isoformat(timespec="seconds")
        new_move = TagMove(sequence, name, action, self.get(name), new, reason, time_utc)
        # Below, the rename is the commit: until it the old tag is in force, after it the new one.
        scratch_path = self._scratch / f"tag-{sequence}"
        self._files.create(scratch_path, _line(new_move))
        self._files.rename(scratch_path, self._folder / name)
        return new_move

    def history(self, name: str | None = None) -> list[TagMove]:
        """Moves, oldest first: the log's and the latest one of each tag."""
        moves = {move.sequence: move for move in self._logged()[0]}
        moves.update({move.sequence: move for move in self._current().values()})
        return [moves[sequence] for sequence in sorted(moves) if name in (None, moves[sequence].tag)]

    def before(self, name: str) -> str:
        """The target that a rollback of this tag restores.

        Raises:
            RatchetError: adapter.no_previous.
        """
        targets = self.line(name)
        if len(targets) < 2:
            raise RatchetError(
                "adapter.no_previous",
                "nothing to roll back to" + (": the base is active" if targets == [BASE] else ""),
                where=f"tag '{name}'",
                fix=f"tags: {', '.join(self.all()) or 'none'}; set the tag to the adapter you want",
            )
        return targets[-2]

    def line(self, name: str) -> list[str]:
        """The tag's targets, oldest first, without those that were rolled back; `active` starts at the base."""
        targets = [BASE] if name == "active" else []
        for move in self.history(name):
            # A rollback undoes the latest set, so the line is a stack and a second rollback goes one further back.
            if move.action == "rollback":
                targets.pop()
            elif not targets or targets[-1] != move.new:
                targets.append(move.new)
        return targets

    def verify(self, stored_ids: set[str]) -> list[Problem]:
        """Damaged tags and log lines, and tags that point at nothing."""
        problems = []
        for tag_file in sorted(self._folder.iterdir()):
            move = self._read(tag_file)
            if move is None:
                problems.append(Problem("adapter.bad_tag", str(tag_file), "the tag's file is damaged"))
            elif move.new not in {*stored_ids, BASE}:
                problems.append(
                    Problem("adapter.dangling_tag", str(tag_file), f"points at {move.new[:12]}, not stored")
                )
        _, readable_bytes, log_bytes = self._logged()
        if readable_bytes < log_bytes:
            problems.append(
                Problem(
                    "adapter.torn_history",
                    str(self._log),
                    f"{log_bytes - readable_bytes} bytes of a cut line",
                    fatal=False,
                )
            )
        return problems

    def _current(self) -> dict[str, TagMove]:
        moves = {tag_file.name: self._read(tag_file) for tag_file in sorted(self._folder.iterdir())}
        return {tag_name: move for tag_name, move in moves.items() if move is not None}

    def _read(self, tag_file: Path) -> TagMove | None:
        return _parse(tag_file.read_bytes()) if tag_file.is_file() else None

    def _logged(self) -> tuple[list[TagMove], int, int]:
        """Readable moves, the bytes they take up to the first damaged line, and the log's size."""
        log_bytes = self._log.read_bytes() if self._log.is_file() else b""
        moves = []
        readable_bytes = 0
        for line in log_bytes.splitlines(keepends=True):
            parsed_move = _parse(line) if line.endswith(b"\n") else None
            if parsed_move is None:
                break
            moves.append(parsed_move)
            readable_bytes += len(line)
        return moves, readable_bytes, len(log_bytes)

    def _complete_log(self) -> list[TagMove]:
        """Cut a torn last line and append the tags' latest moves, before one of them is replaced."""
        moves, readable_bytes, log_bytes = self._logged()
        if readable_bytes < log_bytes:
            self._files.truncate(self._log, readable_bytes)
        logged_sequences = {move.sequence for move in moves}
        for move in sorted(self._current().values(), key=lambda tag_move: tag_move.sequence):
            if move.sequence not in logged_sequences:
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
