"""`ratchet adapters …`: what is in a store; promotion.py and exchange.py hold the other verbs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.adapters.exchange import Export, Import
from ratchet_vla.cli.adapters.promotion import Diff, Promote, Rollback

STORE = Path("runs/demo/adapters")


@dataclass
class List:
    """All adapters, oldest first, with their tags."""

    store: Path = STORE
    """Adapter store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = FolderStore(self.store)
        cards = sorted((store.card(i) for i in store.ids()), key=lambda c: c.created)
        tags = {"active": BASE, **store.tags()}
        if self.json:
            print(json.dumps({"adapters": [dataclasses.asdict(c) for c in cards], "tags": tags}, default=dict))
            return 0
        table = Table()
        for column in ("id", "task", "stage", "parent", "effect", "created", "tags"):
            table.add_column(column)
        at_base = ", ".join(t for t, target in sorted(tags.items()) if target == BASE)
        if at_base:
            table.add_row(BASE, "", "", "", "", "", at_base)
        for card in cards:
            provenance = card.provenance
            table.add_row(
                card.id[:12],
                provenance.task,
                str(provenance.stage),
                (provenance.parent or "base")[:12],
                "" if provenance.effect is None else f"{provenance.effect:.2%}",
                card.created[:19],
                ", ".join(t for t, i in sorted(tags.items()) if i == card.id),
            )
        Console().print(table)
        return 0


@dataclass
class Show:
    """One adapter's card and lineage."""

    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, tag, or base."""
    store: Path = STORE
    """Adapter store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = FolderStore(self.store)
        if store.resolve(self.adapter) == BASE:
            tags = sorted(t for t, target in {"active": BASE, **store.tags()}.items() if target == BASE)
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
class Tag:
    """Point a tag at an adapter or at the base."""

    name: Annotated[str, tyro.conf.Positional]
    """Tag, such as `active`."""
    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix, another tag, or base."""
    reason: str = ""
    """Why; kept in the history."""
    store: Path = STORE
    """Adapter store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        move = FolderStore(self.store).tag(self.name, self.adapter, self.reason)
        if self.json:
            print(json.dumps(dataclasses.asdict(move)))
        else:
            Console().print(f"{move.tag}: {(move.old or 'nothing')[:12]} -> {move.new[:12]}")
        return 0


@dataclass
class Verify:
    """Hash every adapter again and check tags and history; exit 1 where something is wrong."""

    store: Path = STORE
    """Adapter store."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = FolderStore(self.store)
        problems = store.verify()
        if self.json:
            print(json.dumps({"adapters": len(store.ids()), "problems": [dataclasses.asdict(p) for p in problems]}))
        else:
            console = Console()
            for problem in problems:
                console.print(f"[red]{problem.code}[/] {problem.where}: {problem.what}")
            console.print(f"{len(store.ids())} adapters, {len(problems)} problems")
        return 1 if any(p.fatal for p in problems) else 0


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
