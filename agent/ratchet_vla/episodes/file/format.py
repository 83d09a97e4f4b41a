"""The episode file: an MCAP with ROS 2 messages. Topics, message definitions, and what is said about the whole.

Knows names and texts only. Standard message types are used where they exist; the others travel as definitions inside
the file, so that Foxglove, `ros2 bag` and rosbags read it without this project.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

__all__ = ["EpisodeEnding", "EpisodeInfo"]

FORMAT = 1
SUFFIX = ".mcap"
OPEN_SUFFIX = ".mcap.open"  # still being written, or cut off
BEGIN_RECORD = "ratchet.episode"
END_RECORD = "ratchet.end"

Codec = Literal["raw", "png", "jpeg", "h264"]
LOSSLESS: tuple[Codec, ...] = ("raw", "png")

OURS = "/ratchet/"  # every topic of ours begins so: what was on the wire lies beside them under its own name
OBSERVATION = "/ratchet/observation"
CHUNK = "/ratchet/chunk"
STEP = "/ratchet/step"
TICK = "/ratchet/tick"
EVENT = "/ratchet/event"
COMMAND = "/ratchet/command"

_TIME = "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"
_HEADER = "MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n"
_RULE = "=" * 80 + "\n"


def _with(definition: str, *dependencies: str) -> str:
    return definition + "".join(_RULE + dependency for dependency in dependencies)


# Stamps are repeated as float64 beside the header: a ROS time in whole nanoseconds would round them.
DEFINITIONS: dict[str, str] = {
    "sensor_msgs/msg/Image": _with(
        "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\n"
        "uint8[] data\n",
        _HEADER,
        _TIME,
    ),
    "sensor_msgs/msg/CompressedImage": _with(
        "std_msgs/Header header\nstring format\nuint8[] data\n",
        _HEADER,
        _TIME,
    ),
    "foxglove_msgs/msg/CompressedVideo": _with(
        "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
        _TIME,
    ),
    "std_msgs/msg/Float64MultiArray": _with(
        "MultiArrayLayout layout\nfloat64[] data\n",
        "MSG: std_msgs/MultiArrayLayout\nMultiArrayDimension[] dim\nuint32 data_offset\n",
        "MSG: std_msgs/MultiArrayDimension\nstring label\nuint32 size\nuint32 stride\n",
    ),
    "ratchet_msgs/msg/RecordedObservation": _with(
        "std_msgs/Header header\nfloat64 stamp\nint64 sequence\nstring instruction\n"
        "string[] cameras\nstring[] topics\nint64[] frames\n"
        "string[] state_names\nuint32[] state_sizes\nfloat32[] state\n",
        _HEADER,
        _TIME,
    ),
    "ratchet_msgs/msg/RecordedChunk": _with(
        "std_msgs/Header header\nfloat64 observation_stamp\nint64 observation_sequence\nstring adapter_id\n"
        "float64 temperature\nuint32 steps\nuint32 dims\nfloat32[] actions\n"
        "bool has_tokens\nint64[] tokens\nbool has_log_prob\nfloat32[] log_prob\n"
        "uint32[] chain_shape\nfloat32[] chain\nstring compute_dtype\n",
        _HEADER,
        _TIME,
    ),
    "ratchet_msgs/msg/RecordedStep": _with(
        "std_msgs/Header header\nint64 observation\nint64 chunk\nbool[] executed\nint64[] marks\nfloat64 reward\n"
        "bool done\nint64 steps_run\n",
        _HEADER,
        _TIME,
    ),
    "ratchet_msgs/msg/RecordedTick": _with(
        "std_msgs/Header header\nfloat64 stamp\nfloat64 deadline\nint64 index\nbool has_sampled\nfloat32[] sampled\n"
        "bool has_command\nfloat32[] command\nuint32 marks\nint64 chunk_sequence\nint64 chunk_offset\n"
        "string adapter_id\nstring[] state_names\nuint32[] state_sizes\nfloat32[] state\n"
        "bool has_applied\nfloat32[] applied\nint64 applied_marks\n",
        _HEADER,
        _TIME,
    ),
    "ratchet_msgs/msg/RecordedEvent": _with(
        "std_msgs/Header header\nfloat64 stamp\nstring code\nstring message\nstring dim\nfloat64 value\nfloat64 limit\n"
        "bool latched\n",
        _HEADER,
        _TIME,
    ),
}
TYPES: dict[str, str] = {
    OBSERVATION: "ratchet_msgs/msg/RecordedObservation",
    CHUNK: "ratchet_msgs/msg/RecordedChunk",
    STEP: "ratchet_msgs/msg/RecordedStep",
    TICK: "ratchet_msgs/msg/RecordedTick",
    EVENT: "ratchet_msgs/msg/RecordedEvent",
    COMMAND: "std_msgs/msg/Float64MultiArray",
}
_IMAGE_TYPES: dict[Codec, tuple[str, str]] = {
    "raw": ("image_raw", "sensor_msgs/msg/Image"),
    "png": ("image_raw/compressed", "sensor_msgs/msg/CompressedImage"),
    "jpeg": ("image_raw/compressed", "sensor_msgs/msg/CompressedImage"),
    "h264": ("video", "foxglove_msgs/msg/CompressedVideo"),
}


@dataclass(frozen=True)
class EpisodeInfo:
    """What is known when an episode begins; the first record of its file.

    contract: the whole contract as data. calibrations: camera -> calibration id in force. session: empty outside one.
    mode: "collect", "deploy", "rollout", "demonstration" or "import". created: UTC, ISO 8601.
    wire: topics that were kept as they were on the wire.
    name: what it was called while it was recorded, such as RunTask's `episode`; unique, empty for none.
    clock_offset: seconds added to stamps of the robot's clock to give UTC; message times in the file are UTC.
    stream, decisions: codecs of the camera streams and of the frames that decisions were made on; "" for decisions
        says that they are frames of the stream.
    topics: "stream" and "decisions" -> camera -> topic.
    """

    task: str
    instruction: str
    contract: dict[str, Any]
    contract_id: str
    created: str
    adapter_id: str = ""
    session: str = ""
    mode: str = "rollout"
    seed: int = 0
    initial_state: int = -1
    calibrations: dict[str, str] = field(default_factory=dict)
    clock_offset: float = 0.0
    software: str = ""
    stream: str = "jpeg"
    decisions: str = "raw"
    name: str = ""
    wire: list[str] = field(default_factory=list)
    topics: dict[str, dict[str, str]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def to_record(self) -> dict[str, str]:
        """As the metadata record of the file."""
        return {"format": str(FORMAT), "info": json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_record(cls, record: dict[str, str], location: str) -> EpisodeInfo:
        """Raises RatchetError episode.unknown_format, episode.damaged."""
        if record.get("format") != str(FORMAT):
            raise RatchetError(
                "episode.unknown_format",
                f"episode format {record.get('format')!r}, this version reads {FORMAT}",
                where=location,
                fix="read it with the version of Ratchet that wrote it",
            )
        try:
            return cls(**json.loads(record["info"]))
        except (KeyError, ValueError, TypeError) as error:
            raise RatchetError("episode.damaged", f"unreadable header: {error}", where=location) from None

    def robot(self) -> RobotContract:
        """The contract in force, as an object; checked against its id."""
        contract = RobotContract.from_dict(self.contract, "the episode's contract", rules=False)
        if contract.id != self.contract_id:
            raise RatchetError(
                "episode.other_contract",
                f"the embedded contract hashes to {contract.id[:12]}, the episode names {self.contract_id[:12]}",
                fix="read it with the version of Ratchet that wrote it",
            )
        return contract


@dataclass(frozen=True)
class EpisodeEnding:
    """What is known when an episode ends; the last record of a finished file.

    success, success_source: as in `records.Episode`. reason: why it ended; "cut_off" where the recorder was killed.
    ended: UTC. frames: topic -> images written. dropped: what could not be kept -> how often.
    recovered: the file was made whole after a crash. lost_bytes: of the unfinished file, behind the last flush.
    """

    success: bool | None
    success_source: str
    reason: str
    ended: str
    seconds: float = 0.0
    steps: int = 0
    ticks: int = 0
    human_ticks: int = 0
    events: int = 0
    frames: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    recovered: bool = False
    lost_bytes: int = 0

    def to_record(self) -> dict[str, str]:
        """As the metadata record of the file."""
        return {"end": json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_record(cls, record: dict[str, str], location: str) -> EpisodeEnding:
        """Raises RatchetError episode.damaged."""
        try:
            return cls(**json.loads(record["end"]))
        except (KeyError, ValueError, TypeError) as error:
            raise RatchetError("episode.damaged", f"unreadable ending: {error}", where=location) from None


def image_topic(camera: str, codec: Codec, group: str) -> tuple[str, str]:
    """Topic and message type of a camera's images; group: "cameras" for the streams, "decisions"."""
    leaf, type_name = _IMAGE_TYPES[codec]
    return f"{OURS}{group}/{ros_name(camera)}/{leaf}", type_name


def state_topic(name: str) -> str:
    return f"{OURS}state/{ros_name(name)}"


def ros_name(name: str) -> str:
    """A name that ROS accepts as part of a topic."""
    clean = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return clean if clean[:1].isalpha() else f"n{clean}"


def check_meta(meta: dict[str, Any], location: str) -> None:
    """Raises RatchetError episode.bad_meta for what JSON would not give back as it is."""
    try:
        survives_json = json.loads(json.dumps(meta)) == meta
    except (TypeError, ValueError):
        survives_json = False
    if not survives_json:
        raise RatchetError(
            "episode.bad_meta",
            "meta holds something that JSON does not give back as it is",
            where=location,
            fix="use strings, finite numbers, booleans, None, lists and string keys",
        )
