"""`ratchet episodes list|show|play|verify|label|export|import|gc`: the episodes of a store."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.cli import display
from ratchet_vla.cli.episodes.exchange import Export, Gc, Import
from ratchet_vla.cli.stores import EpisodeStoreOption
from ratchet_vla.episodes.library.annotations import LabelStatus, Viewed
from ratchet_vla.episodes.library.store import Card, Damage, EpisodeStore, Stock
from ratchet_vla.episodes.library.survey import INDEX
from ratchet_vla.episodes.review import terminal
from ratchet_vla.errors import RatchetError

STATE_COLOURS = {
    "verified": "green",
    "unjudged": "yellow",
    "second_reader": "yellow",
    "disputed": "red",
    "discarded": "dim",
}
Rows = list[tuple[Card, LabelStatus]]


@dataclass
class List(EpisodeStoreOption):
    """List all episodes, oldest first, with what is known about their success."""

    task: str = ""
    """Only this task."""
    adapter: str = ""
    """Only adapters whose id begins like this."""
    session: str = ""
    """Only this session."""
    state: Literal["", "verified", "unjudged", "second_reader", "disputed", "discarded"] = ""
    """Only episodes with this label status."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = self.open_annotations()
        labelled = ((card, annotations.status(card.id)) for card in annotations.store.cards().values())
        rows = [(card, status) for card, status in labelled if self._chosen(card, status)]
        if self.json:
            print(json.dumps([_as_dict(card, status) for card, status in rows]))
            return 0
        console = Console()
        console.print(_episode_table(rows))
        minutes = sum(card.seconds for card, _ in rows) / 60
        megabytes = sum(card.bytes for card, _ in rows) / 1e6
        console.print(f"{len(rows)} episodes, {minutes:.1f} minutes, {megabytes:.1f} MB")
        return 0

    def _chosen(self, card: Card, status: LabelStatus) -> bool:
        return (
            self.task in ("", card.task)
            and card.adapter_id.startswith(self.adapter)
            and self.session in ("", card.session)
            and self.state in ("", status.state)
        )


