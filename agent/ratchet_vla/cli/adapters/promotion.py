"""`ratchet adapters promote|rollback|diff`: the gate from the command line, the way back, and what differs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.difference import Change, change
from ratchet_vla.adapters.identity import Adapter
from ratchet_vla.adapters.lora.layers import scaled
from ratchet_vla.adapters.protocol import BASE, AdapterStore
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, display
from ratchet_vla.cli.stores import AdapterStoreOption
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import GateConfig, decision_of
from ratchet_vla.learner.gate.keeper import Gatekeeper, earlier_tasks

EXIT_STATUS = {"promote": 0, "hold": 3, "reject": 4}
COLOURS = {"promote": "green", "hold": "yellow", "reject": "red"}


@dataclass
class Promote(AdapterStoreOption):
    """Run the gate on an adapter and make it `active` if it passes; exit 0 promoted, 3 held, 4 rejected.

    The gate runs candidate and active adapter (the base where nothing is active) on the same episodes of the new task,
    every earlier task and the held-out ones. A decision that is already on the adapter's card is not measured again,
    unless it was reached against another adapter or under other demands. Where the tasks cannot be simulated here, the
    gate says what is missing and holds.
    """

    adapter: Annotated[str, tyro.conf.Positional] = "candidate"
    """Id, id prefix or tag."""
    suite: str = "metaworld"
    """Simulation suite of the tasks."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    held_out: tuple[str, ...] = ()
    """Names of tasks that were never trained, which are compared too."""
    gate: GateConfig = field(default_factory=GateConfig)
    again: bool = False
    """Measure again, although the card already has a decision against the active adapter."""
    override: str = ""
    """Promote whatever the gate decided, for this reason; the tag's history keeps it."""
    workers: int = 2
    """Simulator processes. With 0 nothing is simulated: the gate holds, and only --override promotes."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    json: bool = False
    """Print the decision as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        console = Console(stderr=self.json)
        store = self.open_adapters()
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
        return 0 if promoted else EXIT_STATUS[stored["decision"]]

    def _measure(self, store: FolderStore, candidate: str, active: str, console: Console) -> None:
        """Run the gate; its decision is on the candidate's card afterwards."""
        learned = [store.card(candidate).provenance.task, *earlier_tasks(store, candidate, active)]
        names = [name for name in dict.fromkeys([*learned, *self.held_out]) if name]
        if not self.workers:
            self._hold(store, candidate, active)
            return
        try:
            tasks, env, running = self._open_world(store, candidate, names, console)
        except RatchetError as error:
            # What was typed here is refused; what only the cards name cannot be evaluated on this machine.
            if not error.code.startswith("sim.") or self._mistyped(error):
                raise
            self._hold(store, candidate, active, missing=str(error))
            return
        try:
            with display.make_progress(console, counts=True, transient=True) as progress:
                bar = progress.add_task("gate", total=1)

                def show(kind: str, event: dict[str, Any]) -> None:
                    if kind == "episode":
                        progress.update(bar, description=event["what"], completed=event["done"], total=event["of"])

                keeper = Gatekeeper(running.serve, env, tasks, store, self.gate, self.store / "gate", show)
                keeper.run(candidate, active, self.held_out)
        finally:
            env.close()

    def _hold(self, store: FolderStore, candidate: str, active: str, missing: str = "") -> None:
        """Let the gate decide without a simulator: it says what is missing, and holds."""
        keeper = Gatekeeper(_no_policy, None, {}, store, self.gate, self.store / "gate", missing=missing)
        keeper.run(candidate, active, self.held_out)

    def _open_world(
        self, store: FolderStore, candidate: str, names: list[str], console: Console
    ) -> tuple[dict[str, TaskInfo], ChunkVectorEnv, common.Running]:
        """The tasks by name, their simulators and the policy that takes either adapter."""
        contract = registry.contract_for(self.suite)
        tasks = common.find_tasks(self.suite, names)
        lora = common.lora_of(store, candidate)
        folder = common.policy_folder(self.suite, self.policy)
        made_for = common.made_for(store, candidate)
        running = common.open_running(folder, contract, lora, store, made_for=made_for)
        common.print_contract(console, contract)
        return tasks, common.make_vector(running.policy, self.suite, contract, self.workers, self.slots), running

    def _mistyped(self, error: RatchetError) -> bool:
        """Whether an unknown name is one that the user gave."""
        return error.code == "sim.unknown_suite" or any(f"'{name}'" in error.what for name in self.held_out)


def _no_policy(adapter_id: str) -> NoReturn:
    raise RatchetError("gate.no_simulator", "no policy is served where nothing can be simulated", where=adapter_id[:12])


