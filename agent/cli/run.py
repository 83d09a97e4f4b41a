"""`ratchet run`: a policy drives a simulated robot through the runtime that drives an arm."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from agent.cli import common
from agent.cli.computing import ComputingOptions
from agent.contract import RobotContract
from agent.episodes.recorder import Recorder
from agent.errors import RatchetError
from agent.policy.noise import derive_seed
from agent.records import Mark
from agent.runtime.chunks import ChunkExecutor, CollectExecutor, DeployExecutor
from agent.runtime.clock import ManualClock, MonotonicClock
from agent.runtime.judging import SceneJudge
from agent.runtime.loop import ControlLoop, EpisodeEnd
from agent.runtime.policy_client import PolicyClient, PolicyLaunch
from agent.runtime.priority import normal, real_time
from agent.runtime.restamped import Restamped
from agent.runtime.safety import SafetyConfig, SafetyFilter
from agent.runtime.session import Session
from agent.runtime.sink import MemorySink, Tee
from sim import registry
from sim.base import TaskInfo
from sim.robot import SimRobot


@dataclass
class Run(ComputingOptions):
    """Run a policy on a simulated robot through policy process, chunk execution and safety stage.

    Commands to copy:

        ratchet run --task door-open

        ratchet run --task door-open --execute deploy --realtime

        ratchet run --task door-open --record runs/episodes --temperature 1

        ratchet run --task faucet-open --adapter active --store runs/demo/adapters --episodes 5 --json

        ratchet run --task button-press --store runs/robot/adapters --follow active --realtime --episodes 20
    """

    task: str
    """Task name."""
    suite: str = "metaworld"
    """Suite of the task."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    adapter: str = ""
    """Id, id prefix or tag of an adapter; the base alone if absent."""
    store: Path | None = None
    """Adapter store; needed with --adapter and --follow."""
    follow: str = ""
    """A tag of the store, such as `active`: when it moves (promotion, rollback), the running policy swaps at once."""
    episodes: int = 1
    """Episodes, from the first so many evaluation states."""
    horizon: int = 0
    """Control periods after which an episode ends; 0 for the task's own number."""
    record: Path | None = None
    """Episode store to record into; nothing is kept if absent."""
    execute: Literal["collect", "deploy"] = "collect"
    """collect: exactly what was sampled. deploy: inference overlaps motion, stale actions skipped, seams blended."""
    use: int = 0
    """With deploy: actions of each chunk before the next takes over; 0 for three quarters of the chunk."""
    realtime: bool = False
    """Run at the contract's rate on the machine's clock; otherwise in lock-step, where simulated time waits."""
    temperature: float = 0.0
    """Sampling temperature; 0 acts greedily."""
    seed: int = 0
    """Seed of sampled actions."""
    resume: Literal["automatic", "manual"] = "automatic"
    """After a hold that is not latched: go on by itself, or end the episode for want of a person."""
    priority: int = 0
    """With --realtime: SCHED_FIFO level (1..99) asked for the loop's thread; 0 leaves the scheduler alone."""
    python: str = ""
    """Interpreter of the policy process; this one if absent."""
    threads: int = 1
    """Threads for the policy."""
    out: Path | None = None
    """Folder for the session's manifest; none is written if absent."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json)
        info = common.find_tasks(self.suite, [self.task])[self.task]
        contract = registry.contract_for(self.suite)
        safety = SafetyFilter(contract, SafetyConfig(resume=self.resume))
        common.print_contract(console, contract)
        print_times(console, contract)
        options = {
            "policy": str(common.policy_folder(self.suite, self.policy)),
            "store": str(self.store) if self.store else "",
            "adapter": self.adapter,
            "follow": self.follow,
            "threads": self.threads,
        }
        robot = SimRobot(self.suite, info.name, info.evaluation_states[0], contract)
        launch = PolicyLaunch(options=options, python=self.python)
        rows: list[dict[str, Any]] = []
        try:
            with console.status("starting the policy process"), PolicyClient(contract, launch) as client:
                robot.connect()
                if client.computing:
                    console.print(f"the policy computes in {client.computing}", markup=False, highlight=False)
                for warning in client.warnings:
                    console.print(f"[yellow]{warning}[/]")
                session = self._session(contract, client)
                recorder = self._recorder(contract, session)
                try:
                    for state in info.evaluation_states[: self.episodes]:
                        rows.append(self._episode(robot, client, safety, info, state, recorder))
                finally:
                    if recorder is not None:
                        recorder.close()
                if session is not None:
                    session.stop("done")
                adapter_id = client.adapter_id
        finally:
            robot.close()
        if self.json:
            print(json.dumps({"task": info.name, "adapter": adapter_id, "episodes": rows}))
        else:
            console.print(table_of(rows, f"{self.suite} {info.name}, {self.execute}, adapter {adapter_id[:12]}"))
        return 0 if all(row["success"] is not None and not row["not_recorded"] for row in rows) else 1

    def _episode(
        self,
        robot: SimRobot,
        client: PolicyClient,
        safety: SafetyFilter,
        info: TaskInfo,
        state: int,
        recorder: Recorder | None,
    ) -> dict[str, Any]:
        robot.reset(state)
        robot.observe()  # the first frame compiles shaders; that must not happen in the first control period
        sink = MemorySink()
        clock = MonotonicClock() if self.realtime else ManualClock()
        assert client.spec is not None
        executor: ChunkExecutor = CollectExecutor(robot.contract)
        if self.execute == "deploy":
            executor = DeployExecutor(robot.contract, use=self.use or max(1, client.spec.chunk * 3 // 4))
        seed = derive_seed(self.seed, "evaluation", info.name, state)
        client.sample(self.temperature, seed)
        if recorder is not None:
            recorder.revive()
            recorder.require_ready()
            facts = {"mode": self.execute, "seed": seed, "initial_state": state}
            recorder.describe(name=uuid.uuid4().hex[:12], adapter_id=client.adapter_id, **facts)
        loop = ControlLoop(
            Restamped(robot, clock) if self.realtime else robot,
            client,
            safety,
            executor,
            sink=sink if recorder is None else Tee(sink, recorder),
            clock=clock,
            lock_step=not self.realtime,
        )
        try:
            if self.realtime and self.priority:
                Console(stderr=True).print(real_time(self.priority))
            horizon, judge = self.horizon or info.horizon, SceneJudge(robot.success)
            end = loop.run_episode(info.name, info.instruction, horizon=horizon, judge=judge)
        finally:
            if self.realtime and self.priority:
                normal()
        return report(state, end, sink, loop) | kept(recorder)

    def _recorder(self, contract: RobotContract, session: Session | None) -> Recorder | None:
        if self.record is None:
            return None
        return Recorder(self.record, contract, session=session.id if session is not None else "")

    def _session(self, contract: RobotContract, client: PolicyClient) -> Session | None:
        if self.out is None:
            return None
        notes = {"command": common.command_line(), "simulated": True}
        return Session.start(self.out, contract, base_hash=client.base_hash, adapter_id=client.adapter_id, notes=notes)


def report(state: int, end: EpisodeEnd, sink: MemorySink, loop: ControlLoop) -> dict[str, Any]:
    """One episode as plain data."""
    sent = [t for t in sink.ticks if t.chunk_sequence >= 0]
    return {
        "initial_state": state,
        "success": end.success,
        "termination": end.termination.value,
        "reason": end.reason,
        "ticks": end.ticks,
        "seconds": round(end.seconds, 3),
        "chunks": len(sink.chunks),
        "exactly_as_sampled": sum(t.marks == Mark.NONE for t in sent) / max(len(sent), 1),
        "events": dict(Counter(e.code for e in sink.events)),
        "missed_ticks": loop.timing.missed,
        **{k: round(v, 6) for k, v in loop.timing.percentiles().items()},
    }


def kept(recorder: Recorder | None) -> dict[str, str]:
    """The id under which the last episode is kept, or why it is not."""
    if recorder is None:
        return {"episode": "", "not_recorded": ""}
    try:
        return {"episode": recorder.wait_ended(60.0), "not_recorded": ""}
    except RatchetError as error:
        return {"episode": "", "not_recorded": str(error)}


def print_times(console: Console, contract: RobotContract) -> None:
    """When the arm will hold, before it does anything."""
    times = dataclasses.asdict(contract.watchdog)
    jerk = "none" if not contract.limits.jerk else ", ".join(f"{j:g}" for j in contract.limits.jerk)
    console.print(
        f"holds when: state or frames older than {times['observation_max_age']:g} s, an action "
        f"{times['action_max_age']:g} s late, no answer for {times['policy_timeout']:g} s; stops within "
        f"{times['stop_time']:g} s; ramp {contract.limits.ramp_time:g} s; jerk limits: {jerk}\n"
    )


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("state", "success", "ended by", "ticks", "as sampled", "missed", "events", "episode"):
        table.add_column(column, justify="left" if column in ("ended by", "events", "episode") else "right")
    for row in rows:
        events = ", ".join(f"{code.split('.')[-1]} {n}" for code, n in row["events"].items()) or "none"
        solved = "?" if row["success"] is None else "yes" if row["success"] else "no"
        table.add_row(
            str(row["initial_state"]),
            solved,
            row["termination"],
            str(row["ticks"]),
            f"{row['exactly_as_sampled']:.0%}",
            str(row["missed_ticks"]),
            events,
            row["not_recorded"] or row["episode"][:12],
        )
    return table
