"""`ratchet episodes export|import|gc`: what enters and leaves a store of episodes."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ratchet_vla.cli import display
from ratchet_vla.cli.stores import EPISODES, EpisodeStoreOption
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.hdf5 import export_hdf5
from ratchet_vla.episodes.exchange.imports import NameMapping, import_lerobot, import_libero
from ratchet_vla.episodes.exchange.lerobot_export import ExportOptions, export_lerobot
from ratchet_vla.episodes.exchange.returning import import_own, is_own
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.episodes.review.rerun import export_rrd
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.messages.former_recordings import import_recordings, recordings

SECONDS_PER_DAY = 86400


@dataclass
class Export(EpisodeStoreOption):
    """Write verified episodes for other tools: LeRobotDataset v3, robomimic HDF5, or rerun recordings."""

    target: Annotated[Path, tyro.conf.Positional]
    """New folder (lerobot, rrd) or new file (hdf5)."""
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ids, or unique beginnings of ids; all verified episodes if none is given."""
    format: Literal["lerobot", "hdf5", "rrd"] = "lerobot"
    """What to write: lerobot (LeRobotDataset v3), hdf5 (robomimic), rrd (rerun)."""
    options: ExportOptions = dataclasses.field(default_factory=ExportOptions)
    """How a LeRobot data set is written."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        annotations = self.open_annotations()
        with display.counting("written", quiet=self.json) as progress:
            report = self._export(annotations, progress)
        if self.json:
            print(json.dumps(report))
        else:
            errors = f", frames off by {report['mean_error']:.2f} of 255" if "mean_error" in report else ""
            size = f"{report['bytes'] / 1e6:.1f} MB in {report['seconds']:.1f} s"
            print(f"{report['episodes']} episodes to {self.target}: {size}, read back and compared{errors}")
        return 0

    def _export(self, annotations: Annotations, progress: display.Report) -> dict[str, Any]:
        if self.format == "lerobot":
            written = export_lerobot(annotations, self.target, self.episodes, self.options, progress)
            return dataclasses.asdict(written)
        if self.format == "hdf5":
            unverified = self.options.unverified
            file = export_hdf5(annotations, self.target, self.episodes, unverified=unverified, progress=progress)
            return dataclasses.asdict(file)
        return self._export_rrd(annotations, progress)

    def _export_rrd(self, annotations: Annotations, progress: display.Report) -> dict[str, Any]:
        cards = [annotations.store.card(episode) for episode in self.episodes]
        if not cards:
            cards = [card for card, _ in annotations.verified()]
        started_s = time.monotonic()
        size_bytes = 0
        for count, card in enumerate(cards, 1):
            size_bytes += export_rrd(annotations.store, card, self.target / f"{card.id[:12]}.rrd")
            progress("written", count, len(cards))
        return {"episodes": len(cards), "bytes": size_bytes, "seconds": time.monotonic() - started_s}


@dataclass
class Import:
    """Read demonstrations of others, and exports of this project, into a store.

    Others' demonstrations (a LeRobot data set v3.0 or v2.1, or a LIBERO HDF5 file) become episodes without labels.
    Exports of this project come back row by row as they were recorded, recordings of the ROS nodes' former recorder
    with the labels beside them.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a LeRobot data set, HDF5 file, or folder or file of the nodes' former recorder."""
    contract: Path | None = None
    """Contract (YAML) of the robot that the demonstrations are for; own exports and recordings bring theirs."""
    store: Path = EPISODES
    """Folder of the episode store; made if it does not exist."""
    cameras: tuple[str, ...] = ()
    """Camera names as pairs contract=source, such as agentview=image wrist=wrist_image."""
    actions: Literal["physical", "command"] = "physical"
    """What a LeRobot data set's actions are: the contract's physical units, or commands to the driver."""
    same_order: bool = False
    """Match values by position although their names differ."""
    frames: Codec = "png"
    """How frames are stored."""
    json: bool = False
    """Print the ids as JSON."""

    def run(self) -> int:
        contract = None if self.contract is None else RobotContract.load(self.contract)
        mapping = NameMapping(self._camera_names(), self.actions, self.same_order)
        store = EpisodeStore(self.store, create=True)
        if recordings(self.source):
            return self._import_recordings(store)
        with display.counting("read", quiet=self.json) as progress:
            cards = self._import(store, contract, mapping, progress)
        if self.json:
            print(json.dumps([card.id for card in cards]))
        else:
            print(f"{len(cards)} episodes imported; label them with `ratchet review --store {self.store}`")
        return 0

    def _camera_names(self) -> dict[str, str]:
        """The contract's name of each camera -> its name in the source.

        Raises:
            RatchetError: cli.bad_value.
        """
        names = {}
        for pair in self.cameras:
            in_contract, equals, in_source = pair.partition("=")
            if not equals:
                raise RatchetError(
                    "cli.bad_value",
                    f"--cameras takes pairs contract=source, not {pair!r}",
                    fix="such as --cameras agentview=image",
                )
            names[in_contract] = in_source
        return names

    def _import(
        self, store: EpisodeStore, contract: RobotContract | None, mapping: NameMapping, progress: display.Report
    ) -> list[Card]:
        """Import by the kind of source.

        Raises:
            RatchetError: import.no_contract, and what the importers raise.
        """
        if is_own(self.source):
            return import_own(self.source, store, contract, frames=self.frames, progress=progress)
        if contract is None:
            raise RatchetError(
                "import.no_contract",
                "nothing says which robot these demonstrations are for",
                where=str(self.source),
                fix="give --contract, such as robots/libero.yaml",
            )
        if self.source.is_dir():
            return import_lerobot(self.source, store, contract, mapping, frames=self.frames, progress=progress)
        return import_libero(self.source, store, contract, frames=self.frames, progress=progress)

    def _import_recordings(self, store: EpisodeStore) -> int:
        with display.counting("read", quiet=self.json) as progress:
            imported = import_recordings(self.source, store, frames=self.frames, progress=progress)
        if self.json:
            passed = [{"path": str(path), "error": str(error)} for path, error in imported.passed]
            ids = [card.id for card in imported.cards]
            print(json.dumps({"episodes": ids, "labels": imported.labels, "passed": passed}))
        else:
            for path, error in imported.passed:
                print(f"passed over {path}: {error}")
            print(f"{len(imported.cards)} episodes and {imported.labels} labels in {self.store}")
        return 1 if imported.passed else 0


