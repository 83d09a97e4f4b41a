"""`ratchet run`: a policy drives a simulated robot through the runtime that drives an arm."""

from __future__ import annotations

import json
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.robot import SimRobot
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.policy.run_report import kept, print_times, report, table_of
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.recorder.client import Recorder
from ratchet_vla.episodes.success_rules import require_goal
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.runtime.clock import ManualClock, MonotonicClock
from ratchet_vla.runtime.control.chunks import ChunkExecutor, CollectExecutor, DeployExecutor
from ratchet_vla.runtime.control.labelling import SceneLabeller
from ratchet_vla.runtime.control.loop import ControlLoop
from ratchet_vla.runtime.control.priority import normal, real_time
from ratchet_vla.runtime.control.sink import MemorySink, Tee
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.runtime.robots.restamped import Restamped
from ratchet_vla.runtime.safety.filter import SafetyConfig, SafetyFilter
from ratchet_vla.runtime.session import rollout_requests
from ratchet_vla.runtime.session.controller import SessionController
from ratchet_vla.runtime.session.dispatch import recorded

POLL_S = 0.2  # between two looks for a rollout request


@dataclass(frozen=True)
class Attempt:
    """One episode to run.

    Attributes:
        info: The task.
        state: Id of the initial state.
        goal: What is asked of the policy, and how its actions are sampled.
        name: Name that the episode is recorded under.
    """

    info: TaskInfo
    state: int
    goal: rollout_requests.Goal
    name: str


@dataclass(frozen=True)
class Rig:
    """What all episodes of one command share.

    Attributes:
        console: Where progress goes.
        client: The policy, in its own process.
        safety: The filter behind it.
        recorder: Keeps the episodes; None where nothing is kept.
        sessions: The robot's sessions; None without a robot's folder.
    """

    console: Console
    client: PolicyClient
    safety: SafetyFilter
    recorder: Recorder | None
    sessions: SessionController | None


