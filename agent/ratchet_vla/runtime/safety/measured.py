"""Which state fields say where the arm is, and reading them.

Knows the contract's state fields. Knows no limits and no commands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32
from ratchet_vla.runtime import rotation

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Where the arm is. position: (3,) m of the end effector or (J,) of the joints; NaN where nothing measures it.

    orientation: (4,) unit quaternion; NaN where nothing measures it. gripper: in the action's unit; NaN if unknown.
    """

    position: Vector
    orientation: Vector
    gripper: float


class Gauge:
    """Reads a pose out of measured state.

    position_field, rotation_field, gripper_field: names of the state fields; empty where nothing measures it.
    """

    def __init__(self, contract: RobotContract, linear: list[int], gripper: int, *, orientation: bool) -> None:
        """linear: indices of the action dimensions that move a position; gripper: index, -1 for none.

        Raises:
            RatchetError: safety.no_measured_pose where none or several state fields could measure what is moved.
        """
        self._contract = contract
        limits, action = contract.limits, contract.action
        cartesian = action.control_mode.startswith("ee")
        unit = "m" if cartesian else action.dims[linear[0]].unit.split("/")[0]
        self.position_field = self._find(limits.position_state, (len(linear),), unit, "position")
        self.rotation_field = self._find(limits.rotation_state, (3, 4), "rad", "rotation") if orientation else ""
        self.gripper_field = self._gripper(gripper)

    def measure(self, state: Mapping[str, Float32]) -> Measured:
        """Pick the measured pose out of the state fields.

        Raises:
            RatchetError: safety.state for a missing field, a wrong size or a value that is not finite.
        """
        for field in self._contract.state:
            values = state.get(field.name)
            if values is None or np.shape(values) != (field.size,) or not np.isfinite(values).all():
                what = "is missing" if values is None else f"is {np.asarray(values).tolist()}"
                raise RatchetError("safety.state", f"state field {what}", where=field.name, fix="check the driver")
        position = np.asarray(state[self.position_field], np.float64)
        orientation = np.full(4, np.nan)
        if self.rotation_field:
            turned = np.asarray(state[self.rotation_field], np.float64)
            euler = self._contract.action.rotation == "euler_xyz"
            form = "quaternion_xyzw" if len(turned) == 4 else "euler_xyz" if euler else "axis_angle"
            orientation = rotation.to_quaternion(turned, form)
        gripper = float(state[self.gripper_field][0]) if self.gripper_field else math.nan
        return Measured(position, orientation, gripper)

    def _find(self, chosen: str, sizes: tuple[int, ...], unit: str, what: str) -> str:
        fields = self._contract.state
        if chosen:
            fits = [s.name for s in fields if s.name == chosen and s.size in sizes]
        else:
            quaternions = what == "rotation"
            fits = [s.name for s in fields if s.size in sizes and (s.unit == unit or (quaternions and s.size == 4))]
        if len(fits) != 1:
            found = f"{len(fits)} fit ({', '.join(fits)})" if fits else "none fits"
            raise RatchetError(
                "safety.no_measured_pose",
                f"the {what} that the actions move must be measured by one state field; {found}",
                where=self._contract.name,
                fix=f"name it in limits.{what}_state, size {' or '.join(map(str, sizes))}, unit {unit}",
            )
        return fits[0]

    def _gripper(self, index: int) -> str:
        if index < 0:
            return ""
        dim = self._contract.action.dims[index]
        fits = [s.name for s in self._contract.state if s.size == 1 and s.unit == dim.unit and s.name == dim.name]
        return fits[0] if fits else ""
