"""An episode as a rerun recording (.rrd), for people who like that viewer. Needs rerun-sdk, which is optional.

Knows rerun's archetypes. Decides nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.assembly import tick_of
from ratchet_vla.episodes.file.frames import Encoder
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.episodes.review.preview_cache import group_of, start_of
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Mark
from ratchet_vla.storage.growing import disk_refusals


def export_rrd(store: EpisodeStore, card: Card, target: Path) -> int:
    """Write one episode to `target` (new); returns its size in bytes.

    Raises:
        RatchetError: export.no_rerun where the package is not installed, export.exists.
    """
    try:
        import rerun
    except ImportError as error:
        raise RatchetError(
            "export.no_rerun", "the package rerun-sdk is not installed", fix="pip install rerun-sdk"
        ) from error
    if target.exists():
        raise RatchetError("export.exists", "there is something already", where=str(target), fix="name a new file")
    scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
    with disk_refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            recording: Any = rerun.RecordingStream("ratchet", recording_id=card.id)
            recording.save(str(scratch))
            _log(rerun, recording, store, card)
            recording.flush()
            recording.disconnect()
            scratch.rename(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    return target.stat().st_size


def _log(rerun: Any, recording: Any, store: EpisodeStore, card: Card) -> None:
    reader = store.open(card.id)
    start_s = start_of(reader)
    ending = reader.ending()
    summary = f"{card.instruction}\n\ntask {card.task}, adapter {card.adapter_id[:12]}, ended: {card.reason or '?'}"
    recording.log("episode", rerun.TextDocument(summary), static=True)
    encoder = Encoder("jpeg", 90)
    for camera in card.cameras:
        group = group_of(reader, ending.frames if ending else {}, camera)
        encoded = reader.codec(group) == "jpeg"
        source: Any = reader.encoded_frames(camera, group) if encoded else reader.frames(camera, group)
        for stamp, frame in source:
            recording.set_time("robot", duration=stamp - start_s)
            jpeg = frame if encoded else encoder.encode(frame)
            recording.log(f"camera/{camera}", rerun.EncodedImage(contents=jpeg, media_type="image/jpeg"))
    dim_names = [d["name"] for d in reader.info.contract["action"]["dims"]]
    for item in reader.items([fmt.TICK, fmt.EVENT]):
        recording.set_time("robot", duration=item.body.stamp - start_s)
        if item.topic == fmt.EVENT:
            recording.log("safety", rerun.TextLog(f"{item.body.code}: {item.body.message}", level="WARN"))
            continue
        tick = tick_of(item.body)
        for name, values in tick.state.items():
            recording.log(f"state/{name}", rerun.Scalars(values.astype(np.float64)))
        if tick.reached is not None:
            for name, value in zip(dim_names, tick.reached.tolist(), strict=True):
                recording.log(f"command/{name}", rerun.Scalars([value]))
        recording.log("human", rerun.Scalars([float(bool(tick.marks & Mark.HUMAN))]))
