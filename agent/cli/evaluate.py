"""`ratchet eval`: success of a policy, with or without an adapter, with intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from agent.adapters.store import FolderStore
from agent.cli import common
from agent.learner.metrics import Cell
from agent.learner.rollouts import run_episodes
from agent.learner.sequence import evaluated, evaluation_specs
from sim import registry


@dataclass
class Eval:
    """Run a policy on tasks from their evaluation states and report success with 95 % intervals.

    Commands to copy:

        ratchet eval --suite metaworld --tasks door-open faucet-open

        ratchet eval --suite metaworld --adapter candidate --store runs/demo/adapters --json
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
        folder = common.policy_folder(self.suite, self.policy)
        store = FolderStore(self.store) if self.adapter else None
        lora = common.lora_of(store, self.adapter) if store else common.LoraOptions()
        running = common.open_running(folder, contract, lora, store)
        common.print_contract(console, contract)
        if store is not None:
            for warning in running.swapper.swap(store.resolve(self.adapter)).warnings:
                console.print(f"[yellow]{warning.code}[/]: {warning.what}")
        env = common.make_vector(running.policy, self.suite, contract, self.workers, self.slots)
        cells: dict[str, Cell] = {}
        try:
            for name in track(names, description="evaluating", console=console, transient=True):
                info = tasks[name]
                specs = evaluation_specs(info, self.episodes, self.seed, self.horizon)
                with running.swapper.running():
                    outcomes, _ = run_episodes(running.policy, env, specs, temperature=self.temperature, keep=False)
                cells[name] = evaluated(specs, outcomes.success)
        finally:
            env.close()
        if self.json:
            rows = {
                n: {
                    "successes": c.successes,
                    "trials": c.trials,
                    "rate": c.rate.estimate,
                    "low": c.rate.low,
                    "high": c.rate.high,
                }
                for n, c in cells.items()
            }
            print(json.dumps({"adapter": running.swapper.current_id, "suite": self.suite, "tasks": rows}))
            return 0
        table = Table(title=f"{self.suite}, adapter {running.swapper.current_id[:12]}")
        for column in ("task", "success", "rate", "95 % interval"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for name, cell in cells.items():
            rate = cell.rate
            table.add_row(
                name, f"{cell.successes}/{cell.trials}", f"{rate.estimate:.0%}", f"{rate.low:.0%} … {rate.high:.0%}"
            )
        console.print(table)
        return 0
