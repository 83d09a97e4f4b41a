"""One sequential run from the command line: what it opens, learns, swaps, films and writes.

Knows how `learn` and `demo` present a run. The run itself is `ratchet_vla.learner.sequence`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.video import record
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.learn.progress import Ticker, View, progress_bars
from ratchet_vla.cli.learn.retention import Choice, tell
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import SuccessMatrix, difference, measures
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.report.page import print_matrix, write_report
from ratchet_vla.learner.report.run_folder import video_name
from ratchet_vla.learner.retention.regulariser import Retention
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations
from ratchet_vla.learner.sequence import SequenceConfig, SequentialRun
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.policy.checkpoints.own import AnyPolicy


@dataclasses.dataclass
class Result:
    """What a run leaves behind, for the caller and for `--json`.

    Attributes:
        suite: Simulation suite.
        folder: Run folder.
        matrix: Success by stage and task.
        swaps: The hot swaps, as plain data.
        seconds: How long it took.
        report: The HTML page.
        unlearned: Task -> why nothing was learned on it.
    """

    suite: str
    folder: Path
    matrix: SuccessMatrix
    swaps: list[dict[str, Any]]
    seconds: float
    report: Path
    unlearned: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data, with the gain of every task."""
        gains = {}
        for stage, task in enumerate(self.matrix.tasks, 1):
            before = self.matrix.get(0, task)
            after = self.matrix.get(stage, task)
            if before and after:
                gain = difference(after, before)
                gains[task] = {"gain": gain.estimate, "low": gain.low, "high": gain.high}
        return {
            "folder": str(self.folder),
            "matrix": self.matrix.to_dict(),
            "measures": measures(self.matrix).as_dict(),
            "gains": gains,
            "swaps": self.swaps,
            "seconds": self.seconds,
            "report": str(self.report),
            "unlearned": self.unlearned,
        }


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What is run, from what, with what, and where it is kept.

    device: where both policies are. ranks: the processes that run this together, each with `workers` simulators of its
    own; rank 0 alone writes and shows. shard: each rank keeps a part of the frozen base while it updates. known:
    evaluations that other runs made already. expected: seconds that it should take here, 0 where nobody measured it.
    start: adapter that the run goes on from, stored in `origin`. retention: what holds the adapter.
    """

    title: str
    suite: str
    policy_folder: Path
    config: SequenceConfig
    lora: common.LoraOptions
    folder: Path
    workers: int
    slots: int
    videos: bool
    rollouts: str = "local"
    method: SeqFT = dataclasses.field(default_factory=SeqFT)
    device: torch.device | str = ""
    ranks: Ranks | None = None
    shard: bool = False
    known: KnownEvaluations | None = None
    expected: float = 0.0
    start: str = ""
    origin: FolderStore | None = None
    retention: Choice = dataclasses.field(default_factory=Choice)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.ranks is None or self.ranks.main

    @property
    def names(self) -> list[str]:
        """All tasks that are evaluated."""
        return [*self.config.tasks, *self.config.held_out]


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a run has open.

    Attributes:
        policy: The policy under training.
        adapter: Its LoRA layers.
        running: The policy in use; None where what is trained is evaluated itself.
        store: Adapter store of the run.
        contract: The robot.
        tasks: All tasks that are evaluated, by name.
        lora: Shape of the adapter's layers.
        first: Id of the stored adapter that it goes on from, "" for a new one.
        retention: What holds the adapter; None for nothing.
    """

    policy: AnyPolicy
    adapter: Lora
    running: common.Running | None
    store: FolderStore
    contract: RobotContract
    tasks: dict[str, TaskInfo]
    lora: common.LoraOptions
    first: str
    retention: Retention | None


