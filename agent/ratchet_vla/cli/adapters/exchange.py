"""`ratchet adapters import|export`: PEFT folders into a store, and out of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from ratchet_vla.adapters.exchange import bring_in, send_out
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.stores import ADAPTERS, AdapterStoreOption
from ratchet_vla.policy import device
from ratchet_vla.policy.checkpoints import adopted

Dtype = Literal["own", "float32", "bfloat16", "float16"]


@dataclass
class Import:
    """Store an adapter that PEFT saved, after it was checked against its base.

    PEFT's files do not say which base they were trained on; --policy does. The base is loaded and the adapter tried on
    an observation before anything is stored.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with adapter_model.safetensors and adapter_config.json."""
    store: Path = ADAPTERS
    """Folder of the adapter store; made if it does not exist."""
    suite: str = "metaworld"
    """Suite whose built-in base is used if --policy is absent."""
    policy: Path | None = None
    """Folder of the base policy that the adapter was trained on."""
    task: str = ""
    """Name of the task that it learned, which the gate needs; what an export of this project says if absent."""
    tag: str = ""
    """Tag to point at it, such as `candidate`; none if absent."""
    dtype: Dtype = "own"
    """Dtype to store it in; own keeps the file's. Every dtype runs on every base; a narrower one loses digits."""
    device: str = ""
    """Where the base is loaded: cpu, cuda or auto; the value of RATCHET_DEVICE if absent."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        base = common.policy_folder(self.suite, self.policy)
        imported = bring_in(self.folder, adopted.load(base, device.choose(self.device)), _dtype(self.dtype))
        provenance = imported.provenance
        if self.task:
            provenance = dataclasses.replace(provenance, task=self.task, stage=max(provenance.stage, 1))
        store = FolderStore(self.store, create=True)
        card = store.put(imported.adapter, provenance)
        if self.tag:
            store.tag(self.tag, card.id, reason=f"imported from {self.folder}")
        if self.json:
            document = {
                "id": card.id,
                "base": card.base_hash,
                "effect": provenance.effect,
                "notes": imported.notes,
            }
            print(json.dumps(document))
            return 0
        tagged = f", tagged {self.tag}" if self.tag else ""
        effect = f"{provenance.effect or 0.0:.2%}"
        _print_notes(imported.notes, f"stored as {card.id[:12]}{tagged}: changes the base by {effect}")
        return 0


@dataclass
class Export(AdapterStoreOption):
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained` and `adapters import` read."""

    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix or tag."""
    folder: Annotated[Path, tyro.conf.Positional]
    """New folder to write."""
    dtype: Dtype = "own"
    """Dtype of the tensors; own keeps the store's."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = self.open_adapters()
        adapter = store.get(self.adapter)
        notes = send_out(adapter, store.card(self.adapter), self.folder, _dtype(self.dtype))
        if self.json:
            print(json.dumps({"id": adapter.id, "folder": str(self.folder), "notes": notes}))
            return 0
        _print_notes(notes, f"{adapter.id[:12]} in {self.folder}, {adapter.bytes / 1e6:.1f} MB")
        return 0


def _print_notes(notes: Iterable[str], last_line: str) -> None:
    """Print what went other than expected, then the result."""
    console = Console(soft_wrap=True)
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    console.print(last_line, highlight=False)


def _dtype(name: Dtype) -> torch.dtype | None:
    return None if name == "own" else getattr(torch, name)
