"""`ratchet episodes export|import|gc`: what enters and leaves a store of episodes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.hdf5 import export_hdf5
from ratchet_vla.episodes.exchange.imports import NameMapping, import_lerobot, import_libero
from ratchet_vla.episodes.exchange.lerobot_check import Progress as Tell
from ratchet_vla.episodes.exchange.lerobot_export import ExportOptions, export_lerobot
from ratchet_vla.episodes.exchange.returning import import_own, is_own
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.episodes.review.rerun import export_rrd
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.messages.former_recordings import import_recordings, recordings

STORE = Path("runs/episodes")


@dataclass
class Export:
    """Verified episodes for other tools: LeRobotDataset v3, robomimic HDF5, or rerun recordings."""

    target: Annotated[Path, tyro.conf.Positional]
    """New folder (lerobot, rrd) or file (hdf5)."""
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ids or beginnings of ids; all verified ones if none is given."""
    format: Literal["lerobot", "hdf5", "rrd"] = "lerobot"
    """What to write."""
    store: Path = STORE
    """Folder with the episodes."""
    options: ExportOptions = dataclasses.field(default_factory=ExportOptions)
    """How LeRobot data sets are written."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = opened(self.store)
        with progress("written", quiet=self.json) as tell:
            report: dict[str, Any]
            if self.format == "lerobot":
                report = dataclasses.asdict(export_lerobot(annotations, self.target, self.episodes, self.options, tell))
            elif self.format == "hdf5":
                unverified = self.options.unverified
                made = export_hdf5(annotations, self.target, self.episodes, unverified=unverified, progress=tell)
                report = dataclasses.asdict(made)
            else:
                report = self._rrd(annotations, tell)
        if self.json:
            print(json.dumps(report))
        else:
            errors = f", frames off by {report['mean_error']:.2f} of 255" if "mean_error" in report else ""
            size = f"{report['bytes'] / 1e6:.1f} MB in {report['seconds']:.1f} s"
            print(f"{report['episodes']} episodes to {self.target}: {size}, read back and compared{errors}")
        return 0

    def _rrd(self, annotations: Annotations, tell: Tell) -> dict[str, Any]:
        cards = [annotations.store.card(e) for e in self.episodes] or [card for card, _ in annotations.verified()]
        began, size = time.monotonic(), 0
        for i, card in enumerate(cards):
            size += export_rrd(annotations.store, card, self.target / f"{card.id[:12]}.rrd")
            tell("written", i + 1, len(cards))
        return {"episodes": len(cards), "bytes": size, "seconds": time.monotonic() - began}


@dataclass
class Import:
    """Demonstrations of others (a LeRobot data set, v3.0 or v2.1, or a LIBERO HDF5 file) and exports of this project,
    as episodes without labels. Own exports come back row by row as they were recorded; recordings of the ROS nodes'
    former recorder with the labels beside them."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a LeRobot data set, HDF5 file, or folder or file of the nodes' former recorder."""
    contract: Path | None = None
    """Contract of the robot that the demonstrations are for; own exports and recordings have theirs with them."""
    store: Path = STORE
    """Folder with the episodes; made if need be."""
    cameras: tuple[str, ...] = ()
    """Pairs contract=theirs, such as agentview=image wrist=wrist_image."""
    actions: Literal["physical", "command"] = "physical"
    """What a LeRobot data set's actions are: the contract's physical units, or commands to the driver."""
    same_order: bool = False
    """Take values by position although their names differ."""
    frames: Codec = "png"
    """How frames are kept."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        contract = RobotContract.load(self.contract) if self.contract is not None else None
        pairs = [c.partition("=") for c in self.cameras]
        if any(not there for _, there, _ in pairs):
            raise RatchetError("cli.bad_value", "cameras are pairs", fix="such as --cameras agentview=image")
        mapping = NameMapping({mine: theirs for mine, _, theirs in pairs}, self.actions, self.same_order)
        store = EpisodeStore(self.store, create=True)
        if recordings(self.source):
            return self._former(store)
        with progress("read", quiet=self.json) as tell:
            if is_own(self.source):
                cards = import_own(self.source, store, contract, frames=self.frames, progress=tell)
            elif contract is None:
                raise RatchetError(
                    "import.no_contract",
                    "nothing says which robot these demonstrations are for",
                    where=str(self.source),
                    fix="give --contract, such as robots/libero.yaml",
                )
            elif self.source.is_dir():
                cards = import_lerobot(self.source, store, contract, mapping, frames=self.frames, progress=tell)
            else:
                cards = import_libero(self.source, store, contract, frames=self.frames, progress=tell)
        if self.json:
            print(json.dumps([card.id for card in cards]))
        else:
            print(f"{len(cards)} episodes imported; label them with `ratchet review --store {self.store}`")
        return 0

    def _former(self, store: EpisodeStore) -> int:
        with progress("read", quiet=self.json) as tell:
            done = import_recordings(self.source, store, frames=self.frames, progress=tell)
        if self.json:
            passed = [{"path": str(path), "error": str(error)} for path, error in done.passed]
            print(json.dumps({"episodes": [c.id for c in done.cards], "labels": done.labels, "passed": passed}))
        else:
            for path, error in done.passed:
                print(f"passed over {path}: {error}")
            print(f"{len(done.cards)} episodes and {done.labels} labels in {self.store}")
        return 1 if done.passed else 0


@dataclass
class Gc:
    """Free space: old discarded episodes and leftovers of crashes. Shows what it would do, unless told to."""

    store: Path = STORE
    """Folder with the episodes."""
    days: float = 30.0
    """Keep discarded episodes for so long."""
    apply: bool = False
    """Really delete."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = opened(self.store)
        limit = time.time() - self.days * 86400
        going = []
        for card in annotations.store.cards().values():
            path = annotations.store.root / card.file
            old = not path.exists() or path.stat().st_mtime < limit
            if old and annotations.status(card.id).state == "discarded":
                going.append(card)
        leftovers = annotations.store.leftovers()
        freed = sum(c.bytes for c in going) + sum(p.stat().st_size for p in leftovers)
        if self.apply:
            annotations.store.remove([c.id for c in going], "discarded")
            for path in leftovers:
                path.unlink(missing_ok=True)
        if self.json:
            facts = {"removed": [c.id for c in going], "leftovers": [str(p) for p in leftovers]}
            print(json.dumps(facts | {"bytes": freed, "applied": self.apply}))
        else:
            verb = "freed" if self.apply else "would free, with --apply,"
            print(f"{verb} {freed / 1e6:.1f} MB: {len(going)} discarded episodes, {len(leftovers)} leftovers")
        return 0


def opened(root: Path) -> Annotations:
    """A store and the annotations on its episodes.

    Raises:
        RatchetError: episode.no_store, episode.nothing_here, which tell what lies there instead.
    """
    store = EpisodeStore(root)
    store.require_some()
    return Annotations(store)


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where a terminal watches."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda name, done, of: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks = {what: bar.add_task(what, total=None)}

        def tell(name: str, done: int, of: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=of)
            bar.update(tasks[name], completed=done, total=of)

        yield tell
