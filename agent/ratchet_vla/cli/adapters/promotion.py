"""`ratchet adapters promote|rollback|diff`: the gate from the command line, the way back, and what differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.difference import Change, change
from ratchet_vla.adapters.identity import Adapter
from ratchet_vla.adapters.lora.layers import scaled
from ratchet_vla.adapters.protocol import BASE, AdapterStore
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import GateConfig, decision_of
from ratchet_vla.learner.gate.keeper import Gatekeeper, earlier_tasks

STORE = Path("runs/demo/adapters")
EXIT = {"promote": 0, "hold": 3, "reject": 4}


@dataclass
class Promote:
    """Run the gate on an adapter and make it `active` if it passes; exit 0 promoted, 3 held, 4 rejected.

    The gate runs candidate and active adapter (the base where nothing is active) on the same episodes of the new task,
    every earlier task and the held-out ones. A decision that is already on the adapter's card is not measured again,
    unless it was reached against another adapter or under other demands. Where the tasks cannot be simulated here, the
    gate says what is missing and holds.
    """

    adapter: Annotated[str, tyro.conf.Positional] = "candidate"
    """Id, id prefix or tag."""
    store: Path = STORE
    """Adapter store."""
    suite: str = "metaworld"
    """Suite of the tasks."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    held_out: tuple[str, ...] = ()
    """Tasks that were never trained, compared too."""
    gate: GateConfig = field(default_factory=GateConfig)
    again: bool = False
    """Measure although the card has a decision against the active adapter."""
    override: str = ""
    """Promote whatever the gate decided, for this reason, which is kept in the history."""
    workers: int = 2
    """Simulator processes; 0 has no simulator: the gate then holds, and only --override promotes."""
    slots: int = 12
    """Episodes at once per simulator process."""
    threads: int = 1
    """Threads for the policy."""
    json: bool = False
    """Print the decision as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        console = Console(stderr=self.json)
        store = FolderStore(self.store)
        candidate = store.resolve(self.adapter)
        running = store.resolve("active")
        active = "" if running == BASE else running
        if candidate == running:
            raise RatchetError("gate.same", "this adapter is active already", where=candidate[:12])
        stored = store.card(candidate).provenance.gate
        if self.again or decision_of(stored, active, self.gate, self.held_out) is None:
            self._measure(store, candidate, active, console)
            stored = store.card(candidate).provenance.gate
        print_decision(stored, console)
        promoted = stored["decision"] == "promote" or bool(self.override)
        if promoted:
            reason = f"override: {self.override}" if stored["decision"] != "promote" else "passed the gate"
            store.promote(candidate, reason)
            console.print(f"active is now {candidate[:12]} ({reason})")
        if self.json:
            print(json.dumps({**stored, "promoted": promoted}, default=dict))
        return 0 if promoted else EXIT[stored["decision"]]

    def _measure(self, store: FolderStore, candidate: str, active: str, console: Console) -> None:
        names = [store.card(candidate).provenance.task, *earlier_tasks(store, candidate, active), *self.held_out]
        folder = self.store / "gate"
        if not self.workers:
            Gatekeeper(_no_policy, None, {}, store, self.gate, folder).run(candidate, active, self.held_out)
            return
        try:
            tasks, env, running = self._world(store, candidate, [n for n in dict.fromkeys(names) if n], console)
        except RatchetError as error:
            # What was typed here is refused; what only the cards name cannot be evaluated on this machine.
            if not error.code.startswith("sim.") or self._mistyped(error):
                raise
            Gatekeeper(_no_policy, None, {}, store, self.gate, folder, missing=str(error)).run(
                candidate, active, self.held_out
            )
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=console, transient=True) as progress:
                bar = progress.add_task("gate", total=1)

                def show(kind: str, facts: dict[str, Any]) -> None:
                    if kind == "episode":
                        progress.update(bar, description=facts["what"], completed=facts["done"], total=facts["of"])

                keeper = Gatekeeper(running.serve, env, tasks, store, self.gate, folder, show)
                keeper.run(candidate, active, self.held_out)
        finally:
            env.close()

    def _world(
        self, store: FolderStore, candidate: str, names: list[str], console: Console
    ) -> tuple[dict[str, TaskInfo], ChunkVectorEnv, common.Running]:
        """The tasks by name, their simulators and the policy that takes either adapter."""
        contract = registry.contract_for(self.suite)
        tasks = common.find_tasks(self.suite, names)
        lora = common.lora_of(store, candidate)
        folder, made_for = common.policy_folder(self.suite, self.policy), common.made_for(store, candidate)
        running = common.open_running(folder, contract, lora, store, made_for=made_for)
        common.print_contract(console, contract)
        return tasks, common.make_vector(running.policy, self.suite, contract, self.workers, self.slots), running

    def _mistyped(self, error: RatchetError) -> bool:
        return error.code == "sim.unknown_suite" or any(f"'{name}'" in error.what for name in self.held_out)


def _no_policy(adapter_id: str) -> NoReturn:
    raise RatchetError("gate.no_simulator", "no policy is served where nothing can be simulated", where=adapter_id[:12])


@dataclass
class Rollback:
    """Point a tag back at what it pointed at before: after a first promotion, at the base. A running robot follows at
    its next look at the store."""

    tag: str = "active"
    """Tag to move back."""
    reason: str = ""
    """Why; kept in the history."""
    store: Path = STORE
    """Adapter store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        move = FolderStore(self.store).rollback(self.tag, self.reason)
        if self.json:
            print(json.dumps(dataclasses.asdict(move)))
        else:
            Console().print(f"{move.tag}: {(move.old or 'nothing')[:12]} -> {move.new[:12]}")
        return 0


