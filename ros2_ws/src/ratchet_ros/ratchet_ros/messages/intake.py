"""Subscriptions to what an arm and its cameras publish, feeding an Aligner.

What is wrong with a message is logged, once a second at most per source. Knows the contract's topics and a node to
subscribe on. Decides nothing about motion.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from rclpy.node import Node

from ratchet_ros.messages import decode, qos
from ratchet_ros.messages.times import TimeBase
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8
from ratchet_vla.runtime.messages.align import Aligner


def require_topic_mapping(contract: RobotContract) -> Any:
    """The contract's ROS part. Raises RatchetError contract.no_ros."""
    if contract.ros is None:
        raise RatchetError(
            "contract.no_ros",
            "the contract does not say how it is wired to ROS",
            where=contract.name,
            fix="add a `ros` section, see robots/ur5e.yaml",
        )
    return contract.ros


class Intake:
    """Everything that arrives from one arm. Callbacks run on the node's executor; readers are any threads.

    cameras: names that observations consist of; () for a node that needs the state only.
    others: names of cameras that are only shown to `on_frame`.
    reliable: lock-step simulation, where nothing may be lost.
    """

    def __init__(
        self,
        node: Node,
        contract: RobotContract,
        clock: TimeBase,
        *,
        cameras: Iterable[str] | None = None,
        max_skew: float,
        reliable: bool = False,
        on_data: Callable[[], None] | None = None,
        others: Iterable[str] = (),
        on_frame: Callable[[str, UInt8, float], None] = lambda camera, pixels, stamp: None,
    ) -> None:
        topic_mapping = require_topic_mapping(contract)
        names = [c.name for c in contract.cameras] if cameras is None else list(cameras)
        self.contract = contract
        self._clock = clock
        self._node = node
        self.aligner = Aligner(contract, max_skew=max_skew, cameras=names, keep_frames=6)
        self.received: Counter[str] = Counter()
        self.problems: dict[str, RatchetError] = {}
        self._logged_s: dict[str, float] = {}  # monotonic, of the newest log line per source
        self._on_data = on_data
        self._on_frame = on_frame
        self._subscriptions: list[Any] = []
        for name in [*names, *others]:
            camera = contract.camera(name)
            self._subscribe(
                decode.image_type(camera),
                camera.topic,
                self._frame_callback(camera),
                qos.LOCK_STEP if reliable else qos.IMAGES,
            )
        topics: dict[tuple[str, type[Any]], list[decode.StateReader]] = {}
        for source in topic_mapping.state:
            reader = decode.StateReader(contract, source)
            topics.setdefault((reader.field.topic, reader.kind), []).append(reader)
        for (topic, kind), readers in topics.items():
            profile = qos.LOCK_STEP if reliable else qos.STATES
            self._subscribe(kind, topic, self._state_callback(readers), profile)

    def close(self) -> None:
        """Stop listening."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def missing(self) -> list[str]:
        """Contract names of sources that have delivered nothing yet."""
        sources = [*self.aligner.cameras, *(s.name for s in self.contract.state)]
        return [name for name in sources if not self.received[name]]

    def describe(self) -> tuple[str, bool]:
        """A line for /diagnostics, and whether every source delivers what the contract says."""
        missing = self.missing()
        if missing:
            return f"missing {', '.join(missing)}", False
        if self.problems:
            return "; ".join(str(error) for error in self.problems.values()), False
        return "complete", True

    # -- inside ----------------------------------------------------------------------------------------------------

    def _subscribe(self, kind: type[Any], topic: str, callback: Callable[[Any], None], profile: Any) -> None:
        self._subscriptions.append(self._node.create_subscription(kind, topic, callback, profile))

    def _frame_callback(self, camera: CameraSpec) -> Callable[[Any], None]:
        def received(message: Any) -> None:
            try:
                pixels = decode.image(message, camera)
            except RatchetError as error:
                self._report(camera.name, error)
                return
            self.problems.pop(camera.name, None)
            stamp = self._clock.from_ros(message.header.stamp)
            self._on_frame(camera.name, pixels, stamp)  # before an observation can be made of it
            if camera.name in self.aligner.cameras:
                self.aligner.add_frame(camera.name, pixels, stamp)
            self._count(camera.name)

        return received

    def _state_callback(self, readers: list[decode.StateReader]) -> Callable[[Any], None]:
        def received(message: Any) -> None:
            header = getattr(message, "header", None)
            stamp = self._clock.from_ros(header.stamp) if header is not None else self._clock.now()
            for reader in readers:
                name = reader.field.name
                try:
                    values = reader.read(message)
                except RatchetError as error:
                    self._report(name, error)
                    continue
                if values is not None:
                    self.problems.pop(name, None)
                    self.aligner.add_state(name, values, stamp)
                    self._count(name)

        return received

    def _count(self, name: str) -> None:
        self.received[name] += 1
        if self._on_data is not None:
            self._on_data()

    def _report(self, name: str, error: RatchetError) -> None:
        self.problems[name] = error
        now_s = time.monotonic()
        if now_s - self._logged_s.get(name, -1.0) > 1.0:
            self._logged_s[name] = now_s
            self._node.get_logger().error(str(error))
