"""The records of an episode on their way to the recorder process: plain data for msgpack, and back.

Knows both directions, so that they stay together. Knows neither end of the way. Frames travel beside these, in slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ratchet_vla.episodes.recorder.types import Outcome
from ratchet_vla.records import ActionChunk, Applied, ControlTick, Float32, Mark, Observation, SafetyEvent

Message = dict[str, Any]


@dataclass(frozen=True)
class ChunkOutcome:
    """What became of a chunk in the control loop. marks: one `records.Mark` value per action."""

    sequence: int
    marks: list[int]


# -- to the recorder -------------------------------------------------------------------------------------------------


def of_observation(observation: Observation, numbers: Mapping[str, int]) -> Message:
    """numbers: camera -> the number of its frame within this episode, -1 where it was dropped."""
    return {
        "kind": "observation",
        "numbers": numbers,
        "state": _raw(observation.state),
        "instruction": observation.instruction,
        "stamp": observation.stamp,
        "sequence": observation.sequence,
    }


def of_chunk(chunk: ActionChunk) -> Message:
    """Make a message of an answer of the policy."""
    message = {
        "kind": "chunk",
        "actions": chunk.actions.tobytes(),
        "shape": chunk.actions.shape,
        "tokens": None,
        "log_prob": None if chunk.log_prob is None else chunk.log_prob.tobytes(),
        "adapter_id": chunk.adapter_id,
        "temperature": chunk.temperature,
        "observation_stamp": chunk.observation_stamp,
        "observation_sequence": chunk.observation_sequence,
        "compute_dtype": chunk.compute_dtype,
    }
    if chunk.tokens is not None:
        message["tokens"] = chunk.tokens.tobytes()
        message |= {"tokens_type": chunk.tokens.dtype.name, "tokens_shape": chunk.tokens.shape}
    return message


def of_tick(tick: ControlTick, number: int) -> Message:
    """number: of the tick's command, as in `Applied`; -1 where none went out."""
    return {
        "kind": "tick",
        "number": number,
        "stamp": tick.stamp,
        "deadline": tick.deadline,
        "index": tick.index,
        "sampled": None if tick.sampled is None else tick.sampled.tobytes(),
        "command": None if tick.command is None else tick.command.tobytes(),
        "marks": tick.marks,
        "chunk_sequence": tick.chunk_sequence,
        "chunk_offset": tick.chunk_offset,
        "adapter_id": tick.adapter_id,
        "state": _raw(tick.state),
    }


def of_applied(applied: Applied) -> Message:
    """Make a message of what the command filter made of a command."""
    action = None if applied.action is None else applied.action.tobytes()
    return {"kind": "applied", "number": applied.number, "action": action, "marks": applied.marks}


def of_event(event: SafetyEvent) -> Message:
    """Make a message of what the safety filter did."""
    return {"kind": "event", **event.__dict__}


def of_outcome(outcome: Outcome) -> Message:
    """Make a message of what became of a chunk."""
    return {"kind": "outcome", "sequence": outcome.sequence, "marks": np.asarray(outcome.marks, np.int64).tobytes()}


def _raw(state: Mapping[str, Float32]) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in state.items()}


# -- in the recorder -------------------------------------------------------------------------------------------------


def to_observation(message: Message) -> Observation:
    """Without its images."""
    state = _state(message["state"])
    return Observation({}, state, message["instruction"], message["stamp"], message["sequence"])


def to_chunk(message: Message) -> ActionChunk:
    """Read an answer of the policy."""
    shape = message["shape"]
    tokens = message["tokens"]
    log_prob = message["log_prob"]
    if tokens is not None:
        tokens = np.frombuffer(tokens, message["tokens_type"]).reshape(message["tokens_shape"])
    return ActionChunk(
        actions=np.frombuffer(message["actions"], np.float32).reshape(shape),
        tokens=tokens,
        log_prob=None if log_prob is None else np.frombuffer(log_prob, np.float32).reshape(shape),
        adapter_id=message["adapter_id"],
        temperature=message["temperature"],
        observation_stamp=message["observation_stamp"],
        observation_sequence=message["observation_sequence"],
        compute_dtype=message["compute_dtype"],
    )


def to_tick(message: Message) -> ControlTick:
    """Without what a command filter made of its command: that comes apart."""
    return ControlTick(
        stamp=message["stamp"],
        deadline=message["deadline"],
        index=message["index"],
        sampled=_floats(message["sampled"]),
        command=_floats(message["command"]),
        marks=Mark(message["marks"]),
        chunk_sequence=message["chunk_sequence"],
        chunk_offset=message["chunk_offset"],
        adapter_id=message["adapter_id"],
        state=_state(message["state"]),
    )


def to_applied(message: Message) -> Applied:
    """Read what the command filter made of a command."""
    return Applied(message["number"], _floats(message["action"]), Mark(message["marks"]))


def to_event(message: Message) -> SafetyEvent:
    """Read what the safety filter did."""
    fields = ("stamp", "code", "message", "dim", "value", "limit", "latched")
    return SafetyEvent(**{name: message[name] for name in fields})


def to_outcome(message: Message) -> ChunkOutcome:
    """Read what became of a chunk."""
    return ChunkOutcome(message["sequence"], np.frombuffer(message["marks"], np.int64).tolist())


def _floats(raw: bytes | None) -> Float32 | None:
    return None if raw is None else np.frombuffer(raw, np.float32)


def _state(raw: dict[str, bytes]) -> dict[str, Float32]:
    return {name: np.frombuffer(values, np.float32) for name, values in raw.items()}
