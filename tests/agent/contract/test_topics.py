"""A contract that is wired wrongly must be refused when it is read, not found out by an arm.

Pinned: every shipped contract of an arm is sound and names every dimension and field once; each slip in the mapping is
refused with the line concerned; contracts without ROS stay valid. No time, no randomness.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.safety.filter import SafetyFilter

ROBOTS = Path(__file__).resolve().parents[3] / "robots"
BASE = yaml.safe_load((ROBOTS / "ur5e.yaml").read_text())
CARTESIAN = yaml.safe_load((ROBOTS / "franka_fr3.yaml").read_text())


@pytest.mark.parametrize("path", sorted(ROBOTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_contract_is_wired_and_can_be_stopped(path: Path) -> None:
    contract = RobotContract.load(path)
    assert contract.ros is not None
    assert {s.field for s in contract.ros.state} == {s.name for s in contract.state}
    assert contract.ros.driver
    SafetyFilter(contract)
    assert RobotContract.from_dict(contract.to_dict()) == contract


def test_a_contract_without_ros_is_valid() -> None:
    data = copy.deepcopy(BASE)
    del data["ros"]
    assert RobotContract.from_dict(data).ros is None


def slips() -> list[tuple[str, Any]]:
    def change(path: str, value: Any, base: Any = BASE) -> Any:
        data = copy.deepcopy(base)
        place = data
        *keys, last = path.split("/")
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            del place[int(last) if last.isdigit() else last]
        else:
            place[int(last) if last.isdigit() else last] = value
        return data

    everything = {**CARTESIAN["ros"]["commands"][0], "dims": [d["name"] for d in CARTESIAN["action"]["dims"]]}
    return [
        ("cameras.front", change("cameras/0/topic", "")),
        ("state.joints", change("state/0/topic", "")),
        ("state.joints", change("ros/state/0", None)),
        ("state.joints", change("ros/state/0/field", "nobody")),
        ("ros.state.joints", change("ros/state/0/names/0", None)),
        ("ros.state.joints", change("ros/state/0/names/0", "elbow_joint")),
        ("ros.state.joints", change("ros/state/0/part", "orientation")),
        ("ros.state.tcp_position", change("ros/state/1/part", "velocity")),
        ("ros.state.joints", change("ros/state/0/scale", 0.0)),
        ("ros.commands", change("ros/commands/0/dims/0", None)),
        ("ros.commands", change("ros/commands/0/dims/0", "elbow_joint")),
        ("ros.commands", change("ros/commands/0/topic", "")),
        ("names and dims", change("ros/commands/0/names/0", None)),
        ("does not carry", change("ros/commands/0/kind", "twist_stamped")),
        ("takes the gripper alone", change("ros/commands/0/kind", "gripper_command")),
        ("scale and offset", change("ros/commands/0/scale", 0.0)),
        ("not negative", change("ros/commands/1/max_effort", -1.0)),
        ("x, y, z and", change("ros/commands", [everything], CARTESIAN)),
        ("does not carry", change("ros/commands/0/kind", "joint_trajectory", CARTESIAN)),
    ]


@pytest.mark.parametrize(("names", "data"), slips(), ids=lambda v: v if isinstance(v, str) else "")
def test_each_slip_is_refused(names: str, data: Any) -> None:
    with pytest.raises(RatchetError, match=names) as refused:
        RobotContract.from_dict(data)
    assert refused.value.code == "contract.bad_value"
    assert refused.value.fix
