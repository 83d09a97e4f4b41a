"""Import and export of PEFT adapter folders: fitted to a base's layers, checked, and cast where asked for.

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

from ratchet_vla.adapters.identity import Adapter, Binding, binding_of
from ratchet_vla.adapters.lora.layers import attach, room_for, split_name
from ratchet_vla.adapters.peft_format import export_folder, import_folder
from ratchet_vla.adapters.protocol import Card, Provenance
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.protocol import Policy

__all__ = ["Imported", "bring_in", "send_out"]

NOTE = "ratchet.json"  # beside PEFT's files: what they have no place for
FORMAT = 1
_TENSOR = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Imported:
    """An adapter that fits its base, its provenance, and notes in words on what was changed or is unusual."""

    adapter: Adapter
    provenance: Provenance
    notes: tuple[str, ...]


def bring_in(folder: Path, policy: Policy, dtype: torch.dtype | None = None) -> Imported:
    """Read a PEFT folder for a base that carries no adapter yet. The policy is used up by it.

    Every check of a swap is made, the canary observation included.

    Args:
        dtype: what to cast to; None keeps the folder's own, whatever the base's is: layers of float32 carry either.

    Raises:
        RatchetError: what `import_folder` and `HotSwapper.stage` raise; adapter.hash_mismatch, adapter.wrong_base,
            adapter.wrong_statistics, adapter.wrong_action_space against the note of an adapter that was exported here.
    """
    binding = binding_of(policy)
    peft_adapter = import_folder(folder, binding)
    exported_note = _read_note(folder / NOTE)
    if exported_note is not None:
        binding.require(exported_note.binding, where=str(folder))
    # Attached to exactly the layers that the file has tensors for: PEFT's own target_modules may match more.
    attached_lora = attach(policy.module, _layers_of(peft_adapter, policy.module, str(folder)))
    tensors = _cast_all(peft_adapter.tensors, dtype)
    cast_note = _cast_note(peft_adapter.tensors, tensors)
    notes = [cast_note] if cast_note else []
    adapter = Adapter(
        tensors, {**peft_adapter.config, "target_modules": attached_lora.config["target_modules"]}, binding
    )
    if exported_note is not None and not cast_note and adapter.id != exported_note.id:
        raise RatchetError(
            "adapter.hash_mismatch",
            f"content is {adapter.id[:12]}, exported as {exported_note.id[:12]}",
            where=str(folder),
            fix=f"copy the folder again; if it was changed on purpose, remove {NOTE}",
        )
    # Staging runs every check of a swap, so an adapter that a running policy would refuse is never imported.
    staged_adapter = HotSwapper(policy, attached_lora).stage(adapter)
    if staged_adapter.effect.overall == 0.0:
        notes.append("it changes no weight: this is the base")
    source_text = f"imported from {folder.resolve().name}"
    provenance = Provenance(notes=source_text)
    if exported_note is not None:
        provenance = exported_note.provenance
    return Imported(adapter, dataclasses.replace(provenance, effect=staged_adapter.effect.overall), tuple(notes))


def send_out(adapter: Adapter, card: Card, folder: Path, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """Write an adapter as a new PEFT folder, whole or not at all; returns notes in words.

    Args:
        dtype: what to cast to; None keeps the adapter's own.

    Raises:
        RatchetError: adapter.exists, adapter.cast_overflow.
    """
    if folder.exists():
        raise RatchetError("adapter.exists", "the folder exists already", where=str(folder), fix="name a new folder")
    tensors = _cast_all(adapter.tensors, dtype)
    cast_note = _cast_note(adapter.tensors, tensors)
    cast_adapter = Adapter(tensors, adapter.config, adapter.binding)
    note_fields = {
        "format": FORMAT,
        "id": cast_adapter.id,
        "binding": dataclasses.asdict(adapter.binding),
        "provenance": dataclasses.asdict(card.provenance),
    }
    # Written beside the target and renamed at the end, so that a crash never leaves half a folder under its name.
    scratch_folder = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(scratch_folder, ignore_errors=True)
    export_folder(cast_adapter, scratch_folder)
    (scratch_folder / NOTE).write_text(json.dumps(note_fields, indent=1, sort_keys=True) + "\n")
    scratch_folder.rename(folder)
    return (cast_note,) if cast_note else ()


def cast(tensor: Tensor, dtype: torch.dtype, tensor_name: str) -> Tensor:
    """Cast a tensor. Raises RatchetError adapter.cast_overflow where a finite value becomes infinite in `dtype`."""
    cast_tensor = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast_tensor).all()):
        raise RatchetError(
            "adapter.cast_overflow",
            f"values of up to {float(tensor.abs().max()):.3g} do not fit {_word(dtype)}",
            where=tensor_name,
            fix="keep it in bfloat16 or float32",
        )
    return cast_tensor


# -- inside ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Note:
    id: str
    binding: Binding
    provenance: Provenance


def _read_note(note_path: Path) -> _Note | None:
    if not note_path.is_file():
        return None
    try:
        note_fields: dict[str, Any] = json.loads(note_path.read_text())
        if note_fields["format"] != FORMAT:
            raise ValueError(f"format {note_fields['format']}")
        return _Note(str(note_fields["id"]), Binding(**note_fields["binding"]), Provenance(**note_fields["provenance"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError(
            "adapter.bad_card",
            f"the note beside the adapter is malformed: {error}",
            where=str(note_path),
            fix="export it again; without this file the adapter is imported as another project's",
        ) from None


def _layers_of(adapter: Adapter, module: nn.Module, source: str) -> LoraConfig:
    """A configuration that puts LoRA on exactly the layers that the adapter has tensors for."""
    unknown_tensors = [tensor_name for tensor_name in sorted(adapter.tensors) if not _TENSOR.fullmatch(tensor_name)]
    adapter_layers = {split_name(tensor_name)[0] for tensor_name in adapter.tensors} if not unknown_tensors else set()
    base_layers = {
        layer_path for layer_path, submodule in module.named_modules() if isinstance(submodule, nn.Linear | nn.Conv2d)
    }
    unknown_tensors = unknown_tensors or sorted(
        tensor_name for tensor_name in adapter.tensors if split_name(tensor_name)[0] not in base_layers
    )
    if unknown_tensors:
        raise RatchetError(
            "adapter.extra_keys",
            f"{len(unknown_tensors)} of {len(adapter.tensors)} tensors belong to no layer of this base: "
            f"{json.dumps(unknown_tensors[:3])}",
            where=source,
            fix="name the base that it was trained on; this one has layers such as "
            f"{', '.join(sorted(base_layers)[:2])}",
        )
    if not adapter_layers:
        raise RatchetError("adapter.missing_keys", "the file holds no tensor", where=source, fix="export it again")
    return room_for({**adapter.config, "target_modules": "|".join(sorted(map(re.escape, adapter_layers)))})


def _cast_all(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor in another dtype; None keeps each one's own."""
    if dtype is None:
        return dict(tensors)
    return {tensor_name: cast(tensor, dtype, tensor_name) for tensor_name, tensor in tensors.items()}


def _cast_note(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """What a cast did, in words; "" where there was none. A loss is relative to each tensor's largest value."""
    cast_names = {tensor_name for tensor_name in before if before[tensor_name].dtype != after[tensor_name].dtype}
    if not cast_names:
        return ""
    largest_loss = 0.0
    for tensor_name in cast_names:
        largest = float(before[tensor_name].abs().max())
        if largest:
            largest_loss = max(
                largest_loss, float((after[tensor_name].double() - before[tensor_name].double()).abs().max()) / largest
            )
    dtype_changes = sorted(
        {f"{_word(before[tensor_name].dtype)} to {_word(after[tensor_name].dtype)}" for tensor_name in cast_names}
    )
    loss_text = "exactly"
    if largest_loss != 0.0:
        loss_text = f"which changed weights by up to {largest_loss:.2%} of the largest in their tensor"
    return f"cast from {', '.join(dtype_changes)}, {loss_text}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
