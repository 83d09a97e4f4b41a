"""One sequential run from the command line: progress, hot swaps, videos, report.

Knows how `learn` and `demo` present a run. The run itself is `ratchet_vla.learner.sequence`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from ratchet_sim import registry
from ratchet_sim.video import record
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, estimate
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import SuccessMatrix, difference, measures
from ratchet_vla.learner.methods.base import SeqFT
from ratchet_vla.learner.report.page import print_matrix, video_name, write_report
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations
from ratchet_vla.learner.sequence import SequenceConfig, SequentialRun
from ratchet_vla.learner.update.ranks import Ranks
from ratchet_vla.policy.checkpoints.own import AnyPolicy

TRAINED = 3.0  # what an episode that is learned from costs, in episodes that are only evaluated; two cores


@dataclasses.dataclass
class Result:
    """What a run leaves behind, for the caller and for `--json`. unlearned: task -> why nothing was learned on it."""

    suite: str
    folder: Path
    matrix: SuccessMatrix
    swaps: list[dict[str, Any]]
    seconds: float
    report: Path
    unlearned: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        gains = {}
        for stage, task in enumerate(self.matrix.tasks, 1):
            before, after = self.matrix.get(0, task), self.matrix.get(stage, task)
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


def run(
    *,
    title: str,
    suite: str,
    policy_folder: Path,
    config: SequenceConfig,
    lora: common.LoraOptions,
    folder: Path,
    workers: int,
    slots: int,
    videos: bool,
    console: Console,
    rollouts: str = "local",
    method: SeqFT | None = None,
    device: torch.device | str = "",
    ranks: Ranks | None = None,
    shard: bool = False,
    known: KnownEvaluations | None = None,
    expected: float = 0.0,
    start: str = "",
    origin: FolderStore | None = None,
) -> Result:
    """Run (or go on with) a sequential fine-tuning in `folder` and write its report.

    device: where both policies are. ranks: the processes that run this together, each with `workers` simulators of its
    own; rank 0 alone writes and shows. shard: each rank keeps a part of the frozen base while it updates. known:
    evaluations that other runs made already. expected: seconds that it should take here, 0 where nobody measured it.
    start: adapter that the run goes on from, stored in `origin`.
    """
    started = time.perf_counter()
    main = ranks is None or ranks.main
    contract = registry.contract_for(suite)
    tasks = common.find_tasks(suite, [*config.tasks, *config.held_out])
    first = origin.resolve(start) if origin is not None else ""
    origin, first = (None, "") if first == BASE else (origin, first)
    if origin is not None:
        lora = dataclasses.replace(common.lora_of(origin, first), seed=lora.seed)
    made_for = common.made_for(origin, first) if origin is not None else None
    policy, adapter = common.open_policy(policy_folder, contract, lora, device, made_for)
    store = FolderStore(folder / "adapters", create=True)
    if origin is not None:
        common.take_over(store, origin, first)
    method = method or SeqFT()
    room = method.serving_rank(lora.rank, len(config.tasks))
    served = dataclasses.replace(lora, rank=room, alpha=lora.alpha * room / lora.rank)
    running: common.Running | None = None
    if shard and ranks is not None:
        # A second policy would be whole on every rank: what is trained is evaluated itself, and no videos are made.
        ranks.shard(policy, adapter)
    else:
        running = common.open_running(policy_folder, contract, served, store, device)
        if type(method) is SeqFT:
            common.share_base(running.policy, policy)  # other methods may change the weights of the one they train
    common.print_contract(console, contract)
    facts = common.describe_run(
        title,
        common.command_line(),
        suite=suite,
        method=f"{method.name}, {config.update.algorithm}" if method.needs_rollouts else method.name,
        settings=method.settings,
        seed=config.seed,
        contract=f"{contract.name} {contract.id}",
        policy=str(policy_folder),
        base_hash=policy.base_hash,
        config={"sequence": dataclasses.asdict(config), "lora": dataclasses.asdict(lora)},
        **({"start": first} if first else {}),
        **({} if ranks is None else {"processes": ranks.world, "sharded": shard}),
    )
    if main:
        common.write_json(folder / "run.json", facts)
    if videos and main and running is not None:
        _videos(running, first, [*config.tasks, *config.held_out], tasks, folder, "before", console)
    env = common.make_vector(policy, suite, contract, workers, slots, rollouts)
    ticking = Ticker(running) if running is not None else None
    try:
        with progress_bars(console) as progress:
            view = View(progress, console, config, expected)
            serve = running.serve if running is not None else lambda wanted: _trained(wanted, policy, adapter)
            sequence = SequentialRun(
                policy,
                adapter,
                env,
                tasks,
                store,
                serve,
                config,
                folder / "state",
                view.event,
                method,
                ranks,
                known,
                origin=common.command_line(),
                start=first,
            )
            with ticking or contextlib.nullcontext():
                matrix = sequence.run()
    finally:
        env.close()
    if not main:
        seconds = time.perf_counter() - started
        return Result(suite, folder, matrix, [], seconds, folder / "report.html", sequence.unlearned)
    if videos and running is not None:
        _videos(running, sequence.adapter_ids[-1], [*config.tasks, *config.held_out], tasks, folder, "after", console)
    for name in ("matrix.json", "updates.jsonl"):
        source = folder / "state" / name
        if source.exists():
            (folder / name).write_bytes(source.read_bytes())
    common.write_json(folder / "adapters.json", adapter_rows(store, sequence.adapter_ids[1:], config.tasks))
    swaps = swap_rows(running)
    seconds = time.perf_counter() - started
    facts |= {
        "finished": common.now(),
        "seconds": round(seconds, 1),
        "hot swaps": "; ".join(map(swap_line, swaps)),
        "forwards of the running policy meanwhile": ticking.count if ticking is not None else 0,
    }
    common.write_json(folder / "run.json", facts)
    report = write_report(folder)
    if matrix.cells:
        print_matrix(matrix, console)
    return Result(suite, folder, matrix, swaps, seconds, report, sequence.unlearned)


def adapter_rows(store: FolderStore, identities: Sequence[str], learned: Sequence[str]) -> list[dict[str, Any]]:
    """adapters.json: what the report's table says of those that are stored, and of stages that left the base as it is.
    identities: one for each of the tasks that were `learned`, "" for the base."""
    tags: dict[str, list[str]] = {}
    for tag, identity in store.tags().items():
        tags.setdefault(identity, []).append(tag)
    there, rows = store.ids(), []
    for stage, (identity, task) in enumerate(zip(identities, learned, strict=True), 1):
        row: dict[str, Any] = {"stage": stage, "task": task, "id": "", "parent": None, "effect": 0.0, "tags": []}
        if identity in there:
            made = store.card(identity).provenance
            row |= {"stage": made.stage, "task": made.task, "parent": made.parent, "effect": made.effect}
            row |= {"id": identity, "tags": tags.get(identity, [])}
        if identity in there or not identity:
            rows.append(row)
    return rows


def swap_rows(running: common.Running | None) -> list[dict[str, Any]]:
    """The hot swaps so far, as plain data."""
    return [
        {
            "from": s.old_id[:12],
            "to": s.new_id[:12],
            "ready_ms": 1e3 * s.ready,
            "unavailable_ms": 1e3 * s.unavailable,
            "warnings": [w.code for w in s.warnings],
        }
        for s in (running.swaps if running is not None else [])
    ]


def swap_line(swap: Mapping[str, Any]) -> str:
    return (
        f"{swap['from']} -> {swap['to']}: ready in {swap['ready_ms']:.0f} ms, "
        f"policy unavailable {swap['unavailable_ms']:.3f} ms"
    )


def _trained(wanted: str, policy: AnyPolicy, adapter: Lora) -> AnyPolicy:
    """The policy under training itself, which stands at what is to be evaluated whenever a stage is over.

    Raises:
        RatchetError: learn.not_served where another adapter is asked for.
    """
    present = adapter.adapter(binding_of(policy)).id
    if wanted != present and (wanted or adapter.effect().overall > 0.0):
        raise RatchetError(
            "learn.not_served",
            f"with --shard only the adapter under training can be evaluated, not {wanted[:12] or 'the base'}",
            where=present[:12],
            fix="leave --shard out",
        )
    return policy


class Ticker:
    """Keeps asking the running policy for chunks at 1 Hz, so that every swap happens on a policy in use."""

    def __init__(self, running: common.Running) -> None:
        self.running = running
        self.count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from ratchet_vla.adapters.swap.canary import canary_input

        batch = canary_input(self.running.policy.spec)
        while not self._stop.wait(1.0):
            with self.running.swapper.running():
                self.running.policy.predict(batch)
            self.count += 1


def progress_bars(console: Console) -> Progress:
    return Progress(
        # LIBERO's task names are longer than a terminal is wide; the bar and the counts must stay.
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


class View:
    """Turns events of the run into progress bars and lines."""

    def __init__(self, progress: Progress, console: Console, config: SequenceConfig, expected: float) -> None:
        self.progress, self.console, self.config = progress, console, config
        training = len(config.tasks) * config.updates * config.groups * config.group_size
        stages, columns = len(config.tasks) + 1, len(config.tasks) + len(config.held_out)
        evaluation = stages * columns * config.evaluation_episodes
        self.left = estimate.Remaining(TRAINED * training + evaluation, expected)
        self.whole = progress.add_task("in all", total=int(self.left.total), note="")
        total = len(config.tasks) * config.updates
        self.bar = progress.add_task("learning", total=total, note="")
        self.episodes = progress.add_task("episodes", total=1, note="")

    def event(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "episode":
            self.progress.update(
                self.episodes, completed=facts["done"], total=facts["of"], description=facts["what"], note=""
            )
        elif kind == "update":
            done = (facts["stage"] - 1) * self.config.updates + facts["update"]
            self._advance(TRAINED * self.config.groups * self.config.group_size)
            if "skipped" in facts:
                note = f"{facts['task']} changed nothing: {facts['skipped']}"
            elif facts["episodes"]:
                rate = facts["successes"] / facts["episodes"]
                kl, entropy = facts.get("approx_kl", 0), facts.get("entropy", 0)
                note = f"{facts['task']} {rate:.0%}  KL {kl:.3f}  entropy {entropy:.2f}"
            else:
                note = f"{facts['task']} loss {facts['loss']:.3f}"
            self.progress.update(self.bar, completed=done, note=note)
            if not self.console.is_terminal:
                left = estimate.minutes(self.left.seconds())
                self.console.print(f"update {facts['update']:3d}  {note}  {facts['seconds']:.0f} s, about {left} left")
        elif kind == "evaluated":
            self._advance(facts["trials"])
            rate = facts["successes"] / facts["trials"]
            speed = f"{60 * facts['trials'] / facts['seconds']:5.0f} episodes/min" if facts["seconds"] else "known"
            self.console.print(
                f"stage {facts['stage']}  {facts['task']:28s} {facts['successes']:3d}/{facts['trials']} = {rate:4.0%}"
                f"   {speed}"
            )
        elif kind == "stage" and not facts["learned"]:
            self.console.print(f"nothing was learned on {facts['task']}: {facts['why']}", style="yellow", markup=False)
        elif kind == "stage":
            self.console.print(
                f"[bold]learned {facts['task']}[/]: adapter {facts['adapter_id'][:12]}, "
                f"changes the base by {facts['effect']:.2%}"
            )

    def _advance(self, weight: float) -> None:
        self.left.advance(weight)
        left = f"about {estimate.minutes(self.left.seconds())} left"
        self.progress.update(self.whole, completed=int(self.left.done), note=left)


def _videos(
    running: common.Running,
    adapter_id: str,
    names: list[str],
    tasks: dict[str, Any],
    folder: Path,
    moment: str,
    console: Console,
) -> None:
    policy = running.serve(adapter_id)
    for name in names:
        path = folder / "videos" / video_name(name, moment)
        if not path.exists():
            success = record(policy, tasks[name], tasks[name].evaluation_states[0], path)
            console.print(f"video {moment} {name}: {'success' if success else 'failure'}  {path}")
