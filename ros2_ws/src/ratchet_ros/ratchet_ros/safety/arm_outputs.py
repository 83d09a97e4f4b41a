"""The arm's own command topics and actions: messages are made and sent here, and nobody else may publish there.

Knows the contract's command sinks and how each is encoded. Judges no command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.action import ActionClient
from rclpy.node import Node

from ratchet_ros.messages import encode, qos
from ratchet_ros.messages.intake import require_topic_mapping
from ratchet_vla.contract import CommandSink, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32


@dataclass(frozen=True)
class ArmOutput:
    """One command topic or action of the arm. columns: its dimensions' indices in an action of the contract."""

    topic: str
    encoder: Any
    columns: list[int]
    send: Callable[[Any], Any]


class ArmOutputs:
    """Every output of one arm. `command` and `hold` are called from the command filter's thread, the rest on the
    executor thread.

    position_field, rotation_field: the state fields that the pose is read from.
    """

    def __init__(self, node: Node, contract: RobotContract, position_field: str, rotation_field: str) -> None:
        self._node = node
        self._entities: list[Any] = []
        self._publishers: list[Any] = []
        self._outputs: list[ArmOutput] = []
        names = [dim.name for dim in contract.action.dims]
        try:
            for sink in require_topic_mapping(contract).commands:
                encoder = encode.make_encoder(contract, sink, position_field, rotation_field)
                self._require_only_publisher(sink.topic)
                columns = [names.index(dim) for dim in sink.dims]
                self._outputs.append(ArmOutput(sink.topic, encoder, columns, self._open(sink)))
        except BaseException:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Remove the publishers and action clients."""
        for entity in self._entities:
            entity.destroy()
        self._entities = []

    def command(self, action: Float32, state: Mapping[str, Any], stamp: Time) -> None:
        """Send one action, (A,) in the contract's units, to every output."""
        values = action.astype(np.float64)
        for output in self._outputs:
            message = output.encoder.action(values[output.columns], state, stamp)
            if message is not None:
                output.send(message)

    def hold(self, state: Mapping[str, Any], stamp: Time) -> None:
        """Tell every output that the arm keeps its pose."""
        for output in self._outputs:
            message = output.encoder.hold(state, stamp)
            if message is not None:
                output.send(message)

    def require_only_publisher(self) -> None:
        """Two publishers on one command topic fight over the arm. Raises RatchetError ros.second_publisher."""
        for output in self._outputs:
            self._require_only_publisher(output.topic)

    def second_publishers(self) -> list[RatchetError]:
        """As `require_only_publisher`, but every topic's error is returned."""
        errors = []
        for output in self._outputs:
            try:
                self._require_only_publisher(output.topic)
            except RatchetError as error:
                errors.append(error)
        return errors

    def require_arm(self) -> None:
        """A command that is sent before this node and the arm have found each other is lost.

        A simulation in lock-step would wait for it, and everybody for the simulation.

        Raises:
            RatchetError: ros.no_arm while a command topic has no subscriber.
        """
        unheard_topics = [p.topic_name for p in self._publishers if not p.get_subscription_count()]
        if unheard_topics:
            raise RatchetError(
                "ros.no_arm", "nobody takes commands yet", where=", ".join(unheard_topics), fix="start the arm"
            )

    def _open(self, sink: CommandSink) -> Callable[[Any], Any]:
        if sink.kind == "gripper_command":
            client = ActionClient(self._node, encode.gripper_action(), sink.topic)
            self._entities.append(client)
            return client.send_goal_async  # type: ignore[no-any-return]
        publisher = self._node.create_publisher(encode.COMMAND_TYPES[sink.kind], sink.topic, qos.COMMANDS)
        self._entities.append(publisher)
        self._publishers.append(publisher)
        return publisher.publish  # type: ignore[no-any-return]

    def _require_only_publisher(self, topic: str) -> None:
        this_node = self._node.get_fully_qualified_name()
        publishers = {
            f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            for info in self._node.get_publishers_info_by_topic(topic)
        }
        others = sorted(publishers - {this_node})
        if others:
            raise RatchetError(
                "ros.second_publisher",
                f"{', '.join(others)} publishes commands too",
                where=topic,
                fix="stop it; only the safety node may command the arm",
            )
