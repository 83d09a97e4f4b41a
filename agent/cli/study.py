"""`ratchet study run|report|analyse`: methods times seeds over one sequence of tasks, resumable, with one report.

Knows the grid and its folders. Each trial is an ordinary sequential run in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from agent.adapters.store import FolderStore
from agent.cli import common, sequential
from agent.cli.pretrain import demonstration_states
from agent.errors import RatchetError
from agent.learner.analysis import adapter_update
from agent.learner.methods.registry import METHODS, method_named
from agent.learner.ppo import PpoConfig
from agent.learner.sequence import SequenceConfig
from agent.learner.study import MEASURES, Trial, as_dict, load_trial, markdown, summarise
from agent.learner.study_report import write_study
from agent.learner.update import UpdateConfig
from sim import registry
from sim.demonstrations import Demonstrations, collect


@dataclass
class Run:
    """Run (or go on with) the grid, then write study.json, study.md and study.html.

    The defaults are the small VLA's recipe: PPO with a value head, rank 4, noise correlated within a chunk.
    """

    tasks: tuple[str, ...]
    """Tasks in the order in which they are learned."""
    methods: tuple[str, ...] = ("seq_ft",)
    """Methods: seq_ft, ewc, expert_replay, dark_replay, retain, slca, expansion, oracle, full_ft, supervised."""
    seeds: tuple[int, ...] = (0,)
    """One trial per method and seed."""
    suite: str = "metaworld"
    """Suite of the tasks."""
    held_out: tuple[str, ...] = ()
    """Tasks that are evaluated and never trained."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    out: Path = Path("runs/study")
    """Study folder."""
    updates: int = 12
    """Updates per task."""
    groups: int = 32
    """Initial states per update."""
    group_size: int = 8
    """Episodes from each initial state."""
    temperature: float = 1.0
    """Sampling temperature of training episodes."""
    noise_correlation: float = 0.9
    """Correlation of the sampling noise within a chunk."""
    evaluation_episodes: int = 50
    """Episodes per task and evaluation."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    reverse: bool = False
    """Learn the tasks in the opposite order."""
    lora: common.LoraOptions = field(default_factory=lambda: common.LoraOptions(rank=4, alpha=4.0))
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            algorithm="ppo", learning_rate=6e-3, minibatches=2, warmup_steps=4, ppo=PpoConfig(lam=0.9)
        )
    )
    full_learning_rate: float = 2e-4
    """Learning rate of full_ft, whose weights need smaller steps than an adapter's."""
    demonstrations: Path | None = None
    """Demonstrations for replay and supervision; the scripted experts record them if absent."""
    demonstration_episodes: int = 20
    """Demonstrations per task where they are recorded."""
    workers: int = 2
    """Simulator processes."""
    slots: int = 12
    """Episodes at once per simulator process."""
    threads: int = 1
    """Threads for the policy."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        console = Console(stderr=self.json)
        chosen = [method_named(name) for name in self.methods]
        tasks = tuple(reversed(self.tasks)) if self.reverse else self.tasks
        common.find_tasks(self.suite, [*tasks, *self.held_out])
        data = self._demonstrations(console) if any(m.needs_demonstrations for m in chosen) else None
        for seed in self.seeds:
            for kind in chosen:
                folder = self.out / kind.name / f"seed{seed}"
                if load_trial(kind.name, seed, folder) is not None:
                    continue
                console.rule(f"{kind.name}, seed {seed}")
                sequential.run(
                    title=f"{kind.name}, seed {seed}",
                    suite=self.suite,
                    policy_folder=common.policy_folder(self.suite, self.policy),
                    config=self._config(kind.name, tasks, seed),
                    lora=self.lora,
                    folder=folder,
                    workers=self.workers,
                    slots=self.slots,
                    videos=False,
                    console=console,
                    method=kind(data) if kind.needs_demonstrations else kind(),
                )
                write(self.out, self._facts(), console)
        result = write(self.out, self._facts(), console)
        if self.json:
            print(json.dumps(result))
        return 0

    def _config(self, method: str, tasks: tuple[str, ...], seed: int) -> SequenceConfig:
        update = self.update
        if method == "full_ft":
            update = dataclasses.replace(update, learning_rate=self.full_learning_rate)
        return SequenceConfig(
            tasks=tasks,
            held_out=self.held_out,
            updates=self.updates,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            evaluation_episodes=self.evaluation_episodes,
            horizon=self.horizon,
            seed=seed,
            update=update,
        )

    def _demonstrations(self, console: Console) -> Demonstrations:
        path = self.demonstrations or self.out / "demonstrations.safetensors"
        if path.is_file():
            return Demonstrations.load(path)
        if self.demonstrations is not None:
            raise RatchetError("learn.no_demonstrations", "no such file", where=str(path), fix="name a file, or record")
        from agent.policy import checkpoint

        spec = checkpoint.load(common.policy_folder(self.suite, self.policy)).spec
        console.print("recording demonstrations")
        found = collect(
            self.suite,
            self._recorded(),
            demonstration_states(self.suite, self.demonstration_episodes, -1),
            cameras=spec.cameras,
            state_fields=spec.state,
            chunk=spec.chunk,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return found

    def _recorded(self) -> tuple[str, ...]:
        """The sequence's tasks, and one more for replay during the first of them."""
        others = [i.name for i in registry.tasks(self.suite) if i.name not in (*self.tasks, *self.held_out)]
        return (*self.tasks, *others[:1])

    def _facts(self) -> dict[str, Any]:
        return common.describe_run(
            f"Study on {self.suite}",
            common.command_line(),
            suite=self.suite,
            tasks=list(self.tasks),
            held_out=list(self.held_out),
            reverse=self.reverse,
            updates=self.updates,
            episodes_per_update=self.groups * self.group_size,
            lora=dataclasses.asdict(self.lora),
            update=dataclasses.asdict(self.update),
        )


