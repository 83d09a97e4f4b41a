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

LOOK_BACK_FRAMES = 64  # frames of one camera that an observation may look back to


class Assembly:
    """Messages of one episode, taken in the order of the file, being put together.

    codecs: "stream" and "decisions" -> codec. images: whether observations get theirs.
    """

    def __init__(self, info: EpisodeInfo, codecs: Mapping[str, Codec], location: str, images: bool) -> None:
        self._info = info
        self._location = location
        self._with_images = images
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
        steps, lost_steps = self._make_steps()
        recording: dict[str, Any] = {}
        if lost_steps:
            recording["steps_without_frames"] = lost_steps
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
            self._decoders[topic] = Decoder(self._codecs[topic], self._location)
        recent = self._encoded.setdefault(topic, {})
        # H.264 depends on the frames before; of the others, only what is asked for is decoded.
        recent[index] = decode_frame(self._decoders[topic], body) if self._codecs[topic] == "h264" else body
        # An observation comes after its frames; older ones are nobody's any more.
        recent.pop(index - LOOK_BACK_FRAMES, None)

    def _observation(self, body: Any) -> None:
        images = {}
        has_lost_frames = False
        for camera, topic, index in zip(body.cameras, body.topics, body.frames, strict=True):
            if not self._with_images:
                has_lost_frames |= index < 0
                continue
            frame = self._encoded.get(topic, {}).get(index)
            if frame is None:
                has_lost_frames = True
            else:
                is_image = isinstance(frame, np.ndarray)
                images[camera] = frame if is_image else decode_frame(self._decoders[topic], frame)
        observation = Observation(
            images=images,
            state=split_state(body),
            instruction=body.instruction,
            stamp=body.stamp,
            sequence=body.sequence,
        )
        self._observations.append((observation, has_lost_frames))

    def _make_steps(self) -> tuple[list[Step], int]:
        steps = []
        lost_steps = 0
        reported_chunks = set()
        for body in self._steps:
            observation, has_lost_frames = self._observations[body.observation]
            reported_chunks.add(body.chunk)
            if has_lost_frames:
                lost_steps += 1
                continue
            steps.append(
                Step(
                    observation=observation,
                    chunk=self._chunks[body.chunk],
                    executed=np.array(body.executed, np.bool_),
                    reward=body.reward,
                    done=body.done,
                    steps_run=body.steps_run,
                )
            )
        for index, chunk in enumerate(self._chunks):
            if index in reported_chunks:
                continue  # what follows was cut off before anybody told what became of the chunk: the ticks know
            derived = self._derive(chunk)
            if derived is None:
                lost_steps += 1
            else:
                steps.append(derived)
        return steps, lost_steps

    def _derive(self, chunk: ActionChunk) -> Step | None:
        sequence = chunk.observation_sequence
        observation = next(
            (
                candidate
                for candidate, has_lost_frames in self._observations
                if candidate.sequence == sequence and not has_lost_frames
            ),
            None,
        )
        if observation is None:
            return None
        executed = np.zeros(len(chunk.actions), np.bool_)
        chunk_ticks = [tick for tick in self._ticks if tick.chunk_sequence == sequence]
        for tick in chunk_ticks:
            executed[tick.chunk_offset] = tick.fate == Mark.NONE and tick.reached is not None
        return Step(observation, chunk, executed, 0.0, False, len(chunk_ticks))


def decode_frame(decoder: Decoder, body: Any) -> UInt8:
    """(H, W, 3) uint8 RGB of an image message."""
    return decoder.decode(bytes(body.data), getattr(body, "height", 0), getattr(body, "width", 0))


def tick_of(body: Any) -> ControlTick:
    """The control period that a tick message holds."""
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
    """State field -> its values, (size,) float32, from a message that holds them one after the other."""
    values = np.array(body.state, np.float32)
    end_offsets = np.cumsum(body.state_sizes, dtype=int)
    return {
        name: values[end - size : end].copy()
        for name, size, end in zip(body.state_names, body.state_sizes, end_offsets, strict=True)
    }


def _tokens(body: Any, shape: tuple[int, int]) -> Int64 | Float32 | None:
    """Bins, or a flow's chain; files from before flow policies were recorded know no chain."""
    if body.has_tokens:
        return np.array(body.tokens, np.int64).reshape(shape)
    chain_shape = tuple(getattr(body, "chain_shape", ()))
    return np.array(body.chain, np.float32).reshape(chain_shape) if chain_shape else None
