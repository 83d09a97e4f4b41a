"""Promotion tables: which adapter acts on which task, by the words of the instruction.

An adapter acts only where it was measured to be better; on everything else the base acts. A table is content-addressed
as an adapter is, and the tag `table` points at the one in force, with a history and a way back.

Knows files, texts and ids. Knows no policy, and not how a table comes about.

    tables/<id>.json     table/table (the tag)     table-history.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.protocol import BASE, TagMove
from ratchet_vla.adapters.store.tags import Tags
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.canonical import canonical_json, digest
from ratchet_vla.storage.files import Files, disk_errors

TAG = "table"
FORMAT = "ratchet.table.v1"
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TableEntry:
    """One task and who acts on it.

    adapter: id, or BASE where nothing better was measured. instructions: texts that name the task. rate, base_rate:
    success of both when it was decided, in [0, 1]; None where nobody measured. episodes: per side. gate: id of the
    candidate whose gate decided it; "" for an entry that a person made.
    """

    task: str
    instructions: tuple[str, ...]
    adapter: str
    rate: float | None = None
    base_rate: float | None = None
    episodes: int = 0
    gate: str = ""


@dataclass(frozen=True)
class Assignment:
    """Who acts on an instruction, and why. adapter: id or BASE. task: "" where the instruction is unknown."""

    adapter: str
    task: str
    reason: str


@dataclass(frozen=True)
class PromotionTable:
    """Entries of one base, by task."""

    base_hash: str
    entries: Mapping[str, TableEntry]

    @property
    def id(self) -> str:
        """SHA-256 of its content."""
        return digest(self.as_dict())

    def assignment(self, instruction: str) -> Assignment:
        """Who acts on an instruction: exactly the adapter of the entry that has its words, otherwise the base."""
        words = normalised(instruction)
        for entry in self.entries.values():
            if words in map(normalised, entry.instructions):
                what = "the base" if entry.adapter == BASE else entry.adapter[:12]
                return Assignment(entry.adapter, entry.task, f"task {entry.task} is promoted to {what}")
        return Assignment(BASE, "", "no entry has this instruction: the base acts")

    def with_entry(self, entry: TableEntry) -> PromotionTable:
        """The table with one entry added or replaced.

        Raises:
            RatchetError: adapter.bad_table where another task has the same instruction.
        """
        words = set(map(normalised, entry.instructions))
        for other in self.entries.values():
            if other.task != entry.task and words & set(map(normalised, other.instructions)):
                raise RatchetError(
                    "adapter.bad_table",
                    f"tasks {other.task} and {entry.task} have one instruction",
                    where=entry.instructions[0] if entry.instructions else entry.task,
                    fix="give each task words of its own",
                )
        return dataclasses.replace(self, entries={**self.entries, entry.task: entry})

    def as_dict(self) -> dict[str, Any]:
        """Plain data; equal tables give equal data."""
        entries = [dataclasses.asdict(self.entries[task]) for task in sorted(self.entries)]
        return {"format": FORMAT, "base_hash": self.base_hash, "entries": entries}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> PromotionTable:
        """Inverse of `as_dict`. Raises KeyError, TypeError, ValueError."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        entries = [TableEntry(**{**raw, "instructions": tuple(raw["instructions"])}) for raw in data["entries"]]
        return cls(str(data["base_hash"]), {entry.task: entry for entry in entries})


def normalised(instruction: str) -> str:
    """An instruction as it is compared: lower case, words only, one space between them."""
    return " ".join(re.findall(r"[^\W_]+", instruction.casefold()))


class TableStore:
    """The tables beside an adapter store, and the tag that points at the one in force."""

    def __init__(self, root: str | Path, files: Files | None = None) -> None:
        self.root = Path(root)
        self._files = files or Files()
        self._tables = self.root / "tables"
        self._tag_folder = self.root / "table"
        self._scratch = self.root / "scratch"
        self._tags = Tags(self._tag_folder, self.root / "table-history.jsonl", self._scratch, self._files)

    @property
    def tag_file(self) -> Path:
        """The file that is replaced whenever another table comes into force."""
        return self._tag_folder / TAG

    def active(self) -> PromotionTable | None:
        """The table in force; None where none ever was, or where the tag went back to before the first.

        Raises:
            RatchetError: adapter.bad_table.
        """
        if not self._tag_folder.is_dir():
            return None
        identity = self._tags.get(TAG)
        return None if identity in (None, BASE) else self.get(str(identity))

    def get(self, identity: str) -> PromotionTable:
        """A table by id.

        Raises:
            RatchetError: adapter.unknown_table, adapter.bad_table.
        """
        path = self._tables / f"{identity}.json"
        if not _ID.fullmatch(identity) or not path.is_file():
            raise RatchetError("adapter.unknown_table", f"no table {identity[:12]}", where=str(self._tables))
        try:
            table = PromotionTable.of(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RatchetError("adapter.bad_table", f"damaged: {error}", where=str(path)) from None
        if table.id != identity:
            raise RatchetError(
                "adapter.bad_table", f"content is {table.id[:12]}", where=str(path), fix="go back to the table before"
            )
        return table

    def promote(self, table: PromotionTable, reason: str) -> TagMove:
        """Store a table and bring it into force, in this order."""
        with self._writing():
            target = self._tables / f"{table.id}.json"
            if not target.is_file():
                scratch = self._scratch / f"table-{table.id}"
                self._files.create(scratch, (canonical_json(table.as_dict()) + "\n").encode())
                self._files.rename(scratch, target)
            return self._tags.move(TAG, table.id, "set", reason)

    def rollback(self, reason: str = "") -> TagMove:
        """Go back to the table before; before the first the base acts everywhere.

        Raises:
            RatchetError: adapter.no_previous.
        """
        with self._writing():
            line = [BASE, *self._tags.line(TAG)]
            if len(line) < 2:
                raise RatchetError("adapter.no_previous", "no table was ever promoted", where=str(self.root))
            return self._tags.move(TAG, line[-2], "rollback", reason)

    def history(self) -> list[TagMove]:
        """Moves of the tag, oldest first."""
        return self._tags.history(TAG) if self._tag_folder.is_dir() else []

    def _writing(self) -> Any:
        with disk_errors(self.root):
            for folder in (self._tables, self._tag_folder, self._scratch):
                if not folder.is_dir():
                    self._files.folder(folder)
        return self._files.lock(self.root / ".lock")
