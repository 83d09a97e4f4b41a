"""Runs the gate's episodes: both adapters on the same states and seeds, task by task, resumable, decision on the card.

Knows the store, the order of evaluation and its journal. Knows no simulator (environments are an argument); where there
is none, the decision is hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ratchet_vla.adapters.protocol import AdapterStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import Comparison, GateConfig, GateDecision, Role, cannot_evaluate, decide
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.rollouts.collection import ChunkEnv, run_episodes
from ratchet_vla.learner.rollouts.specs import Task, evaluated, evaluation_specs
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.storage.documents import write_json

__all__ = ["Gatekeeper"]

Event = Callable[[str, dict[str, Any]], None]


def earlier_tasks(store: AdapterStore, candidate: str, active: str) -> list[str]:
    """Tasks that the candidate's and the active adapter's lines have learned, oldest first, without the newest one."""
    adapter_ids = [*reversed(store.lineage(active))] if active else []
    adapter_ids += [*reversed(store.lineage(candidate))]
    task_names = [store.card(adapter_id).provenance.task for adapter_id in adapter_ids]
    new_task = store.card(candidate).provenance.task
    return [task_name for task_name in dict.fromkeys(task_names) if task_name and task_name != new_task]


class Gatekeeper:
    """Evaluates a candidate against the active adapter and stores the decision on the candidate's card.

    Args:
        serve: given an adapter id ("" for the base), the policy that runs it; this is where hot swaps happen.
        env: where episodes run; None where there is no simulator for these tasks, and then the gate holds.
        missing: what is missing where `env` is None, for the reason of the decision.
        tasks: by name.
        folder: where measured outcomes are kept, so that an interrupted gate goes on.
        on_event: called with ("episode" | "evaluated" | "decision", facts).
    """

    def __init__(
        self,
        serve: Callable[[str], Policy],
        env: ChunkEnv | None,
        tasks: Mapping[str, Task],
        store: AdapterStore,
        config: GateConfig,
        folder: Path,
        on_event: Event = lambda kind, facts: None,
        missing: str = "there is no simulator for these tasks",
    ) -> None:
        self.missing = missing
        self.serve = serve
        self.env = env
        self.tasks = tasks
        self.store = store
        self.config = config
        self.folder = folder
        self.on_event = on_event

    def run(self, candidate: str, active: str, held_out: Sequence[str] = ()) -> GateDecision:
        """Decide on `candidate` (id) against `active` (id, "" for the base).

        Raises:
            RatchetError: gate.no_task where the candidate's card names no task, gate.same where both are one adapter,
                and what the store and the adapters' checks raise. A simulator that fails makes the gate hold instead.
        """
        if candidate == active:
            raise RatchetError(
                "gate.same",
                "candidate and active are the same adapter",
                where=candidate[:12],
                fix="name a candidate that is not active yet",
            )
        new_task = self.store.card(candidate).provenance.task
        if not new_task:
            raise RatchetError(
                "gate.no_task",
                "the candidate's card names no task that it learned",
                where=candidate[:12],
                fix="store it with its task, or tag it by hand and say why",
            )
        earlier_names = earlier_tasks(self.store, candidate, active)
        task_roles: list[tuple[str, Role]] = [(new_task, "new")]
        task_roles += [(task_name, "earlier") for task_name in earlier_names]
        task_roles += [(task_name, "held_out") for task_name in held_out if task_name not in (new_task, *earlier_names)]
        decision = self._decide(candidate, active, task_roles)
        metrics = {f"gate/{task_row['task']}": task_row["candidate"] for task_row in decision.rows()}
        self.store.annotate(candidate, metrics, gate=decision.as_dict())
        self.on_event("decision", decision.as_dict())
        return decision

    def _decide(self, candidate: str, active: str, task_roles: Sequence[tuple[str, Role]]) -> GateDecision:
        if self.env is None:
            return cannot_evaluate(candidate, active, self.missing, self.config)
        unknown_tasks = [task_name for task_name, _ in task_roles if task_name not in self.tasks]
        if unknown_tasks:
            text = f"no way to run {', '.join(unknown_tasks)}"
            return cannot_evaluate(candidate, active, text, self.config)
        base_hash = self.store.card(candidate).base_hash
        task_names = [task_name for task_name, _ in task_roles]
        try:
            cells = self._measure(base_hash, candidate, active, task_names)
        except RatchetError as error:
            if not error.code.startswith("sim."):
                raise
            return cannot_evaluate(candidate, active, str(error), self.config)
        pairs = [
            Comparison(task_name, role, cells[(active, task_name)], cells[(candidate, task_name)])
            for task_name, role in task_roles
        ]
        return decide(candidate, active, pairs, self.config)

    def _measure(
        self, base_hash: str, candidate: str, active: str, task_names: Sequence[str]
    ) -> dict[tuple[str, str], Cell]:
        """All cells, adapter by adapter, so that there are two swaps whatever the number of tasks."""
        journal_path = self._path(base_hash)
        journal = _read(journal_path)
        cells = {}
        for adapter_id in (active, candidate):
            for task_name in task_names:
                cell_key = f"{adapter_id or 'base'} {task_name}"
                if cell_key not in journal:
                    journal[cell_key] = dict(self._evaluate(adapter_id, task_name).episodes)
                    # Written after each cell: a gate that is killed measures at most one of them twice.
                    write_json(journal_path, journal)
                cells[adapter_id, task_name] = Cell.of(journal[cell_key])
        return cells

    def _evaluate(self, adapter_id: str, task_name: str) -> Cell:
        assert self.env is not None
        task = self.tasks[task_name]
        config = self.config
        specs = evaluation_specs(task, config.episodes, config.seed, config.horizon, purpose="gate", draws=config.draws)
        outcomes, _ = run_episodes(
            self.serve(adapter_id),
            self.env,
            specs,
            temperature=config.temperature,
            keep=False,
            progress=lambda done, success: self.on_event(
                "episode", {"what": f"{task_name}, {adapter_id[:12] or 'base'}", "done": done, "of": len(specs)}
            ),
        )
        cell = evaluated(specs, outcomes.success)
        summary = {"adapter_id": adapter_id, "task": task_name, "successes": cell.successes, "trials": cell.trials}
        self.on_event("evaluated", {**summary, "seconds": outcomes.seconds})
        return cell

    def _path(self, base_hash: str) -> Path:
        """One journal per base, configuration and set of episodes: outcomes of others are never taken for these."""
        states_by_task = {
            task_name: list(task.evaluation_states[: self.config.episodes])
            for task_name, task in sorted(self.tasks.items())
        }
        config = asdict(self.config)
        # So that journals from before there were such settings are found.
        if not self.config.horizon:
            del config["horizon"]
        if self.config.draws == 1:
            del config["draws"]
        identity = json.dumps([base_hash, config, states_by_task], sort_keys=True)
        return self.folder / f"gate-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, dict[str, bool]]:
    if not path.exists():
        return {}
    try:
        outcomes: dict[str, dict[str, bool]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RatchetError(
            "gate.bad_journal", str(error), where=str(path), fix="remove the file; the gate measures again"
        ) from None
    return outcomes
