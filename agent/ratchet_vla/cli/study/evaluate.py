"""`ratchet study evaluate`: what a finished study learned, under conditions that it was not evaluated under.

Knows trials, their stored adapters and simulators. Trains nothing; the result is a study folder of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from ratchet_sim import perturbations, registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.demonstrations import Demonstrations
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.lora.layers import scaled
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli import demonstrations as files
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.study.folder import changed_worlds, finished, write
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.variants import Variant
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import evaluated, evaluation_specs
from ratchet_vla.learner.study.results import load_trial, require_same
from ratchet_vla.learner.supervised.training import Samples
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy

Serve = Callable[[int, str], Policy]
"""(stage, task) -> the policy that acts on the task after so many learned ones."""

BaseCells = dict[tuple[int, str], Cell]
"""(seed, task) -> what the base did on the task; one dictionary for all trials."""


@dataclass(frozen=True)
class _Trained:
    """A finished trial.

    Attributes:
        variant: Its method.
        seed: Its seed.
        origin: Its folder.
        stored: Its run.json.
    """

    variant: Variant
    seed: int
    origin: Path
    stored: dict[str, Any]

    @property
    def suite(self) -> str:
        """Simulation suite that it was trained in."""
        return str(self.stored["suite"])

    @property
    def sequence(self) -> dict[str, Any]:
        """Settings of its sequential run, as `SequenceConfig` names them."""
        sequence: dict[str, Any] = self.stored["config"]["sequence"]
        return sequence

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks, in the order in which it learned them."""
        return tuple(str(task) for task in self.sequence["tasks"])

    @property
    def lora(self) -> common.LoraOptions:
        """Shape of its adapters."""
        return common.LoraOptions(**self.stored["config"]["lora"])


