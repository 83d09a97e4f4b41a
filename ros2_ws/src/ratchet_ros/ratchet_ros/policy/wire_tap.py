"""Topics kept as they are on the wire, beside an episode's own records: for Foxglove, `ros2 bag` and readers of bags.

Knows the contract's topics and ours, and a node to subscribe on. Reads no message: bytes come and go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ratchet_msgs import msg
from rclpy.node import Node

from ratchet_ros.messages import decode, encode, interfaces, qos
from ratchet_ros.messages.intake import require_topic_mapping
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.format import OURS
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Source:
    """One topic, resolved, with its message class and how it is subscribed to."""

    topic: str
    kind: type[Any]
    profile: Any


def sources(node: Node, contract: RobotContract, what: str, lock_step: bool) -> list[Source]:
    """What is kept. what: the parameter `record_wire`.

    Raises:
        RatchetError: ros.bad_parameter where the robot's namespace is the one that records have in the file.
    """
    if what == "none":
        return []
    topic_mapping = require_topic_mapping(contract)
    by_topic: dict[str, tuple[type[Any], Any]] = {}
    if what == "all":
        for camera in contract.cameras:
            by_topic[camera.topic] = (decode.image_type(camera), qos.LOCK_STEP if lock_step else qos.IMAGES)
    for source in topic_mapping.state:
        reader = decode.StateReader(contract, source)
        by_topic[reader.field.topic] = (reader.kind, qos.LOCK_STEP if lock_step else qos.STATES)
    for sink in topic_mapping.commands:
        if sink.kind in encode.COMMAND_TYPES:
            by_topic[sink.topic] = (encode.COMMAND_TYPES[sink.kind], qos.COMMANDS)
    for topic, kind in (
        ("command", msg.Command),
        ("applied", msg.Applied),
        ("chunks", msg.ActionChunk),
        ("safety_events", msg.SafetyEvent),
    ):
        by_topic[topic] = (kind, qos.EVENTS)
    resolved = [Source(node.resolve_topic_name(topic), kind, profile) for topic, (kind, profile) in by_topic.items()]
    clashes = [source.topic for source in resolved if source.topic.startswith(OURS)]
    if clashes:
        raise RatchetError(
            "ros.bad_parameter",
            f"{clashes[0]} would stand among the records' own topics",
            where="record_wire",
            fix=f"use another namespace than {OURS.rstrip('/')}, or record_wire: none",
        )
    return resolved


def channels(wire_sources: list[Source]) -> dict[str, tuple[str, str]]:
    """Topic -> name and definition of its type, as `Recorder` takes them."""
    names = {source.topic: interfaces.type_name(source.kind) for source in wire_sources}
    return {topic: (name, interfaces.definition(name)) for topic, name in names.items()}


class WireTap:
    """Subscriptions that hand over bytes. give: topic, data, ns UTC of arrival."""

    def __init__(self, node: Node, wire_sources: list[Source], give: Callable[[str, bytes, int], None]) -> None:
        self._node = node
        self._subscriptions = [self._subscribe(source, give) for source in wire_sources]

    def destroy(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def _subscribe(self, source: Source, give: Callable[[str, bytes, int], None]) -> Any:
        def received(data: bytes) -> None:
            give(source.topic, bytes(data), time.time_ns())

        return self._node.create_subscription(source.kind, source.topic, received, source.profile, raw=True)
