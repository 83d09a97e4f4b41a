"""`ratchet episodes list|show|play|verify|label|export|import|gc`: the episodes of a store."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.cli.episodes.exchange import STORE, Export, Gc, Import, opened, progress
from ratchet_vla.episodes.library.annotations import LabelStatus, Viewed
from ratchet_vla.episodes.library.store import Card, Damage, EpisodeStore, Stock
from ratchet_vla.episodes.library.survey import INDEX
from ratchet_vla.episodes.review import terminal
from ratchet_vla.errors import RatchetError

STATES = {"verified": "green", "unjudged": "yellow", "second_reader": "yellow", "disputed": "red", "discarded": "dim"}


@dataclass
class List:
    """All episodes, oldest first, with what is known about their success."""

    store: Path = STORE
    """Folder with the episodes."""
    task: str = ""
    """Only this task."""
    adapter: str = ""
    """Only adapters whose id begins like this."""
    session: str = ""
    """Only this session."""
    state: Literal["", "verified", "unjudged", "second_reader", "disputed", "discarded"] = ""
    """Only episodes that stand like this."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = opened(self.store)
        found = []
        for card in annotations.store.cards().values():
            status = annotations.status(card.id)
            if (
                self.task in ("", card.task)
                and card.adapter_id.startswith(self.adapter)
                and self.session in ("", card.session)
                and self.state in ("", status.state)
            ):
                found.append((card, status))
        if self.json:
            print(json.dumps([_facts(card, status) for card, status in found]))
            return 0
        table = Table(box=None, padding=(0, 1, 0, 0))
        for column in ("id", "task", "adapter", "mode", "s", "human", "success", "by", "status"):
            right = column in ("s", "human")
            width = 12 if column == "task" else None
            table.add_column(column, justify="right" if right else "left", no_wrap=column != "task", min_width=width)
        for card, status in found:
            success = status.success if status.state == "verified" else card.success
            table.add_row(
                card.id[:12],
                card.task[:24],
                card.adapter_id[:8] or "-",
                card.mode,
                f"{card.seconds:.1f}",
                f"{card.human_share:.0%}" if card.human_share else "",
                "" if success is None else "yes" if success else "no",
                status.source or card.source,
                f"[{STATES[status.state]}]{status.state.replace('_', ' ')}[/]",
            )
        console = Console()
        console.print(table)
        size = sum(card.bytes for card, _ in found)
        console.print(
            f"{len(found)} episodes, {sum(c.seconds for c, _ in found) / 60:.1f} minutes, {size / 1e6:.1f} MB"
        )
        return 0


