"""Which messages an arm's states and images arrive in; what they say is `ratchet_vla.runtime.messages.readings`'s.

Knows message types and the contract's topic mapping. Knows no node and no topic.
"""

from __future__ import annotations

from typing import Any

from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray

from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.contract.topics import StateSource
from ratchet_vla.runtime.messages import readings
from ratchet_vla.runtime.messages.readings import image

__all__ = ["StateReader", "image", "image_type"]

STATE_TYPES = {"joint_state": JointState, "pose_stamped": PoseStamped, "float64_multi_array": Float64MultiArray}


def image_type(camera: CameraSpec) -> type[Any]:
    """Topics that end in /compressed carry CompressedImage, as image_transport names them."""
    kind: type[Any] = CompressedImage if camera.topic.endswith("/compressed") else Image
    return kind


class StateReader(readings.StateReader):
    """With the type of the messages that the field travels in."""

    def __init__(self, contract: RobotContract, source: StateSource) -> None:
        super().__init__(contract, source)
        self.kind = STATE_TYPES[source.kind]
