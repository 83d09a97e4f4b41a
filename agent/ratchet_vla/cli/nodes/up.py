"""`ratchet up sim|real`: start the nodes of one arm without the launch package, and stop them cleanly."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from ratchet_calibration.store import last_check
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.nodes import ros
from ratchet_vla.cli.nodes.graph import Graph, NodeSpec
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import ROBOTS
from ratchet_vla.runtime.cameras.devices import DEVICE_KINDS
from ratchet_vla.runtime.session.manifest import utc


@dataclass
class _Shared(remote.LearnerOptions, ComputingOptions):
    policy: Path | None = None
    """Folder of the policy."""
    store: Path | None = None
    """Folder of the adapter store; if absent none, and with --learner <robot>/adapters."""
    adapter: str = ""
    """Id or tag of the adapter to start with; the base if absent."""
    follow: str = ""
    """Tag of the store, such as `active`, that the policy follows: when it moves (promotion, rollback), the running
    policy swaps at once. With --learner `active` if absent."""
    mode: Literal["", "deploy", "collect"] = ""
    """How chunks are executed; if absent collect with --learner, deploy without."""
    episodes: Path | None = None
    """Folder of the episode store to record into; if absent none, and with --learner <robot>/episodes."""
    record_wire: Literal["none", "messages", "all"] = "none"
    """Record topics as they are on the wire, too: none, messages (all but images), or all."""
    robot: Path = remote.FOLDER
    """Folder of the robot: its sessions, and with --learner outbox, adapters and episodes. One robot per folder."""
    session: Literal["auto", "manual"] = "auto"
    """auto: a session lasts as long as the nodes. manual: collect only between `ratchet session start|stop`."""
    learner: str = ""
    """Address of a learner, such as tcp://192.0.2.7:5544: a sync agent is started beside the nodes, the policy follows
    `active`, and in collect mode the learner's rollout request says task, temperature and noise."""
    namespace: str = ""
    """ROS namespace, such as /left for one of two arms; none if absent."""
    logs: Path | None = None
    """Folder of the logs; runs/up/<time> if absent."""
    loopback: bool = False
    """Keep all traffic on this machine."""
    policy_module: str = "ratchet_vla.runtime.inference.worker"
    """Python module that serves the policy."""
    policy_options: str = "{}"
    """Further options of the policy module, as a JSON object."""
    max_seconds: float = 0.0
    """Stop after so many seconds; 0 runs until interrupted."""
    json: bool = False
    """Print one JSON line when everything was started."""

    def _policy(self, contract: Path, **parameters: Any) -> NodeSpec:
        values = {
            "contract": ros.absolute(contract),
            "policy": ros.absolute(self.policy),
            "store": ros.absolute(self._store()),
            "adapter": self.adapter,
            "mode": self.mode or ("collect" if self.learner else "deploy"),
            "policy_python": ros.policy_python(),
            "policy_module": self.policy_module,
            "policy_options": self._options(),
            "episodes": ros.absolute(self._episodes()),
            "record_wire": self.record_wire,
            "robot": ros.absolute(self.robot),
            "session": self.session,
            "ordered": bool(self.learner),
            **parameters,
        }
        return NodeSpec("policy_node", "policy_node", values)

    def _store(self) -> Path | None:
        return self.store or (self.robot / "adapters" if self.learner else None)

    def _episodes(self) -> Path | None:
        return self.episodes or (self.robot / "episodes" if self.learner else None)

    def _options(self) -> str:
        follow = self.follow or ("active" if self.learner else "")
        if not follow:
            return self.policy_options
        try:
            return json.dumps({**json.loads(self.policy_options), "follow": follow})
        except (ValueError, TypeError) as error:
            raise RatchetError(
                "up.bad_options", str(error), where="--policy-options", fix="give a JSON object"
            ) from None

    def _sync_command(self) -> list[str]:
        """The command of the sync agent, none without a learner; what the nodes need of it is there when it returns.

        Raises:
            RatchetError: link.no_key and others, before anything is started.
        """
        store = self._store()
        episodes = self._episodes()
        if not self.learner or store is None or episodes is None:
            return []
        self.check_keys()
        from ratchet_vla.adapters.store import folder  # loads torch: only where adapters come

        folder.FolderStore(store, create=True)
        return remote.sync_command(self, self.learner, self.robot, episodes, store)

    def _up(self, specs: list[NodeSpec]) -> int:
        folder = self.logs or Path("runs/up") / utc().replace(":", "").replace("-", "")
        console = Console(stderr=self.json, soft_wrap=True)
        profile = ros.PACKAGE / "config" / ("fastdds_loopback.xml" if self.loopback else "fastdds.xml")
        variables = {"FASTDDS_DEFAULT_PROFILES_FILE": str(profile)} if self.loopback else {}
        sync_command = self._sync_command()
        stopped = _Stopper(self.max_seconds)
        with Graph(folder, self.namespace, variables) as graph:
            if sync_command:
                graph.beside("sync", sync_command)  # first, so that it ends last: the session's end goes out with it
            for spec in specs:
                graph.start(spec)
            self._print_started(folder, [spec.name for spec in specs], bool(sync_command), console)
            graph.watch(stopped, lambda line: console.print(line, style="yellow", markup=False, highlight=False))
            statuses = graph.stop()
        unclean = {name: status for name, status in statuses.items() if status}
        console.print(f"stopped; not clean: {unclean}" if unclean else "stopped")
        return 1 if unclean else 0

    def _print_started(self, folder: Path, names: list[str], syncs: bool, console: Console) -> None:
        if self.json:
            # Scripts read the key under the name that the verb had when they were written.
            print(json.dumps({"logs": str(folder), "nodes": names, "courier": syncs}), flush=True)
        started = ", ".join([*names, "sync"] if syncs else names)
        console.print(f"started {started}; logs in {folder}; stop with Ctrl-C")
        if syncs:
            collects = f"learner {self.learner}: `ratchet ctl run` collects what it requests into {self._episodes()}"
            console.print(f"{collects}; `ratchet status --robot {self.robot}` says how it stands", highlight=False)


