"""Recordings of the ROS nodes' former recorder as episodes: one MCAP of topics as on the wire, and `verdicts.jsonl`.

Knows that form and an episode store. What it said is kept; what it did not say (a flow's chain, frames that were
dropped, states between two messages) is not made up, so such episodes are for labelling and export, not for updates.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mcap.records import Channel, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap_ros2.decoder import DecoderFactory

from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.episodes.file.format import SUFFIX, Codec
from ratchet_vla.episodes.file.reader import RECORD_LIMIT, TORN_ERRORS
from ratchet_vla.episodes.file.recording import EpisodeWriter, make_info
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.labels import HUMAN, Viewed
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.episodes.success_rules import machine_label
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Float32, Mark, Observation, SafetyEvent
from ratchet_vla.runtime.messages import readings
from ratchet_vla.storage.documents import hash_file

ABOUT = ("episode", "contract")  # metadata records that such a file begins with
LABELS_FILE = "verdicts.jsonl"
SESSION = re.compile(r"(\d{8}T\d{6}Z-[0-9a-f]{6})-\d+")
END = 1  # EpisodeMark.kind
ACTION, HOLD = 0, 1  # Command.kind
OUTCOMES = {1: True, 2: False}


@dataclass
class Imported:
    """What an import did. cards: of every recording, those that were there before included. passed: files that could
    not be read, and labels that belong to none, each with why."""

    cards: list[Card] = field(default_factory=list)
    passed: list[tuple[Path, RatchetError]] = field(default_factory=list)
    labels: int = 0


def recordings(source: Path) -> list[Path]:
    """The former recorder's files in a folder (or the file itself), finished ones and those that were cut off."""
    found = [source] if source.is_file() else sorted([*source.glob("*.mcap"), *source.glob("*.mcap.part")])
    return [path for path in found if _about(path).keys() >= set(ABOUT)]


