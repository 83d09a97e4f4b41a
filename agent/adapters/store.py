"""A folder of adapters under their ids, with tags: the store of one machine.

Knows files, locks and what to do when the disk is full or the power goes. Knows no module and no policy.

    objects/<id>/adapter_model.safetensors, adapter_config.json   loadable by peft as they are
    objects/<id>/card.json                                        what the id was made of, lineage, metrics
    tags/<name>     history.jsonl     scratch/ (unfinished work, swept by the next writer)     .lock

An object appears by one rename of a complete, synced folder; afterwards only its card's metrics ever change.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import agent
from agent.adapters.files import Files, disk_errors
from agent.adapters.identity import Adapter, Binding, canonical_json, digest
from agent.adapters.peft_format import (
    CONFIG,
    WEIGHTS,
    config_bytes,
    read_config,
    read_file,
    read_weights,
    weights_bytes,
)
from agent.adapters.protocol import BASE, Card, Problem, Provenance, TagMove
from agent.adapters.tags import Tags
from agent.errors import RatchetError

CARD = "card.json"
SCHEMA = 1
_ID = re.compile(r"[0-9a-f]{64}")


class FolderStore:
    """`AdapterStore` in a folder; safe for many processes on one machine. Readers take no lock."""

    def __init__(self, root: str | Path, *, create: bool = False, files: Files | None = None) -> None:
        """Open a store.

        create: make the folder where there is none; otherwise a mistyped path is refused.

        Raises:
            RatchetError: adapter.no_store, adapter.store_io.
        """
        self.root = Path(root)
        self._files = files or Files()
        self._objects, self._scratch = self.root / "objects", self.root / "scratch"
        folders = (self._objects, self.root / "tags")
        if create:
            with disk_errors(self.root):
                for folder in (*folders, self._scratch):
                    self._files.folder(folder)
        elif not all(folder.is_dir() for folder in folders):
            raise RatchetError(
                "adapter.no_store",
                "not an adapter store",
                where=str(self.root),
                fix="check the path, or create a store there",
            )
        self._tags = Tags(self.root / "tags", self.root / "history.jsonl", self._scratch, self._files)

    # -- adapters ------------------------------------------------------------------------------------------------

    def put(self, adapter: Adapter, provenance: Provenance | None = None) -> Card:
        """See `AdapterStore.put`. A damaged object of the same id is replaced."""
        card = Card(
            id=adapter.id,
            base_hash=adapter.binding.base_hash,
            statistics=adapter.binding.statistics,
            action_space=adapter.binding.action_space,
            provenance=provenance or Provenance(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            software=agent.__version__,
            bytes=adapter.bytes,
        )
        contents = {
            WEIGHTS: weights_bytes(adapter.tensors),
            CONFIG: config_bytes(adapter.config),
            CARD: _card_bytes(card),
        }
        target = self._objects / adapter.id
        with self._writing() as scratch:
            if target.is_dir():
                problems = self._check(target)
                if not problems:
                    return self._card(adapter.id)
            self._files.folder(scratch)
            for name, data in contents.items():
                self._files.create(scratch / name, data)
            self._files.sync_folder(scratch)
            if target.is_dir():
                self._files.rename(target, self._scratch / f"damaged-{secrets.token_hex(8)}")
            self._files.rename(scratch, target)
        return card

    def get(self, reference: str) -> Adapter:
        return self._load(self._objects / self._stored(reference))

    def card(self, reference: str) -> Card:
        return self._card(self._stored(reference))

    def annotate(self, reference: str, metrics: Mapping[str, float], *, gate: Mapping[str, Any] | None = None) -> Card:
        name = self._stored(reference)
        with self._writing() as scratch:
            card = self._card(name)
            merged = {**card.provenance.metrics, **metrics}
            verdict = card.provenance.gate if gate is None else gate
            provenance = dataclasses.replace(card.provenance, metrics=merged, gate=verdict)
            card = dataclasses.replace(card, provenance=provenance)
            self._files.create(scratch, _card_bytes(card))
            self._files.rename(scratch, self._objects / name / CARD)
        return card

    def ids(self) -> list[str]:
        return sorted(p.name for p in self._objects.iterdir() if _ID.fullmatch(p.name))

    def lineage(self, reference: str) -> list[str]:
        known, line = set(self.ids()), [self._stored(reference)]
        while (parent := self._card(line[-1]).provenance.parent) in known and parent not in line:
            line.append(str(parent))
        return line

    def remove(self, reference: str) -> None:
        name = self._stored(reference)
        with self._writing() as scratch:
            holders = [tag for tag, target in self._tags.all().items() if target == name]
            if holders:
                raise RatchetError(
                    "adapter.in_use",
                    f"{name[:12]} is tagged {', '.join(holders)}",
                    where=str(self.root),
                    fix="point the tag at another adapter first",
                )
            self._files.rename(self._objects / name, scratch)
            self._files.remove(scratch)

    # -- references and tags -------------------------------------------------------------------------------------

    def resolve(self, reference: str) -> str:
        tagged = self._tags.get(reference)
        if reference == BASE or (reference == "active" and not self._tags.has("active")):
            tagged = BASE
        elif reference == "previous" and not self._tags.has("previous"):
            tagged = self._tags.line("active")[-2:][0]
        ids = self.ids()
        if tagged is not None:
            if tagged in (*ids, BASE):
                return tagged
            raise RatchetError(
                "adapter.unknown", f"tag '{reference}' points at {tagged[:12]}, which is not stored", fix="store it"
            )
        matches = [i for i in ids if i.startswith(reference)] if len(reference) >= 4 else []
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RatchetError(
                "adapter.ambiguous",
                f"'{reference}' is the beginning of {len(matches)} ids",
                fix=f"give more digits: {', '.join(_apart(matches))}",
            )
        tags = self.tags()
        near = [i[:12] for i in ids if i[:4] == reference[:4]][:3] + difflib.get_close_matches(reference, tags, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"tags: {', '.join(tags) or 'none'}; {len(ids)} ids"
        raise RatchetError("adapter.unknown", f"no adapter '{reference}'", where=str(self.root), fix=hint)

    def _stored(self, reference: str) -> str:
        """The id of an adapter; the base has none."""
        name = self.resolve(reference)
        if name == BASE:
            text = "this is the base without an adapter" if reference == BASE else f"'{reference}' is the base"
            raise RatchetError("adapter.is_base", text, where=str(self.root), fix="name an adapter; see `list`")
        return name

    def tag(self, name: str, reference: str, reason: str = "") -> TagMove:
        new = self.resolve(reference)
        with self._writing():
            return self._tags.move(name, new, "set", reason)

    def tags(self) -> dict[str, str]:
        return self._tags.all()

    def promote(self, reference: str, reason: str = "") -> TagMove:
        new = self.resolve(reference)
        with self._writing():
            old = self._tags.get("active") or BASE
            if old != new:
                self._tags.move("previous", old, "set", reason)
            return self._tags.move("active", new, "set", reason)

    def rollback(self, name: str = "active", reason: str = "") -> TagMove:
        with self._writing():
            return self._tags.move(name, self.resolve(self._tags.before(name)), "rollback", reason)

    def history(self, name: str | None = None) -> list[TagMove]:
        return self._tags.history(name)

    # -- checking ------------------------------------------------------------------------------------------------

    def verify(self) -> list[Problem]:
        problems: list[Problem] = []
        with disk_errors(self.root), self._files.lock(self.root / ".lock", exclusive=False):
            known = set(self.ids())
            for path in sorted(self._objects.iterdir()):
                if path.name not in known:
                    problems.append(Problem("adapter.stray_file", str(path), "not an adapter", fatal=False))
                    continue
                found = self._check(path)
                problems += found
                if not found and (parent := self._card(path.name).provenance.parent) and parent not in known:
                    text = f"its parent {parent[:12]} is not stored here"
                    problems.append(Problem("adapter.missing_parent", str(path), text, fatal=False))
            problems += self._tags.verify(known)
            for path in self._unfinished():
                problems.append(Problem("adapter.leftover", str(path), "of an interrupted write", fatal=False))
        return problems

    def _check(self, folder: Path) -> list[Problem]:
        try:
            self._load(folder)
        except RatchetError as error:
            return [Problem(error.code, error.where or str(folder), error.what)]
        return []

    def _load(self, folder: Path) -> Adapter:
        card = self._card(folder.name)
        config = read_config(read_file(folder / CONFIG), str(folder / CONFIG))
        tensors = read_weights(read_file(folder / WEIGHTS), str(folder / WEIGHTS))
        adapter = Adapter(tensors, config, Binding(card.base_hash, card.statistics, card.action_space))
        if adapter.id != folder.name:
            raise RatchetError(
                "adapter.hash_mismatch",
                f"content is {adapter.id[:12]}, stored as {folder.name[:12]}",
                where=str(folder),
                fix="the files were changed or damaged: store the adapter again, or remove it",
            )
        return adapter

    def _card(self, name: str) -> Card:
        path = self._objects / name / CARD
        try:
            raw: dict[str, Any] = json.loads(read_file(path))
            check, schema = raw.pop("check"), raw.pop("schema")
            intact = check == digest(raw) and schema == SCHEMA and raw["id"] == name
            card = Card(**{**raw, "provenance": Provenance(**raw["provenance"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            intact = False
        if not intact:
            raise RatchetError(
                "adapter.bad_card",
                "the card is damaged or of another version",
                where=str(path),
                fix="store the adapter again",
            )
        return card

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """The writers' lock, a clean scratch, coded errors; yields an unused path on the same file system."""
        scratch = self._scratch / secrets.token_hex(8)
        with disk_errors(self.root), self._files.lock(self.root / ".lock"):
            if not self._scratch.is_dir():
                self._files.folder(self._scratch)
            self._sweep()
            try:
                yield scratch
            finally:
                self._sweep()

    def _sweep(self) -> None:
        # Under the writers' lock nothing in the scratch folder can still be in use.
        for path in self._unfinished():
            self._files.remove(path)

    def _unfinished(self) -> list[Path]:
        """What interrupted writes left. A store that was copied by git has no scratch folder: it was empty."""
        return sorted(self._scratch.iterdir()) if self._scratch.is_dir() else []


def _card_bytes(card: Card) -> bytes:
    raw = dataclasses.asdict(card)
    # The binding's mappings may hold tuples; the check is over what a reader will see.
    try:
        raw = json.loads(canonical_json(raw))
    except ValueError as error:
        raise RatchetError(
            "adapter.bad_card",
            f"not storable as JSON: {error}",
            where=f"card of {card.id[:12]}",
            fix="give finite metrics and plain data",
        ) from None
    return (json.dumps({**raw, "schema": SCHEMA, "check": digest(raw)}, indent=2, sort_keys=True) + "\n").encode()


def _apart(ids: list[str]) -> list[str]:
    """The shortest beginnings that tell the ids apart, at most five of them."""
    size = 4
    while len({i[:size] for i in ids}) < len(ids):
        size += 2
    return [i[:size] for i in ids[:5]]