@dataclass
class Run(remote.LearnerOptions, ComputingOptions):
    """Run a policy on a simulated robot through policy process, chunk execution and safety filter.

    Commands to copy:

        ratchet run --task door-open

        ratchet run --task door-open --execute deploy --realtime

        ratchet run --task door-open --record runs/episodes --temperature 1

        ratchet run --task faucet-open --adapter active --store runs/demo/adapters --episodes 5 --json

        ratchet run --task button-press --store runs/robot/adapters --follow active --realtime --episodes 20

        ratchet run --learner tcp://192.0.2.7:5544 --episodes 24
    """

    task: str = ""
    """Task name; with --learner the one that it requests if absent."""
    suite: str = "metaworld"
    """Simulation suite of the task."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    adapter: str = ""
    """Id, id prefix or tag of an adapter; the base alone if absent."""
    store: Path | None = None
    """Folder of the adapter store; needed with --adapter and --follow. With --learner <robot>/adapters if absent."""
    follow: str = ""
    """Tag of the store, such as `active`, that the policy follows: when it moves (promotion, rollback), the running
    policy swaps at once. With --learner `active` if absent."""
    episodes: int = 1
    """How many episodes: from the first so many evaluation states; with --learner from training states."""
    horizon: int = 0
    """Control periods after which an episode ends; 0 takes the task's own number."""
    record: Path | None = None
    """Folder of the episode store to record into; nothing is kept if absent. With --learner <robot>/episodes if
    absent."""
    execute: Literal["collect", "deploy"] = "collect"
    """collect: execute exactly what was sampled. deploy: inference overlaps motion, stale actions are skipped, chunks
    are blended into one another."""
    use: int = 0
    """With deploy: how many actions of a chunk are executed before the next takes over; 0 takes three quarters of the
    chunk."""
    realtime: bool = False
    """Run at the contract's rate on the machine's clock; otherwise in lock-step, where simulated time waits for the
    policy."""
    temperature: float | None = None
    """Sampling temperature; 0 takes the most likely action. If absent: what the learner requests, and 0 without one."""
    seed: int = 0
    """Seed of the sampled actions."""
    resume: Literal["automatic", "manual"] = "automatic"
    """After a hold that is not latched: automatic goes on by itself, manual ends the episode, as nobody is there."""
    priority: int = 0
    """With --realtime: SCHED_FIFO priority (1 to 99) of the loop's thread; 0 leaves the scheduler alone."""
    python: str = ""
    """Python interpreter of the policy process; this one if absent."""
    threads: int = 1
    """CPU threads for the policy."""
    robot: Path | None = None
    """Folder of the robot, which keeps its sessions; no session is kept if absent. With --learner runs/robot if
    absent."""
    learner: str = ""
    """Address of a learner, such as tcp://192.0.2.7:5544: a sync agent is started, and the rollouts that the learner
    requests are collected."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json)
        if self.learner:
            self._take_learner()
        else:
            require_goal(self.task, "told by the suite")
        contract = registry.contract_for(self.suite)
        safety = SafetyFilter(contract, SafetyConfig(resume=self.resume))
        common.print_contract(console, contract)
        print_times(console, contract)
        rows = []
        # Closed in reverse, the sync agent last: it sends what the others leave.
        with ExitStack() as opened:
            rig = self._open(contract, safety, console, opened)
            robots = Robots(self.suite, contract)
            opened.callback(robots.close)
            attempts = self._requested(rig) if self.learner else self._chosen()
            for attempt in attempts:
                rows.append(self._episode(robots.at(attempt), rig, attempt))
                if rig.sessions is not None:
                    rig.sessions.look()
            adapter_id = rig.client.adapter_id
        tasks = ", ".join(dict.fromkeys(row["task"] for row in rows))
        if self.json:
            print(json.dumps({"task": tasks, "adapter": adapter_id, "episodes": rows}))
        else:
            console.print(table_of(rows, f"{self.suite} {tasks}, {self.execute}, adapter {adapter_id[:12]}"))
        return 0 if all(row["success"] is not None and not row["not_recorded"] for row in rows) else 1

    def _open(self, contract: RobotContract, safety: SafetyFilter, console: Console, opened: ExitStack) -> Rig:
        """Start sync agent, policy process, session and recorder; each is closed with `opened`."""
        options = {
            "policy": str(common.policy_folder(self.suite, self.policy)),
            "store": str(self.store) if self.store else "",
            "adapter": self.adapter,
            "follow": self.follow,
            "threads": self.threads,
        }
        if self.learner and self.robot and self.record and self.store:
            command = remote.sync_command(self, self.learner, self.robot, self.record, self.store)
            opened.enter_context(remote.beside(command, self.robot / "sync.log"))
        with console.status("starting the policy process"):
            client = opened.enter_context(PolicyClient(contract, PolicyLaunch(options=options, python=self.python)))
        if client.computing:
            console.print(f"the policy computes in {client.computing}", markup=False, highlight=False)
        for warning in client.warnings:
            console.print(f"[yellow]{warning}[/]")
        sessions = self._sessions(contract, client, opened)
        recorder = None if self.record is None else opened.enter_context(Recorder(self.record, contract))
        return Rig(console, client, safety, recorder, sessions)

    def _take_learner(self) -> None:
        """Set what follows from a learner: the robot's folder and its stores.

        Raises:
            RatchetError: run.not_collected, link.no_key and others.
        """
        if self.execute != "collect":
            raise RatchetError("run.not_collected", "a learner needs --execute collect", fix="leave --execute out")
        self.check_keys()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # unwinds: the session and the sync agent end
        self.robot = self.robot or remote.FOLDER
        self.store = self.store or self.robot / "adapters"
        self.record = self.record or self.robot / "episodes"
        self.follow = self.follow or "active"
        self.robot.mkdir(parents=True, exist_ok=True)
        FolderStore(self.store, create=True)

    def _chosen(self) -> Iterator[Attempt]:
        """Episodes of the task that was named, one for each of the first evaluation states."""
        info = common.find_tasks(self.suite, [self.task])[self.task]
        for state in info.evaluation_states[: self.episodes]:
            seed = derive_seed(self.seed, "evaluation", info.name, state)
            horizon = self.horizon or info.horizon
            goal = rollout_requests.Goal(info.name, info.instruction, horizon, self.temperature or 0.0, seed)
            yield Attempt(info, state, goal, uuid.uuid4().hex[:12])

    def _requested(self, rig: Rig) -> Iterator[Attempt]:
        """Episodes as the learner requests them; each request is read when the episode before is over."""
        started = uuid.uuid4().hex[:8]
        session = rig.sessions.id if rig.sessions else ""
        for number in range(self.episodes):
            name = f"{session}-{started}-{number + 1:04d}"
            with rig.console.status("waiting for the learner's rollout request"):
                goal = self._next_goal(rig, name)
            info = common.find_tasks(self.suite, [goal.task])[goal.task]
            state = info.train_states[derive_seed("state", name) % len(info.train_states)]
            yield Attempt(info, state, goal, name)

    def _next_goal(self, rig: Rig, name: str) -> rollout_requests.Goal:
        """Wait until the learner requests something, and until the adapter that it wants is active here."""
        assert self.robot is not None
        while True:
            try:
                return rollout_requests.requested(
                    rollout_requests.read(self.robot),
                    task=self.task,
                    horizon=self.horizon,
                    temperature=self.temperature,
                    seed=self.seed,
                    active=rig.client.adapter_id,
                    episode=name,
                )
            except RatchetError as error:
                if error.code not in ("order.no_word", "order.none", "order.other_adapter"):
                    raise
            if rig.sessions is not None:
                rig.sessions.look()
            time.sleep(POLL_S)

    def _episode(self, robot: SimRobot, rig: Rig, attempt: Attempt) -> dict[str, Any]:
        """Run one episode; returns it as plain data."""
        robot.reset(attempt.state)
        robot.observe()  # the first frame compiles shaders; that must not happen in the first control period
        goal = attempt.goal
        sink = MemorySink()
        clock = MonotonicClock() if self.realtime else ManualClock()
        rig.client.sample(goal.temperature, goal.seed, goal.noise)
        self._describe(rig, attempt)
        loop = ControlLoop(
            Restamped(robot, clock) if self.realtime else robot,
            rig.client,
            rig.safety,
            self._executor(robot.contract, rig.client),
            sink=sink if rig.recorder is None else Tee(sink, rig.recorder),
            clock=clock,
            lock_step=not self.realtime,
        )
        prioritised = self.realtime and self.priority > 0
        try:
            if prioritised:
                Console(stderr=True).print(real_time(self.priority))
            labeller = SceneLabeller(robot.success)
            end = loop.run_episode(goal.task, goal.instruction, horizon=goal.horizon, labeller=labeller)
        finally:
            if prioritised:
                normal()
        return {"task": goal.task, **report(attempt.state, end, sink, loop), **kept(rig.recorder)}

    def _executor(self, contract: RobotContract, client: PolicyClient) -> ChunkExecutor:
        if self.execute == "collect":
            return CollectExecutor(contract)
        assert client.spec is not None
        return DeployExecutor(contract, use=self.use or max(1, client.spec.chunk * 3 // 4))

    def _describe(self, rig: Rig, attempt: Attempt) -> None:
        """Tell the recorder what the next episode is. Raises RatchetError where it cannot record."""
        if rig.recorder is None:
            return
        goal = attempt.goal
        rig.recorder.revive()
        rig.recorder.require_ready()
        rig.recorder.describe(
            name=attempt.name,
            session=rig.sessions.id if rig.sessions is not None else "",
            adapter_id=rig.client.adapter_id,
            mode=self.execute,
            seed=goal.seed,
            initial_state=attempt.state,
            meta={"order": goal.request_id} if goal.request_id else {},
        )

    def _sessions(self, contract: RobotContract, client: PolicyClient, opened: ExitStack) -> SessionController | None:
        """Open the robot's sessions; one is open until this verb ends."""
        if self.robot is None:
            return None
        store = "" if self.record is None else str(self.record.resolve())
        sessions = SessionController(
            self.robot,
            "run",
            contract,
            client.base_hash,
            lambda: client.adapter_id,
            episodes=lambda session: recorded(store, session),
            store=store,
        )
        opened.callback(sessions.close)
        sessions.start({"command": common.command_line(), "simulated": True})
        opened.callback(lambda: sessions.stop("done"))
        return sessions


class Robots:
    """A simulated robot per task, made when it is first needed; one at a time is kept, as each holds a renderer."""

    def __init__(self, suite: str, contract: RobotContract) -> None:
        self._suite = suite
        self._contract = contract
        self._task = ""
        self._robot: SimRobot | None = None

    def at(self, attempt: Attempt) -> SimRobot:
        """Return the connected robot in the scene of this attempt's task."""
        if self._robot is None or self._task != attempt.info.name:
            self.close()
            self._task = attempt.info.name
            self._robot = SimRobot(self._suite, self._task, attempt.state, self._contract)
            self._robot.connect()
        return self._robot

    def close(self) -> None:
        """End the simulator, if there is one."""
        if self._robot is not None:
            self._robot.close()
            self._robot = None