def run(plan: RunPlan, console: Console) -> Result:
    """Run (or go on with) a sequential fine-tuning in the plan's folder and write its report."""
    started = time.perf_counter()
    opened = _open(plan)
    common.print_contract(console, opened.contract)
    tell(console, opened.retention, plan.retention)
    description = _facts(plan, opened)
    if plan.writes:
        common.write_json(plan.folder / "run.json", description)
        _videos(plan, opened, opened.first, "before", console)
    sequence, forwards = _learn(plan, opened, console)
    if not plan.writes:
        seconds = time.perf_counter() - started
        report = plan.folder / "report.html"
        return Result(plan.suite, plan.folder, sequence.matrix, [], seconds, report, sequence.unlearned)
    _videos(plan, opened, sequence.adapter_ids[-1], "after", console)
    for name in ("matrix.json", "updates.jsonl"):
        source = plan.folder / "state" / name
        if source.exists():
            (plan.folder / name).write_bytes(source.read_bytes())
    rows = adapter_rows(opened.store, sequence.adapter_ids[1:], plan.config.tasks)
    common.write_json(plan.folder / "adapters.json", rows)
    swaps = swap_rows(opened.running)
    seconds = time.perf_counter() - started
    description |= {
        "finished": common.now(),
        "seconds": round(seconds, 1),
        "hot swaps": "; ".join(map(swap_line, swaps)),
        "forwards of the running policy meanwhile": forwards,
    }
    common.write_json(plan.folder / "run.json", description)
    report = write_report(plan.folder)
    if sequence.matrix.cells:
        print_matrix(sequence.matrix, console)
    return Result(plan.suite, plan.folder, sequence.matrix, swaps, seconds, report, sequence.unlearned)


def _open(plan: RunPlan) -> Opened:
    """Policies, store and tasks of a run."""
    contract = registry.contract_for(plan.suite)
    tasks = common.find_tasks(plan.suite, plan.names)
    first = plan.origin.resolve(plan.start) if plan.origin is not None else ""
    origin = plan.origin
    if first == BASE:  # the same as to begin afresh
        origin = None
        first = ""
    lora = plan.lora
    if origin is not None:
        lora = dataclasses.replace(common.lora_of(origin, first), seed=lora.seed)
    made_for = common.made_for(origin, first) if origin is not None else None
    policy, adapter = common.open_policy(plan.policy_folder, contract, lora, plan.device, made_for)
    store = FolderStore(plan.folder / "adapters", create=True)
    if origin is not None:
        common.copy_adapter(store, origin, first)
    running: common.Running | None = None
    if plan.shard and plan.ranks is not None:
        # A second policy would be whole on every rank: what is trained is evaluated itself, and no videos are made.
        plan.ranks.shard(policy, adapter)
    else:
        room = plan.method.serving_rank(lora.rank, len(plan.config.tasks))
        served = dataclasses.replace(lora, rank=room, alpha=lora.alpha * room / lora.rank)
        running = common.open_running(plan.policy_folder, contract, served, store, plan.device)
        if type(plan.method) is SeqFT:
            common.share_base(running.policy, policy)  # other methods may change the weights of the one they train
    retention = plan.retention.open(
        plan.policy_folder, policy, plan.config.tasks, plan.config.held_out, plan.config.update.micro_size
    )
    return Opened(policy, adapter, running, store, contract, tasks, lora, first, retention)


def _facts(plan: RunPlan, opened: Opened) -> dict[str, Any]:
    """run.json: what was run, for the report and for whoever goes on with it."""
    method = plan.method
    return common.describe_run(
        plan.title,
        common.command_line(),
        suite=plan.suite,
        method=f"{method.name}, {plan.config.update.algorithm}" if method.needs_rollouts else method.name,
        settings=method.settings,
        seed=plan.config.seed,
        contract=f"{opened.contract.name} {opened.contract.id}",
        policy=str(plan.policy_folder),
        base_hash=opened.policy.base_hash,
        config={"sequence": dataclasses.asdict(plan.config), "lora": dataclasses.asdict(opened.lora)},
        reference=_reference_facts(opened.retention),
        **({"start": opened.first} if opened.first else {}),
        **({} if plan.ranks is None else {"processes": plan.ranks.world, "sharded": plan.shard}),
    )


def _reference_facts(retention: Retention | None) -> dict[str, Any] | str:
    if retention is None:
        return "none"
    tasks = retention.reference.present_tasks if retention.reference is not None else ()
    return {**retention.settings, "tasks": list(tasks)}


