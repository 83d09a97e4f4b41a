"""`ratchet reference`: the decisions of a base that adapters are held to while they learn.

Knows suites, stores and the file beside a base. What a set is and how it holds is `ratchet_vla.learner.retention`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ratchet_sim import registry
from ratchet_vla.cli import common, display
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.learn.progress import progress_bars
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention import recording
from ratchet_vla.learner.retention.decisions import Decisions
from ratchet_vla.learner.retention.recording import RecordingConfig
from ratchet_vla.learner.retention.reference_set import FILE, Origin, ReferenceSet, load, save
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints.own import AnyPolicy


@dataclass
class Record(ComputingOptions):
    """Record a reference set: the base decides on many tasks, and nothing is learned.

    The wider the set, the more it keeps: give it every task and scene that the robot meets. A task that is learned is
    left out by itself while it is learned.
    """

    suite: str = "metaworld"
    """Simulation suite whose tasks the base is rolled out on."""
    tasks: tuple[str, ...] = ()
    """Task names; all tasks of the suite if absent."""
    leave_out: tuple[str, ...] = ()
    """Tasks that are not recorded."""
    store: Path | None = None
    """Take the decisions of an episode store instead of rolling out."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    out: Path | None = None
    """The file; beside the base policy if absent."""
    recording: RecordingConfig = field(default_factory=RecordingConfig)
    workers: int = 2
    """Simulator processes."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Record, write and show the set; the exit status."""
        common.threads(self.threads)
        console = Console(stderr=self.json)
        folder = common.policy_folder(self.suite, self.policy)
        path = self.out or folder / FILE
        policy = adopted.load(folder)
        if self.store is not None:
            decisions, origin = self._of_store(policy, self.store)
        else:
            decisions, origin = self._rolled_out(policy, console)
        reference = save(path, decisions, origin)
        _show(reference, path, console, self.json)
        return 0

    def _of_store(self, policy: AnyPolicy, folder: Path) -> tuple[Decisions, Origin]:
        store = EpisodeStore(folder)
        store.require_some()
        episodes = (store.read(identity) for identity in store.cards())
        limit = self.recording.decisions_per_task
        return recording.from_episodes(policy, episodes, limit, self.recording.seed, str(folder))

    def _rolled_out(self, policy: AnyPolicy, console: Console) -> tuple[Decisions, Origin]:
        names = self._names()
        contract = registry.contract_for(self.suite)
        tasks = common.find_tasks(self.suite, names)
        env = common.make_vector(policy, self.suite, contract, self.workers, self.slots)
        try:
            with progress_bars(console) as progress:
                total = len(names) * self.recording.episodes
                bar = progress.add_task("the base on other tasks", total=total, note="")
                finished = dict.fromkeys(names, 0)

                def report(task: str, done: int, of: int) -> None:
                    finished[task] = done
                    progress.update(bar, completed=sum(finished.values()), note=task)

                chosen = [tasks[name] for name in names]
                return recording.record(policy, env, chosen, self.recording, self.suite, report)
        finally:
            env.close()

    def _names(self) -> Sequence[str]:
        names_of_suite = [info.name for info in registry.tasks(self.suite)]
        common.find_tasks(self.suite, [*self.tasks, *self.leave_out])
        names = [name for name in self.tasks or names_of_suite if name not in self.leave_out]
        if not names:
            raise RatchetError("reference.empty", "no task is left to record", fix="name more with --tasks")
        return names


@dataclass
class Show:
    """What a reference set holds."""

    file: Annotated[Path, tyro.conf.Positional]
    """A file of `ratchet reference record`, or the folder of a base that has one."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Show the set; the exit status."""
        path = self.file / FILE if self.file.is_dir() else self.file
        _show(load(path), path, Console(stderr=self.json), self.json)
        return 0


@dataclass
class Reference:
    """Record and look at reference sets: decisions of a base that hold an adapter to what it is not trained on.

    Commands to copy:

        ratchet reference record --suite metaworld --leave-out door-lock --out runs/reference.safetensors

        ratchet reference record --store episodes --policy models/my-base

        ratchet reference show models/small-metaworld

        ratchet learn --reference runs/reference.safetensors --tasks faucet-open window-open
    """

    command: Annotated[
        Annotated[Record, tyro.conf.subcommand("record")] | Annotated[Show, tyro.conf.subcommand("show")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Run the verb that was named; its exit status."""
        return self.command.run()


def _show(reference: ReferenceSet, path: Path, console: Console, as_json: bool) -> None:
    counts = recording.decisions_by_task(reference.decisions)
    document: dict[str, Any] = {
        "file": str(path),
        "id": reference.id,
        "bytes": path.stat().st_size,
        "decisions": len(reference.decisions),
        "tasks": dict(counts),
        "origin": dataclasses.asdict(reference.origin),
    }
    if as_json:
        print(json.dumps(document))
        return
    origin = reference.origin
    title = (
        f"{len(reference.decisions)} decisions on {len(counts)} tasks, {document['bytes'] / 1e6:.1f} MB, "
        f"id {reference.id[:12]}\nbase {origin.base_hash[:12]}, {origin.episodes} episodes of {origin.source}, "
        f"{origin.success:.0%} succeeded"
    )
    table = display.make_table(("task", "decisions"), title=title, framed=False)
    for task, count in sorted(counts.items()):
        table.add_row(task, str(count))
    console.print(table)
    console.print(f"{path}\nnext: ratchet learn --reference {path} --tasks …", soft_wrap=True, highlight=False)
