"""Adapter store in a folder, content-addressed, with tags: the store of one machine.

Knows files, locks and how to survive a full disk or a power cut. Knows no module and no policy.

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

import ratchet_vla
from ratchet_vla.adapters.identity import Adapter, Binding
from ratchet_vla.adapters.peft_format import (
    CONFIG,
    WEIGHTS,
    config_bytes,
    read_config,
    read_file,
    read_weights,
    weights_bytes,
)
from ratchet_vla.adapters.protocol import BASE, Card, Problem, Provenance, TagMove
from ratchet_vla.adapters.store.tags import Tags
from ratchet_vla.errors import RatchetError
from ratchet_vla.storage.canonical import canonical_json, digest
from ratchet_vla.storage.disk import disk_errors
from ratchet_vla.storage.files import ADAPTER_DISK, Files

__all__ = ["FolderStore"]

CARD = "card.json"
SCHEMA = 1
_ID = re.compile(r"[0-9a-f]{64}")


class FolderStore:
    """`AdapterStore` in a folder; safe for many processes on one machine. Readers take no lock."""

    def __init__(self, root: str | Path, *, create: bool = False, files: Files | None = None) -> None:
        """Open a store.

        Args:
            create: make the folder where there is none; otherwise a mistyped path is refused.

        Raises:
            RatchetError: adapter.no_store, adapter.store_io.
        """
        self.root = Path(root)
        self._files = files or Files()
        # All three folders are on one file system, so that a rename from scratch is atomic.
        self._objects = self.root / "objects"
        self._scratch = self.root / "scratch"
        folders = (self._objects, self.root / "tags")
        if create:
            with disk_errors(self.root, ADAPTER_DISK):
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
            software=ratchet_vla.__version__,
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
            # All files are written and synced in scratch; the rename below is the one moment at which the adapter
            # exists.
            self._files.folder(scratch)
            for file_name, file_bytes in contents.items():
                self._files.create(scratch / file_name, file_bytes)
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
        adapter_id = self._stored(reference)
        with self._writing() as scratch:
            card = self._card(adapter_id)
            all_metrics = {**card.provenance.metrics, **metrics}
            gate_report = card.provenance.gate if gate is None else gate
            provenance = dataclasses.replace(card.provenance, metrics=all_metrics, gate=gate_report)
            card = dataclasses.replace(card, provenance=provenance)
            self._files.create(scratch, _card_bytes(card))
            self._files.rename(scratch, self._objects / adapter_id / CARD)
        return card

    def ids(self) -> list[str]:
        return sorted(
            object_folder.name for object_folder in self._objects.iterdir() if _ID.fullmatch(object_folder.name)
        )

    def lineage(self, reference: str) -> list[str]:
        stored_ids = set(self.ids())
        ancestors = [self._stored(reference)]
        while (parent := self._card(ancestors[-1]).provenance.parent) in stored_ids and parent not in ancestors:
            ancestors.append(str(parent))
        return ancestors

    def remove(self, reference: str) -> None:
        adapter_id = self._stored(reference)
        with self._writing() as scratch:
            holders = [tag for tag, target_id in self._tags.all().items() if target_id == adapter_id]
            if holders:
                raise RatchetError(
                    "adapter.in_use",
                    f"{adapter_id[:12]} is tagged {', '.join(holders)}",
                    where=str(self.root),
                    fix="point the tag at another adapter first",
                )
            self._files.rename(self._objects / adapter_id, scratch)
            self._files.remove(scratch)

    # -- references and tags -------------------------------------------------------------------------------------

    def resolve(self, reference: str) -> str:
        tag_target = self._tags.get(reference)
        if reference == BASE or (reference == "active" and not self._tags.has("active")):
            tag_target = BASE
        elif reference == "previous" and not self._tags.has("previous"):
            tag_target = self._tags.line("active")[-2:][0]
        ids = self.ids()
        if tag_target is not None:
            if tag_target in (*ids, BASE):
                return tag_target
            raise RatchetError(
                "adapter.unknown", f"tag '{reference}' points at {tag_target[:12]}, which is not stored", fix="store it"
            )
        # Four digits at least: a shorter prefix would match several adapters by chance in a store of a few hundred.
        matches = []
        if len(reference) >= 4:
            matches = [adapter_id for adapter_id in ids if adapter_id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RatchetError(
                "adapter.ambiguous",
                f"'{reference}' is the beginning of {len(matches)} ids",
                fix=f"give more digits: {', '.join(_apart(matches))}",
            )
        tags = self.tags()
        near_ids = [adapter_id[:12] for adapter_id in ids if adapter_id[:4] == reference[:4]]
        near_matches = near_ids[:3] + difflib.get_close_matches(reference, tags, n=3)
        hint = f"tags: {', '.join(tags) or 'none'}; {len(ids)} ids"
        if near_matches:
            hint = f"did you mean {' or '.join(near_matches)}?"
        raise RatchetError("adapter.unknown", f"no adapter '{reference}'", where=str(self.root), fix=hint)

    def _stored(self, reference: str) -> str:
        """The id of an adapter; the base has none."""
        adapter_id = self.resolve(reference)
        if adapter_id == BASE:
            explanation = "this is the base without an adapter" if reference == BASE else f"'{reference}' is the base"
            raise RatchetError("adapter.is_base", explanation, where=str(self.root), fix="name an adapter; see `list`")
        return adapter_id

    def tag(self, name: str, reference: str, reason: str = "") -> TagMove:
        target_id = self.resolve(reference)
        with self._writing():
            return self._tags.move(name, target_id, "set", reason)

    def tags(self) -> dict[str, str]:
        return self._tags.all()

    def promote(self, reference: str, reason: str = "") -> TagMove:
        new_id = self.resolve(reference)
        with self._writing():
            old_id = self._tags.get("active") or BASE
            # `previous` moves first: a crash between the two leaves both tags at the adapter that was active.
            if old_id != new_id:
                self._tags.move("previous", old_id, "set", reason)
            return self._tags.move("active", new_id, "set", reason)

    def rollback(self, name: str = "active", reason: str = "") -> TagMove:
        with self._writing():
            return self._tags.move(name, self.resolve(self._tags.before(name)), "rollback", reason)

    def history(self, name: str | None = None) -> list[TagMove]:
        return self._tags.history(name)

    # -- checking ------------------------------------------------------------------------------------------------

    def verify(self) -> list[Problem]:
        problems: list[Problem] = []
        # A shared lock: many may verify at once, and no writer changes what is being read.
        with disk_errors(self.root, ADAPTER_DISK), self._files.lock(self.root / ".lock", exclusive=False):
            stored_ids = set(self.ids())
            for object_path in sorted(self._objects.iterdir()):
                if object_path.name not in stored_ids:
                    problems.append(Problem("adapter.stray_file", str(object_path), "not an adapter", fatal=False))
                    continue
                object_problems = self._check(object_path)
                problems += object_problems
                if (
                    not object_problems
                    and (parent := self._card(object_path.name).provenance.parent)
                    and parent not in stored_ids
                ):
                    explanation = f"its parent {parent[:12]} is not stored here"
                    problems.append(Problem("adapter.missing_parent", str(object_path), explanation, fatal=False))
            problems += self._tags.verify(stored_ids)
            for object_path in self._unfinished():
                problems.append(Problem("adapter.leftover", str(object_path), "of an interrupted write", fatal=False))
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

    def _card(self, adapter_id: str) -> Card:
        card_path = self._objects / adapter_id / CARD
        try:
            card_fields: dict[str, Any] = json.loads(read_file(card_path))
            checksum = card_fields.pop("check")
            schema = card_fields.pop("schema")
            intact = checksum == digest(card_fields) and schema == SCHEMA and card_fields["id"] == adapter_id
            card = Card(**{**card_fields, "provenance": Provenance(**card_fields["provenance"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            intact = False
        if not intact:
            raise RatchetError(
                "adapter.bad_card",
                "the card is damaged or of another version",
                where=str(card_path),
                fix="store the adapter again",
            )
        return card

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """The writers' lock, a clean scratch, coded errors; yields an unused path on the same file system."""
        scratch = self._scratch / secrets.token_hex(8)
        with disk_errors(self.root, ADAPTER_DISK), self._files.lock(self.root / ".lock"):
            if not self._scratch.is_dir():
                self._files.folder(self._scratch)
            self._sweep()
            try:
                yield scratch
            finally:
                self._sweep()

    def _sweep(self) -> None:
        # Under the writers' lock nothing in the scratch folder can still be in use.
        for leftover in self._unfinished():
            self._files.remove(leftover)

    def _unfinished(self) -> list[Path]:
        """What interrupted writes left. A store that was copied by git has no scratch folder: it was empty."""
        return sorted(self._scratch.iterdir()) if self._scratch.is_dir() else []


def _card_bytes(card: Card) -> bytes:
    card_fields = dataclasses.asdict(card)
    # The binding's mappings may hold tuples; the check is over what a reader will see.
    try:
        card_fields = json.loads(canonical_json(card_fields))
    except ValueError as error:
        raise RatchetError(
            "adapter.bad_card",
            f"not storable as JSON: {error}",
            where=f"card of {card.id[:12]}",
            fix="give finite metrics and plain data",
        ) from None
    return (
        json.dumps({**card_fields, "schema": SCHEMA, "check": digest(card_fields)}, indent=2, sort_keys=True) + "\n"
    ).encode()


def _apart(adapter_ids: list[str]) -> list[str]:
    """The shortest beginnings that tell the ids apart, at most five of them."""
    digits = 4
    while len({adapter_id[:digits] for adapter_id in adapter_ids}) < len(adapter_ids):
        digits += 2
    return [adapter_id[:digits] for adapter_id in adapter_ids[:5]]