class _Stopper:
    """True once a signal came or time is up."""

    def __init__(self, limit: float) -> None:
        self._stopped = False
        self._checks_left = limit / 0.2 if limit else float("inf")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = True

    def __call__(self) -> bool:
        self._checks_left -= 1
        return self._stopped or self._checks_left <= 0


@dataclass
class Sim(_Shared):
    """A simulated arm behind the same topics as a real one.

    Commands to copy:

        ratchet up sim --task door-open --policy models/small-metaworld

        ratchet up sim --task door-open --policy models/small-metaworld --lock-step

        ratchet up sim --task button-press --policy models/small-metaworld --learner tcp://192.0.2.7:5544
    """

    suite: str = "metaworld"
    """Suite of the task."""
    task: str = "door-open"
    """Name of the task."""
    initial_state: int = -1
    """Id of the initial state; -1 for the first training state."""
    contract: Path | None = None
    """Robot contract (YAML); the suite's own if absent."""
    speed: float = 1.0
    """Simulated seconds per real second."""
    lock_step: bool = False
    """Simulated time stands still while the policy computes."""
    labeller: Literal["scene", "operator", "none"] = "scene"
    """Who says that a task is solved: the scene's own predicate, a person's buttons, or nobody until a review."""

    def run(self) -> int:
        name = "metaworld" if self.suite == "metaworld" else "libero"
        contract = self.contract or ROBOTS / f"{name}.yaml"
        RobotContract.load(contract)
        timed = {"use_sim_time": True, "lock_step": self.lock_step}
        scene = {
            "contract": ros.absolute(contract),
            "suite": self.suite,
            "task": self.task,
            "initial_state": self.initial_state,
            "speed": self.speed,
            "lock_step": self.lock_step,
        }
        return self._up(
            [
                NodeSpec("sim_robot_node", "sim_robot_node", scene),
                NodeSpec("safety_node", "safety_node", {"contract": ros.absolute(contract), **timed}),
                self._policy(contract, judge=self.labeller, **timed),
            ]
        )


@dataclass
class Real(_Shared):
    """A real arm whose own driver runs already; `ratchet doctor --contract …` first.

    Commands to copy:

        ratchet up real --contract robots/ur5e.yaml --policy models/mine --store runs/adapters --adapter active

        ratchet up real --contract robots/so101.yaml --policy models/mine --cameras front=uvc:/dev/video0

        ratchet up real --contract robots/ur5e.yaml --policy models/mine --learner tcp://192.0.2.7:5544 --session manual
    """

    contract: Path = Path("robots/ur5e.yaml")
    """Robot contract (YAML)."""
    cameras: list[str] = field(default_factory=list)
    """Cameras that are opened here, besides those with drivers of their own: name=realsense:SERIAL,
    name=uvc:/dev/video0, name=recorded:FILE."""
    joy: list[str] = field(default_factory=list)
    """Let a person intervene by gamepad: pairs dimension=axis; the joy driver runs already."""
    operator: str = ""
    """Who holds the gamepad and labels with it; needed with --joy."""
    resume: Literal["automatic", "manual"] = "manual"
    """After a hold: automatic goes on by itself, manual waits for a person."""
    dead_man: bool = False
    """Move only while the dead-man switch is held."""
    calibrations: Path = Path("calibrations")
    """Folder of calibrations; cameras that the contract ties to one must have been checked with `calibrate drift`."""

    def run(self) -> int:
        loaded = RobotContract.load(self.contract)
        checks = last_check.require(self.calibrations, loaded)
        path = ros.absolute(self.contract)
        if self.joy and not self.operator.strip():
            raise RatchetError("up.no_operator", "whoever holds the gamepad labels with it", fix="--operator NAME")
        specs = [_camera(loaded, path, line) for line in self.cameras]
        ids = [f"{c.name}={c.calibration_id}" for c in loaded.cameras if c.calibration_id]
        tied = {"calibrations": ids} if ids else {}  # an empty list has no type on the way to a node
        safe = {"resume": self.resume, "dead_man": self.dead_man}
        specs.append(NodeSpec("safety_node", "safety_node", {"contract": path, **safe}))
        specs.append(self._policy(self.contract, checks=json.dumps(checks), **tied, **safe))
        if self.joy:
            joy = {"contract": path, "axes": self.joy, "person": self.operator}
            specs.append(NodeSpec("teleop_node", "teleop_node", joy, vital=False))
        return self._up(specs)


def _camera(contract: RobotContract, path: str, line: str) -> NodeSpec:
    name, equals, rest = line.partition("=")
    kind, colon, source = rest.partition(":")
    if not equals or kind not in DEVICE_KINDS:
        raise RatchetError(
            "up.bad_camera", f"{line!r} is not name=kind:source", fix=f"kinds: {', '.join(DEVICE_KINDS)}"
        )
    contract.camera(name)
    values = {"contract": path, "camera": name, "device": kind, "source": source if colon else ""}
    return NodeSpec("camera_node", f"camera_{name}", values)


@dataclass
class Up:
    """Start all nodes of one arm, real or simulated; Ctrl-C brings the arm to rest and ends them in order."""

    command: Annotated[Sim, tyro.conf.subcommand("sim")] | Annotated[Real, tyro.conf.subcommand("real")]

    def run(self) -> int:
        return self.command.run()
