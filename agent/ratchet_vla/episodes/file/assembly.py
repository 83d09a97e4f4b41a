"""From messages back to an episode: observations get their frames, decisions what became of them.

Knows message contents and how they refer to each other. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.format import Codec, EpisodeEnding, EpisodeInfo
from ratchet_vla.episodes.file.frames import Decoder
from ratchet_vla.records import (
    ActionChunk,
    ControlTick,
    Episode,
    Float32,
    Int64,
    Mark,
    Observation,
    SafetyEvent,
    Step,
    UInt8,
)

KEEP = 64  # frames of one camera that an observation may look back to


class Assembly:
    """Messages of one episode, taken in the order of the file, being put together.

    codecs: "stream" and "decisions" -> codec. images: whether observations get theirs.
    """

    def __init__(self, info: EpisodeInfo, codecs: Mapping[str, Codec], where: str, images: bool) -> None:
        self._info, self._where, self._want = info, where, images
        self._codecs: dict[str, Codec] = {}
        for group, cameras in info.topics.items():
            self._codecs |= dict.fromkeys(cameras.values(), codecs[group])
        self._decoders: dict[str, Decoder] = {}
        self._encoded: dict[str, dict[int, Any]] = {}
        self._observations: list[tuple[Observation, bool]] = []  # with whether frames of it are lost
        self._chunks: list[ActionChunk] = []
        self._steps: list[Any] = []
        self._ticks: list[ControlTick] = []
        self._events: list[SafetyEvent] = []

    def take(self, topic: str, index: int, body: Any) -> None:
        """One message. index: counts those of its topic."""
        if topic in self._codecs:
            self._image(topic, index, body)
        elif topic == fmt.OBSERVATION:
            self._observation(body)
        elif topic == fmt.CHUNK:
            shape = (body.steps, body.dims)
            self._chunks.append(
                ActionChunk(
                    actions=np.array(body.actions, np.float32).reshape(shape),
                    tokens=_tokens(body, shape),
                    log_prob=np.array(body.log_prob, np.float32).reshape(shape) if body.has_log_prob else None,
                    adapter_id=body.adapter_id,
                    temperature=body.temperature,
                    observation_stamp=body.observation_stamp,
                    observation_sequence=body.observation_sequence,
                    compute_dtype=getattr(body, "compute_dtype", ""),  # files before it was recorded lack it
                )
            )
        elif topic == fmt.STEP:
            self._steps.append(body)
        elif topic == fmt.TICK:
            self._ticks.append(tick_of(body))
        elif topic == fmt.EVENT:
            fields = ("stamp", "code", "message", "dim", "value", "limit", "latched")
            self._events.append(SafetyEvent(**{name: getattr(body, name) for name in fields}))

    def episode(self, ending: EpisodeEnding | None) -> Episode:
        """What came together. ending: None where the file was cut off."""
        info = self._info
        meta = dict(info.meta)
        steps, lost = self._make_steps()
        recording: dict[str, Any] = {}
        if lost:
            recording["steps_without_frames"] = lost
        if ending is None or ending.recovered:
            recording["cut_off"] = True
        if ending is not None and ending.dropped:
            recording["dropped"] = ending.dropped
        if recording:
            meta["recording"] = recording
        return Episode(
            task=info.task,
            instruction=info.instruction,
            steps=steps,
            success=ending.success if ending else None,
            success_source=ending.success_source if ending else "",
            initial_state=info.initial_state,
            seed=info.seed,
            adapter_id=info.adapter_id,
            meta=meta,
            ticks=self._ticks,
            events=self._events,
            termination=ending.reason if ending else "",
        )

    def _image(self, topic: str, index: int, body: Any) -> None:
        if topic not in self._decoders:
            self._decoders[topic] = Decoder(self._codecs[topic], self._where)
        kept = self._encoded.setdefault(topic, {})
        # H.264 depends on the frames before; of the others, only what is asked for is decoded.
        kept[index] = decode_frame(self._decoders[topic], body) if self._codecs[topic] == "h264" else body
        # An observation comes after its frames; older ones are nobody's any more.
        kept.pop(index - KEEP, None)

    def _observation(self, body: Any) -> None:
        images, lost = {}, False
        for camera, topic, index in zip(body.cameras, body.topics, body.frames, strict=True):
            if not self._want:
                lost |= index < 0
                continue
            found = self._encoded.get(topic, {}).get(index)
            if found is None:
                lost = True
            else:
                is_image = isinstance(found, np.ndarray)
                images[camera] = found if is_image else decode_frame(self._decoders[topic], found)
        seen = Observation(
            images=images,
            state=split_state(body),
            instruction=body.instruction,
            stamp=body.stamp,
            sequence=body.sequence,
        )
        self._observations.append((seen, lost))

    def _make_steps(self) -> tuple[list[Step], int]:
        steps, lost, told = [], 0, set()
        for body in self._steps:
            seen, missing = self._observations[body.observation]
            told.add(body.chunk)
            if missing:
                lost += 1
                continue
            steps.append(
                Step(
                    observation=seen,
                    chunk=self._chunks[body.chunk],
                    executed=np.array(body.executed, np.bool_),
                    reward=body.reward,
                    done=body.done,
                    steps_run=body.steps_run,
                )
            )
        for index, chunk in enumerate(self._chunks):
            if index in told:
                continue  # what follows was cut off before anybody told what became of the chunk: the ticks know
            derived = self._derive(chunk)
            if derived is None:
                lost += 1
            else:
                steps.append(derived)
        return steps, lost

    def _derive(self, chunk: ActionChunk) -> Step | None:
        sequence = chunk.observation_sequence
        seen = next((s for s, missing in self._observations if s.sequence == sequence and not missing), None)
        if seen is None:
            return None
        executed = np.zeros(len(chunk.actions), np.bool_)
        mine = [t for t in self._ticks if t.chunk_sequence == sequence]
        for tick in mine:
            executed[tick.chunk_offset] = tick.fate == Mark.NONE and tick.reached is not None
        return Step(seen, chunk, executed, 0.0, False, len(mine))


def decode_frame(decoder: Decoder, body: Any) -> UInt8:
    return decoder.decode(bytes(body.data), getattr(body, "height", 0), getattr(body, "width", 0))


def tick_of(body: Any) -> ControlTick:
    applied_marks = getattr(body, "applied_marks", -1)  # files from before a command filter was recorded lack it
    return ControlTick(
        stamp=body.stamp,
        deadline=body.deadline,
        index=body.index,
        sampled=np.array(body.sampled, np.float32) if body.has_sampled else None,
        command=np.array(body.command, np.float32) if body.has_command else None,
        marks=Mark(body.marks),
        chunk_sequence=body.chunk_sequence,
        chunk_offset=body.chunk_offset,
        adapter_id=body.adapter_id,
        state=split_state(body),
        applied=np.array(body.applied, np.float32) if applied_marks >= 0 and body.has_applied else None,
        applied_marks=Mark(applied_marks) if applied_marks >= 0 else None,
    )


def split_state(body: Any) -> dict[str, Float32]:
    values = np.array(body.state, np.float32)
    ends = np.cumsum(body.state_sizes, dtype=int)
    return {
        name: values[end - size : end].copy()
        for name, size, end in zip(body.state_names, body.state_sizes, ends, strict=True)
    }


def _tokens(body: Any, shape: tuple[int, int]) -> Int64 | Float32 | None:
    """Bins, or a flow's chain; files from before flow policies were recorded know no chain."""
    if body.has_tokens:
        return np.array(body.tokens, np.int64).reshape(shape)
    chain_shape = tuple(getattr(body, "chain_shape", ()))
    return np.array(body.chain, np.float32).reshape(chain_shape) if chain_shape else None
