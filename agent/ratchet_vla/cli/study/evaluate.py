"""`ratchet study evaluate`: what a finished study learned, under conditions that it was not evaluated under.

Knows trials, their stored adapters and simulators. Trains nothing; the result is a study folder of its own.
"""

from __future__ import annotations

import dataclasses
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
from ratchet_vla.adapters.lora.layers import scaled
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.study.folder import finished, write
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.variants import Variant
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import evaluated, evaluation_specs
from ratchet_vla.learner.study.results import load_trial, require_same
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy

Serve = Callable[[int, str], Policy]
"""(stage, task) -> the policy that acts on the task after so many learned ones."""


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
    """Folder of the new one; what is finished there is not run again."""
    methods: tuple[str, ...] = ()
    """Rows, as the study names them; all if absent."""
    seeds: tuple[int, ...] = ()
    """Seeds; all if absent."""
    stages: Literal["ends", "all"] = "ends"
    """The base and the end of the sequence, or every stage (needed for NBT and FWT). The oracle has no stages, and of
    whole models the last one alone is kept."""
    held_out: tuple[str, ...] = ()
    """Held-out tasks instead of the study's own, as in `study run`."""
    perturb: tuple[str, ...] = ()
    """Hold out every learned task under these changes of its world: camera, light, base."""
    temperature: float = 0.0
    """Sampling temperature; 0 acts greedily."""
    scale: float = 1.0
    """Factor on what every adapter adds to the base: 0 is the base, 1 the adapter as it was learned."""
    episodes: int = 0
    """Episodes per task and stage; 0 takes the study's number."""
    policy: Path | None = None
    """Folder of the base policy, where it is not where the study found it."""
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
        if self.out.resolve() == self.source.resolve():
            raise RatchetError("study.same_folder", "the result needs a folder of its own", where=str(self.out))
        trials = finished(self.source)
        chosen = [
            (variants.parse(t.method), t.seed)
            for t in trials
            if (not self.methods or t.method in self.methods) and (not self.seeds or t.seed in self.seeds)
        ]
        missing = set(self.methods) - {v.label for v, _ in chosen}
        if not chosen or missing:
            raise RatchetError(
                "study.nothing_finished",
                f"no finished trial of {', '.join(sorted(missing)) or 'these methods and seeds'}",
                where=str(self.source),
                fix=f"finished: {', '.join(dict.fromkeys(t.method for t in trials)) or 'none'}",
            )
        base: dict[tuple[int, str], Cell] = {}
        with Progress(console=console, transient=True) as progress:
            for variant, seed in chosen:
                self._trial(variant, seed, base, progress)
        result = write(self.out, self._facts(), console)
        if self.json:
            print(json.dumps(result))
        return 0

    def _trial(self, variant: Variant, seed: int, base: dict[tuple[int, str], Cell], progress: Progress) -> None:
        place = self.out / variant.label / f"seed{seed}"
        origin = self.source / variant.label / f"seed{seed}"
        stored = json.loads((origin / "run.json").read_text())
        sequence, suite = stored["config"]["sequence"], str(stored["suite"])
        tasks = tuple(str(t) for t in sequence["tasks"])
        held_out = self.held_out or (() if self.perturb else tuple(sequence["held_out"]))
        held_out += tuple(f"{t}{perturbations.MARK}{kind}" for kind in self.perturb for t in tasks)
        wanted = {
            "tasks": tasks,
            "held_out": held_out,
            "temperature": self.temperature,
            "episodes": self.episodes or int(sequence["evaluation_episodes"]),
            "stages": self.stages,
            "scale": self.scale,
            "base_hash": stored["base_hash"],
        }
        require_same(place, {"evaluated": wanted})
        if load_trial(variant.label, seed, place) is not None:
            return
        place.mkdir(parents=True, exist_ok=True)
        facts = common.describe_run(
            f"{variant.label}, seed {seed}, evaluated again",
            common.command_line(),
            suite=suite,
            method=stored["method"],
            seed=seed,
            evaluated=wanted,
        )
        common.write_json(place / "run.json", facts)
        infos = common.find_tasks(suite, [*tasks, *held_out])
        path = place / "matrix.json"
        matrix = SuccessMatrix.load(path) if path.is_file() else SuccessMatrix(tasks, held_out)
        last = len(tasks)
        every = self.stages == "all" and variant.kind.sequential and not variant.kind.whole_model
        stages = range(last + 1) if every else (0, last)
        bar = progress.add_task(f"{variant.label}, seed {seed}", total=len(stages) * len(infos))
        started = time.monotonic()
        for policy, serve, part in self._servers(variant, origin, stored, stages, place / "adapters"):
            env = common.make_vector(policy, suite, registry.contract_for(suite), self.workers, self.slots)
            try:
                for stage, name in ((s, n) for s in part for n in infos):
                    known = base.get((seed, name)) if stage == 0 and not variant.kind.whole_model else None
                    if matrix.get(stage, name) is None:
                        cell = known or self._cell(serve(stage, name), env, infos[name], sequence, wanted["episodes"])
                        matrix.record(stage, name, cell)
                        matrix.save(path)
                    if stage == 0 and not variant.kind.whole_model:
                        found = matrix.get(0, name)
                        assert found is not None
                        base[(seed, name)] = found
                    progress.advance(bar)
            finally:
                env.close()
        progress.remove_task(bar)
        common.write_json(
            place / "run.json", facts | {"finished": common.now(), "seconds": round(time.monotonic() - started, 1)}
        )

    def _cell(self, policy: Policy, env: Any, task: TaskInfo, sequence: dict[str, Any], episodes: int) -> Cell:
        specs = evaluation_specs(task, episodes, int(sequence["seed"]), int(sequence["horizon"]))
        outcomes, _ = run_episodes(policy, env, specs, temperature=self.temperature, keep=False)
        return evaluated(specs, outcomes.success)

    def _servers(
        self, variant: Variant, origin: Path, stored: dict[str, Any], stages: Sequence[int], scaled_store: Path
    ) -> list[tuple[Policy, Serve, Sequence[int]]]:
        """What serves which stages of a trial: one policy that swaps adapters, or one whole model per stage."""
        suite, sequence = str(stored["suite"]), stored["config"]["sequence"]
        contract, tasks, seed = registry.contract_for(suite), tuple(sequence["tasks"]), int(sequence["seed"])
        folder = self.policy or Path(stored["policy"])
        lora = common.LoraOptions(**stored["config"]["lora"])
        method = variant.make(self._demonstrations() if variant.kind.needs_demonstrations else None)
        if variant.kind.whole_model:
            if self.scale != 1:
                raise RatchetError(
                    "study.no_adapter", "there is no adapter to scale", where=variant.label, fix="name other --methods"
                )
            out: list[tuple[Policy, Serve, Sequence[int]]] = []
            for stage in stages:
                mine = variant.make(method.demonstrations)
                policy, adapter = common.open_policy(folder, contract, lora)
                _require_base(policy, stored, folder)
                mine.bind(policy, adapter, tasks, seed)
                mine.start(derive_seed(seed, "lora"))
                if stage:
                    state = torch.load(origin / "state" / "checkpoint.pt", map_location="cpu", weights_only=True)
                    mine.load_state_dict(state["method"])
                out.append((mine.policy, _always(mine.policy), (stage,)))
            return out
        room = method.serving_rank(lora.rank, len(tasks))
        served = dataclasses.replace(lora, rank=room, alpha=lora.alpha * room / lora.rank)
        store = FolderStore(origin / "adapters")
        ids = ["", *(str(a["id"]) for a in json.loads((origin / "adapters.json").read_text()))]
        if self.scale != 1:
            weaker = FolderStore(scaled_store, create=True)
            ids = ["", *(weaker.put(scaled(store.get(i), self.scale), store.card(i).provenance).id for i in ids[1:])]
            store = weaker
        running = common.open_running(folder, contract, served, store)
        _require_base(running.policy, stored, folder)
        method.tasks = tasks
        return [(running.policy, lambda stage, name: method.serve(running.serve, ids, stage, name), stages)]

    def _demonstrations(self) -> Demonstrations:
        path = self.source / "demonstrations.safetensors"
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
