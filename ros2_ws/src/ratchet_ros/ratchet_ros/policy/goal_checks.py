"""A RunTask request becomes a complete goal, or is refused before anything moves.

Knows every reason to refuse but one: whether the node is free, which the task server knows.
"""

from __future__ import annotations

from pathlib import Path

from ratchet_msgs.action import RunTask

from ratchet_ros.nodes.waiting import in_thread, settled
from ratchet_ros.policy import task_run
from ratchet_ros.policy.parts import PolicyParts
from ratchet_vla.episodes.success_rules import require_goal, require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session import rollout_requests

TEMPERATURE_UNSET = -1.0  # in a request: left to the learner's rollout request, or to acting greedily
SCENE_STATUS_LIMIT_S = 0.5  # within which the scene's status after a reset must arrive


class GoalChecks:
    """Called on the executor thread."""

    def __init__(self, parts: PolicyParts) -> None:
        self._parts = parts

    def complete(self, request: RunTask.Goal, episode: str) -> task_run.Goal:
        """The goal with what the learner requested, or this node's defaults, filled in.

        Raises:
            RatchetError: session.none; what the rules of temperatures and of rollout requests raise.
        """
        parts = self._parts
        settings = parts.node.settings
        mode = request.mode or settings.mode
        temperature = None
        if request.temperature != TEMPERATURE_UNSET:
            temperature = float(request.temperature)
            require_temperature(temperature)
        parts.sessions.require(mode)
        if mode == "collect" and settings.ordered:
            goal = rollout_requests.requested(
                rollout_requests.read(Path(settings.robot)),
                task=request.task,
                instruction=request.instruction,
                horizon=int(request.horizon),
                temperature=temperature,
                seed=int(request.seed),
                active=parts.client.adapter_id,
                episode=episode,
            )
        else:
            goal = rollout_requests.unrequested(
                request.task, request.instruction, int(request.horizon), temperature, int(request.seed), episode=episode
            )
        return task_run.Goal(
            task=goal.task,
            instruction=goal.instruction,
            horizon=goal.horizon or settings.horizon,
            mode=mode,
            temperature=goal.temperature,
            seed=goal.seed,
            expected_adapter=request.expected_adapter or goal.adapter,
            episode=episode,
            noise=goal.noise,
            request_id=goal.request_id,
        )

    async def wait_for_scene(self, goal: task_run.Goal) -> None:
        """Give a scene that does not fit the goal yet a moment: its status after a reset may be on its way."""
        labeller = self._parts.labeller
        if labeller.refusal(goal.task, goal.instruction) is None:
            return

        def wait() -> None:
            labeller.settle(goal.task, goal.instruction, SCENE_STATUS_LIMIT_S)

        await settled(self._parts.node, in_thread(wait, "scene"))

    def require_ready(self, goal: task_run.Goal) -> None:
        """Everything else that can be refused before anything moves.

        Raises:
            RatchetError: session.none, ros.no_safety_node, safety.latched, policy.not_ready, adapter.not_active, and
                what the rules of goals and the labeller refuse.
        """
        parts = self._parts
        parts.sessions.require(goal.mode)  # one may have ended while the scene was waited for
        require_goal(goal.task, goal.instruction)
        label_refusal = parts.labeller.refusal(goal.task, goal.instruction)
        if label_refusal is not None:
            raise label_refusal
        parts.safety_node.require_unlatched()
        status = parts.client.status()
        if status.state != "ready":
            raise RatchetError("policy.not_ready", f"the policy is {status.state}", where=status.error)
        if goal.expected_adapter and goal.expected_adapter != status.adapter_id:
            raise RatchetError(
                "adapter.not_active", f"{goal.expected_adapter[:12]} is expected, {status.adapter_id[:12]} is active"
            )
