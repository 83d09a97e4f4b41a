"""A folder of episodes and its index: what is there, under which id, and how to get it.

Knows files and cards. What annotators think of an episode is `annotations`'s business; it shares the index.
Layout: `index.jsonl`, and one folder per session with the episode files. Deleting is `gc`'s alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.format import EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.episodes.file.recovery import Recovered, recover, unfinished
from ratchet_vla.episodes.library import labels
from ratchet_vla.episodes.library.index import Index
from ratchet_vla.episodes.library.survey import INDEX, kind_of, look, mcap_files, nothing_here, store_around
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Episode
from ratchet_vla.storage.documents import hash_file, sync_folder
from ratchet_vla.storage.growing import disk_refusals

__all__ = ["Card", "Damage", "EpisodeStore", "Stock"]


@dataclass(frozen=True)
class Card:
    """What the index says about one episode. success, source: as recorded, before anybody's label.

    file: relative to the store. seconds: duration. human_share: ticks under a person's command, in [0, 1].
    dropped: records and frames that were lost while recording.
    """

    id: str
    file: str
    task: str
    instruction: str
    adapter_id: str
    session: str
    robot: str
    contract_id: str
    mode: str
    created: str
    seconds: float
    steps: int
    ticks: int
    human_share: float
    bytes: int
    cameras: tuple[str, ...]
    success: bool | None
    source: str
    reason: str
    name: str = ""
    dropped: int = 0
    recovered: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, digest: str, file: str, size_bytes: int, info: EpisodeInfo, ending: EpisodeEnding) -> Card:
        """The card of a finished file. file: relative to the store."""
        return cls(
            id=digest,
            file=file,
            task=info.task,
            instruction=info.instruction,
            adapter_id=info.adapter_id,
            session=info.session,
            robot=str(info.contract.get("name", "")),
            contract_id=info.contract_id,
            mode=info.mode,
            created=info.created,
            seconds=ending.seconds,
            steps=ending.steps,
            ticks=ending.ticks,
            human_share=ending.human_ticks / ending.ticks if ending.ticks else 0.0,
            bytes=size_bytes,
            cameras=tuple(info.topics.get("stream", {})),
            success=ending.success,
            source=ending.success_source,
            reason=ending.reason,
            name=info.name,
            dropped=sum(ending.dropped.values()),
            recovered=ending.recovered,
            meta=info.meta,
        )


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a store. fatal False: worth knowing, nothing is lost."""

    code: str
    where: str
    what: str
    fatal: bool = True


@dataclass(frozen=True)
class Stock:
    """What taking stock did. passed: files that could not be made episodes of, each with why; they stay as they are."""

    recovered: list[Recovered]
    entered: list[Card]
    passed: list[tuple[Path, RatchetError]]