def _learn(plan: RunPlan, opened: Opened, console: Console) -> tuple[SequentialRun, int]:
    """The run itself, with its progress; and how often the running policy was asked meanwhile."""
    running = opened.running
    env = common.make_vector(opened.policy, plan.suite, opened.contract, plan.workers, plan.slots, plan.rollouts)
    ticking = Ticker(running) if running is not None else None

    def serve(adapter_id: str) -> AnyPolicy:
        if running is None:
            return _trained(adapter_id, opened.policy, opened.adapter)
        return running.serve(adapter_id)

    try:
        with progress_bars(console) as progress:
            sequence = SequentialRun(
                opened.policy,
                opened.adapter,
                env,
                opened.tasks,
                opened.store,
                serve,
                plan.config,
                plan.folder / "state",
                View(progress, console, plan.config, plan.expected).event,
                plan.method,
                plan.ranks,
                plan.known,
                origin=common.command_line(),
                start=opened.first,
                retention=opened.retention,
            )
            with ticking or contextlib.nullcontext():
                sequence.run()
    finally:
        env.close()
    return sequence, ticking.count if ticking is not None else 0


def adapter_rows(store: FolderStore, identities: Sequence[str], learned: Sequence[str]) -> list[dict[str, Any]]:
    """Return adapters.json: the stored adapters for the report's table, and stages that left the base as it is.

    Args:
        store: Store of the run.
        identities: An id for each of the tasks that were `learned`, "" for the base.
        learned: Names of the tasks, in the order of learning.
    """
    tags: dict[str, list[str]] = {}
    for tag, identity in store.tags().items():
        tags.setdefault(identity, []).append(tag)
    stored_ids = store.ids()
    rows = []
    for stage, (identity, task) in enumerate(zip(identities, learned, strict=True), 1):
        row: dict[str, Any] = {"stage": stage, "task": task, "id": "", "parent": None, "effect": 0.0, "tags": []}
        if identity in stored_ids:
            origin = store.card(identity).provenance
            row |= {"stage": origin.stage, "task": origin.task, "parent": origin.parent, "effect": origin.effect}
            row |= {"id": identity, "tags": tags.get(identity, [])}
        if identity in stored_ids or not identity:
            rows.append(row)
    return rows


def swap_rows(running: common.Running | None) -> list[dict[str, Any]]:
    """Return the hot swaps so far as plain data; none where no policy is in use."""
    reports = running.swaps if running is not None else []
    return [
        {
            "from": report.old_id[:12],
            "to": report.new_id[:12],
            "ready_ms": 1e3 * report.ready,
            "unavailable_ms": 1e3 * report.unavailable,
            "warnings": [warning.code for warning in report.warnings],
        }
        for report in reports
    ]


def swap_line(swap: Mapping[str, Any]) -> str:
    """Word one of `swap_rows`."""
    return (
        f"{swap['from']} -> {swap['to']}: ready in {swap['ready_ms']:.0f} ms, "
        f"policy unavailable {swap['unavailable_ms']:.3f} ms"
    )


def _trained(adapter_id: str, policy: AnyPolicy, adapter: Lora) -> AnyPolicy:
    """The policy under training itself, which stands at what is to be evaluated whenever a stage is over.

    Raises:
        RatchetError: learn.not_served where another adapter is asked for.
    """
    present = adapter.adapter(binding_of(policy)).id
    if adapter_id != present and (adapter_id or adapter.effect().overall > 0.0):
        raise RatchetError(
            "learn.not_served",
            f"with --shard only the adapter under training can be evaluated, not {adapter_id[:12] or 'the base'}",
            where=present[:12],
            fix="leave --shard out",
        )
    return policy


def _videos(plan: RunPlan, opened: Opened, adapter_id: str, moment: str, console: Console) -> None:
    """One attempt per task as a file, where videos are wanted and a policy is in use."""
    if not plan.videos or opened.running is None:
        return
    policy = opened.running.serve(adapter_id)
    for name in plan.names:
        path = plan.folder / "videos" / video_name(name, moment)
        if not path.exists():
            success = record(policy, opened.tasks[name], opened.tasks[name].evaluation_states[0], path)
            console.print(f"video {moment} {name}: {'success' if success else 'failure'}  {path}")
