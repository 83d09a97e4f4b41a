"""A contract that reads differently from what its author meant moves an arm wrongly: every slip must be a refusal.

Pinned: each error code with the field it names; ids that depend on content alone; numbers that survive the YAML; every
reason for which a policy may not drive a robot, one at a time; both shipped contracts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratchet_vla.contract import PolicySpec, RobotContract, compatibility, require_compatible
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import presets

ROBOTS = Path(__file__).resolve().parents[3] / "robots"
Change = Callable[[dict[str, Any]], Any]


def raw(name: str = "libero") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROBOTS / f"{name}.yaml").read_text())
    return loaded


def written(data: Any, folder: Path) -> RobotContract:
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(data))
    return RobotContract.load(path)


def put(*keys: str | int, value: Any) -> Change:
    """A change that sets one value deep inside the contract."""

    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


def drop(*keys: str | int) -> Change:
    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def test_shipped_contracts_load() -> None:
    found = {p.stem: RobotContract.load(p) for p in ROBOTS.glob("*.yaml")}
    assert {"libero", "metaworld"} <= set(found)
    assert all(contract.name == stem for stem, contract in found.items())
    assert len({c.id for c in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        (put("colour", value="red"), "contract.unknown_field", "colour"),
        (put("cameras", 0, "widht", value=3), "contract.unknown_field", "did you mean 'width'"),
        (drop("control_hz"), "contract.missing_field", "control_hz"),
        (drop("action", "dims", 1, "unit"), "contract.missing_field", r"dims\[1\]"),
        (put("control_hz", value="twenty"), "contract.wrong_type", "control_hz"),
        (put("control_hz", value=True), "contract.wrong_type", "control_hz"),
        (put("schema", value=True), "contract.wrong_type", "schema"),
        (put("cameras", 0, "width", value=96.0), "contract.wrong_type", "width"),
        (put("cameras", 0, "mirror", value=1), "contract.wrong_type", "mirror"),
        (put("cameras", value={}), "contract.wrong_type", "cameras"),
        (put("limits", value=[1]), "contract.wrong_type", "limits"),
        (put("limits", "velocity", value=0.5), "contract.wrong_type", "velocity"),
        (put("name", value=None), "contract.wrong_type", "name"),
        (put("schema", value=2), "contract.bad_value", "schema"),
        (put("control_hz", value=0), "contract.bad_value", "control_hz"),
        (put("control_hz", value=math.nan), "contract.bad_value", "control_hz"),
        (put("control_hz", value=math.inf), "contract.bad_value", "control_hz"),
        (put("cameras", 0, "rotate", value=45), "contract.bad_value", "rotate"),
        (put("cameras", 0, "rotate", value=False), "contract.bad_value", "rotate"),
        (put("cameras", 0, "encoding", value="mono8"), "contract.bad_value", "encoding"),
        (put("cameras", 0, "encoding", value=["rgb8"]), "contract.bad_value", "encoding"),
        (put("cameras", 1, "name", value="agentview"), "contract.bad_value", "agentview"),
        (put("cameras", 0, "height", value=0), "contract.bad_value", "cameras.agentview"),
        (put("cameras", 0, "position", value=[0.1, 0.2]), "contract.bad_value", "cameras.agentview"),
        (put("state", 0, "name", value="gripper"), "contract.bad_value", "state"),
        (put("state", 0, "size", value=0), "contract.bad_value", "state.eef_position"),
        (put("action", "dims", value=[]), "contract.bad_value", "action.dims"),
        (put("action", "dims", 0, "name", value="dy"), "contract.bad_value", "action.dims"),
        (put("action", "dims", 0, "low", value=0.05), "contract.bad_value", "action.dims.dx"),
        (put("action", "dims", 0, "high", value=math.inf), "contract.bad_value", "action.dims.dx"),
        (put("action", "dims", 0, "command_scale", value=-1.0), "contract.bad_value", "action.dims.dx"),
        (put("action", "dims", 0, "command_scale", value=math.inf), "contract.bad_value", "action.dims.dx"),
        (put("action", "control_mode", value="torque"), "contract.bad_value", "control_mode"),
        (put("action", "gripper", "dim", value="hand"), "contract.bad_value", "action.gripper.dim"),
        (put("action", "gripper", "closed", value=-1.0), "contract.bad_value", "action.gripper"),
        (put("limits", "velocity", value=[1.0]), "contract.bad_value", "limits.velocity"),
        (put("limits", "acceleration", 2, value=0.0), "contract.bad_value", "limits.acceleration"),
        (put("limits", "workspace_low", 0, value=0.6), "contract.bad_value", "limits.workspace_low"),
        (put("limits", "workspace_low", value=[0.1]), "contract.bad_value", "limits.workspace_low"),
        (put("limits", "position_low", value=[0.1]), "contract.bad_value", "limits.position_low"),
        (put("watchdog", "stop_time", value=0), "contract.bad_value", "watchdog.stop_time"),
        (put("watchdog", "policy_timeout", value=math.inf), "contract.bad_value", "watchdog.policy_timeout"),
        (put("simulator", "steps_per_control", value=0), "contract.bad_value", "simulator"),
        (put("simulator", "settle_steps", value=-1), "contract.bad_value", "simulator"),
    ],
)
def test_every_slip_is_refused_by_name(change: Change, code: str, names: str, tmp_path: Path) -> None:
    data = raw()
    change(data)
    with pytest.raises(RatchetError, match=names) as refused:
        written(data, tmp_path)
    assert refused.value.code == code
    assert "robot.yaml" in refused.value.where


def test_a_cartesian_contract_needs_a_workspace(tmp_path: Path) -> None:
    data = raw()
    del data["limits"]["workspace_low"], data["limits"]["workspace_high"]
    with pytest.raises(RatchetError, match=r"contract\.bad_value.*workspace") as refused:
        written(data, tmp_path)
    assert refused.value.fix
    data["action"]["control_mode"] = "joint_delta"
    del data["ros"]  # wired for Cartesian commands
    assert written(data, tmp_path).limits.workspace_low == ()


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "just words"])
def test_files_that_hold_no_contract(text: str, tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(RatchetError) as refused:
        RobotContract.load(path)
    assert refused.value.code == ("contract.bad_yaml" if text == "a: [1" else "contract.wrong_type")


def test_a_missing_file_names_those_that_exist() -> None:
    with pytest.raises(RatchetError, match=r"contract\.missing_file.*libero\.yaml, metaworld\.yaml"):
        RobotContract.load(ROBOTS / "libro.yaml")


def test_an_unknown_camera_names_those_that_exist() -> None:
    contract = RobotContract.load(ROBOTS / "libero.yaml")
    assert contract.camera("wrist").source == "robot0_eye_in_hand"
    with pytest.raises(RatchetError, match=r"contract\.unknown_camera.*agentview, wrist"):
        contract.camera("front")


def reversed_keys(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: reversed_keys(v) for k, v in reversed(data.items())}
    return [reversed_keys(v) for v in data] if isinstance(data, list) else data


@pytest.mark.parametrize("name", ["libero", "metaworld"])
def test_the_id_depends_on_content_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "other_name.yaml"
    path.write_text("# another comment\n" + yaml.safe_dump(reversed_keys(raw(name)), sort_keys=False))
    original = RobotContract.load(ROBOTS / f"{name}.yaml")
    assert RobotContract.load(path) == original
    assert RobotContract.load(path).id == original.id


def test_every_field_moves_the_id() -> None:
    contract = RobotContract.load(ROBOTS / "libero.yaml")
    camera = dataclasses.replace(contract.cameras[0], mirror=True)
    changed = [
        dataclasses.replace(contract, control_hz=20.000001),
        dataclasses.replace(contract, cameras=(camera, contract.cameras[1])),
        dataclasses.replace(contract, cameras=contract.cameras[::-1]),
        dataclasses.replace(contract, action=dataclasses.replace(contract.action, gripper=None)),
        dataclasses.replace(contract, watchdog=dataclasses.replace(contract.watchdog, stop_time=0.3)),
    ]
    assert len({contract.id, *(c.id for c in changed)}) == 6


finite = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(rate=finite, low=finite, span=finite, limit=st.one_of(finite, st.just(math.inf)))
def test_numbers_survive_the_file(tmp_path: Path, rate: float, low: float, span: float, limit: float) -> None:
    data = raw()
    data["control_hz"] = rate
    data["action"]["dims"][0] |= {"low": low, "high": low + span}
    data["limits"]["velocity"][0] = limit
    contract = written(data, tmp_path)
    assert contract.control_hz == rate
    assert (contract.action.dims[0].low, contract.action.dims[0].high) == (low, low + span)
    assert contract.limits.velocity[0] == limit


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(value=st.floats().filter(lambda x: not x > 0))
def test_no_time_or_rate_below_zero_gets_through(tmp_path: Path, value: float) -> None:
    for keys in (("control_hz",), ("watchdog", "action_max_age"), ("limits", "velocity", 0)):
        data = raw()
        put(*keys, value=value)(data)
        with pytest.raises(RatchetError, match=r"contract\.bad_value"):
            written(data, tmp_path)


# Whether a policy may drive a robot.


@pytest.fixture
def contract() -> RobotContract:
    return RobotContract.load(ROBOTS / "libero.yaml")


@pytest.fixture
def spec(contract: RobotContract) -> PolicySpec:
    return presets.spec_for(
        contract, cameras=["agentview"], state=["eef_position", "gripper"], chunk=8, statistics_key="libero"
    )


def test_a_policy_made_for_the_contract_fits(spec: PolicySpec, contract: RobotContract) -> None:
    assert compatibility(spec, contract) == []
    assert require_compatible(spec, contract) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"cameras": ("agentview", "front")}, "compat.camera_missing"),
        ({"state": ("joints",)}, "compat.state_missing"),
        ({"state_size": 6}, "compat.state_size"),
        ({"control_mode": "ee_absolute"}, "compat.control_mode"),
        ({"rotation": "euler_xyz"}, "compat.rotation"),
        ({"frame": "world"}, "compat.frame"),
        ({"action_names": ("dy", "dx", "dz", "drx", "dry", "drz", "gripper")}, "compat.action_dims"),
        ({"action_names": ("dx", "dy")}, "compat.action_dims"),
        ({"action_units": ("mm", "m", "m", "rad", "rad", "rad", "normalised")}, "compat.action_unit"),
        ({"gripper_dim": None}, "compat.gripper"),
        ({"gripper_dim": "dx"}, "compat.gripper"),
        ({"gripper_open": None}, "compat.gripper_polarity"),
        ({"gripper_closed": -1.0}, "compat.gripper_polarity"),
        ({"gripper_closed": None}, "compat.gripper_polarity"),
        ({"control_hz": 10.0}, "compat.control_hz"),
    ],
)
def test_each_misfit_is_found_alone(
    spec: PolicySpec, contract: RobotContract, change: dict[str, Any], code: str
) -> None:
    misfit = dataclasses.replace(spec, **change)
    assert [m.code for m in compatibility(misfit, contract)] == [code]
    with pytest.raises(RatchetError, match=rf"compat\.refused.*{code}") as refused:
        require_compatible(misfit, contract)
    assert refused.value.where == contract.name


def test_all_misfits_are_listed_at_once(spec: PolicySpec, contract: RobotContract) -> None:
    misfit = dataclasses.replace(spec, control_hz=5.0, frame="world", cameras=("front",))
    with pytest.raises(RatchetError) as refused:
        require_compatible(misfit, contract)
    for code in ("compat.control_hz", "compat.frame", "compat.camera_missing"):
        assert code in refused.value.what


def test_another_robots_policy_is_refused(spec: PolicySpec) -> None:
    with pytest.raises(RatchetError, match=r"compat\.refused"):
        require_compatible(spec, RobotContract.load(ROBOTS / "metaworld.yaml"))
