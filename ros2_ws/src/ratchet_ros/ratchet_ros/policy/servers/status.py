"""What policy_node says of itself: PolicyStatus twice a second and after every change, lines for /diagnostics.

Knows how to read every part of the node. Changes none, but that a session notes which adapter acts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ratchet_msgs import msg

from ratchet_ros.messages import qos
from ratchet_ros.nodes.base import ERROR, OK, WARN, Line
from ratchet_ros.policy.parts import PolicyParts
from ratchet_ros.policy.servers.task_server import TaskServer

JITTER_TICKS = 1000  # newest ticks that the published jitter is taken over
DEAD_POLICY = ("failed", "stopped")
COMING_UP = ("starting", "restarting")


class StatusReports:
    """Used on the executor thread."""

    def __init__(self, parts: PolicyParts, tasks: TaskServer) -> None:
        self._parts = parts
        self._tasks = tasks
        self._publisher = parts.node.create_publisher(msg.PolicyStatus, "policy_status", qos.STATUS)

    def destroy(self) -> None:
        """Remove the publisher."""
        self._publisher.destroy()

    def publish(self) -> None:
        """Send the present status."""
        parts = self._parts
        policy = parts.client.status()
        goal = self._tasks.goal
        parts.sessions.note_adapter(policy.adapter_id)
        status = msg.PolicyStatus(
            state=policy.state,
            error=policy.error,
            contract_id=parts.contract.id,
            base_hash=policy.base_hash,
            adapter_id=policy.adapter_id,
            swapping=policy.swapping,
            running=goal is not None,
            instruction=goal.instruction if goal else "",
            motion=parts.safety.state.value,
            motion_cause=parts.safety.cause,
            inference=policy.inference,
            asked=policy.asked,
            answered=policy.answered,
            restarts=policy.restarts,
            observation_skew=float(parts.robot.skew),
        )
        loop = self._tasks.loop
        if loop is not None:
            jitter_s = loop.timing.jitter[-JITTER_TICKS:]
            status.ticks = self._tasks.sink.progress.ticks
            status.missed = loop.timing.missed
            status.jitter_p99 = float(np.percentile(jitter_s, 99)) if len(jitter_s) else 0.0
        status.header.stamp = parts.clock.to_ros(parts.clock.now())
        self._publisher.publish(status)

    def diagnose(self) -> list[Line]:
        """Lines for /diagnostics: policy, observation, safety node, recording, control loop."""
        lines = [self._policy_line(), self._observation_line()]
        if self._parts.safety_node.status is None:
            lines.append((ERROR, "safety node", "not heard of", {}))
        if self._parts.recording is not None:
            lines.append(self._parts.recording.diagnose())
        loop = self._tasks.loop
        if loop is not None:
            level = WARN if loop.timing.missed else OK
            lines.append((level, "control loop", f"{loop.timing.missed} missed", {"overruns": loop.timing.overruns}))
        return lines

    def _policy_line(self) -> Line:
        status = self._parts.client.status()
        if status.state in DEAD_POLICY:
            level = ERROR
        elif status.state in COMING_UP:
            level = WARN
        else:
            level = OK
        values = {
            "adapter": status.adapter_id,
            "asked": status.asked,
            "answered": status.answered,
            "restarts": status.restarts,
            "inference_s": f"{status.inference:.4f}",
        }
        return (level, "policy", status.error or status.state, values)

    def _observation_line(self) -> Line:
        intake = self._parts.intake
        now = self._parts.clock.now()
        text, complete = intake.describe()
        values: dict[str, Any] = {"state_age_s": f"{now - intake.aligner.state_stamp():.4f}"}
        if intake.aligner.cameras:
            values["frame_age_s"] = f"{now - intake.aligner.frames_stamp():.4f}"
        values["skew_s"] = self._parts.robot.skew
        return (OK if complete else ERROR, "observation", text, values)