@dataclass
class Show(EpisodeStoreOption):
    """Show one episode: where it is from, how it went, who labelled it how."""

    episode: Annotated[str, tyro.conf.Positional]
    """Id, or a unique beginning of one."""
    json: bool = False
    """Print JSON on one line."""

    def run(self) -> int:
        annotations = self.open_annotations()
        card = annotations.store.card(self.episode)
        reader = annotations.store.open(card.id)
        ending = reader.ending()  # None where a crash cut the recording off
        document = _as_dict(card, annotations.status(card.id))
        document |= {
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
            print(json.dumps(document))
        else:
            Console().print_json(json.dumps(document))
        return 0


@dataclass
class Play(EpisodeStoreOption):
    """Watch an episode in the terminal."""

    episode: Annotated[str, tyro.conf.Positional]
    """Id, or a unique beginning of one."""
    speed: float = 1.0
    """Factor on real time; 2 plays twice as fast."""
    columns: int = 80
    """Width of the images in characters, 8 or more."""
    fps: float = 10.0
    """Frames to show per second of recorded time."""

    def run(self) -> int:
        if self.speed <= 0 or self.columns < 8 or self.fps <= 0:
            raise RatchetError("cli.bad_value", "speed, columns and fps must be positive, columns 8 or more")
        store = self.open_annotations().store
        card = store.card(self.episode)
        print(f"{card.instruction}  ({card.task}, {card.seconds:.1f} s, ended: {card.reason or '?'})")
        play(store, card, self.speed, self.columns, self.fps)
        return 0


@dataclass
class Verify(EpisodeStoreOption):
    """Hash every episode again and check the index's chain; exit 1 where something is wrong.

    With --recover, first mend what a crash left. What is no episode, or cannot be mended, is passed over and named;
    the exit status is 1 then, too.
    """

    recover: bool = False
    """First finish cut-off files, and enter finished ones that the index lacks."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = EpisodeStore(self.store, create=self.recover and self.store.is_dir())
        stock = store.take_stock() if self.recover else Stock([], [], [])
        if not (store.root / INDEX).exists():
            store = EpisodeStore(self.store)  # nothing could be recovered: refused, with what lies there
        if not stock.recovered:
            store.require_some()
        sound, damages = self._check(store)
        if self.json:
            self._print_json(store, stock, sound, damages)
        else:
            self._print(store, stock, sound, damages)
        return 1 if stock.passed or any(damage.fatal for damage in damages) else 0

    def _check(self, store: EpisodeStore) -> tuple[int, list[Damage]]:
        """How many episodes are sound, and what is damaged."""
        sound = 0
        damages = []
        with display.counting("checked", quiet=self.json) as progress:
            count = len(store.cards())
            for result in store.verify():
                if isinstance(result, Damage):
                    damages.append(result)
                else:
                    sound += 1
                    progress("checked", sound, count)
        return sound, damages

    def _print_json(self, store: EpisodeStore, stock: Stock, sound: int, damages: list[Damage]) -> None:
        document: dict[str, Any] = {
            "sound": sound,
            "damages": [dataclasses.asdict(damage) for damage in damages],
            "head": store.index.head,
            "recovered": [{"path": str(result.path), "lost_bytes": result.lost_bytes} for result in stock.recovered],
            "passed_over": [{"path": str(path), **error.as_dict()} for path, error in stock.passed],
            "entered": [card.id for card in stock.entered],
        }
        print(json.dumps(document))

    def _print(self, store: EpisodeStore, stock: Stock, sound: int, damages: list[Damage]) -> None:
        console = Console(soft_wrap=True)
        for result in stock.recovered:
            console.print(f"recovered {result.path or result.remains}: {result.lost_bytes} bytes were torn off")
        if stock.entered:
            console.print(f"entered {len(stock.entered)} episodes")
        for path, error in stock.passed:
            console.print(f"passed over {path}: {error}", style="yellow", markup=False, highlight=False)
        for damage in damages:
            colour = "red" if damage.fatal else "yellow"
            console.print(f"[{colour}]{damage.code}[/] {damage.where}: {damage.what}")
        console.print(f"{sound} episodes sound, {len(damages)} problems; index head {store.index.head[:16]}")


@dataclass
class Label(EpisodeStoreOption):
    """Say how episodes went. Labels are kept for good; of one annotator's, the latest counts."""

    label: Annotated[Literal["success", "failure", "discard"], tyro.conf.Positional]
    """How they went; discard keeps an episode out of training and evaluation."""
    episodes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Ids, or unique beginnings of ids."""
    annotator: str
    """Your name; kept with the label."""
    note: str = ""
    """Why; kept with the label."""
    settles: bool = False
    """End a dispute among other readers."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        annotations = self.open_annotations()
        # All ids are resolved before the first label is written: a typo in the last one changes nothing.
        ids = [annotations.store.resolve(episode) for episode in self.episodes]
        viewed = Viewed(0.0, 0.0, (), "command line")
        for episode in ids:
            annotations.annotate(
                episode, self.label, self.annotator, note=self.note, viewed=viewed, settles=self.settles
            )
        states = {episode: annotations.status(episode).state for episode in ids}
        if self.json:
            print(json.dumps(states))
        else:
            print("\n".join(f"{episode[:12]} {state}" for episode, state in states.items()))
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
    """Draw an episode in the terminal, in time.

    Each moment is drawn over the one before; where no terminal watches, below it and without waiting.
    """
    live = sys.stdout.isatty()
    drawn_lines = 0
    started_s = time.monotonic()
    for moment_s, images in terminal.moments(store, card, fps):
        if live:
            time.sleep(max(started_s + moment_s / speed - time.monotonic(), 0.0))
        text = f"{moment_s:6.2f} s\n{terminal.side_by_side(images, columns)}"
        cursor_up = f"\x1b[{drawn_lines}F" if live and drawn_lines else ""
        sys.stdout.write(f"{cursor_up}{text}\n")
        sys.stdout.flush()
        drawn_lines = text.count("\n") + 1


def _episode_table(rows: Rows) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("id", "task", "adapter", "mode", "s", "human", "success", "by", "status"):
        table.add_column(
            heading,
            justify="right" if heading in ("s", "human") else "left",
            no_wrap=heading != "task",
            min_width=12 if heading == "task" else None,
        )
    for card, status in rows:
        # What people agree on counts before what the recording says.
        success = status.success if status.state == "verified" else card.success
        table.add_row(
            card.id[:12],
            card.task[:24],
            card.adapter_id[:8] or "-",
            card.mode,
            f"{card.seconds:.1f}",
            f"{card.human_share:.0%}" if card.human_share else "",
            display.yes_or_no(success),
            status.source or card.source,
            f"[{STATE_COLOURS[status.state]}]{status.state.replace('_', ' ')}[/]",
        )
    return table


def _as_dict(card: Card, status: LabelStatus) -> dict[str, Any]:
    # Scripts read the status under the key that it had when they were written.
    return {**dataclasses.asdict(card), "standing": dataclasses.asdict(status)}
