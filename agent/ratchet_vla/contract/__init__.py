"""The contract: one description per robot, in one YAML file; nothing else knows a topic, a joint count or a sign.

Knows what a contract says, how it is read and checked, and whether a policy fits it. Knows no simulator and no model.
Begin with `specs` (the fields), then `robot` (reading) and `fitting` (policy against robot).
"""

from ratchet_vla.contract.fitting import Mismatch, PolicySpec, compatibility, require_compatible
from ratchet_vla.contract.robot import RobotContract
from ratchet_vla.contract.specs import (
    SCHEMA,
    ActionDim,
    ActionSpace,
    CameraSpec,
    ControlMode,
    GripperSpec,
    Limits,
    RotationRepr,
    SimulatorSpec,
    StateField,
    VerifiedFact,
    Watchdog,
)
from ratchet_vla.contract.topics import CommandSink, StateSource, TopicMapping
from ratchet_vla.contract.verified import write_verified

__all__ = [
    "SCHEMA",
    "ActionDim",
    "ActionSpace",
    "CameraSpec",
    "CommandSink",
    "ControlMode",
    "GripperSpec",
    "Limits",
    "Mismatch",
    "PolicySpec",
    "RobotContract",
    "RotationRepr",
    "SimulatorSpec",
    "StateField",
    "StateSource",
    "TopicMapping",
    "VerifiedFact",
    "Watchdog",
    "compatibility",
    "require_compatible",
    "write_verified",
]
