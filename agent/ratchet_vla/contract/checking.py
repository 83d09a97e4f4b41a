"""Whether a contract's fields fit each other: ranges, names, boxes, times, and each field's way over ROS.

Knows the rules between fields. Knows no file; only the first problem is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ratchet_vla.contract.specs import SCHEMA, ActionDim, CameraSpec, ContractSpec, GripperSpec, Limits, Watchdog
from ratchet_vla.contract.topics import CommandSink, StateSource, TopicMapping
from ratchet_vla.errors import RatchetError

# How many numbers a part of a pose may be written in: a rotation as three angles or as a quaternion.
_POSE_SIZES = {"position": (3,), "orientation": (3, 4)}
# How many action dimensions a rotation takes; every representation that is not listed takes three.
_ROTATION_SIZES = {"none": 0, "quaternion_xyzw": 4}
_CARTESIAN_MODES = {"twist_stamped": ("ee_delta",), "pose_stamped": ("ee_delta", "ee_absolute")}
_JOINT_KINDS = ("joint_trajectory", "float64_multi_array")


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
    """Yield everything that does not fit, one problem at a time: a later rule may rely on those before it."""
    yield from _version_and_rate_problems(contract)
    yield from _repeated_names("cameras", [camera.name for camera in contract.cameras])
    yield from _repeated_names("state", [field.name for field in contract.state])
    yield from _repeated_names("action.dims", [dim.name for dim in contract.action.dims])
    for camera in contract.cameras:
        yield from _camera_problems(camera)
    yield from _state_size_problems(contract)
    yield from _action_problems(contract)
    yield from _limit_problems(contract)
    yield from _watchdog_problems(contract.watchdog)
    yield from _simulator_problems(contract)
    if contract.ros is not None:
        yield from _topic_problems(contract, contract.ros)


def _version_and_rate_problems(contract: ContractSpec) -> Iterator[Problem]:
    if contract.schema != SCHEMA:
        yield Problem("schema", f"schema {contract.schema} is not supported", f"this version reads schema {SCHEMA}")
    if not 0 < contract.control_hz < math.inf:
        yield Problem("control_hz", f"{contract.control_hz} is not a rate", "give the control rate in Hz, above 0")


def _repeated_names(kind: str, names: Sequence[str]) -> Iterator[Problem]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        yield Problem(kind, f"name {repeated[0]!r} occurs twice", "names must be unique")


def _camera_problems(camera: CameraSpec) -> Iterator[Problem]:
    field_path = f"cameras.{camera.name}"
    if camera.width <= 0 or camera.height <= 0:
        yield Problem(field_path, "width and height must be positive", "give the size in pixels")
    if len(camera.position) not in (0, 3) or not all(map(math.isfinite, camera.position)):
        yield Problem(field_path, "position is not a point", "give 3 values in m, or none")


def _state_size_problems(contract: ContractSpec) -> Iterator[Problem]:
    for field in contract.state:
        if field.size <= 0:
            yield Problem(f"state.{field.name}", "size must be positive", "give how many numbers it has")


def _action_problems(contract: ContractSpec) -> Iterator[Problem]:
    dims = contract.action.dims
    if not dims:
        yield Problem("action.dims", "no action dimensions", "list at least one")
    for dim in dims:
        yield from _dimension_problems(dim)
    if contract.action.gripper is not None:
        yield from _gripper_problems(contract.action.gripper, [dim.name for dim in dims])


def _dimension_problems(dim: ActionDim) -> Iterator[Problem]:
    field_path = f"action.dims.{dim.name}"
    if not (math.isfinite(dim.low) and math.isfinite(dim.high) and dim.low < dim.high):
        yield Problem(field_path, f"range [{dim.low}, {dim.high}] is empty or not finite", "low < high")
    if not 0 < dim.command_scale < math.inf:
        yield Problem(field_path, "command_scale must be positive", "give physical units per command")


def _gripper_problems(gripper: GripperSpec, dim_names: Sequence[str]) -> Iterator[Problem]:
    if gripper.dim not in dim_names:
        yield Problem("action.gripper.dim", f"no action dimension '{gripper.dim}'", "name one of action.dims")
    if gripper.open == gripper.closed or not (math.isfinite(gripper.open) and math.isfinite(gripper.closed)):
        yield Problem("action.gripper", "open and closed must be two finite numbers", "give the polarity")


def _limit_problems(contract: ContractSpec) -> Iterator[Problem]:
    limits = contract.limits
    action_size = contract.action.size
    yield from _bound_problems("velocity", limits.velocity, action_size)
    yield from _bound_problems("acceleration", limits.acceleration, action_size)
    # An empty jerk limit means that the arm needs none.
    if limits.jerk:
        yield from _bound_problems("jerk", limits.jerk, action_size)
    yield from _box_problems("workspace", limits.workspace_low, limits.workspace_high)
    yield from _box_problems("position", limits.position_low, limits.position_high)
    if not 0 <= limits.ramp_time < math.inf:
        yield Problem("limits.ramp_time", f"{limits.ramp_time} is not a duration", "give seconds, 0 for no ramp")
    yield from _measured_field_problems(limits, [field.name for field in contract.state])
    if contract.action.control_mode.startswith("ee") and len(limits.workspace_low) != 3:
        yield Problem("limits.workspace_low", "a Cartesian contract needs a workspace box", "give 3 values in m")


def _bound_problems(key: str, bounds: Sequence[float], action_size: int) -> Iterator[Problem]:
    if len(bounds) != action_size:
        yield Problem(f"limits.{key}", f"{len(bounds)} values for {action_size} dimensions", "give one each")
    # `not > 0` instead of `<= 0`: NaN is no limit either.
    if any(not bound > 0 for bound in bounds):
        yield Problem(f"limits.{key}", "limits must be positive", "use .inf to exempt a dimension")


def _box_problems(key: str, low: Sequence[float], high: Sequence[float]) -> Iterator[Problem]:
    same_length = len(low) == len(high)
    if not same_length or any(not below < above for below, above in zip(low, high, strict=True)):
        yield Problem(f"limits.{key}_low", f"{key}_low and {key}_high do not form a box", "same length, low < high")


def _measured_field_problems(limits: Limits, state_names: Sequence[str]) -> Iterator[Problem]:
    for key, state_name in (("position_state", limits.position_state), ("rotation_state", limits.rotation_state)):
        # An empty name leaves the choice to the only field that fits.
        if state_name and state_name not in state_names:
            yield Problem(f"limits.{key}", f"no state field '{state_name}'", "name one of the contract's state fields")


def _watchdog_problems(watchdog: Watchdog) -> Iterator[Problem]:
    durations = {
        "observation_max_age": watchdog.observation_max_age,
        "action_max_age": watchdog.action_max_age,
        "policy_timeout": watchdog.policy_timeout,
        "stop_time": watchdog.stop_time,
    }
    for name, duration_s in durations.items():
        if not 0 < duration_s < math.inf:
            yield Problem(f"watchdog.{name}", "times must be positive and finite", "give seconds")


def _simulator_problems(contract: ContractSpec) -> Iterator[Problem]:
    simulator = contract.simulator
    if simulator and (simulator.steps_per_control < 1 or simulator.settle_steps < 0):
        yield Problem("simulator", "at least one step per control step, and no negative settling", "give whole numbers")


def _topic_problems(contract: ContractSpec, topic_mapping: TopicMapping) -> Iterator[Problem]:
    for camera in contract.cameras:
        if not camera.topic:
            yield Problem(f"cameras.{camera.name}", "has no topic", "name the topic its images arrive on")
    yield from _state_source_problems(contract, topic_mapping)
    yield from _coverage_problems(contract, topic_mapping)
    for sink in topic_mapping.commands:
        yield from _sink_topic_problems(sink)
        yield from _sink_mode_problems(sink, contract)
        yield from _sink_name_problems(sink)
        yield from _sink_number_problems(sink, contract)


def _state_source_problems(contract: ContractSpec, topic_mapping: TopicMapping) -> Iterator[Problem]:
    sources = {source.field: source for source in topic_mapping.state}
    for field in contract.state:
        if not field.topic or field.name not in sources:
            yield Problem(f"state.{field.name}", "has no topic or no line in ros.state", "say where it comes from")
            continue
        yield from _source_problems(sources[field.name], field.size)
    state_names = [field.name for field in contract.state]
    for unknown_field in sorted(set(sources) - set(state_names)):
        yield Problem(f"ros.state.{unknown_field}", "no such state field", f"fields: {', '.join(state_names)}")


def _source_problems(source: StateSource, size: int) -> Iterator[Problem]:
    field_path = f"ros.state.{source.field}"
    if source.kind == "joint_state":
        if len(source.names) != size or len(set(source.names)) != size:
            yield Problem(field_path, f"{len(source.names)} joint names for {size} values", "name each joint once")
        if source.part == "orientation":
            yield Problem(field_path, "a JointState has no orientation", "position, velocity or effort")
    elif source.kind == "pose_stamped" and size not in _POSE_SIZES.get(source.part, ()):
        yield Problem(
            field_path, f"{size} values cannot be the {source.part} of a pose", "position 3, orientation 3 or 4"
        )
    if not (math.isfinite(source.scale) and source.scale != 0.0):
        yield Problem(field_path, "scale must be finite and not zero", "physical units per unit on the wire")


def _coverage_problems(contract: ContractSpec, topic_mapping: TopicMapping) -> Iterator[Problem]:
    """Yield action dimensions that no command carries, or several do."""
    dim_names = [dim.name for dim in contract.action.dims]
    commanded = [dim for sink in topic_mapping.commands for dim in sink.dims]
    if sorted(commanded) == sorted(dim_names):
        return
    missing_or_unknown = sorted(set(commanded) ^ set(dim_names))
    repeated = sorted({dim for dim in commanded if commanded.count(dim) > 1})
    wrong_dims = missing_or_unknown or repeated
    yield Problem("ros.commands", f"{', '.join(wrong_dims)}: not commanded exactly once", "list each dimension once")


def _sink_topic_problems(sink: CommandSink) -> Iterator[Problem]:
    if not sink.topic:
        yield Problem("ros.commands", f"a {sink.kind} without topic", "name it")


def _sink_mode_problems(sink: CommandSink, contract: ContractSpec) -> Iterator[Problem]:
    """Yield messages that cannot say what the contract's control mode means."""
    mode = contract.action.control_mode
    field_path = f"ros.commands.{sink.topic}"
    motion_dims = [dim for dim in sink.dims if dim != _gripper_dim(contract)]
    if sink.kind in _CARTESIAN_MODES:
        rotation_size = _ROTATION_SIZES.get(contract.action.rotation, 3)
        allowed_modes = _CARTESIAN_MODES[sink.kind]
        if mode not in allowed_modes:
            yield Problem(field_path, f"{sink.kind} does not carry {mode}", f"modes: {', '.join(allowed_modes)}")
        if len(motion_dims) != len(sink.dims) or len(sink.dims) != 3 + rotation_size:
            yield Problem(
                field_path, f"{len(sink.dims)} dimensions", f"x, y, z and {rotation_size} of rotation, no gripper"
            )
    if sink.kind in _JOINT_KINDS and motion_dims and not mode.startswith("joint"):
        yield Problem(field_path, f"{sink.kind} does not carry {mode}", "a joint mode")
    if sink.kind == "joint_trajectory" and mode == "joint_velocity" and motion_dims:
        yield Problem(field_path, "a trajectory needs positions", "joint_absolute or joint_delta")


