"""What a policy demands of a robot, and whether a contract gives it.

Knows a policy by its demands only: no weights, no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ratchet_vla.contract.robot import RobotContract
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class PolicySpec:
    """What a policy demands of a robot. Comes with the checkpoint, never guessed.

    cameras: contract camera names in the order of the policy's image inputs.
    image_size: square input side in pixels after the policy's own preparation.
    state: state field names in input order; empty where the policy takes no proprioception.
    action_names: names of its action dimensions in output order.
    action_units: unit per dimension; the checkpoint's statistics are in these.
    gripper_open, gripper_closed: the policy's own gripper numbers; None where it has none.
    chunk: K; control_hz: rate at which the K actions are meant to run.
    statistics_key: which normalisation statistics are in force.
    bins: number of action bins per dimension; 0 where the head gives no probabilities.
    """

    cameras: tuple[str, ...]
    image_size: int
    state: tuple[str, ...]
    state_size: int
    control_mode: str
    rotation: str
    frame: str
    action_names: tuple[str, ...]
    action_units: tuple[str, ...]
    gripper_dim: str | None
    gripper_open: float | None
    gripper_closed: float | None
    chunk: int
    control_hz: float
    statistics_key: str
    bins: int


@dataclass(frozen=True)
class Mismatch:
    """One reason why a policy may not drive a robot. `code` is stable; `fatal` False means a warning."""

    code: str
    message: str
    fatal: bool = True


def compatibility(policy: PolicySpec, contract: RobotContract) -> list[Mismatch]:
    """Every way in which the policy does not fit the contract; empty when it fits."""
    return [
        *_camera_mismatches(policy, contract),
        *_state_mismatches(policy, contract),
        *_control_mismatches(policy, contract),
        *_dimension_mismatches(policy, contract),
        *_gripper_mismatches(policy, contract),
        *_rate_mismatches(policy, contract),
    ]


def require_compatible(policy: PolicySpec, contract: RobotContract) -> list[Mismatch]:
    """Refuse a misfit before any motion; returns what is worth a warning.

    Raises:
        RatchetError: compat.refused, listing every fatal mismatch.
    """
    mismatches = compatibility(policy, contract)
    fatal = [mismatch for mismatch in mismatches if mismatch.fatal]
    if fatal:
        reasons = "; ".join(f"{mismatch.code}: {mismatch.message}" for mismatch in fatal)
        raise RatchetError(
            "compat.refused",
            f"policy does not fit the robot: {reasons}",
            where=contract.name,
            fix="use a checkpoint made for this contract, or the contract that the checkpoint names",
        )
    return mismatches


def _camera_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    robot_cameras = {camera.name for camera in contract.cameras}
    for name in policy.cameras:
        if name not in robot_cameras:
            yield Mismatch("compat.camera_missing", f"policy needs camera '{name}', robot has {sorted(robot_cameras)}")


def _state_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    robot_sizes = {field.name: field.size for field in contract.state}
    missing = [name for name in policy.state if name not in robot_sizes]
    for name in missing:
        yield Mismatch("compat.state_missing", f"policy needs state '{name}', robot has {sorted(robot_sizes)}")
    # The size is worth a word only where every field is there.
    if not policy.state or missing:
        return
    size = sum(robot_sizes[name] for name in policy.state)
    if size != policy.state_size:
        yield Mismatch("compat.state_size", f"policy takes {policy.state_size} state values, robot gives {size}")


def _control_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    action = contract.action
    for code, commanded, accepted in (
        ("compat.control_mode", policy.control_mode, action.control_mode),
        ("compat.rotation", policy.rotation, action.rotation),
        ("compat.frame", policy.frame, action.frame),
    ):
        if commanded != accepted:
            yield Mismatch(code, f"policy commands {commanded!r}, robot takes {accepted!r}")


def _dimension_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    dims = contract.action.dims
    robot_names = tuple(dim.name for dim in dims)
    if policy.action_names != robot_names:
        message = f"policy gives {list(policy.action_names)}, robot takes {list(robot_names)}"
        yield Mismatch("compat.action_dims", message)
        return
    for dim, policy_unit in zip(dims, policy.action_units, strict=True):
        if dim.unit != policy_unit:
            yield Mismatch("compat.action_unit", f"'{dim.name}' is {policy_unit} in the policy, {dim.unit} here")


def _gripper_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    gripper = contract.action.gripper
    robot_dim = gripper.dim if gripper else None
    if policy.gripper_dim != robot_dim:
        yield Mismatch("compat.gripper", f"policy's gripper is {policy.gripper_dim!r}, robot's {robot_dim!r}")
        return
    has_no_polarity = (
        policy.gripper_open is None or policy.gripper_closed is None or policy.gripper_open == policy.gripper_closed
    )
    if gripper and has_no_polarity:
        yield Mismatch("compat.gripper_polarity", "policy does not say which gripper values are open and closed")


def _rate_mismatches(policy: PolicySpec, contract: RobotContract) -> Iterator[Mismatch]:
    if not math.isclose(policy.control_hz, contract.control_hz, rel_tol=1e-3):
        message = f"policy was made for {policy.control_hz} Hz, robot runs {contract.control_hz}"
        yield Mismatch("compat.control_hz", message)
