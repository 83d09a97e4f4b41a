"""Whether a contract's fields fit each other: ranges, names, boxes, times, and each field's way over ROS.

Knows the rules between fields. Knows no file; the first problem found is the one that is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ratchet_vla.contract.specs import SCHEMA, ContractSpec, Limits, Watchdog
from ratchet_vla.contract.topics import CommandSink, StateSource, TopicMapping
from ratchet_vla.errors import RatchetError


@dataclass(frozen=True)
class Problem:
    """One thing that does not fit: the field, what is wrong with it, and what to do."""

    field: str
    what: str
    fix: str


def require_sound(contract: ContractSpec, where: str) -> None:
    """Refuse a contract whose fields do not fit each other.

    Raises:
        RatchetError: contract.bad_value, naming file and field of the first problem.
    """
    for problem in problems(contract):
        raise RatchetError("contract.bad_value", problem.what, where=f"{where}: {problem.field}", fix=problem.fix)


def problems(contract: ContractSpec) -> Iterator[Problem]:
    """Everything that does not fit, one problem at a time: a later rule may rely on those before it."""
    if contract.schema != SCHEMA:
        yield Problem("schema", f"schema {contract.schema} is not supported", f"this version reads schema {SCHEMA}")
    if not 0 < contract.control_hz < math.inf:
        yield Problem("control_hz", f"{contract.control_hz} is not a rate", "give the control rate in Hz, above 0")
    yield from _doubled("cameras", [camera.name for camera in contract.cameras])
    yield from _doubled("state", [field.name for field in contract.state])
    yield from _doubled("action.dims", [dim.name for dim in contract.action.dims])
    yield from _camera_and_state_problems(contract)
    yield from _action_problems(contract)
    yield from _limit_problems(contract)
    yield from _watchdog_problems(contract.watchdog)
    simulator = contract.simulator
    if simulator and (simulator.steps_per_control < 1 or simulator.settle_steps < 0):
        yield Problem("simulator", "at least one step per control step, and no negative settling", "give whole numbers")
    if contract.ros is not None:
        yield from _topic_problems(contract, contract.ros)


def _doubled(kind: str, names: Sequence[str]) -> Iterator[Problem]:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        yield Problem(kind, f"name {doubled[0]!r} occurs twice", "names must be unique")


def _camera_and_state_problems(contract: ContractSpec) -> Iterator[Problem]:
    for camera in contract.cameras:
        where = f"cameras.{camera.name}"
        if camera.width <= 0 or camera.height <= 0:
            yield Problem(where, "width and height must be positive", "give the size in pixels")
        if len(camera.position) not in (0, 3) or not all(map(math.isfinite, camera.position)):
            yield Problem(where, "position is not a point", "give 3 values in m, or none")
    for field in contract.state:
        if field.size <= 0:
            yield Problem(f"state.{field.name}", "size must be positive", "give how many numbers it has")


def _action_problems(contract: ContractSpec) -> Iterator[Problem]:
    action = contract.action
    if not action.dims:
        yield Problem("action.dims", "no action dimensions", "list at least one")
    for dim in action.dims:
        where = f"action.dims.{dim.name}"
        if not (math.isfinite(dim.low) and math.isfinite(dim.high) and dim.low < dim.high):
            yield Problem(where, f"range [{dim.low}, {dim.high}] is empty or not finite", "low < high")
        if not 0 < dim.command_scale < math.inf:
            yield Problem(where, "command_scale must be positive", "give physical units per command")
    gripper = action.gripper
    if gripper is None:
        return
    if gripper.dim not in [dim.name for dim in action.dims]:
        yield Problem("action.gripper.dim", f"no action dimension '{gripper.dim}'", "name one of action.dims")
    if gripper.open == gripper.closed or not (math.isfinite(gripper.open) and math.isfinite(gripper.closed)):
        yield Problem("action.gripper", "open and closed must be two finite numbers", "give the polarity")


def _limit_problems(contract: ContractSpec) -> Iterator[Problem]:
    limits = contract.limits
    yield from _bound_problems("velocity", limits.velocity, contract.action.size)
    yield from _bound_problems("acceleration", limits.acceleration, contract.action.size)
    if limits.jerk:
        yield from _bound_problems("jerk", limits.jerk, contract.action.size)
    yield from _box_problems(limits)
    if not 0 <= limits.ramp_time < math.inf:
        yield Problem("limits.ramp_time", f"{limits.ramp_time} is not a duration", "give seconds, 0 for no ramp")
    names = [field.name for field in contract.state]
    for key, chosen in (("position_state", limits.position_state), ("rotation_state", limits.rotation_state)):
        if chosen and chosen not in names:
            yield Problem(f"limits.{key}", f"no state field '{chosen}'", "name one of the contract's state fields")
    if contract.action.control_mode.startswith("ee") and len(limits.workspace_low) != 3:
        yield Problem("limits.workspace_low", "a Cartesian contract needs a workspace box", "give 3 values in m")


def _bound_problems(key: str, values: Sequence[float], size: int) -> Iterator[Problem]:
    if len(values) != size:
        yield Problem(f"limits.{key}", f"{len(values)} values for {size} dimensions", "give one each")
    if any(not value > 0 for value in values):
        yield Problem(f"limits.{key}", "limits must be positive", "use .inf to exempt a dimension")


def _box_problems(limits: Limits) -> Iterator[Problem]:
    for key, low, high in (
        ("workspace", limits.workspace_low, limits.workspace_high),
        ("position", limits.position_low, limits.position_high),
    ):
        if len(low) != len(high) or any(not below < above for below, above in zip(low, high, strict=True)):
            yield Problem(f"limits.{key}_low", f"{key}_low and {key}_high do not form a box", "same length, low < high")


def _watchdog_problems(watchdog: Watchdog) -> Iterator[Problem]:
    times = {
        "observation_max_age": watchdog.observation_max_age,
        "action_max_age": watchdog.action_max_age,
        "policy_timeout": watchdog.policy_timeout,
        "stop_time": watchdog.stop_time,
    }
    for name, seconds in times.items():
        if not 0 < seconds < math.inf:
            yield Problem(f"watchdog.{name}", "times must be positive and finite", "give seconds")


def _topic_problems(contract: ContractSpec, topic_mapping: TopicMapping) -> Iterator[Problem]:
    for camera in contract.cameras:
        if not camera.topic:
            yield Problem(f"cameras.{camera.name}", "has no topic", "name the topic its images arrive on")
    sources = {source.field: source for source in topic_mapping.state}
    for field in contract.state:
        if not field.topic or field.name not in sources:
            yield Problem(f"state.{field.name}", "has no topic or no line in ros.state", "say where it comes from")
            continue
        yield from _state_problems(sources[field.name], field.size)
    known = [field.name for field in contract.state]
    for extra in sorted(set(sources) - set(known)):
        yield Problem(f"ros.state.{extra}", "no such state field", f"fields: {', '.join(known)}")
    dims = [dim.name for dim in contract.action.dims]
    commanded = [dim for sink in topic_mapping.commands for dim in sink.dims]
    if sorted(commanded) != sorted(dims):
        odd = sorted(set(commanded) ^ set(dims)) or sorted({dim for dim in commanded if commanded.count(dim) > 1})
        yield Problem("ros.commands", f"{', '.join(odd)}: not commanded exactly once", "list each dimension once")
    for sink in topic_mapping.commands:
        yield from _command_problems(sink, contract)


def _state_problems(source: StateSource, size: int) -> Iterator[Problem]:
    where = f"ros.state.{source.field}"
    if source.kind == "joint_state":
        if len(source.names) != size or len(set(source.names)) != size:
            yield Problem(where, f"{len(source.names)} joint names for {size} values", "name each joint once")
        if source.part == "orientation":
            yield Problem(where, "a JointState has no orientation", "position, velocity or effort")
    elif source.kind == "pose_stamped":
        wanted = {"position": (3,), "orientation": (3, 4)}.get(source.part, ())
        if size not in wanted:
            yield Problem(
                where, f"{size} values cannot be the {source.part} of a pose", "position 3, orientation 3 or 4"
            )
    if not (math.isfinite(source.scale) and source.scale != 0.0):
        yield Problem(where, "scale must be finite and not zero", "physical units per unit on the wire")


def _command_problems(sink: CommandSink, contract: ContractSpec) -> Iterator[Problem]:
    mode = contract.action.control_mode
    gripper = contract.action.gripper.dim if contract.action.gripper else ""
    where = f"ros.commands.{sink.topic}"
    if not sink.topic:
        yield Problem("ros.commands", f"a {sink.kind} without topic", "name it")
    moving = [d for d in sink.dims if d != gripper]
    turning = {"none": 0, "quaternion_xyzw": 4}.get(contract.action.rotation, 3)
    if sink.kind in ("twist_stamped", "pose_stamped"):
        allowed = ("ee_delta",) if sink.kind == "twist_stamped" else ("ee_delta", "ee_absolute")
        if mode not in allowed:
            yield Problem(where, f"{sink.kind} does not carry {mode}", f"modes: {', '.join(allowed)}")
        if len(moving) != len(sink.dims) or len(sink.dims) != 3 + turning:
            yield Problem(where, f"{len(sink.dims)} dimensions", f"x, y, z and {turning} of rotation, no gripper")
    if sink.kind in ("joint_trajectory", "float64_multi_array") and moving and not mode.startswith("joint"):
        yield Problem(where, f"{sink.kind} does not carry {mode}", "a joint mode")
    if sink.kind == "joint_trajectory" and mode == "joint_velocity" and moving:
        yield Problem(where, "a trajectory needs positions", "joint_absolute or joint_delta")
    if sink.kind == "joint_trajectory" and len(sink.names) != len(sink.dims):
        yield Problem(where, f"{len(sink.names)} joint names for {len(sink.dims)} dimensions", "one each")
    if sink.names and len(sink.names) != len(sink.dims):
        yield Problem(where, "names and dims differ in number", "one joint per dimension, or no names")
    if sink.kind == "gripper_command" and sink.dims != (gripper,):
        yield Problem(where, "takes the gripper alone", f"dims: [{gripper}]")
    if not (math.isfinite(sink.scale) and sink.scale != 0.0 and math.isfinite(sink.offset)):
        yield Problem(where, "scale and offset must be finite, scale not zero", "correct them")
    if sink.horizon < 0.0 or sink.max_effort < 0.0:
        yield Problem(where, "horizon and max_effort are not negative", "correct them")
