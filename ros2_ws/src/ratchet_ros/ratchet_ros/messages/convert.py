"""Our records as our messages. Knows both; knows no node."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from ratchet_msgs import msg

from ratchet_ros.messages.times import TimeBase
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, SafetyEvent


def event(source: SafetyEvent, node: str, clock: TimeBase) -> msg.SafetyEvent:
    return msg.SafetyEvent(
        stamp=clock.to_ros(source.stamp),
        node=node,
        code=source.code,
        message=source.message,
        dim=source.dim,
        value=float(source.value),
        limit=float(source.limit),
        latched=bool(source.latched),
    )


def chunk(source: ActionChunk, image_stamps: Iterable[float], clock: TimeBase) -> msg.ActionChunk:
    steps, dims = source.actions.shape
    out = msg.ActionChunk(
        adapter_id=source.adapter_id,
        observation_stamp=clock.to_ros(source.observation_stamp),
        image_stamps=[clock.to_ros(s) for s in image_stamps],
        observation_sequence=source.observation_sequence,
        temperature=float(source.temperature),
        steps=steps,
        dims=dims,
        actions=floats(source.actions),
        compute_dtype=source.compute_dtype,
    )
    out.header.stamp = clock.to_ros(clock.now())
    tokens = source.tokens
    if tokens is not None and tokens.ndim == 2 and source.log_prob is not None:  # a flow's chain is not published
        out.tokens = array("i", tokens.astype(np.int32).tobytes())
        out.log_prob = floats(source.log_prob)
    return out


def floats(values: object) -> array[float]:
    """float32 values as messages take them without looking at each one."""
    return array("f", np.ascontiguousarray(values, np.float32).tobytes())


def refused(response: object, error: RatchetError) -> object:
    """Fill success, code and message of a service response or result."""
    if hasattr(response, "success"):
        response.success = False
    response.code, response.message = error.code, str(error)  # type: ignore[attr-defined]
    return response
