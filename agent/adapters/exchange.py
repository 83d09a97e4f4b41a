"""PEFT folders in and out of a store: fitted to the layers of a base here, checked, and cast where that is asked for.

Knows adapters, a policy's layers and the note that this project leaves beside PEFT's files. Knows no store and no names
of other projects' models: layers must be called here what they are called there.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from agent.adapters.hotswap import HotSwapper
from agent.adapters.identity import Adapter, Binding, binding_of
from agent.adapters.lora import attach, room_for, split_name
from agent.adapters.peft_format import export_folder, import_folder
from agent.adapters.protocol import Card, Provenance
from agent.errors import RatchetError
from agent.policy.protocol import Policy

NOTE = "ratchet.json"  # beside PEFT's files: what they have no place for
FORMAT = 1
_TENSOR = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Imported:
    """An adapter that fits its base, with where it is from, and whatever was changed or is worth knowing, in words."""

    adapter: Adapter
    provenance: Provenance
    notes: tuple[str, ...]


def bring_in(folder: Path, policy: Policy, dtype: torch.dtype | None = None) -> Imported:
    """Read a PEFT folder for a base that carries no adapter yet; the policy is used up by it.

    Every check of a swap is made, the canary observation included.

    dtype: what to cast to; None keeps the folder's own, whatever the base's is: layers of float32 carry either.

    Raises:
        RatchetError: what `import_folder` and `HotSwapper.stage` raise; adapter.hash_mismatch, adapter.wrong_base,
            adapter.wrong_statistics, adapter.wrong_action_space against the note of an adapter that was exported here.
    """
    binding = binding_of(policy)
    found = import_folder(folder, binding)
    told = _read_note(folder / NOTE)
    if told is not None:
        binding.require(told.binding, where=str(folder))
    lora = attach(policy.module, _layers_of(found, policy.module, str(folder)))
    tensors = {n: t if dtype is None else cast(t, dtype, n) for n, t in found.tensors.items()}
    changed = _cast_note(found.tensors, tensors)
    notes = [changed] if changed else []
    adapter = Adapter(tensors, {**found.config, "target_modules": lora.config["target_modules"]}, binding)
    if told is not None and not changed and adapter.id != told.id:
        raise RatchetError(
            "adapter.hash_mismatch",
            f"content is {adapter.id[:12]}, exported as {told.id[:12]}",
            where=str(folder),
            fix=f"copy the folder again; if it was changed on purpose, remove {NOTE}",
        )
    staged = HotSwapper(policy, lora).stage(adapter)
    if staged.effect.overall == 0.0:
        notes.append("it changes no weight: this is the base")
    text = f"imported from {folder.resolve().name}"
    provenance = told.provenance if told is not None else Provenance(notes=text)
    return Imported(adapter, dataclasses.replace(provenance, effect=staged.effect.overall), tuple(notes))


def send_out(adapter: Adapter, card: Card, folder: Path, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Write an adapter as a new PEFT folder, whole or not at all; returns notes in words.

    dtype: what to cast to; None keeps the adapter's own.

    Raises:
        RatchetError: adapter.exists, adapter.cast_overflow.
    """
    if folder.exists():
        raise RatchetError("adapter.exists", "there is something already", where=str(folder), fix="name a new folder")
    tensors = {n: t if dtype is None else cast(t, dtype, n) for n, t in adapter.tensors.items()}
    changed = _cast_note(adapter.tensors, tensors)
    sent = Adapter(tensors, adapter.config, adapter.binding)
    note = {
        "format": FORMAT,
        "id": sent.id,
        "binding": dataclasses.asdict(adapter.binding),
        "provenance": dataclasses.asdict(card.provenance),
    }
    scratch = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    export_folder(sent, scratch)
    (scratch / NOTE).write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")
    scratch.rename(folder)
    return (changed,) if changed else ()


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises RatchetError adapter.cast_overflow where a finite value has no finite one in the other dtype."""
    out = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(out).all()):
        raise RatchetError(
            "adapter.cast_overflow",
            f"values of up to {float(tensor.abs().max()):.3g} do not fit {_word(dtype)}",
            where=name,
            fix="keep it in bfloat16 or float32",
        )
    return out


# -- inside ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Note:
    id: str
    binding: Binding
    provenance: Provenance


def _read_note(path: Path) -> _Note | None:
    if not path.is_file():
        return None
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}")
        return _Note(str(raw["id"]), Binding(**raw["binding"]), Provenance(**raw["provenance"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError(
            "adapter.bad_card",
            f"the note beside the adapter is malformed: {error}",
            where=str(path),
            fix="export it again; without the file it counts as another project's",
        ) from None


def _layers_of(found: Adapter, module: nn.Module, where: str) -> LoraConfig:
    """A configuration that puts LoRA on exactly the layers that the adapter has tensors for."""
    strange = [n for n in sorted(found.tensors) if not _TENSOR.fullmatch(n)]
    layers = {split_name(n)[0] for n in found.tensors} if not strange else set()
    there = {name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    strange = strange or sorted(n for n in found.tensors if split_name(n)[0] not in there)
    if strange:
        raise RatchetError(
            "adapter.extra_keys",
            f"{len(strange)} of {len(found.tensors)} tensors are of no layer of this base: {json.dumps(strange[:3])}",
            where=where,
            fix=f"name the base that it was trained on; this one has layers such as {', '.join(sorted(there)[:2])}",
        )
    if not layers:
        raise RatchetError("adapter.missing_keys", "the file holds no tensor", where=where, fix="export it again")
    return room_for({**found.config, "target_modules": "|".join(sorted(map(re.escape, layers)))})


def _cast_note(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """What a cast did, in words; "" where there was none. A loss is relative to each tensor's largest value."""
    moved = {name for name in before if before[name].dtype != after[name].dtype}
    if not moved:
        return ""
    lost = 0.0
    for name in moved:
        size = float(before[name].abs().max())
        if size:
            lost = max(lost, float((after[name].double() - before[name].double()).abs().max()) / size)
    kinds = sorted({f"{_word(before[n].dtype)} to {_word(after[n].dtype)}" for n in moved})
    how = "exactly" if lost == 0.0 else f"which changed weights by up to {lost:.2%} of the largest in their tensor"
    return f"cast from {', '.join(kinds)}, {how}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
