"""From a policy's actions to a robot's and back: the gripper's numbers, which every data set chose for itself.

Knows the two gripper conventions and the straight line between them. All other dimensions share their unit already, or
`ratchet_vla.contract.compatibility` has refused the pair.
"""

from __future__ import annotations

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32


def robot_actions(actions: Float32, spec: PolicySpec, contract: RobotContract) -> Float32:
    """Actions (…, D) float32 as `spec` numbers them -> the same as `contract` numbers them; the input is not changed.

    The policy's open becomes the robot's open and closed becomes closed, on a straight line through both: OpenVLA-OFT's
    1 = open and 0 = closed become LIBERO's -1 and +1. Where the numbers agree, `actions` itself is returned.

    Raises:
        RatchetError: compat.gripper or compat.gripper_polarity where one side has no gripper or no polarity.
    """
    return _translated(actions, spec, contract, back=False)


def policy_actions(actions: Float32, spec: PolicySpec, contract: RobotContract) -> Float32:
    """The way back: actions (…, D) float32 as `contract` numbers them -> as `spec` does. Raises as `robot_actions`."""
    return _translated(actions, spec, contract, back=True)


def _translated(actions: Float32, spec: PolicySpec, contract: RobotContract, back: bool) -> Float32:
    gripper = contract.action.gripper
    mine = gripper.dim if gripper else None
    if spec.gripper_dim != mine:
        raise RatchetError(
            "compat.gripper", f"policy's gripper is {spec.gripper_dim!r}, robot's {mine!r}", where=contract.name
        )
    if gripper is None or (spec.gripper_open, spec.gripper_closed) == (gripper.open, gripper.closed):
        return actions
    if spec.gripper_open is None or spec.gripper_closed is None or spec.gripper_open == spec.gripper_closed:
        raise RatchetError(
            "compat.gripper_polarity",
            "policy does not say which gripper value is open and which closed",
            where=contract.name,
            fix="state both in the checkpoint's configuration",
        )
    index = spec.action_names.index(gripper.dim)
    slope = (gripper.closed - gripper.open) / (spec.gripper_closed - spec.gripper_open)
    out = actions.copy()
    if back:
        out[..., index] = spec.gripper_open + (actions[..., index] - gripper.open) / slope
    else:
        out[..., index] = gripper.open + (actions[..., index] - spec.gripper_open) * slope
    return out