class EpisodeStore:
    """One folder. Safe to use from several processes; episodes are never changed, only added (and removed by `gc`)."""

    def __init__(self, root: Path | str, *, create: bool = False) -> None:
        """create: a store that does not exist yet may be opened; its first episode makes the index.

        Raises:
            RatchetError: episode.no_store, which tells what lies there instead.
        """
        self.root = Path(root)
        if not (self.root / INDEX).exists() and (not create or store_around(self.root) is not None):
            raise nothing_here("episode.no_store", "no episodes are kept here", self.root, look(self.root))
        with disk_refusals(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self.index = Index(self.root / INDEX, ("store", {"format": fmt.FORMAT}))
        self._cards: dict[str, Card] = {}
        self._names: dict[str, str] = {}  # name -> id
        self._entries_read = 0
        self._lock = threading.Lock()  # the review page asks from several threads

    # -- what is there ------------------------------------------------------------------------------------------

    def require_some(self, *, waits: bool = False) -> None:
        """Refuse a store without episodes where other things lie that whoever opened it may have meant.

        waits: the caller stays; what a recorder is working on is no reason to refuse then.

        Raises:
            RatchetError: episode.nothing_here.
        """
        if self.cards():
            return
        contents = [item for item in look(self.root, self._removed()) if not (waits and item.passes)]
        if contents:
            raise nothing_here("episode.nothing_here", "no episode is kept here", self.root, contents)

    def _removed(self) -> set[str]:
        """Files of episodes that `remove` took; a crash may have left one."""
        return {entry.body["file"] for entry in self.index.entries() if entry.kind == "removed"}

    def cards(self) -> dict[str, Card]:
        """Id -> card, oldest first."""
        self._read_index()
        with self._lock:
            return dict(self._cards)

    def _read_index(self) -> None:
        """Take in what the index has got since the last look."""
        with self._lock:
            entries = self.index.entries(self._entries_read)
            for entry in entries:
                if entry.kind == "episode":
                    fields = {**entry.body, "cameras": tuple(entry.body["cameras"])}
                    card = self._cards[fields["id"]] = Card(**fields)
                    self._names |= {card.name: card.id} if card.name else {}
                elif entry.kind == "removed":
                    removed_card = self._cards.pop(entry.body["id"], None)
                    if removed_card is not None and self._names.get(removed_card.name) == removed_card.id:
                        del self._names[removed_card.name]
            self._entries_read += len(entries)

    def resolve(self, reference: str) -> str:
        """The full id for an id, a unique beginning of one, or the name that an episode was recorded under.

        Raises:
            RatchetError: episode.unknown, episode.ambiguous.
        """
        self._read_index()
        with self._lock:
            if reference in self._cards:
                return reference
            if reference in self._names:
                return self._names[reference]
            cards = list(self._cards)
        matches: list[str] = []
        if re.fullmatch(r"[0-9a-f]{4,64}", reference):
            matches = [episode_id for episode_id in cards if episode_id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RatchetError("episode.ambiguous", f"{len(matches)} episodes begin like that", where=reference)
        raise RatchetError(
            "episode.unknown", "no such episode", where=reference, fix="see `ratchet episodes list`; 4 digits or more"
        )

    def named(self, name: str) -> Card | None:
        """The episode that was recorded under this name, None where there is none."""
        self._read_index()
        with self._lock:
            return self._cards.get(self._names.get(name, ""))

    def card(self, reference: str) -> Card:
        """What the index says of an episode. Raises as `resolve` does."""
        return self._cards[self.resolve(reference)]

    def path(self, reference: str) -> Path:
        """Where the episode's file lies. Raises as `resolve` does."""
        return self.root / self.card(reference).file

    def open(self, reference: str) -> EpisodeReader:
        """A reader of the episode's file. Raises as `resolve` and `EpisodeReader` do."""
        return EpisodeReader(self.path(reference))

    def read(self, reference: str, *, images: bool = True) -> Episode:
        """The episode as recorded; for one with its verified label, see `annotations.Annotations.read`."""
        return self.open(reference).episode(images)

    # -- what comes in ------------------------------------------------------------------------------------------

    def folder(self, session: str) -> Path:
        """Where the files of a session lie; made if need be."""
        folder = self.root / (re.sub(r"[^A-Za-z0-9._-]", "_", session).lstrip(".") or "episodes")
        with disk_refusals(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.root)
        return folder

    def add(self, path: Path, digest: str | None = None, ending: EpisodeEnding | None = None) -> Card:
        """Enter a finished file that lies inside the store.

        digest, ending: its id and last record, if known; looked up in the file otherwise.
        What a person said while it was recorded is entered with it, as their label. Entering it again changes nothing.

        Raises:
            RatchetError: episode.outside_store, episode.damaged, episode.unknown_format.
        """
        try:
            file = str(path.resolve().relative_to(self.root.resolve()))
        except ValueError:
            raise RatchetError(
                "episode.outside_store", "the file is not in the store", where=str(path), fix="use `copy_in`"
            ) from None
        reader = EpisodeReader(path)
        ending = ending or reader.ending()
        assert ending is not None  # a reader that accepts no cut-off file has refused it before
        digest = digest or reader.id
        cards = self.cards()
        if digest in cards:
            return cards[digest]
        card = Card.of(digest, file, path.stat().st_size, reader.info, ending)
        self.index.append([("episode", dataclasses.asdict(card)), *labels.recorded(digest, ending)])
        return card

    def copy_in(self, path: Path, *, link: bool = False) -> Card:
        """Copy a finished file from elsewhere into the store, whole or not at all.

        link: nobody will write to that file any more, so where the file system can, it only gets a second name here.

        Raises:
            RatchetError: episode.damaged, episode.copy_differs, episode.disk_full.
        """
        reader = EpisodeReader(path)
        digest = reader.id
        if digest in self.cards():
            return self.card(digest)
        folder = self.folder(reader.info.session)
        final = folder / f"{digest[:16]}{fmt.SUFFIX}"
        scratch = folder / f".{digest[:16]}.copying"
        with disk_refusals(final):
            scratch.unlink(missing_ok=True)
            _duplicate(path, scratch, link)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            if hash_file(scratch) != digest:
                scratch.unlink()
                raise RatchetError("episode.copy_differs", "the copy is not the file", where=str(final), fix="retry")
            scratch.rename(final)
            sync_folder(folder)
        return self.add(final, digest)

    def link_out(self, reference: str, path: Path) -> None:
        """The episode's file under another name, which may be moved and removed; a copy on another file system.

        Raises:
            RatchetError: episode.unknown, episode.exists, episode.disk_full, episode.io.
        """
        with disk_refusals(path):
            _duplicate(self.path(reference), path, True)

    def take_stock(self) -> Stock:
        """After a crash: recover unfinished files, and enter finished ones that the index does not have yet.

        What can't be mended is passed over: one bad file keeps no other episode out.
        """
        stock = Stock([], [], [])
        for remains in unfinished(self.root):
            try:
                stock.recovered.append(recover(remains))
            except RatchetError as error:
                stock.passed.append((remains, error))
        entered = {card.file for card in self.cards().values()} | self._removed()
        for path in mcap_files(self.root):
            if path.suffix != fmt.SUFFIX or str(path.relative_to(self.root)) in entered:
                continue
            try:
                card = self.add(path)
            except RatchetError as error:
                stock.passed.append((path, error))
                continue
            if self.root / card.file == path:  # else a second file of one that is there
                stock.entered.append(card)
        return stock

    # -- what must stay true ------------------------------------------------------------------------------------

    def verify(self) -> Iterator[Damage | Card]:
        """Check the chain of the index and hash every file again; yields each card that is sound, and every damage."""
        try:
            cards = self.cards()
        except RatchetError as error:
            yield Damage(error.code, error.where, error.what)
            return
        for card in cards.values():
            path = self.root / card.file
            if not path.is_file():
                yield Damage("episode.missing", str(path), f"the file of {card.id[:12]} is gone")
            elif hash_file(path) != card.id:
                yield Damage("episode.damaged", str(path), f"the file is not what {card.id[:12]} was")
            else:
                yield card
        entered = {card.file for card in cards.values()}
        for path in sorted(self.root.rglob(f"*{fmt.OPEN_SUFFIX}")):
            yield Damage("episode.unfinished", str(path), "being recorded, or cut off and not recovered", fatal=False)
        for path in mcap_files(self.root):
            if path.suffix != fmt.SUFFIX or str(path.relative_to(self.root)) in entered:
                continue
            code, problem = self._not_entered(path)
            yield Damage(code, str(path), problem, fatal=False)

    def _not_entered(self, path: Path) -> tuple[str, str]:
        """Code and words for a file that the index does not name."""
        kind = kind_of(path)[0]
        if kind == "episode":
            same_card = self.cards().get(hash_file(path))
            if same_card is not None:
                return "episode.twice", f"a second file of {same_card.id[:12]}, which is in {same_card.file}; it may go"
            return "episode.not_entered", "finished, but not in the index; --recover enters it"
        if kind == "nodes":
            return "episode.not_an_episode", "of the nodes' former recorder; `ratchet episodes import` makes one of it"
        problem = "can't be read as an MCAP" if kind == "broken" else "an MCAP of another recorder"
        return "episode.not_an_episode", problem

    def remove(self, ids: Iterable[str], reason: str) -> int:
        """Delete episodes; the index keeps that they were there and why they went. Returns the bytes that were freed.

        The entry is written first: after a crash in between, the file is left over, never a wish unknown.
        """
        freed_bytes = 0
        for reference in ids:
            card = self.card(reference)
            self.index.append([("removed", {"id": card.id, "file": card.file, "reason": reason})])
            with disk_refusals(self.root):
                (self.root / card.file).unlink(missing_ok=True)
            freed_bytes += card.bytes
        return freed_bytes

    def leftovers(self, older_than: float = 3600.0) -> list[Path]:
        """Files that a crash in the middle of copying, recovering or removing left behind; seconds since written."""
        written_before_s = time.time() - older_than
        removed_files = {self.root / file for file in self._removed()}
        entered_files = {self.root / card.file for card in self.cards().values()}
        leftovers = [path for suffix in ("copying", "recovering") for path in self.root.glob(f"*/.*.{suffix}")]
        leftovers += [path for path in removed_files - entered_files if path.exists()]
        return sorted(path for path in leftovers if path.stat().st_mtime < written_before_s)


def _duplicate(source: Path, target: Path, link: bool) -> None:
    """A second file with the same content; the same file under a second name, where that is wished for and possible."""
    try:
        if link:
            os.link(source, target)
            return
    except FileExistsError:
        raise
    except OSError:
        pass  # another file system, or one without links
    shutil.copyfile(source, target)
