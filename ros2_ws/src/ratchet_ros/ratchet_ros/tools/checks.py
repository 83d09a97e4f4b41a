"""Is the live graph what the contract says? Every mismatch by name, with what to do about it.

Knows a contract, a node to listen with, and a few seconds. Sends nothing to the arm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSCompatibility, ReliabilityPolicy, qos_check_compatible

from ratchet_ros.messages import decode, encode, qos
from ratchet_ros.messages.intake import require_topic_mapping
from ratchet_ros.messages.interfaces import type_name
from ratchet_ros.messages.times import seconds
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

AHEAD = 0.02  # s that a stamp may lie in the future: clocks of two machines under NTP
UNNAMED = "_NODE_NAME_UNKNOWN_"  # rmw's name for a node that has not been discovered


@dataclass(frozen=True)
class Finding:
    """One line. level: "ok", "warn" or "error"; code: stable, as in RatchetError."""

    level: str
    code: str
    what: str
    where: str = ""
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass
class Heard:
    """What came on one topic while listening."""

    topic: str
    kind: type[Any]
    names: list[str]
    moments: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    errors: dict[str, RatchetError] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    joints: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        if len(self.moments) < 2:
            return 0.0
        return (len(self.moments) - 1) / max(self.moments[-1] - self.moments[0], 1e-9)


class GraphCheck:
    """Listens to everything that the contract names. Create, spin the node for a few seconds, then `findings`."""

    def __init__(self, node: Node, contract: RobotContract, *, alone: bool = True) -> None:
        """alone: nobody may publish on the arm's command topics yet (a dry run before the nodes start)."""
        self.node, self.contract, self._alone = node, contract, alone
        self.heard: dict[str, Heard] = {}
        topic_mapping = require_topic_mapping(contract)
        for camera in contract.cameras:
            read = self._camera_reader(camera)
            self._listen(camera.topic, decode.image_type(camera), qos.IMAGES, camera.name, read)
        for source in topic_mapping.state:
            reader = decode.StateReader(contract, source)
            self._listen(reader.field.topic, reader.kind, qos.STATES, reader.field.name, self._state_reader(reader))

    def findings(self) -> list[Finding]:
        found = [f for heard in self.heard.values() for f in self._topic(heard)]
        for sink in require_topic_mapping(self.contract).commands:
            found += self._sink(sink)
        return found

    def unnamed(self) -> bool:
        """Whether a publisher of commands is seen whose node is not: endpoints are discovered before names."""
        sinks = [self.node.resolve_topic_name(s.topic) for s in require_topic_mapping(self.contract).commands]
        return any(i.node_name == UNNAMED for t in sinks for i in self.node.get_publishers_info_by_topic(t))

    # -- listening ---------------------------------------------------------------------------------------------------

    def _listen(self, topic: str, kind: type[Any], profile: Any, name: str, read: Callable[[Any, Heard], None]) -> None:
        full = self.node.resolve_topic_name(topic)
        heard = self.heard.setdefault(f"{full} {kind.__name__}", Heard(full, kind, []))
        first = not heard.names
        heard.names.append(name)

        def received(message: Any) -> None:
            if first:
                heard.moments.append(time.monotonic())
                header = getattr(message, "header", None)
                if header is not None:
                    heard.ages.append(self.node.get_clock().now().nanoseconds * 1e-9 - seconds(header.stamp))
            try:
                read(message, heard)
            except RatchetError as error:
                heard.errors[name] = error

        self.node.create_subscription(kind, topic, received, profile)

    def _camera_reader(self, camera: Any) -> Callable[[Any, Heard], None]:
        def read(message: Any, heard: Heard) -> None:
            heard.sizes.append(len(message.data))
            decode.image(message, camera)
            heard.seen.add(camera.name)

        return read

    def _state_reader(self, reader: decode.StateReader) -> Callable[[Any, Heard], None]:
        def read(message: Any, heard: Heard) -> None:
            heard.joints = list(getattr(message, "name", []))
            if reader.read(message) is not None:
                heard.seen.add(reader.field.name)

        return read

    # -- checking -----------------------------------------------------------------------------------------------------

    def _topic(self, heard: Heard) -> list[Finding]:
        infos = self.node.get_publishers_info_by_topic(heard.topic)
        wanted = type_name(heard.kind)
        if not infos:
            close = [n for n, kinds in self.node.get_topic_names_and_types() if wanted in kinds]
            fix = f"topics of that type: {', '.join(sorted(close)[:5])}" if close else "start the driver"
            return [Finding("error", "doctor.no_publisher", f"nobody publishes {wanted}", heard.topic, fix)]
        others = {i.topic_type for i in infos} - {wanted}
        if others:
            text = f"type is {', '.join(sorted(others))}, the contract expects {wanted}"
            return [Finding("error", "doctor.wrong_type", text, heard.topic, "correct kind or topic in the contract")]
        if not heard.moments:
            return [self._silent(heard, infos)]
        found = []
        for name in heard.names:
            error = heard.errors.get(name)
            if error is not None:
                found.append(Finding("error", error.code, f"{name}: {error.what}", heard.topic, error.fix))
            elif name not in heard.seen:
                text = f"{name}: joints missing; the topic has {', '.join(heard.joints) or 'none'}"
                found.append(Finding("error", "doctor.joint_names", text, heard.topic, "correct names in ros.state"))
        return found + self._timing(heard)

    def _silent(self, heard: Heard, infos: list[Any]) -> Finding:
        for info in infos:
            level, reason = qos_check_compatible(info.qos_profile, qos.STATES)
            if level == QoSCompatibility.ERROR:
                return Finding("error", "doctor.qos", reason, heard.topic, "change the driver's quality of service")
        if heard.kind.__name__ == "Image":
            fix = "load ratchet_ros/config/fastdds.xml in the camera driver's process (FASTDDS_DEFAULT_PROFILES_FILE)"
            text = "a publisher, but no image arrives: larger than the shared-memory segment?"
            return Finding("error", "doctor.images_lost", text, heard.topic, fix)
        return Finding("error", "doctor.silent", "a publisher, but nothing arrives", heard.topic, "activate the driver")

    def _timing(self, heard: Heard) -> list[Finding]:
        found, hz, limit = [], self.contract.control_hz, self.contract.watchdog.observation_max_age
        camera = heard.kind.__name__ in ("Image", "CompressedImage")
        if heard.rate < (1.0 / limit if camera else hz * 0.95):
            text = (
                f"{heard.rate:.1f} Hz; {'frames' if camera else 'states'} become older than {limit} s at control time"
            )
            found.append(Finding("error", "doctor.rate", text, heard.topic, "raise the rate"))
        gap = max((b - a for a, b in zip(heard.moments, heard.moments[1:], strict=False)), default=0.0)
        if gap > limit:
            text = f"a gap of {gap * 1e3:.0f} ms between two messages, allowed {limit * 1e3:.0f} ms"
            found.append(Finding("warn", "doctor.gap", text, heard.topic, "look for loss and load"))
        if heard.ages:
            age = statistics.median(heard.ages)
            if age < -AHEAD:
                text = f"stamps lie {-age * 1e3:.0f} ms in the future"
                found.append(Finding("error", "doctor.clock", text, heard.topic, "synchronise the machines' clocks"))
            elif age > limit:
                text = f"stamps are {age * 1e3:.0f} ms old on arrival, allowed {limit * 1e3:.0f} ms"
                fix = "synchronise clocks; check that use_sim_time is the same everywhere"
                found.append(Finding("error", "doctor.age", text, heard.topic, fix))
        if not found:
            age_text = f", {statistics.median(heard.ages) * 1e3:.1f} ms old" if heard.ages else ""
            text = f"{', '.join(heard.names)}: {heard.rate:.1f} Hz{age_text}"
            found.append(Finding("ok", "doctor.topic", text, heard.topic))
        return found

    def _sink(self, sink: Any) -> list[Finding]:
        topic = self.node.resolve_topic_name(sink.topic)
        if sink.kind == "gripper_command":
            try:
                encode.gripper_action()
            except RatchetError as error:
                return [Finding("error", error.code, error.what, topic, error.fix)]
            there = bool(self.node.get_publishers_info_by_topic(f"{topic}/_action/status"))
            return [
                Finding("ok", "doctor.sink", f"{', '.join(sink.dims)}: action server there", topic)
                if there
                else Finding("error", "doctor.no_controller", "no action server", topic, "start the gripper's driver")
            ]
        wanted = type_name(encode.COMMAND_TYPES[sink.kind])
        infos = self.node.get_subscriptions_info_by_topic(topic)
        found = []
        if not infos:
            fix = "load and activate the controller"
            found.append(Finding("error", "doctor.no_controller", f"nobody takes {wanted}", topic, fix))
        elif wanted not in {i.topic_type for i in infos}:
            kinds = ", ".join(sorted({i.topic_type for i in infos}))
            text = f"the controller takes {kinds}, the contract sends {wanted}"
            found.append(Finding("error", "doctor.wrong_type", text, topic, "correct kind in ros.commands"))
        for info in infos:
            offered = qos.COMMANDS
            demands = info.qos_profile
            if demands.durability == DurabilityPolicy.TRANSIENT_LOCAL or (
                demands.reliability == ReliabilityPolicy.RELIABLE and offered.reliability != demands.reliability
            ):
                found.append(
                    Finding("error", "doctor.qos", f"{info.node_name} demands another quality of service", topic)
                )
        senders = {i.node_name for i in self.node.get_publishers_info_by_topic(topic)}
        allowed = set() if self._alone else {"safety_node"}
        if senders - allowed:
            text = f"{', '.join(sorted(senders - allowed))} publishes commands too"
            found.append(Finding("error", "doctor.second_publisher", text, topic, "stop it before the nodes start"))
        return found or [Finding("ok", "doctor.sink", f"{', '.join(sink.dims)}: taken by {infos[0].node_name}", topic)]


def worst(findings: list[Finding]) -> str:
    levels = [f.level for f in findings]
    return "error" if "error" in levels else "warn" if "warn" in levels else "ok"
