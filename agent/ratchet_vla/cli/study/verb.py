"""`ratchet study`: methods times seeds over one sequence of tasks, resumable, with one report.

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

from ratchet_sim import perturbations, registry
from ratchet_sim.demonstrations import Demonstrations, collect
from ratchet_vla.cli import common
from ratchet_vla.cli import demonstrations as files
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.learn import retention, sequential
from ratchet_vla.cli.study.analysis import Analyse
from ratchet_vla.cli.study.evaluate import Evaluate
from ratchet_vla.cli.study.folder import changed_worlds, claim, finished, write
from ratchet_vla.learner.defaults import STUDY
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.variants import Variant
from ratchet_vla.learner.retention.reference_set import FILE
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations
from ratchet_vla.learner.sequence import SequenceConfig
from ratchet_vla.learner.study.results import load_trial, require_same
from ratchet_vla.learner.update.ppo import PpoConfig
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.storage.files import Files


@dataclass
class Run(ComputingOptions):
    """Run (or go on with) the grid, then write study.json, study.md and study.html.

    The defaults are the small VLA's recipe: PPO with a value head, rank 4, noise correlated within a chunk.
    """

    tasks: tuple[str, ...]
    """Tasks in the order in which they are learned."""
    methods: tuple[str, ...] = ("seq_ft",)
    """Rows of the table: seq_ft, ewc, expert_replay, dark_replay, retain, slca, expansion, oracle, full_ft, small_cnn,
    supervised. Parameters follow a colon: retain:coefficient=0.5, ewc:strength=1e5; any method takes rank, alpha,
    learning_rate, updates, groups, until, temperature, order (reversed, or a number that seeds a shuffle) and
    reference (base, or the name of another reference set beside the base), with reference_weight and own_weight:
    seq_ft:alpha=8,order=reversed, seq_ft:reference=base."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; one trial is run per method and seed."""
    suite: str = "metaworld"
    """Simulation suite of the tasks."""
    held_out: tuple[str, ...] = ()
    """Tasks that are evaluated and never trained; also `task@perturbation`, and `suite/task` of the same robot."""
    perturb: tuple[str, ...] = ()
    """Hold out every learned task under these changes of its world too: camera, light, base."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    out: Path = Path("runs/study")
    """Study folder."""
    updates: int = STUDY.updates
    """Updates per task."""
    until: float = 0.0
    """A task ends early once this share (0 to 1) of an update's episodes succeeds; 0 makes all updates."""
    groups: int = STUDY.groups
    """Initial states per update."""
    group_size: int = STUDY.group_size
    """Episodes from each initial state."""
    temperature: float = STUDY.temperature
    """Sampling temperature of training episodes."""
    noise_correlation: float = STUDY.noise_correlation
    """Correlation (0 to 1) of the sampling noise within a chunk."""
    evaluation_episodes: int = 50
    """Episodes per task and evaluation."""
    evaluation_temperature: float = 0.0
    """Sampling temperature of evaluations; 0 takes the most likely action. The published study uses 1.6, as it
    trains."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    lora: common.LoraOptions = field(default_factory=lambda: common.LoraOptions(rank=4, alpha=4.0))
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            algorithm="ppo", learning_rate=6e-3, minibatches=2, warmup_steps=4, ppo=PpoConfig(lam=0.9)
        )
    )
    full_learning_rate: float = 2e-4
    """Learning rate of full_ft and small_cnn, whose weights need smaller steps than an adapter's."""
    demonstrations: Path | None = None
    """File of demonstrations for replay and supervision; the scripted experts record some if absent."""
    demonstration_episodes: int = 20
    """Demonstrations per task, where they are recorded."""
    rollouts: str = "local"
    """Where the simulators run: "local", "local-ray", or the address of a Ray cluster such as ray://head:10001."""
    workers: int = 2
    """Simulator processes."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        console = Console(stderr=self.json)
        chosen = [variants.parse(text) for text in self.methods]
        held_out = self.held_out + changed_worlds(self.tasks, self.perturb)
        common.find_tasks(self.suite, [*self.tasks, *held_out])
        folder = common.policy_folder(self.suite, self.policy)
        plans = self._plans(chosen, held_out)
        for seed, variant, config, lora in plans:  # before hours are spent
            self._retention(variant, folder)
            settings: dict[str, Any] = {
                "config": {"sequence": dataclasses.asdict(config), "lora": dataclasses.asdict(lora)}
            }
            settings |= {"suite": self.suite, "settings": variant.make_settings()}
            require_same(self.out / variant.label / f"seed{seed}", settings)
        needs_data = any(variant.kind.needs_demonstrations for variant in chosen)
        data = self._demonstrations(console) if needs_data else None
        known = KnownEvaluations(self.out / "evaluations")
        elsewhere = 0
        for seed, variant, config, lora in plans:
            trial_folder = self.out / variant.label / f"seed{seed}"
            with claim(trial_folder) as claimed:
                elsewhere += 0 if claimed else 1
                if not claimed or load_trial(variant.label, seed, trial_folder) is not None:
                    continue
                console.rule(f"{variant.label}, seed {seed}")
                sequential.run(
                    sequential.RunPlan(
                        title=f"{variant.label}, seed {seed}",
                        suite=self.suite,
                        policy_folder=folder,
                        config=config,
                        lora=lora,
                        folder=trial_folder,
                        workers=self.workers,
                        slots=self.slots,
                        videos=False,
                        rollouts=self.rollouts,
                        method=variant.make(data),
                        known=known,
                        retention=self._retention(variant, folder),
                    ),
                    console,
                )
            write(self.out, self._facts(), console)
        if elsewhere:
            console.print(f"{elsewhere} of {len(plans)} trials run in other processes; theirs is the last table")
            if not finished(self.out):
                return 0
        result = write(self.out, self._facts(), console)
        if self.json:
            print(json.dumps(result))
        return 0

    def _plans(
        self, chosen: list[Variant], held_out: tuple[str, ...]
    ) -> list[tuple[int, Variant, SequenceConfig, common.LoraOptions]]:
        """The grid: all methods with the first seed, then with the next, so that a first table is soon complete."""
        plans = []
        for seed in self.seeds:
            for variant in chosen:
                plans.append((seed, variant, self._config(variant, held_out, seed), self._lora(variant)))
        return plans

    def _config(self, variant: Variant, held_out: tuple[str, ...], seed: int) -> SequenceConfig:
        update = self.update
        if variant.kind.whole_model:
            update = dataclasses.replace(update, learning_rate=self.full_learning_rate)
        if variant.learning_rate is not None:
            update = dataclasses.replace(update, learning_rate=variant.learning_rate)
        config = SequenceConfig(
            tasks=variant.arranged(self.tasks),
            held_out=held_out,
            updates=self.updates,
            until=self.until,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            evaluation_episodes=self.evaluation_episodes,
            evaluation_temperature=self.evaluation_temperature,
            horizon=self.horizon,
            seed=seed,
            update=update,
        )
        return dataclasses.replace(config, **variant.sequence)

    def _retention(self, variant: Variant, policy_folder: Path) -> retention.Choice:
        reference = variant.reference
        if reference not in (retention.BESIDE_THE_BASE, retention.NONE):
            reference = str(policy_folder / f"reference-{reference}.safetensors")
        if reference == retention.BESIDE_THE_BASE:
            reference = str(policy_folder / FILE)  # a row that says so does without it nowhere
        retention.require_known(reference)
        return retention.Choice(reference, variant.retention())

    def _lora(self, variant: Variant) -> common.LoraOptions:
        rank, alpha = variant.lora(self.lora.rank, self.lora.alpha)
        return dataclasses.replace(self.lora, rank=rank, alpha=alpha)

    def _demonstrations(self, console: Console) -> Demonstrations:
        path = self.demonstrations or self.out / files.FILE
        if self.demonstrations is not None:
            files.require_file(path)
        self.out.mkdir(parents=True, exist_ok=True)
        with Files().lock(self.out / "demonstrations.lock"):  # one process records, others wait for it
            return Demonstrations.load(path) if path.is_file() else self._record(path, console)

    def _record(self, path: Path, console: Console) -> Demonstrations:
        from ratchet_vla.policy.checkpoints import adopted

        spec = adopted.load(common.policy_folder(self.suite, self.policy)).spec
        console.print("recording demonstrations")
        demonstrations = collect(
            self.suite,
            self._recorded(),
            files.demonstration_states(self.suite, self.demonstration_episodes, -1),
            cameras=spec.cameras,
            state_fields=spec.state,
            chunk=spec.chunk,
        )
        files.save_whole(demonstrations, path)
        return demonstrations

    def _recorded(self) -> tuple[str, ...]:
        """The sequence's tasks, and one more for replay during the first of them."""
        used = (*self.tasks, *self.held_out)
        others = [info.name for info in registry.tasks(self.suite) if info.name not in used]
        return (*self.tasks, *others[:1])

    def _facts(self) -> dict[str, Any]:
        return common.describe_run(
            f"Study on {self.suite}",
            common.command_line(),
            suite=self.suite,
            tasks=list(self.tasks),
            held_out=list(self.held_out),
            perturbed={kind: perturbations.KINDS[kind] for kind in self.perturb},
            updates=self.updates,
            episodes_per_update=self.groups * self.group_size,
            temperature=self.temperature,
            evaluation_temperature=self.evaluation_temperature,
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
class Study:
    """Compare Seq. FT with other methods on your own tasks.

    Commands to copy:

        ratchet study run --tasks button-press handle-press --methods seq_ft ewc --seeds 0 1 --out runs/study

        ratchet study run --tasks button-press handle-press --methods seq_ft seq_ft:alpha=8 --perturb camera light

        ratchet study report runs/study

        ratchet study evaluate runs/study --perturb camera --out runs/study_camera

        ratchet study analyse runs/study

    A study that was stopped goes on when the same command is given again; methods and seeds may be added to it. The
    same command in a second terminal runs trials beside the first: each takes those that nobody has taken.
    """

    command: Annotated[
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Analyse, tyro.conf.subcommand("analyse")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()