def _sink_name_problems(sink: CommandSink) -> Iterator[Problem]:
    field_path = f"ros.commands.{sink.topic}"
    if len(sink.names) == len(sink.dims):
        return
    if sink.kind == "joint_trajectory":
        yield Problem(field_path, f"{len(sink.names)} joint names for {len(sink.dims)} dimensions", "one each")
    if sink.names:
        yield Problem(field_path, "names and dims differ in number", "one joint per dimension, or no names")


def _sink_number_problems(sink: CommandSink, contract: ContractSpec) -> Iterator[Problem]:
    field_path = f"ros.commands.{sink.topic}"
    gripper_dim = _gripper_dim(contract)
    if sink.kind == "gripper_command" and sink.dims != (gripper_dim,):
        yield Problem(field_path, "takes the gripper alone", f"dims: [{gripper_dim}]")
    if not (math.isfinite(sink.scale) and sink.scale != 0.0 and math.isfinite(sink.offset)):
        yield Problem(field_path, "scale and offset must be finite, scale not zero", "correct them")
    if sink.horizon < 0.0 or sink.max_effort < 0.0:
        yield Problem(field_path, "horizon and max_effort are not negative", "correct them")


def _gripper_dim(contract: ContractSpec) -> str:
    """Return the gripper's action dimension; "" for an arm without one."""
    gripper = contract.action.gripper
    return gripper.dim if gripper else ""
