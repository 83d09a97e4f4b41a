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
    lines = [*reversed(store.lineage(active))] if active else []
    lines += [*reversed(store.lineage(candidate))]
    names = [store.card(i).provenance.task for i in lines]
    new = store.card(candidate).provenance.task
    return [n for n in dict.fromkeys(names) if n and n != new]


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
        self.serve, self.env, self.tasks, self.store = serve, env, tasks, store
        self.config, self.folder, self.on_event = config, folder, on_event

    def run(self, candidate: str, active: str, held_out: Sequence[str] = ()) -> GateDecision:
        """Decide on `candidate` (id) against `active` (id, "" for the base).

        Raises:
            RatchetError: gate.no_task where the candidate's card names no task, gate.same where both are one adapter,
                and what the store and the adapters' checks raise. A simulator that fails makes the gate hold instead.
        """
        if candidate == active:
            raise RatchetError("gate.same", "candidate and active are the same adapter", where=candidate[:12])
        new = self.store.card(candidate).provenance.task
        if not new:
            raise RatchetError(
                "gate.no_task",
                "the candidate's card names no task that it learned",
                where=candidate[:12],
                fix="store it with its task, or tag it by hand and say why",
            )
        earlier = earlier_tasks(self.store, candidate, active)
        wanted: list[tuple[str, Role]] = [(new, "new")]
        wanted += [(t, "earlier") for t in earlier]
        wanted += [(t, "held_out") for t in held_out if t != new and t not in earlier]
        decision = self._decide(candidate, active, wanted)
        metrics = {f"gate/{row['task']}": row["candidate"] for row in decision.rows()}
        self.store.annotate(candidate, metrics, gate=decision.as_dict())
        self.on_event("decision", decision.as_dict())
        return decision

    def _decide(self, candidate: str, active: str, wanted: Sequence[tuple[str, Role]]) -> GateDecision:
        if self.env is None:
            return cannot_evaluate(candidate, active, self.missing, self.config)
        unknown = [t for t, _ in wanted if t not in self.tasks]
        if unknown:
            text = f"no way to run {', '.join(unknown)}"
            return cannot_evaluate(candidate, active, text, self.config)
        try:
            cells = self._measure(self.store.card(candidate).base_hash, candidate, active, [t for t, _ in wanted])
        except RatchetError as error:
            if not error.code.startswith("sim."):
                raise
            return cannot_evaluate(candidate, active, str(error), self.config)
        pairs = [Comparison(t, role, cells[(active, t)], cells[(candidate, t)]) for t, role in wanted]
        return decide(candidate, active, pairs, self.config)

    def _measure(self, base: str, candidate: str, active: str, names: Sequence[str]) -> dict[tuple[str, str], Cell]:
        """All cells, adapter by adapter, so that there are two swaps whatever the number of tasks."""
        path = self._path(base)
        journal = _read(path)
        for adapter_id in (active, candidate):
            for name in names:
                key = f"{adapter_id or 'base'} {name}"
                if key not in journal:
                    journal[key] = dict(self._evaluate(adapter_id, name).episodes)
                    write_json(path, journal)
        return {(i, n): Cell.of(journal[f"{i or 'base'} {n}"]) for i in (active, candidate) for n in names}

    def _evaluate(self, adapter_id: str, name: str) -> Cell:
        assert self.env is not None
        task, config = self.tasks[name], self.config
        specs = evaluation_specs(task, config.episodes, config.seed, config.horizon, purpose="gate", draws=config.draws)
        outcomes, _ = run_episodes(
            self.serve(adapter_id),
            self.env,
            specs,
            temperature=config.temperature,
            keep=False,
            progress=lambda done, ok: self.on_event(
                "episode", {"what": f"{name}, {adapter_id[:12] or 'base'}", "done": done, "of": len(specs)}
            ),
        )
        cell = evaluated(specs, outcomes.success)
        facts = {"adapter_id": adapter_id, "task": name, "successes": cell.successes, "trials": cell.trials}
        self.on_event("evaluated", {**facts, "seconds": outcomes.seconds})
        return cell

    def _path(self, base: str) -> Path:
        """One journal per base, configuration and set of episodes: outcomes of others are never taken for these."""
        tasks = {n: list(t.evaluation_states[: self.config.episodes]) for n, t in sorted(self.tasks.items())}
        config = asdict(self.config)
        # So that journals from before there were such settings are found.
        if not self.config.horizon:
            del config["horizon"]
        if self.config.draws == 1:
            del config["draws"]
        facts = json.dumps([base, config, tasks], sort_keys=True)
        return self.folder / f"gate-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, dict[str, bool]]:
    if not path.exists():
        return {}
    try:
        read: dict[str, dict[str, bool]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RatchetError(
            "gate.bad_journal", str(error), where=str(path), fix="remove the file; the gate measures again"
        ) from None
    return read
