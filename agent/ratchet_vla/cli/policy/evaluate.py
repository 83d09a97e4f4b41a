"""`ratchet eval`: success of a policy, with or without an adapter, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ratchet_sim import registry
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import evaluated, evaluation_specs
from ratchet_vla.learner.rollouts.vision_ablation import OtherImages, OwnImages, compare


@dataclass
class Eval(ComputingOptions):
    """Run a policy on tasks from their evaluation states and report success with 95 % intervals.

    Commands to copy:

        ratchet eval --suite metaworld --tasks door-open faucet-open

        ratchet eval --suite metaworld --adapter candidate --store runs/demo/adapters --json

        ratchet eval --suite metaworld --tasks door-open faucet-open --vision-ablation
    """

    suite: str = "metaworld"
    """Suite of the tasks."""
    tasks: tuple[str, ...] = ()
    """Task names; all tasks of the suite if absent."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    adapter: str = ""
    """Id, id prefix or tag of an adapter; the base alone if absent."""
    store: Path = Path("runs/demo/adapters")
    """Adapter store."""
    episodes: int = 50
    """Episodes per task, from the first so many evaluation states."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    temperature: float = 0.0
    """Sampling temperature; 0 acts greedily."""
    seed: int = 0
    """Seed of sampled actions."""
    vision_ablation: bool = False
    """Run every episode again with the images of another one: does the policy use its cameras?"""
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
        names = self.tasks or tuple(i.name for i in registry.tasks(self.suite))
        tasks = common.find_tasks(self.suite, names)
        contract = registry.contract_for(self.suite)
        wanted = {n: evaluation_specs(tasks[n], self.episodes, self.seed, self.horizon) for n in names}
        # What the policy is shown: its own images, and for the vision ablation another episode's as well.
        own = {n: OwnImages(len(specs)) for n, specs in wanted.items()} if self.vision_ablation else {}
        other = {n: OtherImages(own[n], wanted[n]) for n in own}
        folder = common.policy_folder(self.suite, self.policy)
        store = FolderStore(self.store) if self.adapter else None
        lora = common.lora_of(store, self.adapter) if store else common.LoraOptions()
        made_for = common.made_for(store, self.adapter) if store else None
        running = common.open_running(folder, contract, lora, store, made_for=made_for)
        common.print_contract(console, contract)
        if store is not None:
            for warning in running.swapper.swap(store.resolve(self.adapter)).warnings:
                console.print(f"[yellow]{warning.code}[/]: {warning.what}")
        env = common.make_vector(running.policy, self.suite, contract, self.workers, self.slots)
        cells: dict[str, Cell] = {}
        others: dict[str, Cell] = {}
        try:
            for name in track(names, description="evaluating", console=console, transient=True):
                specs = wanted[name]
                for shown, into in ((own, cells), (other, others))[: 2 if self.vision_ablation else 1]:
                    with running.swapper.running():
                        outcomes, _ = run_episodes(
                            running.policy,
                            env,
                            specs,
                            temperature=self.temperature,
                            keep=False,
                            shown=shown.get(name),
                        )
                    into[name] = evaluated(specs, outcomes.success)
        finally:
            env.close()
        ablation = compare(cells, others) if self.vision_ablation else None
        if self.json:
            result = {"adapter": running.swapper.current_id, "suite": self.suite, "tasks": _rows(cells)}
            if ablation:
                # Keys of earlier releases: result files and scripts know them.
                result |= {"other_pictures": _rows(others), "sight": asdict(ablation)}
            print(json.dumps(result))
            return 0
        table = Table(title=f"{self.suite}, adapter {running.swapper.current_id[:12]}")
        extra = ("others' images", "loss, points") if ablation else ()
        for column in ("task", "success", "rate", "95 % interval", *extra):
            table.add_column(column, justify="left" if column == "task" else "right")
        for name, cell in cells.items():
            rate = cell.rate
            row = [name, f"{cell.successes}/{cell.trials}", f"{rate.estimate:.0%}", f"{rate.low:.0%} … {rate.high:.0%}"]
            if ablation:
                row += [f"{others[name].successes}/{others[name].trials}", ablation.per_task[name].percent()]
            table.add_row(*row)
        console.print(table)
        if ablation:
            console.print(ablation.sentence())
        return 0


def _rows(cells: Mapping[str, Cell]) -> dict[str, dict[str, float]]:
    return {
        n: {
            "successes": c.successes,
            "trials": c.trials,
            "rate": c.rate.estimate,
            "low": c.rate.low,
            "high": c.rate.high,
        }
        for n, c in cells.items()
    }