@dataclass
class Rollback(AdapterStoreOption):
    """Point a tag back at what it pointed at before: after a first promotion, at the base.

    A running robot that follows the tag swaps as soon as it next reads the store.
    """

    tag: str = "active"
    """Tag to move back."""
    reason: str = ""
    """Why; kept in the tag's history."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        move = self.open_adapters().rollback(self.tag, self.reason)
        if self.json:
            print(json.dumps(dataclasses.asdict(move)))
        else:
            Console().print(f"{move.tag}: {(move.old or 'nothing')[:12]} -> {move.new[:12]}")
        return 0


@dataclass
class Diff(AdapterStoreOption):
    """Show what differs between two adapters: origin, measured values, and the weights of each layer."""

    first: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or `base`."""
    second: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or `base`."""
    layers: int = 10
    """How many layers to list, the most changed first."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = self.open_adapters()
        first = store.resolve(self.first)
        second = store.resolve(self.second)
        if first == second == BASE:
            text = f"{self.first} and {self.second} are the base"
            print(json.dumps({"cards": {}, "layers": []}) if self.json else text)
            return 0
        changes = change(*_pair(store, first, second))
        differences = _card_differences(store, first, second)
        if self.json:
            layers = [dataclasses.asdict(layer) for layer in changes]
            print(json.dumps({"cards": differences, "layers": layers}, default=dict))
            return 0
        console = Console()
        table = display.make_table(("", "first", "second"), title=f"{first[:12]} against {second[:12]}")
        for name, (value_first, value_second) in differences.items():
            table.add_row(name, _cell(value_first), _cell(value_second))
        console.print(table)
        console.print(_layer_table(changes[: self.layers], len(changes)))
        return 0


def print_decision(decision: Mapping[str, Any], console: Console) -> None:
    """Print the gate's comparison as a table, then its decision and the reasons.

    Args:
        decision: A gate's decision as an adapter's card keeps it.
        console: Where it is printed.
    """
    if decision["tasks"]:
        console.print(_comparison_table(decision["tasks"]))
        console.print("sees: smallest true drop, in points, that the test finds with 80 % chance", highlight=False)
    console.print(f"[bold {COLOURS[decision['decision']]}]{decision['decision'].upper()}[/]")
    for reason in decision["reasons"]:
        task = f" {reason['task']}:" if reason["task"] else ""
        console.print(f"  {reason['code']}{task} {reason['text']}", markup=False, highlight=False)


def _comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ("active", "candidate", "change [95 %]", "lost/gained", "p worse", "sees")
    table = display.make_table(
        ("task", *numbers), title="gate: candidate against active, same episodes", numbers=numbers, folds=True
    )
    for row in rows:
        table.add_row(
            f"{row['task']} ({row['role'].replace('_', '-')})",
            f"{row['active']:.0%}",
            f"{row['candidate']:.0%}",
            f"{100 * row['change']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]",
            f"{row['losses']}/{row['gains']} of {row['episodes']}",
            f"{row['p_worse']:.3f}",
            f"-{100 * row['detectable_drop']:.0f}",
        )
    return table


def _pair(store: AdapterStore, first: str, second: str) -> tuple[Adapter, Adapter]:
    """Two adapters of which one may be the base: the other one's layers, with an update of zero."""
    if first == BASE:
        adapter = store.get(second)
        return scaled(adapter, 0.0), adapter
    if second == BASE:
        adapter = store.get(first)
        return adapter, scaled(adapter, 0.0)
    return store.get(first), store.get(second)


def _card_differences(store: AdapterStore, first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Entries of the two cards that differ, by name; the base has none."""
    of_first = _card_entries(store, first)
    of_second = _card_entries(store, second)
    pairs = {name: (of_first.get(name), of_second.get(name)) for name in [*of_first, *of_second]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _card_entries(store: AdapterStore, reference: str) -> dict[str, Any]:
    if reference == BASE:
        return {}
    card = store.card(reference)
    origin = card.provenance
    return {
        "task": origin.task,
        "stage": origin.stage,
        "parent": origin.parent,
        "created": card.created,
        "base": card.base_hash,
        "effect": origin.effect,
        "gate": origin.gate.get("decision"),
        **{f"measured {name}": value for name, value in origin.metrics.items()},
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)[:24]


def _layer_table(changes: Sequence[Change], total: int) -> Table:
    numbers = ("norm first", "norm second", "norm of difference", "cosine")
    title = f"{len(changes)} of {total} layers, most changed first"
    table = display.make_table(("layer", *numbers), title=title, numbers=numbers, folds=True)
    for layer in changes:
        table.add_row(
            layer.layer,
            f"{layer.first:.3g}",
            f"{layer.second:.3g}",
            f"{layer.difference:.3g}",
            f"{layer.cosine:+.2f}",
        )
    return table
