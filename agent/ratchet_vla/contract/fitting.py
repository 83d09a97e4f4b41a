"""What a policy demands of a robot, and whether a contract gives it.

Knows a policy by its demands only: no weights, no network.
"""

from __future__ import annotations

import math
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
    found: list[Mismatch] = []
    names = {c.name for c in contract.cameras}
    for camera in policy.cameras:
        if camera not in names:
            found.append(
                Mismatch("compat.camera_missing", f"policy needs camera '{camera}', robot has {sorted(names)}")
            )
    fields = {s.name: s.size for s in contract.state}
    for name in policy.state:
        if name not in fields:
            found.append(Mismatch("compat.state_missing", f"policy needs state '{name}', robot has {sorted(fields)}"))
    size = sum(fields.get(n, 0) for n in policy.state)
    if policy.state and size != policy.state_size and all(n in fields for n in policy.state):
        found.append(
            Mismatch("compat.state_size", f"policy takes {policy.state_size} state values, robot gives {size}")
        )
    action = contract.action
    for code, mine, theirs in (
        ("compat.control_mode", policy.control_mode, action.control_mode),
        ("compat.rotation", policy.rotation, action.rotation),
        ("compat.frame", policy.frame, action.frame),
    ):
        if mine != theirs:
            found.append(Mismatch(code, f"policy commands {mine!r}, robot takes {theirs!r}"))
    dims = tuple(d.name for d in action.dims)
    if policy.action_names != dims:
        found.append(
            Mismatch("compat.action_dims", f"policy gives {list(policy.action_names)}, robot takes {list(dims)}")
        )
    else:
        for dim, unit in zip(action.dims, policy.action_units, strict=True):
            if dim.unit != unit:
                found.append(Mismatch("compat.action_unit", f"'{dim.name}' is {unit} in the policy, {dim.unit} here"))
    theirs_dim = action.gripper.dim if action.gripper else None
    if policy.gripper_dim != theirs_dim:
        found.append(Mismatch("compat.gripper", f"policy's gripper is {policy.gripper_dim!r}, robot's {theirs_dim!r}"))
    elif action.gripper and (
        policy.gripper_open is None or policy.gripper_closed is None or policy.gripper_open == policy.gripper_closed
    ):
        found.append(
            Mismatch("compat.gripper_polarity", "policy does not say which gripper values are open and closed")
        )
    if not math.isclose(policy.control_hz, contract.control_hz, rel_tol=1e-3):
        found.append(
            Mismatch(
                "compat.control_hz", f"policy was made for {policy.control_hz} Hz, robot runs {contract.control_hz}"
            )
        )
    return found


def require_compatible(policy: PolicySpec, contract: RobotContract) -> list[Mismatch]:
    """Refuse a misfit before any motion; returns what is worth a warning.

    Raises:
        RatchetError: compat.refused, listing every fatal mismatch.
    """
    found = compatibility(policy, contract)
    fatal = [m for m in found if m.fatal]
    if fatal:
        reasons = "; ".join(f"{m.code}: {m.message}" for m in fatal)
        raise RatchetError(
            "compat.refused",
            f"policy does not fit the robot: {reasons}",
            where=contract.name,
            fix="use a checkpoint made for this contract, or the contract that the checkpoint names",
        )
    return found
