"""What a viewer needs of an episode: frames as JPEG, plots, marks and events; kept in memory for the next look.

Knows recordings and a bounded cache. Knows no HTTP and no label.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.assembly import tick_of
from ratchet_vla.episodes.file.frames import Encoder
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.records import Mark

CACHE_BYTES = 256 << 20
MAX_PLOT_POINTS = 600  # of a plot
QUALITY = 80


class PreviewCache:
    """Packed frames and facts of the episodes looked at last. Thread-safe."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._packs: OrderedDict[tuple[str, str, float], bytes] = OrderedDict()
        self._size = 0
        self._previews: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def facts(self, store: EpisodeStore, card: Card) -> dict[str, Any]:
        """Plots and marks of an episode.

        `times` (s from the start), `series` (name -> values), `spans` (mark -> [from, to]), `events`, `length` in
        seconds, and `dims`, the names of the action's values.
        """
        with self._lock:
            if card.id in self._previews:
                return self._previews[card.id]
        preview = _facts(store.open(card.id), card)
        with self._lock:
            self._previews[card.id] = preview
            while len(self._previews) > 200:
                self._previews.popitem(last=False)
        return preview

    def pack(self, store: EpisodeStore, card: Card, camera: str, fps: float) -> bytes:
        """Frames of one camera, at most `fps` per second.

        For each, float64 seconds from the start, uint32 length and the JPEG, little-endian.

        Raises:
            RatchetError: episode.no_camera.
        """
        key = (card.id, camera, fps)
        with self._lock:
            if key in self._packs:
                self._packs.move_to_end(key)
                return self._packs[key]
        packed = _pack(store.open(card.id), camera, fps)
        with self._lock:
            if key not in self._packs:
                self._packs[key] = packed
                self._size += len(packed)
            while self._size > self._limit and len(self._packs) > 1:
                self._size -= len(self._packs.popitem(last=False)[1])
        return packed


def group_of(reader: EpisodeReader, card_frames: dict[str, int], camera: str) -> str:
    """Where a camera's frames are: in its stream, or, if nothing was streamed, beside the decisions."""
    reader.topic(camera)
    streamed = card_frames.get(reader.info.topics["stream"][camera], 0)
    decided = card_frames.get(reader.info.topics.get("decisions", {}).get(camera, ""), 0)
    return "stream" if streamed >= decided else "decisions"


def start_of(reader: EpisodeReader) -> float:
    """Stamp of the first message: second 0 of the viewer."""
    return next((reader.stamp(item) for item in reader.items()), 0.0)


def _pack(reader: EpisodeReader, camera: str, fps: float) -> bytes:
    ending = reader.ending()
    group = group_of(reader, ending.frames if ending else {}, camera)
    start_s = start_of(reader)
    period_s = 1.0 / fps
    last_s = -1e9
    encoder = Encoder("jpeg", QUALITY)
    packets = []
    encoded = reader.codec(group) == "jpeg"
    source: Any = reader.encoded_frames(camera, group) if encoded else reader.frames(camera, group)
    for stamp, frame in source:
        if stamp - last_s < period_s * 0.9:
            continue
        last_s = stamp
        jpeg = frame if encoded else encoder.encode(frame)
        packets.append(struct.pack("<dI", stamp - start_s, len(jpeg)) + jpeg)
    return b"".join(packets)


def _facts(reader: EpisodeReader, card: Card) -> dict[str, Any]:
    start_s = start_of(reader)
    times_s: list[float] = []
    values: dict[str, list[float]] = {}
    marks: list[int] = []
    events = []
    dim_names = [d["name"] for d in reader.info.contract["action"]["dims"]]
    for item in reader.items([fmt.TICK, fmt.EVENT, *([] if card.ticks else [fmt.OBSERVATION])]):
        if item.topic == fmt.EVENT:
            events.append({"time": item.body.stamp - start_s, "code": item.body.code, "text": item.body.message})
            continue
        times_s.append(item.body.stamp - start_s)
        flat_state = iter(item.body.state)
        for name, size in zip(item.body.state_names, item.body.state_sizes, strict=True):
            for position in range(size):
                values.setdefault(f"{name}.{position}" if size > 1 else name, []).append(next(flat_state))
        if item.topic == fmt.TICK:
            tick = tick_of(item.body)
            marks.append(int(tick.fate))
            command = [float("nan")] * len(dim_names) if tick.reached is None else tick.reached.tolist()
            for name, value in zip(dim_names, command, strict=True):
                values.setdefault(f"command {name}", []).append(value)
    kept_indices: list[int] = (
        np.unique(np.linspace(0, len(times_s) - 1, min(MAX_PLOT_POINTS, len(times_s))).round()).astype(int).tolist()
    )
    series = {
        name: [None if np.isnan(samples[position]) else round(samples[position], 6) for position in kept_indices]
        for name, samples in values.items()
        if len(samples) == len(times_s)
    }
    return {
        "times": [round(times_s[position], 4) for position in kept_indices],
        "series": series,
        "spans": {mark.name: _spans(times_s, marks, mark) for mark in Mark if mark.name and mark},
        "events": events[:200],
        "length": max(card.seconds, times_s[-1] if times_s else 0.0),
        "dims": dim_names,
    }


def _spans(times_s: list[float], marks: list[int], mark: Mark) -> list[tuple[float, float]]:
    """From when to when ticks carried a mark."""
    spans: list[tuple[float, float]] = []
    begin_s: float | None = None
    for time_s, tick_marks in zip(times_s, marks, strict=False):
        if tick_marks & mark and begin_s is None:
            begin_s = time_s
        elif not tick_marks & mark and begin_s is not None:
            spans.append((round(begin_s, 3), round(time_s, 3)))
            begin_s = None
    if begin_s is not None:
        spans.append((round(begin_s, 3), round(times_s[-1], 3)))
    return spans
