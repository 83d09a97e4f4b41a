"""`ratchet adapters …`: what is in a store; promotion.py and exchange.py hold the other verbs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.adapters.protocol import BASE, Card
from ratchet_vla.cli import display
from ratchet_vla.cli.adapters.exchange import Export, Import
from ratchet_vla.cli.adapters.promotion import Diff, Promote, Rollback
from ratchet_vla.cli.stores import AdapterStoreOption


@dataclass
class List(AdapterStoreOption):
    """List all adapters, oldest first, with their tags."""

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = self.open_adapters()
        cards = sorted((store.card(identity) for identity in store.ids()), key=lambda card: card.created)
        tags = {"active": BASE, **store.tags()}  # where nothing was promoted yet, the base is active
        if self.json:
            adapters = [dataclasses.asdict(card) for card in cards]
            print(json.dumps({"adapters": adapters, "tags": tags}, default=dict))
            return 0
        Console().print(_card_table(cards, tags))
        return 0


@dataclass
class Show(AdapterStoreOption):
    """Show one adapter's card and lineage."""

    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or `base`."""
    json: bool = False
    """Print JSON on one line."""

    def run(self) -> int:
        store = self.open_adapters()
        if store.resolve(self.adapter) == BASE:
            tags = _tags_of(BASE, {"active": BASE, **store.tags()})
            card: dict[str, Any] = {"id": BASE, "tags": tags, "what": "the base without an adapter", "lineage": []}
        else:
            card = dataclasses.asdict(store.card(self.adapter))
            card["lineage"] = store.lineage(self.adapter)
        if self.json:
            print(json.dumps(card, default=dict))
        else:
            Console().print_json(json.dumps(card, default=dict))
        return 0


@dataclass
class Tag(AdapterStoreOption):
    """Point a tag at an adapter or at the base."""

    name: Annotated[str, tyro.conf.Positional]
    """Tag, such as `active`."""
    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, another tag, or `base`."""
    reason: str = ""
    """Why; kept in the tag's history."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        move = self.open_adapters().tag(self.name, self.adapter, self.reason)
        if self.json:
            print(json.dumps(dataclasses.asdict(move)))
        else:
            Console().print(f"{move.tag}: {(move.old or 'nothing')[:12]} -> {move.new[:12]}")
        return 0


@dataclass
class Verify(AdapterStoreOption):
    """Hash every adapter again and check tags and history; exit 1 where something is wrong."""

    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = self.open_adapters()
        problems = store.verify()
        if self.json:
            rows = [dataclasses.asdict(problem) for problem in problems]
            print(json.dumps({"adapters": len(store.ids()), "problems": rows}))
        else:
            console = Console()
            for problem in problems:
                console.print(f"[red]{problem.code}[/] {problem.where}: {problem.what}")
            console.print(f"{len(store.ids())} adapters, {len(problems)} problems")
        return 1 if any(problem.fatal for problem in problems) else 0


@dataclass
class Adapters:
    """Look at, compare, tag, promote, roll back, import and export the adapters of a store.

    Commands to copy:

        ratchet adapters list --store runs/demo/adapters

        ratchet adapters show candidate --store runs/demo/adapters --json

        ratchet adapters promote candidate --suite metaworld --store runs/demo/adapters

        ratchet adapters rollback --reason "hesitates at the drawer"

        ratchet adapters diff active candidate

        ratchet adapters import peft-folder --policy models/mine --task door-open --tag candidate

        ratchet adapters export active out/peft-folder --dtype float32
    """

    command: Annotated[
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Tag, tyro.conf.subcommand("tag")]
        | Annotated[Promote, tyro.conf.subcommand("promote")]
        | Annotated[Rollback, tyro.conf.subcommand("rollback")]
        | Annotated[Diff, tyro.conf.subcommand("diff")]
        | Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Verify, tyro.conf.subcommand("verify")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        return self.command.run()


def _card_table(cards: Sequence[Card], tags: Mapping[str, str]) -> Table:
    table = display.make_table(("id", "task", "stage", "parent", "effect", "created", "tags"))
    tags_of_base = _tags_of(BASE, tags)
    if tags_of_base:
        table.add_row(BASE, "", "", "", "", "", ", ".join(tags_of_base))
    for card in cards:
        provenance = card.provenance
        table.add_row(
            card.id[:12],
            provenance.task,
            str(provenance.stage),
            (provenance.parent or "base")[:12],
            "" if provenance.effect is None else f"{provenance.effect:.2%}",
            card.created[:19],
            ", ".join(_tags_of(card.id, tags)),
        )
    return table


def _tags_of(identity: str, tags: Mapping[str, str]) -> list[str]:
    return sorted(tag for tag, target in tags.items() if target == identity)
