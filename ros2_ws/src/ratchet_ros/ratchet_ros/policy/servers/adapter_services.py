"""`~/swap_adapter` and `~/list_adapters`: the adapters that the policy process knows.

Knows the policy client and two services. The swap itself is the policy process's; nothing here waits on the executor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ratchet_msgs import msg, srv

from ratchet_ros.messages import convert
from ratchet_ros.nodes.base import RatchetNode
from ratchet_ros.nodes.waiting import settled
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.inference.client import PolicyClient


class AdapterServices:
    """Serves both. on_swap: called after a swap, on the executor thread."""

    def __init__(self, node: RatchetNode, client: PolicyClient, on_swap: Callable[[], None]) -> None:
        self._node = node
        self._client = client
        self._on_swap = on_swap
        self._services = [
            node.create_service(srv.SwapAdapter, "~/swap_adapter", self._serve_swap),
            node.create_service(srv.ListAdapters, "~/list_adapters", self._serve_list),
        ]

    def destroy(self) -> None:
        """Remove both services."""
        for service in self._services:
            service.destroy()

    async def _serve_swap(self, request: srv.SwapAdapter.Request, response: srv.SwapAdapter.Response) -> Any:
        try:
            report = await settled(self._node, self._client.swap(request.reference, request.expected_id))
        except RatchetError as error:
            self._node.get_logger().warning(str(error))
            return convert.refused(response, error)
        response.success = True
        response.old_id = report["old_id"]
        response.new_id = report["new_id"]
        response.ready = float(report["ready"])
        response.unavailable = float(report["unavailable"])
        response.warnings = [str(warning) for warning in report["warnings"]]
        response.message = f"{report['old_id'][:12]} -> {report['new_id'][:12]}"
        self._on_swap()
        return response

    async def _serve_list(self, request: srv.ListAdapters.Request, response: srv.ListAdapters.Response) -> Any:
        try:
            adapters = await settled(self._node, self._client.adapters())
        except RatchetError as error:
            return convert.refused(response, error)
        response.success = True
        response.adapters = [msg.AdapterInfo(**adapter) for adapter in adapters]
        return response
