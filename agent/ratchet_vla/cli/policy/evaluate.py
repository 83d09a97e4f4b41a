"""`ratchet eval`: success of a policy, with or without an adapter, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ratchet_sim import registry
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, display
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.stores import ADAPTERS
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec, evaluated, evaluation_specs
from ratchet_vla.learner.rollouts.vision_ablation import OtherImages, OwnImages, VisionAblation, compare


@dataclass
class Eval(ComputingOptions):
    """Run a policy on tasks from their evaluation states and report success with 95 % intervals.

    Commands to copy:

        ratchet eval --suite metaworld --tasks door-open faucet-open

        ratchet eval --suite metaworld --adapter candidate --store runs/demo/adapters --json

        ratchet eval --suite metaworld --tasks door-open faucet-open --vision-ablation
    """

    suite: str = "metaworld"
    """Simulation suite of the tasks."""
    tasks: tuple[str, ...] = ()
    """Task names; all tasks of the suite if absent."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    adapter: str = ""
    """Id, id prefix or tag of an adapter; the base alone if absent."""
    store: Path = ADAPTERS
    """Folder of the adapter store; only read with --adapter."""
    episodes: int = 50
    """Episodes per task, from the first so many evaluation states."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely action."""
    seed: int = 0
    """Seed of the sampled actions."""
    vision_ablation: bool = False
    """Run every episode again with the images of another one, and report the loss: does the policy use its cameras?"""
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
        names = self.tasks or tuple(info.name for info in registry.tasks(self.suite))
        tasks = common.find_tasks(self.suite, names)
        specs = {name: evaluation_specs(tasks[name], self.episodes, self.seed, self.horizon) for name in names}
        # Made before the policy is loaded: an ablation that the episodes do not allow is refused at once.
        images_of = _episode_images(specs) if self.vision_ablation else {}
        running = self._open_policy(console)
        contract = registry.contract_for(self.suite)
        env = common.make_vector(running.policy, self.suite, contract, self.workers, self.slots)
        cells: dict[str, Cell] = {}
        ablated_cells: dict[str, Cell] = {}
        try:
            for name in track(names, description="evaluating", console=console, transient=True):
                if not self.vision_ablation:
                    cells[name] = self._evaluate(running, env, specs[name], None)
                    continue
                # In this order: the second run shows images that the first one keeps.
                own_images, other_images = images_of[name]
                cells[name] = self._evaluate(running, env, specs[name], own_images)
                ablated_cells[name] = self._evaluate(running, env, specs[name], other_images)
        finally:
            env.close()
        ablation = compare(cells, ablated_cells) if self.vision_ablation else None
        if self.json:
            document = {"adapter": running.swapper.current_id, "suite": self.suite, "tasks": _rows(cells)}
            if ablation:
                # Keys of earlier releases: result files and scripts know them.
                document |= {"other_pictures": _rows(ablated_cells), "sight": asdict(ablation)}
            print(json.dumps(document))
            return 0
        console.print(self._table(running.swapper.current_id, cells, ablated_cells, ablation))
        if ablation:
            console.print(ablation.sentence())
        return 0

    def _open_policy(self, console: Console) -> common.Running:
        """Load the base, with the adapter swapped in where one is named."""
        contract = registry.contract_for(self.suite)
        folder = common.policy_folder(self.suite, self.policy)
        if not self.adapter:
            running = common.open_running(folder, contract, common.LoraOptions(), None)
            common.print_contract(console, contract)
            return running
        store = FolderStore(self.store)
        lora = common.lora_of(store, self.adapter)
        made_for = common.made_for(store, self.adapter)
        running = common.open_running(folder, contract, lora, store, made_for=made_for)
        common.print_contract(console, contract)
        for warning in running.swapper.swap(store.resolve(self.adapter)).warnings:
            console.print(f"[yellow]{warning.code}[/]: {warning.what}")
        return running

    def _evaluate(
        self,
        running: common.Running,
        env: ChunkVectorEnv,
        specs: Sequence[EpisodeSpec],
        images: OwnImages | OtherImages | None,
    ) -> Cell:
        """Run one task's episodes. images: what the policy is shown instead of what the cameras see, if anything."""
        with running.swapper.running():
            outcomes, _ = run_episodes(
                running.policy,
                env,
                specs,
                temperature=self.temperature,
                keep=False,
                shown=images,
            )
        return evaluated(specs, outcomes.success)

    def _table(
        self,
        adapter_id: str,
        cells: Mapping[str, Cell],
        ablated_cells: Mapping[str, Cell],
        ablation: VisionAblation | None,
    ) -> Table:
        numbers = ["success", "rate", "95 % interval"]
        if ablation:
            numbers += ["others' images", "loss, points"]
        title = f"{self.suite}, adapter {adapter_id[:12]}"
        table = display.make_table(("task", *numbers), title=title, numbers=numbers)
        for name, cell in cells.items():
            rate = cell.rate
            row = [name, f"{cell.successes}/{cell.trials}", f"{rate.estimate:.0%}", f"{rate.low:.0%} … {rate.high:.0%}"]
            if ablation:
                ablated = ablated_cells[name]
                row += [f"{ablated.successes}/{ablated.trials}", ablation.per_task[name].percent()]
            table.add_row(*row)
        return table


def _episode_images(specs: Mapping[str, Sequence[EpisodeSpec]]) -> dict[str, tuple[OwnImages, OtherImages]]:
    """What the policy is shown on each task: its own images, which are kept, and then another episode's."""
    images = {}
    for name, episodes in specs.items():
        own_images = OwnImages(len(episodes))
        images[name] = (own_images, OtherImages(own_images, episodes))
    return images


def _rows(cells: Mapping[str, Cell]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "successes": cell.successes,
            "trials": cell.trials,
            "rate": cell.rate.estimate,
            "low": cell.rate.low,
            "high": cell.rate.high,
        }
        for name, cell in cells.items()
    }
