"""The robot's sessions as policy_node keeps them, and the names that episodes get within one.

Knows the session controller. Without the parameter `robot` there are no sessions, and nothing here has an effect.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from ratchet_ros.policy import params as policy_params
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.inference.client import PolicyClient
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.dispatch import recorded


class NodeSessions:
    """The session controller, where there is one, and a counter of episodes. Used on the executor thread.

    logger: rclpy's, for what must not stop the node.
    """

    def __init__(self, controller: SessionController | None, logger: Any) -> None:
        self._controller = controller
        self._logger = logger
        self._process_id = uuid.uuid4().hex[:8]
        self._episode_count = 0

    @property
    def id(self) -> str:
        """The running session; empty without one."""
        return self._controller.id if self._controller is not None else ""

    def next_episode_name(self) -> str:
        """A unique name, also where a session goes on after its process was killed."""
        self._episode_count += 1
        stem = f"{self.id}-{self._process_id}" if self.id else self._process_id
        return f"{stem}-{self._episode_count:04d}"

    def require(self, mode: str) -> None:
        """Raise RatchetError session.none where episodes are collected outside a session."""
        if mode == "collect" and self._controller is not None and not self._controller.id:
            raise RatchetError("session.none", "nothing is collected outside a session", fix="ratchet session start")

    def note_adapter(self, adapter_id: str) -> None:
        """Write down which adapter acts; a policy that follows a tag swaps by itself."""
        if self._controller is not None and self._controller.session is not None and adapter_id:
            self._controller.session.adapter(adapter_id)

    def look(self) -> None:
        """Start or stop a session where somebody wishes it. Between episodes only, so that each belongs to one."""
        if self._controller is None:
            return
        try:
            self._controller.look()
        except RatchetError as error:
            self._logger.error(str(error))

    def close(self) -> None:
        """End the session. Nothing may keep the node from ending; the next start ends the session otherwise."""
        if self._controller is None:
            return
        try:
            self._controller.stop("powered down")
        except RatchetError as error:
            self._logger.error(str(error))
        self._controller.close()
        self._controller = None


def open_sessions(
    settings: policy_params.Parameters,
    contract: RobotContract,
    client: PolicyClient,
    calibrations: dict[str, str],
    logger: Any,
) -> NodeSessions:
    """The sessions of the robot's folder; the first one starts at once unless `session` is manual.

    Raises:
        RatchetError: ros.bad_parameter where a rollout request is to be run without a robot's folder; what
            SessionController raises.
    """
    if not settings.robot:
        if settings.ordered:
            raise RatchetError(
                "ros.bad_parameter", "the learner's rollout request lies in the robot's folder", where="robot"
            )
        return NodeSessions(None, logger)
    checks = policy_params.checks(settings)
    store = str(Path(settings.episodes).resolve()) if settings.episodes else ""
    controller = SessionController(
        Path(settings.robot),
        "nodes",
        contract,
        client.base_hash,
        lambda: client.adapter_id,
        calibrations=calibrations,
        episodes=lambda session: recorded(store, session),
        store=store,
    )
    if settings.session == "auto":
        controller.start({"by": "policy_node"}, checks)
    return NodeSessions(controller, logger)
