"""Parameters of policy_node, and what they mean for the policy process and the safety filter."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ratchet_ros.nodes.params import parameter
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.episodes.recorder.types import RecorderConfig
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.control.chunks import ChunkExecutor, CollectExecutor, DeployExecutor
from ratchet_vla.runtime.inference.client import PolicyLaunch
from ratchet_vla.runtime.safety.filter import SafetyConfig
from ratchet_vla.runtime.safety.types import LATCHING

FILTER_LATCHED = "safety.last_stage"  # the command filter stopped the arm; episodes on disk carry this code


@dataclass(frozen=True)
class Parameters:
    contract: str = parameter("", "Path of the robot contract (YAML).")
    policy: str = parameter("", "Folder of the policy checkpoint.")
    store: str = parameter("", "Folder of the adapter store; empty to run without adapters.")
    adapter: str = parameter("", "Adapter id or tag to start with; empty for the base alone.")
    policy_python: str = parameter("", "Interpreter of the policy process, which has no ROS; empty for this one.")
    policy_module: str = parameter("ratchet_vla.runtime.inference.worker", "Python module that serves the policy.")
    policy_options: str = parameter(
        "{}", "JSON object: further options of the policy module (threads, device, image_fit)."
    )
    nice: int = parameter(5, "Added to the policy process's niceness.", low=0, high=19)
    memory_limit_mb: int = parameter(
        0, "Private memory that the policy process may have; 0 for no limit.", low=0, high=1 << 20
    )
    start_timeout: float = parameter(300.0, "Seconds until the policy process must be ready.", low=1.0, high=3600.0)
    hang_timeout: float = parameter(10.0, "Seconds without an answer after which it is killed.", low=0.1, high=600.0)
    restarts: int = parameter(
        5,
        "How often in a row it is started again after a crash or a hang; one that served for 10 s begins a new row.",
        low=0,
        high=1000,
    )
    mode: str = parameter("deploy", "Chunk execution where a goal does not say.", one_of=("deploy", "collect"))
    use: int = parameter(
        0, "Actions of each chunk before the next takes over; 0: half (deploy), all (collect).", low=0, high=1000
    )
    blend: int = parameter(2, "Ticks over which a new chunk is mixed with the old one (deploy).", low=0, high=50)
    horizon: int = parameter(500, "Control periods of a task where a goal does not say.", low=1, high=1_000_000)
    hold_timeout: float = parameter(
        10.0, "Seconds of holding after which a task ends.", low=0.1, high=3600.0, live=True
    )
    judge: str = parameter(
        "operator",
        "Who says that a task is solved: nobody, the operator's buttons, or the simulated scene.",
        one_of=("none", "operator", "scene"),
    )
    resume: str = parameter(
        "automatic",
        "After a hold that is not latched: go on by itself with the ramp, or wait for ~/resume.",
        one_of=("automatic", "manual"),
    )
    dead_man: bool = parameter(False, "Motion needs the dead-man switch of an OperatorInput.")
    dead_man_timeout: float = parameter(0.2, "Seconds for which one report of the switch holds.", low=0.02, high=2.0)
    max_skew: float = parameter(
        0.0,
        "Seconds that images and states of one observation may be apart; 0: the contract's observation_max_age.",
        low=0.0,
        high=10.0,
    )
    frozen_after: float = parameter(
        0.0,
        "Seconds after which a camera that repeats one image while the arm moves counts as frozen; 0: not looked at.",
        low=0.0,
        high=60.0,
    )
    lock_step: bool = parameter(False, "Simulation only: time stands still while the policy thinks.")
    clock_timeout: float = parameter(
        1.0, "Simulation only: real seconds without /clock after which the arm is held.", low=0.1, high=600.0
    )
    patience: float = parameter(
        30.0, "Lock-step only: real seconds to wait for an answer or an observation.", low=0.1, high=3600.0
    )
    episodes: str = parameter("", "Folder of the episode store that every task is recorded into; empty for none.")
    record_cameras: str = parameter(
        "jpeg",
        "How camera streams are recorded; the frames that decisions were made on are always kept bit by bit.",
        one_of=("jpeg", "h264", "png", "raw"),
    )
    record_wire: str = parameter(
        "none",
        "Topics kept in the episode's file as they are on the wire too: none, all but images, or all.",
        one_of=("none", "messages", "all"),
    )
    record_memory_mb: int = parameter(256, "Frames that may wait for the disk.", low=1, high=1 << 16)
    record_least_free_gb: float = parameter(2.0, "Recording stops when less disk than this is free.", low=0.0, high=1e6)
    robot: str = parameter("", "The robot's folder: its sessions and the learner's last status; empty for no sessions.")
    session: str = parameter(
        "auto",
        "A session lasts as long as the node is configured, or from `ratchet session start` to stop.",
        one_of=("auto", "manual"),
    )
    checks: str = parameter(
        "{}", "JSON object: camera -> its newest look for having moved; kept in the manifest of the automatic session."
    )
    ordered: bool = parameter(
        False, "In collect mode run the learner's rollout request, which lies in the robot's folder."
    )
    calibrations: list[str] = parameter([], "Calibrations in force, as camera=id.")  # noqa: RUF009


def launch(settings: Parameters) -> PolicyLaunch:
    """How the policy process is started. Raises RatchetError ros.bad_parameter."""
    try:
        options: dict[str, Any] = json.loads(settings.policy_options or "{}")
        if not isinstance(options, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise RatchetError("ros.bad_parameter", str(error), where="policy_options", fix="give a JSON object") from None
    for name in ("policy", "store"):
        path = getattr(settings, name)
        if path:
            options[name] = str(Path(path).resolve())
    if settings.adapter:
        options["adapter"] = settings.adapter
    return PolicyLaunch(
        options=options,
        module=settings.policy_module,
        python=settings.policy_python or sys.executable,
        nice=settings.nice,
        memory_limit=settings.memory_limit_mb << 20,
        start_timeout=settings.start_timeout,
        hang_timeout=settings.hang_timeout,
        restarts=settings.restarts,
    )


def safety_config(settings: Parameters, simulated: bool) -> SafetyConfig:
    """The node's own safety filter; a latched command filter latches it too. simulated: time is a simulation's."""
    return SafetyConfig(
        latch_on=LATCHING | {FILTER_LATCHED},
        resume="manual" if settings.resume == "manual" else "automatic",
        dead_man=settings.dead_man,
        dead_man_timeout=settings.dead_man_timeout,
        clock_may_pause=simulated and not settings.lock_step,
    )


def executor(settings: Parameters, mode: str, contract: RobotContract, chunk: int) -> ChunkExecutor:
    """Raises RatchetError ros.bad_mode, ros.bad_parameter."""
    if settings.use > chunk:
        raise RatchetError("ros.bad_parameter", f"{settings.use} of a chunk of {chunk}", where="use")
    if mode == "collect":
        return CollectExecutor(contract, use=settings.use or None)
    if mode == "deploy":
        return DeployExecutor(contract, use=settings.use or max(1, chunk // 2), blend=settings.blend)
    raise RatchetError("ros.bad_mode", f"no execution mode {mode!r}", fix="deploy or collect")


def recorder_config(settings: Parameters) -> RecorderConfig:
    """How episodes are recorded."""
    return RecorderConfig(
        stream=cast(Codec, settings.record_cameras),
        memory_mb=settings.record_memory_mb,
        min_free_gb=settings.record_least_free_gb,
    )


def checks(settings: Parameters) -> dict[str, dict[str, Any]]:
    """Raises RatchetError ros.bad_parameter."""
    try:
        found = json.loads(settings.checks or "{}")
        return {str(camera): dict(check) for camera, check in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RatchetError("ros.bad_parameter", str(error), where="checks", fix="give a JSON object") from None


def calibrations(settings: Parameters) -> dict[str, str]:
    """Raises RatchetError ros.bad_parameter."""
    found = {}
    for line in settings.calibrations:
        camera, equals, name = line.partition("=")
        if not equals or not name:
            raise RatchetError("ros.bad_parameter", f"{line!r} is not camera=id", where="calibrations")
        found[camera] = name
    return found