@dataclass
class Show:
    """One episode: where it is from, how it went, who said what."""

    episode: Annotated[str, tyro.conf.Positional]
    """Id or the beginning of one."""
    store: Path = STORE
    """Folder with the episodes."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = opened(self.store)
        card = annotations.store.card(self.episode)
        reader = annotations.store.open(card.id)
        ending = reader.ending()
        facts = _facts(card, annotations.status(card.id))
        facts |= {
            "path": str(annotations.store.path(card.id)),
            "labels": [label.as_dict() for label in annotations.labels(card.id)],
            "frames": ending.frames if ending else {},
            "dropped_records": ending.dropped if ending else {},
            "calibrations": reader.info.calibrations,
            "software": reader.info.software,
            "seed": reader.info.seed,
            "initial_state": reader.info.initial_state,
        }
        if self.json:
            print(json.dumps(facts))
        else:
            Console().print_json(json.dumps(facts))
        return 0


@dataclass
class Play:
    """Watch an episode in the terminal."""

    episode: Annotated[str, tyro.conf.Positional]
    """Id or the beginning of one."""
    store: Path = STORE
    """Folder with the episodes."""
    speed: float = 1.0
    """Times real time."""
    columns: int = 80
    """Width of the image in characters."""
    fps: float = 10.0
    """Frames per second of recorded time."""

    def run(self) -> int:
        if self.speed <= 0 or self.columns < 8 or self.fps <= 0:
            raise RatchetError("cli.bad_value", "speed, columns and fps must be positive, columns 8 or more")
        store = opened(self.store).store
        card = store.card(self.episode)
        print(f"{card.instruction}  ({card.task}, {card.seconds:.1f} s, ended: {card.reason or '?'})")
        play(store, card, self.speed, self.columns, self.fps)
        return 0


@dataclass
class Verify:
    """Hash every episode again, check the index's chain, recover what a crash left; exit 1 where something is wrong.

    With --recover, what is no episode and what can't be mended is passed over and named; exit 1 then, too.
    """

    store: Path = STORE
    """Folder with the episodes."""
    recover: bool = False
    """First finish cut-off files and enter finished ones that the index lacks."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = EpisodeStore(self.store, create=self.recover and self.store.is_dir())
        stock = store.take_stock() if self.recover else Stock([], [], [])
        if not (store.root / INDEX).exists():
            store = EpisodeStore(self.store)  # nothing came of it: refused, with what lies there
        if not stock.recovered:
            store.require_some()
        sound, damages = 0, []
        with progress("checked", quiet=self.json) as tell:
            count = len(store.cards())
            for found in store.verify():
                if isinstance(found, Damage):
                    damages.append(found)
                else:
                    sound += 1
                    tell("checked", sound, count)
        if self.json:
            facts = {"sound": sound, "damages": [dataclasses.asdict(d) for d in damages], "head": store.index.head}
            facts["recovered"] = [{"path": str(r.path), "lost_bytes": r.lost_bytes} for r in stock.recovered]
            facts["passed_over"] = [{"path": str(path), **error.as_dict()} for path, error in stock.passed]
            print(json.dumps(facts | {"entered": [card.id for card in stock.entered]}))
        else:
            console = Console(soft_wrap=True)
            for result in stock.recovered:
                console.print(f"recovered {result.path or result.remains}: {result.lost_bytes} bytes were torn off")
            if stock.entered:
                console.print(f"entered {len(stock.entered)} episodes")
            for path, error in stock.passed:
                console.print(f"passed over {path}: {error}", style="yellow", markup=False, highlight=False)
            for damage in damages:
                console.print(f"[{'red' if damage.fatal else 'yellow'}]{damage.code}[/] {damage.where}: {damage.what}")
            console.print(f"{sound} episodes sound, {len(damages)} problems; index head {store.index.head[:16]}")
        if stock.passed:
            return 1
        return 1 if any(d.fatal for d in damages) else 0


@dataclass
class Label:
    """Say how episodes went. Labels are kept for good; a later one of the same annotator counts instead."""

    label: Annotated[Literal["success", "failure", "discard"], tyro.conf.Positional]
    """What you say."""
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Ids or beginnings of ids."""
    annotator: str
    """Your name."""
    note: str = ""
    """Why."""
    settles: bool = False
    """End a dispute among other readers."""
    store: Path = STORE
    """Folder with the episodes."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = opened(self.store)
        ids = [annotations.store.resolve(e) for e in self.episodes]
        viewed = Viewed(0.0, 0.0, (), "command line")
        for episode in ids:
            annotations.annotate(
                episode, self.label, self.annotator, note=self.note, viewed=viewed, settles=self.settles
            )
        states = {episode: annotations.status(episode).state for episode in ids}
        print(json.dumps(states) if self.json else "\n".join(f"{e[:12]} {s}" for e, s in states.items()))
        return 0


@dataclass
class Episodes:
    """Look at, label, export and import episodes.

    Commands to copy:

        ratchet episodes list --store runs/episodes --state unjudged

        ratchet episodes label failure 3f2a --annotator Ada --note "dropped it"

        ratchet episodes export out/set --options.codec h264

        ratchet episodes import demos.hdf5 --contract robots/libero.yaml
    """

    command: Annotated[
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Play, tyro.conf.subcommand("play")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Label, tyro.conf.subcommand("label")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Gc, tyro.conf.subcommand("gc")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()


def play(store: EpisodeStore, card: Card, speed: float, columns: int, fps: float) -> None:
    """Draw an episode over itself in the terminal, in time; each moment below the other where nobody watches."""
    live = sys.stdout.isatty()
    height, began = 0, time.monotonic()
    for moment, images in terminal.moments(store, card, fps):
        if live:
            time.sleep(max(began + moment / speed - time.monotonic(), 0.0))
        text = f"{moment:6.2f} s\n{terminal.side_by_side(images, columns)}"
        sys.stdout.write((f"\x1b[{height}F" if live and height else "") + text + "\n")
        sys.stdout.flush()
        height = text.count("\n") + 1


def _facts(card: Card, status: LabelStatus) -> dict[str, Any]:
    return {**dataclasses.asdict(card), "standing": dataclasses.asdict(status)}
