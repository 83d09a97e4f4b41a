"""The safety node as policy_node knows it: commands go there, its status comes back.

Knows three names of the graph. Decides nothing: what a latched fault means for a task is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ratchet_msgs import msg, srv
from rclpy.callback_groups import ReentrantCallbackGroup

from ratchet_ros.messages import qos
from ratchet_ros.nodes.base import RatchetNode
from ratchet_vla.errors import RatchetError


class SafetyNodeLink:
    """One publisher, one subscription, one client. All of it is used on the node's executor thread.

    on_status: called with every status of the safety node.
    """

    def __init__(self, node: RatchetNode, on_status: Callable[[msg.SafetyStatus], None]) -> None:
        self._on_status = on_status
        self.status: msg.SafetyStatus | None = None
        self.commands = node.create_publisher(msg.Command, "command", qos.COMMANDS)
        # A callback that awaits another node holds up its whole callback group, the other node's answer included.
        self.awaiting_group = ReentrantCallbackGroup()
        self.clear_fault = node.create_client(
            srv.ClearFault, "safety_node/clear_fault", callback_group=self.awaiting_group
        )
        subscription = node.create_subscription(msg.SafetyStatus, "safety_status", self._receive, qos.STATUS)
        self._entities: list[Any] = [self.commands, self.clear_fault, subscription]

    def require(self) -> msg.SafetyStatus:
        """The safety node's newest status.

        Raises:
            RatchetError: ros.no_safety_node where none has reported or none takes commands.
        """
        if self.status is None or not self.commands.get_subscription_count():
            raise RatchetError("ros.no_safety_node", "no safety node listens", fix="start safety_node and activate it")
        return self.status

    def require_unlatched(self) -> None:
        """Raise RatchetError safety.latched while the safety node waits for a person; see also `require`."""
        status = self.require()
        if status.latched:
            text = f"the safety node is latched by {status.cause}"
            raise RatchetError("safety.latched", text, fix="ratchet ctl clear")

    def destroy(self) -> None:
        """Remove what this link put on the node."""
        for entity in self._entities:
            entity.destroy()
        self._entities = []

    def _receive(self, status: msg.SafetyStatus) -> None:
        self.status = status
        self._on_status(status)