def import_recordings(
    source: Path,
    store: EpisodeStore,
    *,
    frames: Codec = "png",
    progress: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Imported:
    """Every recording as an episode of mode "import", and the labels beside it; a second time changes nothing.

    frames: how frames are kept.
    """
    done, found = Imported(), recordings(source)
    for number, path in enumerate(found):
        try:
            done.cards.append(_import(path, store, frames))
        except RatchetError as error:
            done.passed.append((path, error))
        progress("read", number + 1, len(found))
    folder = source if source.is_dir() else source.parent
    if (folder / LABELS_FILE).is_file():
        _labels(folder / LABELS_FILE, {p.stem: p for p in found if p.suffix == SUFFIX}, store, done)
    return done


# -- one recording -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """One message. kind: its type's name without the package; received: ns, UTC."""

    topic: str
    kind: str
    received: int
    body: Any


@dataclass
class _Small:
    """What must be known before the first record can be written. sent: commands, as (session, number), in order."""

    begin: Any = None
    end: Any = None
    first: tuple[float, int] | None = None  # the first stamp of our own messages, and when it was received
    chunks: dict[int, Any] = field(default_factory=dict)
    applied: dict[tuple[int, int], Any] = field(default_factory=dict)


def _import(path: Path, store: EpisodeStore, frames: Codec) -> Card:
    about = _about(path)
    told = about["episode"]
    known = store.named(told["episode"])
    if known is not None:
        return known
    contract = RobotContract.from_dict(json.loads(about["contract"]["json"]), str(path), rules=False)
    small = _small(path)
    if small.begin is None or small.first is None:
        raise RatchetError("import.empty_recording", "it ends before the task began", where=str(path))
    session = SESSION.fullmatch(told["episode"])
    info = make_info(
        contract,
        told["task"],
        told["instruction"],
        name=told["episode"],
        adapter_id=small.begin.adapter_id,
        session=session.group(1) if session else "",
        mode="import",
        seed=int(small.begin.seed),
        clock_offset=_offset(*small.first),
        created=told["started"].replace("Z", "+00:00"),
        stream=frames,
        decisions="",
        meta={"recorded_as": small.begin.mode, "imported_from": path.name},
    )
    final = store.folder(info.session) / f"{told['episode']}{SUFFIX}"
    scratch = final.with_name(f".{final.name}.copying")
    scratch.unlink(missing_ok=True)
    writer = EpisodeWriter(scratch, final, info)
    try:
        written = _Writing(writer, contract, small)
        for item in _items(path):
            written.take(item)
        digest, ending = writer.finish(*written.outcome(about.get("end")), dropped=_dropped(about.get("end")))
    except BaseException:
        writer.discard()
        raise
    return store.add(final, digest, ending)


class _Writing:
    """Messages in, records out."""

    def __init__(self, writer: EpisodeWriter, contract: RobotContract, small: _Small) -> None:
        self._writer, self._contract, self._small = writer, contract, small
        self._readers = [readings.StateReader(contract, s) for s in (contract.ros.state if contract.ros else ())]
        self._states: dict[str, list[tuple[float, Float32]]] = {s.name: [] for s in contract.state}
        self._frames: dict[str, dict[float, int]] = {c.name: {} for c in contract.cameras}
        self._seen: dict[int, tuple[int, int]] = {}  # chunk -> index of its observation and its own
        self._marks: dict[int, dict[int, Mark]] = {}  # chunk -> offset -> what became of the action
        self._ticks = self._human = 0
        self._stamp = 0.0

    def take(self, item: _Item) -> None:
        if item.kind in ("Image", "CompressedImage"):
            for camera in self._contract.cameras:
                if _ends(item.topic, camera.topic):
                    self._frame(camera, item.body)
        elif item.kind == "ActionChunk":
            self._chunk(item.body)
        elif item.kind == "Command":
            self._command(item.body)
        elif item.kind == "SafetyEvent":
            fields = ("code", "message", "dim", "value", "limit", "latched")
            said = {name: getattr(item.body, name) for name in fields}
            self._writer.event(SafetyEvent(stamp=_seconds(item.body.stamp), **said))
        else:
            for reader in self._readers:
                if _ends(item.topic, reader.field.topic):
                    self._state(reader, item)

    def outcome(self, end: dict[str, str] | None) -> tuple[bool | None, str, str]:
        """Write what became of the decisions; success, its source, and why the episode ended."""
        reason = end.get("termination", "cut_off") if end is not None else "cut_off"
        success, source = OUTCOMES.get(int(end.get("outcome", 0))) if end is not None else None, ""
        if success is not None and end is not None:
            source = end.get("source", "")
        decided = [n for n in self._seen if self._marks.get(n)]
        if not source.startswith(HUMAN) and success is not machine_label(reason, len(decided), self._human):
            success = None
        last = max(decided, default=-1)
        for sequence in decided:
            self._step(sequence, sequence == last, bool(success))
        return success, source if success is not None else "", reason

    # -- inside -------------------------------------------------------------------------------------------------

    def _frame(self, camera: CameraSpec, body: Any) -> None:
        stamp = _seconds(body.header.stamp)
        self._frames[camera.name][stamp] = self._writer.frame(camera.name, readings.image(body, camera), stamp)

    def _state(self, reader: readings.StateReader, item: _Item) -> None:
        values = reader.read(item.body)
        header = getattr(item.body, "header", None)
        stamp = _seconds(header.stamp) if header is not None else item.received / 1e9 - self._writer.info.clock_offset
        if values is not None:
            self._states[reader.field.name].append((stamp, values))

    def _chunk(self, body: Any) -> None:
        moment = _seconds(body.observation_stamp)
        state = {name: near for name, kept in self._states.items() if (near := _nearest(kept, moment)) is not None}
        if len(state) < len(self._states):
            return  # the recording began after what the policy saw
        cameras, topics, frames = [], [], []
        for camera, stamp in zip(self._contract.cameras, body.image_stamps, strict=False):
            index = self._frames[camera.name].get(_seconds(stamp))
            cameras.append(camera.name)
            topics.append(self._writer.info.topics["stream"][camera.name])
            frames.append(-1 if index is None else index)
        instruction, sequence = self._writer.info.instruction, int(body.observation_sequence)
        seen = Observation({}, state, instruction, moment, sequence)
        index = self._writer.observation_record(seen, cameras, topics, frames)
        self._seen[sequence] = (index, self._writer.chunk(_chunk(body), moment))

    def _command(self, body: Any) -> None:
        if body.kind not in (ACTION, HOLD):
            return
        stamp, sequence, offset = _seconds(body.stamp), int(body.chunk_sequence), int(body.chunk_offset)
        source = self._small.chunks.get(sequence)
        told = self._small.applied.get((body.session, body.number))
        tick = ControlTick(
            stamp=stamp,
            deadline=stamp,
            index=self._ticks,
            sampled=None if source is None or offset < 0 else _chunk(source).actions[offset],
            command=np.array(body.action, np.float32) if body.kind == ACTION else None,
            marks=Mark(body.marks),
            chunk_sequence=sequence,
            chunk_offset=offset,
            adapter_id=body.adapter_id,
            state={name: kept[-1][1] for name, kept in self._states.items() if kept},
            applied=np.array(told.action, np.float32) if told is not None and len(told.action) else None,
            applied_marks=Mark.SKIPPED if told is None else Mark(told.marks),
        )
        self._ticks += 1
        self._human += bool(tick.marks & Mark.HUMAN)
        self._stamp = stamp
        self._writer.tick(tick)
        if sequence >= 0:
            self._marks.setdefault(sequence, {})[offset] = tick.fate

    def _step(self, sequence: int, last: bool, won: bool) -> None:
        observation, chunk = self._seen[sequence]
        marks = [int(Mark.SKIPPED)] * int(self._small.chunks[sequence].steps)
        for offset, mark in self._marks[sequence].items():
            marks[offset] = int(mark)
        executed = [mark == 0 for mark in marks]
        run = len(self._marks[sequence])
        self._writer.step(observation, chunk, executed, marks, float(won and last), last, run, self._stamp)


def _chunk(body: Any) -> ActionChunk:
    shape = (int(body.steps), int(body.dims))
    return ActionChunk(
        actions=np.array(body.actions, np.float32).reshape(shape),
        tokens=np.array(body.tokens, np.int64).reshape(shape) if len(body.tokens) else None,
        log_prob=np.array(body.log_prob, np.float32).reshape(shape) if len(body.log_prob) else None,
        adapter_id=body.adapter_id,
        temperature=float(body.temperature),
        observation_stamp=_seconds(body.observation_stamp),
        observation_sequence=int(body.observation_sequence),
        compute_dtype=getattr(body, "compute_dtype", ""),
    )


# -- files -------------------------------------------------------------------------------------------------------


def _about(path: Path) -> dict[str, dict[str, str]]:
    """Its metadata records by name; what is before the first message for a file that was cut off."""
    found: dict[str, dict[str, str]] = {}
    try:
        with path.open("rb") as file:
            for record in StreamReader(file, record_size_limit=RECORD_LIMIT).records:
                if isinstance(record, Metadata):
                    found[record.name] = dict(record.metadata)
    except TORN_ERRORS:
        pass
    return found


def _items(path: Path) -> Iterator[_Item]:
    """Messages in the order of the file, up to where it was cut off."""
    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    decoders = DecoderFactory()
    try:
        with path.open("rb") as file:
            for record in StreamReader(file, record_size_limit=RECORD_LIMIT).records:
                if isinstance(record, Schema):
                    schemas[record.id] = record
                elif isinstance(record, Channel):
                    channels[record.id] = record
                elif isinstance(record, Message):
                    channel = channels[record.channel_id]
                    schema = schemas[channel.schema_id]
                    decode = decoders.decoder_for(channel.message_encoding, schema)
                    if decode is not None:
                        kind = schema.name.rsplit("/", 1)[-1]
                        yield _Item(channel.topic, kind, record.log_time, decode(record.data))
    except TORN_ERRORS:
        return


def _small(path: Path) -> _Small:
    small = _Small()
    for item in _items(path):
        stamp = getattr(item.body, "stamp", None)
        if item.kind == "EpisodeMark":
            small.begin, small.end = (small.begin, item.body) if item.body.kind == END else (item.body, small.end)
        elif item.kind == "ActionChunk":
            small.chunks[int(item.body.observation_sequence)] = item.body
        elif item.kind == "Applied":
            small.applied[item.body.session, item.body.number] = item.body
        if item.kind == "Command" and small.first is None:
            small.first = (_seconds(stamp), item.received)
    return small


def _labels(path: Path, files: dict[str, Path], store: EpisodeStore, done: Imported) -> None:
    annotations = Annotations(store)
    for line in path.read_text().splitlines():
        try:
            raw = json.loads(line)
            episode, label, annotator = raw["episode"], raw["label"], raw["person"]
            note = " ".join(filter(None, [raw["note"], f"(said {raw['time']})"]))
            card = store.named(episode)
            if card is None or (episode in files and hash_file(files[episode]) != raw["sha256"]):
                raise RatchetError(
                    "import.other_recording",
                    f"{annotator} labelled {episode}, and that file is not here, or another one",
                    where=str(path),
                    fix="import the file that was labelled",
                )
            if not any((x.annotator, x.value, x.note) == (annotator, label, note) for x in annotations.labels(card.id)):
                annotations.annotate(card.id, label, annotator, note=note, viewed=Viewed(0.0, 0.0, (), "ros"))
                done.labels += 1
        except (ValueError, KeyError, TypeError):
            error = RatchetError("import.bad_label", f"no label: {line[:80]}", where=str(path))
            done.passed.append((path, error))
        except RatchetError as error:
            done.passed.append((path, error))


def _offset(stamp: float, received: int) -> float:
    """Seconds from the robot's clock to UTC: none where its stamps are UTC already."""
    apart = received / 1e9 - stamp
    return apart if abs(apart) > 60.0 else 0.0


def _dropped(end: dict[str, str] | None) -> dict[str, int]:
    count = int(end.get("dropped", 0)) if end is not None else 0
    return {"messages": count} if count else {}


def _nearest(kept: list[tuple[float, Float32]], moment: float) -> Float32 | None:
    """The value next to a moment in time, as the nodes' aligner chooses."""
    if not kept:
        return None
    place = bisect.bisect_left(kept, moment, key=lambda k: k[0])
    near = kept[max(place - 1, 0) : place + 1]
    return min(near, key=lambda k: abs(k[0] - moment))[1]


def _seconds(stamp: Any) -> float:
    return float(stamp.sec) + float(stamp.nanosec) * 1e-9


def _ends(topic: str, wanted: str) -> bool:
    """Whether a resolved topic, maybe in a namespace, is the contract's."""
    return topic == wanted or topic.endswith(f"/{wanted.lstrip('/')}")
