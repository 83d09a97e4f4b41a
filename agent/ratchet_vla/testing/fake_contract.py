"""Contracts of arms that do not exist, for FakeArm: one per control mode, with finite limits everywhere.

Knows the contract format. For tests and benchmarks; no real robot has these numbers.
"""

from __future__ import annotations

from typing import Any

from ratchet_vla.contract import RobotContract

MODES = ("ee_delta", "ee_absolute", "joint_delta", "joint_absolute", "joint_velocity")
HZ = 20.0


def arm(
    mode: str = "ee_delta",
    *,
    rotation: str = "axis_angle",
    jerk: bool = False,
    ramp: float = 0.0,
    hz: float = HZ,
    camera: int = 8,
    **watchdog: float,
) -> RobotContract:
    """Three linear dimensions (or joints), a rotation where the mode is Cartesian, and a gripper with finite rate.

    rotation: as in the contract, "none" for three dimensions and the gripper. jerk: with jerk limits. ramp: seconds.
    camera: side of its one square camera in pixels. watchdog: times in seconds, over the defaults.
    """
    cartesian = mode.startswith("ee")
    period = 1.0 / hz
    unit = "m" if cartesian else "rad"
    speed, acceleration, harsh = (0.4, 2.0, 40.0) if cartesian else (1.5, 8.0, 160.0)
    if mode.endswith("delta"):
        low = -speed * period
        high = speed * period
    elif mode.endswith("absolute"):
        low = -0.9
        high = 0.9
    else:
        low = -speed
        high = speed
    names = ["x", "y", "z"] if cartesian else ["j0", "j1", "j2"]
    action_unit = f"{unit}/s" if mode == "joint_velocity" else unit
    dims: list[dict[str, Any]] = [{"name": n, "unit": action_unit, "low": low, "high": high} for n in names]
    limits: dict[str, Any] = {"velocity": [speed] * 3, "acceleration": [acceleration] * 3, "jerk": [harsh] * 3}
    state = [{"name": "place", "size": 3, "unit": unit}]
    turns = {"none": 0, "quaternion_xyzw": 4}.get(rotation, 3) if cartesian else 0
    if turns:
        reach = 1.2 * period if mode == "ee_delta" else 3.2 if turns == 3 else 1.0
        turn_unit = "quaternion" if turns == 4 else "rad"
        dims += [{"name": f"r{i}", "unit": turn_unit, "low": -reach, "high": reach} for i in range(turns)]
        for key, value in (("velocity", 1.2), ("acceleration", 6.0), ("jerk", 120.0)):
            limits[key] += [value] * turns
        state.append({"name": "turned", "size": turns, "unit": turn_unit})
    dims.append({"name": "gripper", "unit": "opening", "low": 0.0, "high": 1.0})
    limits["velocity"].append(3.0)
    limits["acceleration"].append(float("inf"))
    limits["jerk"].append(float("inf"))
    if not jerk:
        limits["jerk"] = []
    if cartesian:
        limits |= {"workspace_low": [-0.5] * 3, "workspace_high": [0.5] * 3}
    else:
        limits |= {"position_low": [-0.8] * 3, "position_high": [0.8] * 3}
    times = {"observation_max_age": 0.2, "action_max_age": 0.4, "policy_timeout": 0.5, "stop_time": 0.4} | watchdog
    return RobotContract.from_dict(
        {
            "schema": 1,
            "name": f"test arm, {mode}",
            "control_hz": hz,
            "cameras": [{"name": "front", "width": camera, "height": camera}],
            "state": [*state, {"name": "gripper", "size": 1, "unit": "opening"}],
            "action": {
                "control_mode": mode,
                "rotation": rotation if cartesian else "none",
                "frame": "base",
                "dims": dims,
                "gripper": {"dim": "gripper", "open": 1.0, "closed": 0.0},
            },
            "limits": {**limits, "ramp_time": ramp},
            "watchdog": times,
        }
    )