@dataclass
class Gc(EpisodeStoreOption):
    """Free space: old discarded episodes and leftovers of crashes. Deletes nothing without --apply."""

    days: float = 30.0
    """Keep discarded episodes for this many days."""
    apply: bool = False
    """Delete; without it only say what would be deleted."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        annotations = self.open_annotations()
        discarded = self._old_discarded(annotations)
        leftovers = annotations.store.leftovers()
        freed_bytes = sum(card.bytes for card in discarded) + sum(path.stat().st_size for path in leftovers)
        if self.apply:
            annotations.store.remove([card.id for card in discarded], "discarded")
            for path in leftovers:
                path.unlink(missing_ok=True)
        if self.json:
            removed = {"removed": [card.id for card in discarded], "leftovers": [str(path) for path in leftovers]}
            print(json.dumps(removed | {"bytes": freed_bytes, "applied": self.apply}))
        else:
            verb = "freed" if self.apply else "would free, with --apply,"
            counts = f"{len(discarded)} discarded episodes, {len(leftovers)} leftovers"
            print(f"{verb} {freed_bytes / 1e6:.1f} MB: {counts}")
        return 0

    def _old_discarded(self, annotations: Annotations) -> list[Card]:
        newest_time = time.time() - self.days * SECONDS_PER_DAY
        cards = []
        for card in annotations.store.cards().values():
            path = annotations.store.root / card.file
            # An episode whose file is gone has nothing that could be kept any longer.
            is_old = not path.exists() or path.stat().st_mtime < newest_time
            if is_old and annotations.status(card.id).state == "discarded":
                cards.append(card)
        return cards