@dataclass
class Diff:
    """What differs between two adapters: origin, measured values, and how far their weights are apart, layer by
    layer."""

    first: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or base."""
    second: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or base."""
    store: Path = STORE
    """Adapter store."""
    layers: int = 10
    """Layers to list, the most changed first."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = FolderStore(self.store)
        names = [store.resolve(reference) for reference in (self.first, self.second)]
        if names == [BASE, BASE]:
            text = f"{self.first} and {self.second} are the base"
            print(json.dumps({"cards": {}, "layers": []}) if self.json else text)
            return 0
        changes = change(*_pair(store, names))
        facts = _card_differences(store, *names)
        if self.json:
            print(json.dumps({"cards": facts, "layers": [dataclasses.asdict(c) for c in changes]}, default=dict))
            return 0
        console = Console()
        table = Table(title=f"{names[0][:12]} against {names[1][:12]}")
        for column in ("", "first", "second"):
            table.add_column(column)
        for name, (one, two) in facts.items():
            table.add_row(name, _show(one), _show(two))
        console.print(table)
        console.print(_layers(changes[: self.layers], len(changes)))
        return 0


def print_decision(decision: Mapping[str, Any], console: Console) -> None:
    """The comparison as a table, then the decision and its reasons."""
    if decision["tasks"]:
        table = Table(title="gate: candidate against active, same episodes")
        for column in ("task", "active", "candidate", "change [95 %]", "lost/gained", "p worse", "sees"):
            table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
        for row in decision["tasks"]:
            change_ = f"{100 * row['change']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"
            table.add_row(
                f"{row['task']} ({row['role'].replace('_', '-')})",
                f"{row['active']:.0%}",
                f"{row['candidate']:.0%}",
                change_,
                f"{row['losses']}/{row['gains']} of {row['episodes']}",
                f"{row['p_worse']:.3f}",
                f"-{100 * row['detectable_drop']:.0f}",
            )
        console.print(table)
        console.print("sees: smallest true drop, in points, that the test finds with 80 % chance", highlight=False)
    colour = {"promote": "green", "hold": "yellow", "reject": "red"}[decision["decision"]]
    console.print(f"[bold {colour}]{decision['decision'].upper()}[/]")
    for reason in decision["reasons"]:
        place = f" {reason['task']}:" if reason["task"] else ""
        console.print(f"  {reason['code']}{place} {reason['text']}", markup=False, highlight=False)


def _pair(store: AdapterStore, names: list[str]) -> tuple[Adapter, Adapter]:
    """Two adapters of which one may be the base: the other one's layers, changed by nothing."""
    first, second = (None if name == BASE else store.get(name) for name in names)
    some = first or second
    assert some is not None
    return first or scaled(some, 0.0), second or scaled(some, 0.0)


def _card_differences(store: AdapterStore, first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Facts of the two cards by name, those that are equal left out; the base has none."""
    sides: list[dict[str, Any]] = []
    for reference in (first, second):
        if reference == BASE:
            sides.append({})
            continue
        card = store.card(reference)
        origin = card.provenance
        sides.append(
            {
                "task": origin.task,
                "stage": origin.stage,
                "parent": origin.parent,
                "created": card.created,
                "base": card.base_hash,
                "effect": origin.effect,
                "gate": origin.gate.get("decision"),
                **{f"measured {k}": v for k, v in origin.metrics.items()},
            }
        )
    one, two = sides
    return {k: (one.get(k), two.get(k)) for k in dict.fromkeys([*one, *two]) if one.get(k) != two.get(k)}


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)[:24]


def _layers(changes: list[Change], total: int) -> Table:
    table = Table(title=f"{len(changes)} of {total} layers, most changed first")
    for column in ("layer", "norm first", "norm second", "norm of difference", "cosine"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for c in changes:
        table.add_row(c.layer, f"{c.first:.3g}", f"{c.second:.3g}", f"{c.difference:.3g}", f"{c.cosine:+.2f}")
    return table