@dataclass
class Evaluate(ComputingOptions):
    """Evaluate the adapters of a study again: other held-out tasks, changed worlds, sampled instead of greedy.

    Commands to copy:

        ratchet study evaluate runs/study --perturb camera --out runs/study_camera

        ratchet study evaluate runs/study --methods seq_ft oracle --stages all --temperature 1 --out runs/study_sampled

        ratchet study evaluate runs/study --methods seq_ft --scale 0.5 --out runs/study_half
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of the study that was trained."""
    out: Path
    """Folder of the new study; what is finished there is not run again."""
    methods: tuple[str, ...] = ()
    """Rows of the study's table to evaluate, as it names them; all if absent."""
    seeds: tuple[int, ...] = ()
    """Seeds of the study to evaluate; all if absent."""
    stages: Literal["ends", "all"] = "ends"
    """ends: the base and the end of the sequence; all: every stage, which NBT and FWT need. The oracle has no stages,
    and of whole models only the last is kept."""
    held_out: tuple[str, ...] = ()
    """Held-out tasks instead of the study's own, as in `study run`."""
    perturb: tuple[str, ...] = ()
    """Hold out every learned task under these changes of its world: camera, light, base."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely action."""
    scale: float = 1.0
    """Factor on what every adapter adds to the base: 0 is the base, 1 the adapter as it was learned."""
    episodes: int = 0
    """Episodes per task and stage; 0 takes the study's number."""
    policy: Path | None = None
    """Folder of the base policy; where the study found it if absent."""
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
        if self.out.resolve() == self.source.resolve():
            raise RatchetError("study.same_folder", "the result needs a folder of its own", where=str(self.out))
        chosen = self._chosen()
        base_cells: BaseCells = {}
        with Progress(console=console, transient=True) as progress:
            for variant, seed in chosen:
                self._trial(variant, seed, base_cells, progress)
        result = write(self.out, self._facts(), console)
        if self.json:
            print(json.dumps(result))
        return 0

    def _chosen(self) -> list[tuple[Variant, int]]:
        """The finished trials that were asked for.

        Raises:
            RatchetError: study.nothing_finished.
        """
        trials = finished(self.source)
        chosen = []
        for trial in trials:
            if self.methods and trial.method not in self.methods:
                continue
            if self.seeds and trial.seed not in self.seeds:
                continue
            chosen.append((variants.parse(trial.method), trial.seed))
        missing = set(self.methods) - {variant.label for variant, _ in chosen}
        if not chosen or missing:
            labels = dict.fromkeys(trial.method for trial in trials)
            raise RatchetError(
                "study.nothing_finished",
                f"no finished trial of {', '.join(sorted(missing)) or 'these methods and seeds'}",
                where=str(self.source),
                fix=f"finished: {', '.join(labels) or 'none'}",
            )
        return chosen

    def _trial(self, variant: Variant, seed: int, base_cells: BaseCells, progress: Progress) -> None:
        """Evaluate one trial, unless that is finished."""
        folder = self.out / variant.label / f"seed{seed}"
        origin = self.source / variant.label / f"seed{seed}"
        trained = _Trained(variant, seed, origin, json.loads((origin / "run.json").read_text()))
        conditions = self._conditions(trained)
        require_same(folder, {"evaluated": conditions})
        if load_trial(variant.label, seed, folder) is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        description = common.describe_run(
            f"{variant.label}, seed {seed}, evaluated again",
            common.command_line(),
            suite=trained.suite,
            method=trained.stored["method"],
            seed=seed,
            evaluated=conditions,
        )
        common.write_json(folder / "run.json", description)
        started_s = time.monotonic()
        self._measure(trained, conditions, folder, base_cells, progress)
        seconds = round(time.monotonic() - started_s, 1)
        common.write_json(folder / "run.json", description | {"finished": common.now(), "seconds": seconds})

    def _conditions(self, trained: _Trained) -> dict[str, Any]:
        """Under which conditions a trial is evaluated; what is finished under others is not mixed with it."""
        held_out = self.held_out or (() if self.perturb else tuple(trained.sequence["held_out"]))
        return {
            "tasks": trained.tasks,
            "held_out": held_out + changed_worlds(trained.tasks, self.perturb),
            "temperature": self.temperature,
            "episodes": self.episodes or int(trained.sequence["evaluation_episodes"]),
            "stages": self.stages,
            "scale": self.scale,
            "base_hash": trained.stored["base_hash"],
        }

    def _measure(
        self,
        trained: _Trained,
        conditions: dict[str, Any],
        folder: Path,
        base_cells: BaseCells,
        progress: Progress,
    ) -> None:
        """Fill the trial's success matrix; it is saved after every cell, and a run that was stopped goes on."""
        variant = trained.variant
        infos = common.find_tasks(trained.suite, [*trained.tasks, *conditions["held_out"]])
        path = folder / "matrix.json"
        empty = SuccessMatrix(trained.tasks, conditions["held_out"])
        matrix = SuccessMatrix.load(path) if path.is_file() else empty
        last = len(trained.tasks)
        every = self.stages == "all" and variant.kind.sequential and not variant.kind.whole_model
        stages = range(last + 1) if every else (0, last)
        bar = progress.add_task(f"{variant.label}, seed {trained.seed}", total=len(stages) * len(infos))
        for policy, serve, served_stages in self._servers(trained, stages, folder / "adapters"):
            contract = registry.contract_for(trained.suite)
            env = common.make_vector(policy, trained.suite, contract, self.workers, self.slots)
            try:
                for stage, name in itertools.product(served_stages, infos):
                    # All adapters of a seed begin with the same base: it is measured once. A whole model may have a
                    # network of its own.
                    shares_base = stage == 0 and not variant.kind.whole_model
                    cell = matrix.get(stage, name)
                    if cell is None:
                        cell = base_cells.get((trained.seed, name)) if shares_base else None
                        if cell is None:
                            cell = self._cell(serve(stage, name), env, infos[name], trained, conditions["episodes"])
                        matrix.record(stage, name, cell)
                        matrix.save(path)
                    if shares_base:
                        base_cells[(trained.seed, name)] = cell
                    progress.advance(bar)
            finally:
                env.close()
        progress.remove_task(bar)

    def _cell(self, policy: Policy, env: ChunkVectorEnv, task: TaskInfo, trained: _Trained, episodes: int) -> Cell:
        sequence = trained.sequence
        specs = evaluation_specs(task, episodes, int(sequence["seed"]), int(sequence["horizon"]))
        outcomes, _ = run_episodes(policy, env, specs, temperature=self.temperature, keep=False)
        return evaluated(specs, outcomes.success)

    def _servers(
        self, trained: _Trained, stages: Sequence[int], scaled_store: Path
    ) -> list[tuple[Policy, Serve, Sequence[int]]]:
        """What serves which stages of a trial: one policy that swaps adapters, or one whole model per stage."""
        variant = trained.variant
        method = variant.make(self._demonstrations() if variant.kind.needs_demonstrations else None)
        if variant.kind.whole_model:
            if self.scale != 1:
                raise RatchetError(
                    "study.no_adapter", "there is no adapter to scale", where=variant.label, fix="name other --methods"
                )
            return [self._whole_model(trained, method.demonstrations, stage) for stage in stages]
        contract = registry.contract_for(trained.suite)
        folder = self.policy or Path(trained.stored["policy"])
        room = method.serving_rank(trained.lora.rank, len(trained.tasks))
        served = dataclasses.replace(trained.lora, rank=room, alpha=trained.lora.alpha * room / trained.lora.rank)
        store = FolderStore(trained.origin / "adapters")
        rows = json.loads((trained.origin / "adapters.json").read_text())
        ids = ["", *(str(row["id"]) for row in rows)]  # by stage; the base has none
        if self.scale != 1:
            store, ids = self._scaled(store, ids, scaled_store)
        running = common.open_running(folder, contract, served, store)
        _require_base(running.policy, trained.stored, folder)
        method.tasks = trained.tasks
        return [(running.policy, lambda stage, name: method.serve(running.serve, ids, stage, name), stages)]

    def _scaled(self, store: FolderStore, ids: list[str], folder: Path) -> tuple[FolderStore, list[str]]:
        """Store every adapter again with its update times `scale`; returns the store and the new ids."""
        scaled_store = FolderStore(folder, create=True)
        scaled_ids = [""]
        for identity in ids[1:]:
            adapter = scaled(store.get(identity), self.scale)
            scaled_ids.append(scaled_store.put(adapter, store.card(identity).provenance).id)
        return scaled_store, scaled_ids

    def _whole_model(
        self, trained: _Trained, demonstrations: Samples | None, stage: int
    ) -> tuple[Policy, Serve, Sequence[int]]:
        """A model whose own weights were trained, as it was at a stage: the first, or the last."""
        folder = self.policy or Path(trained.stored["policy"])
        seed = int(trained.sequence["seed"])
        method = trained.variant.make(demonstrations)
        policy, adapter = common.open_policy(folder, registry.contract_for(trained.suite), trained.lora)
        _require_base(policy, trained.stored, folder)
        method.bind(policy, adapter, trained.tasks, seed)
        method.start(derive_seed(seed, "lora"))
        if stage:
            path = trained.origin / "state" / "checkpoint.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)
            method.load_state_dict(state["method"])
        return method.policy, _always(method.policy), (stage,)

    def _demonstrations(self) -> Demonstrations:
        path = self.source / files.FILE
        if not path.is_file():
            raise RatchetError(
                "learn.no_demonstrations", "the study's demonstrations are gone", where=str(path), fix="put them back"
            )
        return Demonstrations.load(path)

    def _facts(self) -> dict[str, Any]:
        return common.describe_run(
            "A study evaluated again",
            common.command_line(),
            held_out=list(self.held_out),
            perturbed={kind: perturbations.KINDS[kind] for kind in self.perturb},
            evaluation_temperature=self.temperature,
            scale=self.scale,
            stages=self.stages,
        )


def _always(policy: Policy) -> Serve:
    return lambda stage, name: policy


def _require_base(policy: Policy, stored: dict[str, Any], folder: Path) -> None:
    if policy.base_hash != stored["base_hash"]:
        raise RatchetError(
            "study.other_base",
            f"the study was trained on base {stored['base_hash'][:12]}, this is {policy.base_hash[:12]}",
            where=str(folder),
            fix="name the study's base with --policy",
        )
