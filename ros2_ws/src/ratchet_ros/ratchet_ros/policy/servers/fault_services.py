"""`~/clear_fault` and `~/resume`: what a person does after a stop.

Knows both filters of the arm: the policy node's own and, over a service, the safety node's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ratchet_msgs import srv
from std_srvs.srv import Trigger

from ratchet_ros.messages import convert
from ratchet_ros.nodes.base import RatchetNode
from ratchet_ros.nodes.waiting import answered
from ratchet_ros.policy.safety_link import SafetyNodeLink
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import SafetyEvent
from ratchet_vla.runtime.safety.filter import SafetyFilter

NOT_LATCHED = "safety.not_latched"
ANSWER_LIMIT_S = 5.0  # that the safety node has to answer


class FaultServices:
    """Serves both on the executor thread. on_event: told of the cleared fault. on_change: the state is another one."""

    def __init__(
        self,
        node: RatchetNode,
        safety: SafetyFilter,
        safety_node: SafetyNodeLink,
        on_event: Callable[[SafetyEvent], None],
        on_change: Callable[[], None],
    ) -> None:
        self._node = node
        self._safety = safety
        self._safety_node = safety_node
        self._on_event = on_event
        self._on_change = on_change
        self._services = [
            node.create_service(
                srv.ClearFault, "~/clear_fault", self._serve_clear, callback_group=safety_node.awaiting_group
            ),
            node.create_service(Trigger, "~/resume", self._serve_resume),
        ]

    def destroy(self) -> None:
        """Remove both services."""
        for service in self._services:
            service.destroy()

    async def _serve_clear(self, request: srv.ClearFault.Request, response: srv.ClearFault.Response) -> Any:
        """Both filters of the arm, the one before the arm first, so that nothing moves while it is still latched."""
        causes: list[str] = []
        messages: list[str] = []
        try:
            filter_answer = await answered(self._node, self._safety_node.clear_fault, request, ANSWER_LIMIT_S)
            if filter_answer.success:
                causes.append(filter_answer.cleared)
                messages.append(filter_answer.message)
            elif filter_answer.code != NOT_LATCHED:
                return filter_answer
            cause = self._safety.cause
            try:
                event = self._safety.clear(request.person)
            except RatchetError as error:
                # Only one of the two was latched: that one is cleared. If neither was, the person hears so.
                if error.code != NOT_LATCHED or not causes:
                    raise
            else:
                self._on_event(event)
                causes.append(cause)
                messages.append(event.message)
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        response.cleared = ", ".join(dict.fromkeys(causes))
        response.message = "; ".join(dict.fromkeys(messages))
        self._on_change()
        return response

    def _serve_resume(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._safety.resume()
        response.success = True
        return response
