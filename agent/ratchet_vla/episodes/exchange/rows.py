"""An episode as rows of a data set: per control step or per decision the frames, the state and the action.

"control": a row per control step, with the newest frames. "decisions": a row per decision, with its chunk. "spread": a
row per control step of each decision, which repeats the frames and the state that the decision was made on.

Knows which recorded frame belongs to which step. Knows no format of other projects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file import format as fmt
from ratchet_vla.episodes.file.assembly import decode_frame, tick_of
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.file.frames import Decoder
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Bool, Float32, Mark, UInt8

Rate = Literal["control", "decisions", "spread"]
MAX_FRAME_AGE_PERIODS = 1.6  # control periods that a frame may be older than the step it is shown at


@dataclass(frozen=True)
class Row:
    """One step. stamp: seconds, robot's clock. images: camera -> (H, W, 3) uint8. state: as in `Observation`.

    action: (D,) float32, physical units: what the robot was sent; of a decision, the first action of its chunk.
    chunk: (K, D) float32 of a decision, None at control rate. executed: the (first) action was sent exactly as sampled.
    human: it was a person's. marks: what became of the action, a `Mark` as a number, at control rate; 0 of a decision.
    flags: (K,) bool of a decision, which of its actions were sent exactly as sampled; None at control rate.
    fresh: False where frames and state are repeated from the row before. ran: control steps of the decision that ran.
    """

    stamp: float
    images: dict[str, UInt8]
    state: dict[str, Float32]
    action: Float32
    chunk: Float32 | None
    executed: bool
    human: bool
    reward: float
    done: bool
    marks: int = 0
    flags: Bool | None = None
    fresh: bool = True
    ran: int = 1


def best_rate(reader: EpisodeReader) -> Rate:
    """Say "control" where there are ticks and frames keep up with them, else "decisions"."""
    ages_s = list(_ages(reader))
    period_s = 1.0 / reader.info.robot().control_hz
    return "control" if ages_s and max(ages_s) <= MAX_FRAME_AGE_PERIODS * period_s else "decisions"


def rows(reader: EpisodeReader, rate: Rate, success: bool | None = None) -> Iterator[Row]:
    """Every step that has an action, in order; held steps have none and are left out.

    success: of the whole, for the last row's reward where the recording does not tell.

    Raises:
        RatchetError: episode.no_frames where a step at control rate has no frame that is new enough.
    """
    steps = _control_rows(reader) if rate == "control" else _decision_rows(reader, spread=rate == "spread")
    previous: Row | None = None
    for row in steps:
        if previous is not None:
            yield previous
        previous = row
    if previous is not None:
        reward = previous.reward or (1.0 if success else 0.0)
        yield Row(**{**previous.__dict__, "reward": reward, "done": True})


def _control_rows(reader: EpisodeReader) -> Iterator[Row]:
    contract = reader.info.robot()
    max_age_s = MAX_FRAME_AGE_PERIODS / contract.control_hz
    newest: dict[str, tuple[float, str, Any]] = {}
    cameras, decoders, codecs = _camera_topics(reader)
    shown: dict[str, tuple[Any, UInt8]] = {}  # camera -> message and its decoded image
    for item in reader.items([fmt.TICK, *cameras]):
        if item.topic in cameras:
            body: Any = item.body
            if codecs[item.topic] == "h264":  # depends on the frames before
                body = decode_frame(decoders[item.topic], item.body)
            newest[cameras[item.topic]] = (reader.stamp(item), item.topic, body)
            continue
        tick = tick_of(item.body)
        if tick.reached is None:
            continue
        images = {}
        for camera in contract.cameras:
            if camera.name not in newest or tick.stamp - newest[camera.name][0] > max_age_s:
                raise RatchetError(
                    "episode.no_frames",
                    f"no frame of {camera.name!r} at tick {tick.index} that is new enough",
                    where=str(reader.path),
                    fix="record the camera streams, or take the decisions only",
                )
            _, topic, body = newest[camera.name]
            if camera.name not in shown or shown[camera.name][0] is not body:
                image = body if isinstance(body, np.ndarray) else decode_frame(decoders[topic], body)
                shown[camera.name] = (body, image)
            images[camera.name] = shown[camera.name][1]
        human = bool(tick.marks & Mark.HUMAN)
        yield Row(
            tick.stamp,
            images,
            tick.state,
            tick.reached,
            None,
            tick.fate == Mark.NONE,
            human,
            0.0,
            False,
            int(tick.fate),
        )


def _decision_rows(reader: EpisodeReader, *, spread: bool) -> Iterator[Row]:
    """spread: as many rows of each decision as it had control steps; its reward comes with the last of them."""
    period_s = 1.0 / reader.info.robot().control_hz
    for step in reader.episode().steps:
        observation = step.observation
        actions = step.chunk.actions
        human = not step.chunk.adapter_id and not step.executed.any()
        count = max(step.steps_run, 1) if spread else 1
        for offset in range(count):
            is_last = offset == count - 1
            yield Row(
                observation.stamp + offset * period_s,
                observation.images,
                observation.state,
                actions[offset],
                actions,
                bool(step.executed[offset]),
                human,
                step.reward if is_last else 0.0,
                step.done and is_last,
                flags=step.executed,
                fresh=offset == 0,
                ran=step.steps_run,
            )


def _ages(reader: EpisodeReader) -> Iterator[float]:
    """Age of the oldest newest frame at each tick that moved the robot; inf where a camera has none yet."""
    cameras, _, _ = _camera_topics(reader)
    newest: dict[str, float] = {c.name: -np.inf for c in reader.info.robot().cameras}
    for item in reader.items([fmt.TICK, *cameras]):
        if item.topic in cameras:
            newest[cameras[item.topic]] = reader.stamp(item)
        elif tick_of(item.body).reached is not None:
            yield item.body.stamp - min(newest.values(), default=-np.inf)


def _camera_topics(reader: EpisodeReader) -> tuple[dict[str, str], dict[str, Decoder], dict[str, Codec]]:
    """Topic -> camera, decoder and codec, of both groups: a decision's frame is a frame like another."""
    cameras: dict[str, str] = {}
    codecs: dict[str, Codec] = {}
    for group, topic_by_camera in reader.info.topics.items():
        for camera, topic in topic_by_camera.items():
            cameras[topic] = camera
            codecs[topic] = reader.codec(group)
    return cameras, {image_topic: Decoder(codec, str(reader.path)) for image_topic, codec in codecs.items()}, codecs


def state_vector(state: dict[str, Float32], contract: RobotContract) -> Float32:
    """(S,) float32: all state fields one after the other, in the contract's order."""
    return np.concatenate([state[spec.name] for spec in contract.state] + [np.zeros(0, np.float32)])


def state_names(contract: RobotContract) -> list[str]:
    """A name per value of `state_vector`."""
    return [
        f"{spec.name}.{position}" if spec.size > 1 else spec.name
        for spec in contract.state
        for position in range(spec.size)
    ]
