"""`ratchet adapters import|export`: PEFT folders into a store, and out of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from ratchet_vla.adapters.exchange import bring_in, send_out
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.policy import device
from ratchet_vla.policy.checkpoints import adopted

STORE = Path("runs/demo/adapters")
Dtype = Literal["own", "float32", "bfloat16", "float16"]


@dataclass
class Import:
    """An adapter that PEFT saved: checked against its base and stored under its id.

    PEFT's files do not say which base they were trained on; --policy does. The base is loaded and the adapter tried on
    an observation before anything is stored.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with adapter_model.safetensors and adapter_config.json."""
    store: Path = STORE
    """Adapter store; made if need be."""
    suite: str = "metaworld"
    """Suite whose built-in base is meant where --policy is absent."""
    policy: Path | None = None
    """Folder of the base policy that the adapter was trained on."""
    task: str = ""
    """Task that it learned; the gate wants to know. Kept from the export where this project made the folder."""
    tag: str = ""
    """Tag to point at it, such as `candidate`."""
    dtype: Dtype = "own"
    """Dtype to store it in. Any runs on any base; a narrower one loses digits."""
    device: str = ""
    """Where the base is loaded: cpu, cuda or auto; what RATCHET_DEVICE says if absent."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        base = common.policy_folder(self.suite, self.policy)
        found = bring_in(self.folder, adopted.load(base, device.choose(self.device)), _dtype(self.dtype))
        provenance = found.provenance
        if self.task:
            provenance = dataclasses.replace(provenance, task=self.task, stage=max(provenance.stage, 1))
        store = FolderStore(self.store, create=True)
        card = store.put(found.adapter, provenance)
        if self.tag:
            store.tag(self.tag, card.id, reason=f"imported from {self.folder}")
        effect = f"{provenance.effect or 0.0:.2%}"
        if self.json:
            facts = {"id": card.id, "base": card.base_hash, "effect": provenance.effect, "notes": found.notes}
            print(json.dumps(facts))
            return 0
        console = Console(soft_wrap=True)
        for note in found.notes:
            console.print(note, style="yellow", markup=False, highlight=False)
        tagged = f", tagged {self.tag}" if self.tag else ""
        console.print(f"stored as {card.id[:12]}{tagged}: changes the base by {effect}", highlight=False)
        return 0


@dataclass
class Export:
    """An adapter as a folder that `peft.PeftModel.from_pretrained` and `adapters import` read."""

    adapter: Annotated[str, tyro.conf.Positional]
    """Id, id prefix or tag."""
    folder: Annotated[Path, tyro.conf.Positional]
    """New folder."""
    store: Path = STORE
    """Adapter store."""
    dtype: Dtype = "own"
    """Dtype of the tensors."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        store = FolderStore(self.store)
        adapter = store.get(self.adapter)
        notes = send_out(adapter, store.card(self.adapter), self.folder, _dtype(self.dtype))
        if self.json:
            print(json.dumps({"id": adapter.id, "folder": str(self.folder), "notes": notes}))
            return 0
        console = Console(soft_wrap=True)
        for note in notes:
            console.print(note, style="yellow", markup=False, highlight=False)
        console.print(f"{adapter.id[:12]} in {self.folder}, {adapter.bytes / 1e6:.1f} MB", highlight=False)
        return 0


def _dtype(word: Dtype) -> torch.dtype | None:
    return None if word == "own" else getattr(torch, word)
