"""What policy_node's setup makes and its servers share.

Knows types alone. Every field lives from the node's setup to its teardown.
"""

from __future__ import annotations

from dataclasses import dataclass

from ratchet_ros.messages.intake import Intake
from ratchet_ros.messages.times import TimeBase
from ratchet_ros.nodes.base import RatchetNode
from ratchet_ros.policy.labeller import RosLabeller
from ratchet_ros.policy.recording import EpisodeRecording
from ratchet_ros.policy.robot import NotingSafety, RosRobot
from ratchet_ros.policy.safety_link import SafetyNodeLink
from ratchet_ros.policy.sessions import NodeSessions
from ratchet_vla.contract import RobotContract
from ratchet_vla.runtime.inference.client import PolicyClient


@dataclass(frozen=True)
class PolicyParts:
    """The parts of a configured policy_node. recording: absent without the parameter `episodes`.

    safety: this node's own filter, used by the control loop. safety_node: the other node, which filters a second time.
    chunk_steps: actions in a chunk of the policy.
    """

    node: RatchetNode
    contract: RobotContract
    clock: TimeBase
    client: PolicyClient
    intake: Intake
    robot: RosRobot
    safety: NotingSafety
    safety_node: SafetyNodeLink
    labeller: RosLabeller
    recording: EpisodeRecording | None
    sessions: NodeSessions
    chunk_steps: int