@dataclass
class Report:
    """Write study.json, study.md and study.html again from the trials that are finished."""

    out: Annotated[Path, tyro.conf.Positional] = Path("runs/study")
    """Study folder."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        result = write(self.out, {"title": "Study", "command": common.command_line()}, Console(stderr=self.json))
        if self.json:
            print(json.dumps(result))
        return 0


@dataclass
class Analyse:
    """Effective rank and norm of the update, layer by layer, of every adapter of a study or of one store."""

    out: Annotated[Path, tyro.conf.Positional] = Path("runs/study")
    """Study folder, run folder, or adapter store."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        stores = sorted(p.parent for p in self.out.rglob("objects") if (p.parent / "tags").is_dir())
        if not stores:
            raise RatchetError("study.no_adapters", "no adapter store below this folder", where=str(self.out))
        rows: list[dict[str, Any]] = []
        for root in stores:
            store = FolderStore(root)
            for name in store.ids():
                card = store.card(name)
                layers = adapter_update(store.get(name))
                rows.append(
                    {
                        "trial": str(root.parent.relative_to(self.out)) if root != self.out else ".",
                        "adapter": name,
                        "task": card.provenance.task,
                        "stage": card.provenance.stage,
                        "layers": [dataclasses.asdict(layer) for layer in layers],
                        "mean_effective_rank": sum(x.effective_rank for x in layers) / len(layers),
                        "norm": sum(x.norm**2 for x in layers) ** 0.5,
                    }
                )
        if self.json:
            print(json.dumps(rows))
            return 0
        table = Table(title="updates")
        for column in ("trial", "stage", "task", "norm", "mean effective rank"):
            table.add_column(column, overflow="fold")
        for row in sorted(rows, key=lambda r: (r["trial"], r["stage"])):
            rank = f"{row['mean_effective_rank']:.2f}"
            table.add_row(row["trial"], str(row["stage"]), row["task"], f"{row['norm']:.3g}", rank)
        Console(width=100).print(table)
        return 0


@dataclass
class Study:
    """Compare Seq. FT with other methods on your own tasks.

    Commands to copy:

        ratchet study run --tasks button-press handle-press --methods seq_ft ewc --seeds 0 1 --out runs/study

        ratchet study report runs/study

        ratchet study analyse runs/study

    A study that was stopped goes on when the same command is given again.
    """

    command: Annotated[
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Analyse, tyro.conf.subcommand("analyse")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()


def write(out: Path, facts: dict[str, Any], console: Console) -> dict[str, Any]:
    """All of a study's files from its finished trials; prints the table.

    Raises:
        RatchetError: study.nothing_finished.
    """
    trials: list[Trial] = []
    for name in METHODS:
        for folder in sorted((out / name).glob("seed*"), key=lambda p: int(p.name[4:])):
            trial = load_trial(name, int(folder.name[4:]), folder)
            trials += [trial] if trial else []
    if not trials:
        raise RatchetError("study.nothing_finished", "no finished trial", where=str(out), fix="run the study first")
    result = as_dict(trials, facts)
    common.write_json(out / "study.json", result)
    (out / "study.md").write_text(markdown(trials))
    page = write_study(trials, facts, out / "study.html")
    table = Table(title="points, 95 % intervals")
    for column in ("method", "seeds", *MEASURES):
        table.add_column(column, overflow="fold")
    for s in summarise(trials):
        table.add_row(s.method, str(len(s.seeds)), *[v.percent() if (v := s.values[n]) else "-" for n in MEASURES])
    console.print(table)
    console.print(f"report: {page}")
    return result
