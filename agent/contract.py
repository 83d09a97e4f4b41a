"""RobotContract: the one description of a robot, and the check that a policy fits it.

Knows cameras, state fields, action dimensions, rates, limits and watchdog times, with units and frames.
Nothing else in the code knows a topic name, a joint count or a gripper sign. Knows no simulator and no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agent.errors import RatchetError
from agent.wiring import RosWiring, problems

ControlMode = Literal["ee_delta", "ee_absolute", "joint_delta", "joint_absolute", "joint_velocity"]
RotationRepr = Literal["none", "axis_angle", "euler_xyz", "quaternion_xyzw"]
SCHEMA = 1


@dataclass(frozen=True)
class CameraSpec:
    """One camera. Pixels reach the policy upright, RGB, at (height, width); the driver applies `rotate` and `mirror`.

    rotate: degrees counter-clockwise that turn the raw image upright: 0, 90, 180 or 270.
    mirror: True where the raw image must be flipped left-right after the rotation.
    source: the simulator's camera name or the device's serial; empty where the topic says it all.
    position: (3,) m, world frame, where a simulated camera is moved to; empty leaves it where the model has it.
    """

    name: str
    width: int
    height: int
    topic: str = ""
    source: str = ""
    encoding: Literal["rgb8", "bgr8"] = "rgb8"
    rotate: Literal[0, 90, 180, 270] = 0
    mirror: bool = False
    position: tuple[float, ...] = ()
    calibration_id: str = ""


@dataclass(frozen=True)
class StateField:
    """One proprioceptive quantity: `size` numbers in `unit`, expressed in `frame`."""

    name: str
    size: int
    unit: str
    frame: str = ""
    topic: str = ""


@dataclass(frozen=True)
class ActionDim:
    """One action dimension in physical units.

    low, high: the range the controller accepts for one control step.
    command_scale: physical units per unit of the driver's own command (0.05 where command 1.0 moves 0.05 m).
    """

    name: str
    unit: str
    low: float
    high: float
    command_scale: float = 1.0


@dataclass(frozen=True)
class GripperSpec:
    """Which action dimension is the gripper and what its numbers mean, in the contract's own units.

    binary: True where the hardware knows only open and closed, so that the sign against the middle decides.
    """

    dim: str
    open: float
    closed: float
    binary: bool = False


@dataclass(frozen=True)
class ActionSpace:
    """The action vector: order of `dims` is the order of every action array."""

    control_mode: ControlMode
    rotation: RotationRepr
    frame: str
    dims: tuple[ActionDim, ...]
    gripper: GripperSpec | None = None

    @property
    def size(self) -> int:
        return len(self.dims)


@dataclass(frozen=True)
class Limits:
    """Bounds that the safety stage enforces, per action dimension unless said otherwise.

    velocity: units/s; acceleration: units/s^2; one value per action dimension (gripper included, inf to exempt).
    workspace_low, workspace_high: (3,) m in the action frame, box for the end effector; empty for joint modes.
    position_low, position_high: joint limits in the dimension's unit for joint modes, one value per dimension that is
        not the gripper; empty otherwise.
    jerk: units/s^3, one value per action dimension (inf to exempt one); empty where the arm needs none.
    ramp_time: seconds over which the permitted speed grows from zero to the limit at a start, after a hold and after a
        hand-back; 0 leaves the start to the acceleration limit alone.
    position_state, rotation_state: names of the state fields that measure what the actions move: the end effector's
        position and orientation, or the joints (`position_state`). Empty takes the only field that fits.
    """

    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    workspace_low: tuple[float, ...] = ()
    workspace_high: tuple[float, ...] = ()
    position_low: tuple[float, ...] = ()
    position_high: tuple[float, ...] = ()
    jerk: tuple[float, ...] = ()
    ramp_time: float = 1.0
    position_state: str = ""
    rotation_state: str = ""


@dataclass(frozen=True)
class Watchdog:
    """Ages in seconds beyond which the robot holds, and how long a controlled stop may take.

    observation_max_age: age of the measured state, and of the frames a decision is made on.
    action_max_age: how long after the moment it was predicted for an action may still be sent.
    policy_timeout: how long an answer of the policy may take. stop_time: from full speed to standstill.
    """

    observation_max_age: float
    action_max_age: float
    policy_timeout: float
    stop_time: float


@dataclass(frozen=True)
class SimulatorSpec:
    """How the simulator realises this contract: which package, and simulator steps per control step."""

    kind: Literal["libero", "metaworld"]
    steps_per_control: int = 1
    settle_steps: int = 0


@dataclass(frozen=True)
class VerifiedFact:
    """Something that was measured on this robot: what, how much in which unit, and when (ISO 8601, UTC)."""

    name: str
    value: float
    unit: str
    date: str


@dataclass(frozen=True)
class RobotContract:
    """Everything that the rest of the system may assume about one robot. See `robots/*.yaml`."""

    schema: int
    name: str
    control_hz: float
    cameras: tuple[CameraSpec, ...]
    state: tuple[StateField, ...]
    action: ActionSpace
    limits: Limits
    watchdog: Watchdog
    simulator: SimulatorSpec | None = None
    description: str = ""
    ros: RosWiring | None = None
    verified: tuple[VerifiedFact, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> RobotContract:
        """Read and validate a contract.

        Raises:
            RatchetError: contract.missing_file, contract.bad_yaml, contract.unknown_field, contract.missing_field,
                contract.wrong_type, contract.bad_value; each names file and field.
        """
        path = Path(path)
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
            raise RatchetError(
                "contract.missing_file", "no such contract", where=str(path), fix=f"contracts there: {known}"
            )
        try:
            raw = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise RatchetError(
                "contract.bad_yaml", str(error), where=str(path), fix="correct the YAML syntax"
            ) from None
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Any, where: str = "contract", *, rules: bool = True) -> RobotContract:
        """Validate plain data, such as `to_dict` gives or YAML holds; raises like `load`.

        rules: False checks names and types only, for a contract that was in force when an older version recorded.
        """
        contract: RobotContract = _build(cls, raw, where)
        if rules:
            contract._validate(where)
        return contract

    def to_dict(self) -> dict[str, Any]:
        """Plain data with lists for tuples; limits may be infinite."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @property
    def id(self) -> str:
        """SHA-256 of the contract's content; comments, key order in the YAML and measurements do not matter."""
        content = {k: v for k, v in dataclasses.asdict(self).items() if k != "verified"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def camera(self, name: str) -> CameraSpec:
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise RatchetError(
            "contract.unknown_camera",
            f"no camera '{name}'",
            where=self.name,
            fix=f"cameras: {', '.join(c.name for c in self.cameras)}",
        )

    def _validate(self, where: str) -> None:
        def refuse(field_name: str, what: str, fix: str) -> typing.NoReturn:
            raise RatchetError("contract.bad_value", what, where=f"{where}: {field_name}", fix=fix)

        if self.schema != SCHEMA:
            refuse("schema", f"schema {self.schema} is not supported", f"this version reads schema {SCHEMA}")
        if not 0 < self.control_hz < math.inf:
            refuse("control_hz", f"{self.control_hz} is not a rate", "give the control rate in Hz, above 0")
        for kind, names in (
            ("cameras", [c.name for c in self.cameras]),
            ("state", [s.name for s in self.state]),
            ("action.dims", [d.name for d in self.action.dims]),
        ):
            doubled = {n for n in names if names.count(n) > 1}
            if doubled:
                refuse(kind, f"name {sorted(doubled)[0]!r} occurs twice", "names must be unique")
        for camera in self.cameras:
            if camera.width <= 0 or camera.height <= 0:
                refuse(f"cameras.{camera.name}", "width and height must be positive", "give the size in pixels")
            if len(camera.position) not in (0, 3) or not all(map(math.isfinite, camera.position)):
                refuse(f"cameras.{camera.name}", "position is not a point", "give 3 values in m, or none")
        for field in self.state:
            if field.size <= 0:
                refuse(f"state.{field.name}", "size must be positive", "give how many numbers it has")
        if not self.action.dims:
            refuse("action.dims", "no action dimensions", "list at least one")
        for dim in self.action.dims:
            if not (math.isfinite(dim.low) and math.isfinite(dim.high) and dim.low < dim.high):
                refuse(f"action.dims.{dim.name}", f"range [{dim.low}, {dim.high}] is empty or not finite", "low < high")
            if not 0 < dim.command_scale < math.inf:
                refuse(f"action.dims.{dim.name}", "command_scale must be positive", "give physical units per command")
        gripper = self.action.gripper
        if gripper is not None:
            if gripper.dim not in [d.name for d in self.action.dims]:
                refuse("action.gripper.dim", f"no action dimension '{gripper.dim}'", "name one of action.dims")
            if gripper.open == gripper.closed or not (math.isfinite(gripper.open) and math.isfinite(gripper.closed)):
                refuse("action.gripper", "open and closed must be two finite numbers", "give the polarity")
        for name in ("velocity", "acceleration", "jerk"):
            values = getattr(self.limits, name)
            if name == "jerk" and not values:
                continue
            if len(values) != self.action.size:
                refuse(f"limits.{name}", f"{len(values)} values for {self.action.size} dimensions", "give one each")
            if any(not v > 0 for v in values):
                refuse(f"limits.{name}", "limits must be positive", "use .inf to exempt a dimension")
        for low, high in (("workspace_low", "workspace_high"), ("position_low", "position_high")):
            lo, hi = getattr(self.limits, low), getattr(self.limits, high)
            if len(lo) != len(hi) or any(not a < b for a, b in zip(lo, hi, strict=True)):
                refuse(f"limits.{low}", f"{low} and {high} do not form a box", "same length, low < high")
        if not 0 <= self.limits.ramp_time < math.inf:
            refuse("limits.ramp_time", f"{self.limits.ramp_time} is not a duration", "give seconds, 0 for no ramp")
        for name in ("position_state", "rotation_state"):
            chosen = getattr(self.limits, name)
            if chosen and chosen not in [s.name for s in self.state]:
                refuse(f"limits.{name}", f"no state field '{chosen}'", "name one of the contract's state fields")
        if self.action.control_mode.startswith("ee") and len(self.limits.workspace_low) != 3:
            refuse("limits.workspace_low", "a Cartesian contract needs a workspace box", "give 3 values in m")
        for name in ("observation_max_age", "action_max_age", "policy_timeout", "stop_time"):
            if not 0 < getattr(self.watchdog, name) < math.inf:
                refuse(f"watchdog.{name}", "times must be positive and finite", "give seconds")
        if self.simulator and (self.simulator.steps_per_control < 1 or self.simulator.settle_steps < 0):
            refuse("simulator", "at least one step per control step, and no negative settling", "give whole numbers")
        if self.ros is not None:
            for field_name, what, fix in problems(
                self.ros,
                [(c.name, c.topic) for c in self.cameras],
                [(s.name, s.size, s.topic) for s in self.state],
                self.action.control_mode,
                self.action.rotation,
                [d.name for d in self.action.dims],
                gripper.dim if gripper else "",
            ):
                refuse(field_name, what, fix)


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


def write_verified(path: Path, facts: Sequence[VerifiedFact]) -> None:
    """Put measured facts into a contract's file; those of the same name are replaced, everything else stays as it is,
    comments included. The file is exchanged at once or not at all.

    Raises:
        RatchetError: what `RobotContract.load` raises; contract.not_written.
    """
    contract = RobotContract.load(path)
    fresh = {f.name for f in facts}
    merged = [f for f in contract.verified if f.name not in fresh] + list(facts)
    kept: list[str] = []
    inside = False
    for line in path.read_text().splitlines():
        inside = line.startswith("verified:") or (inside and (not line.strip() or line[:1] in (" ", "-", "#")))
        if not inside:
            kept.append(line)
    block = yaml.safe_dump({"verified": [dataclasses.asdict(f) for f in merged]}, sort_keys=False)
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text("\n".join(kept).rstrip() + "\n" + block)
        changed = RobotContract.load(scratch)
        if changed.id != contract.id:
            raise RatchetError("contract.not_written", "the contract would have changed", where=str(path))
        scratch.rename(path)
    except OSError as error:
        raise RatchetError("contract.not_written", str(error), where=str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def _build(cls: type[Any], raw: Any, where: str) -> Any:
    """Construct a frozen dataclass from plain YAML data, refusing what it does not know."""
    if not isinstance(raw, dict):
        raise RatchetError("contract.wrong_type", f"expected a mapping, got {type(raw).__name__}", where=where)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known fields: {', '.join(known)}"
            raise RatchetError("contract.unknown_field", f"unknown field '{key}'", where=where, fix=hint)
    values: dict[str, Any] = {}
    for name, spec in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RatchetError("contract.missing_field", f"field '{name}' is missing", where=where, fix="add it")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RatchetError("contract.wrong_type", f"expected a list, got {value!r}", where=where)
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise RatchetError(
                "contract.bad_value",
                f"{value!r} is not allowed",
                where=where,
                fix=f"one of {', '.join(map(str, args))}",
            )
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise RatchetError("contract.bad_value", "NaN is not a value", where=where, fix="give a number")
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RatchetError("contract.wrong_type", f"expected {hint.__name__}, got {value!r}", where=where)
