"""PEFT's adapter folder: `adapter_model.safetensors` and `adapter_config.json`.

Knows how to read what `peft` saved and to write what `peft` loads, refusing what is damaged. Knows no id and no store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from agent.adapters.identity import Adapter, Binding, canonical_config, dtype_name
from agent.errors import RatchetError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The weights file, as PEFT writes it."""
    # safetensors refuses tensors that share memory, such as views of one received buffer.
    alone = {name: tensor.detach().contiguous().clone() for name, tensor in sorted(tensors.items())}
    data: bytes = safetensors.torch.save(alone, metadata={"format": "pt"})
    return data


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The configuration file: PEFT's full one, so that any version of it can read it."""
    from agent.adapters.lora import peft_config  # peft takes seconds to load, and whoever only reads needs none of it

    full = peft_config(config).to_dict()
    full["peft_type"] = "LORA"
    full["inference_mode"] = True
    full["target_modules"] = config["target_modules"]
    full.pop("runtime_config", None)
    return (json.dumps(full, indent=2, sort_keys=True) + "\n").encode()


def read_weights(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors of a weights file.

    Raises:
        RatchetError: adapter.truncated for a cut or malformed file, adapter.wrong_dtype.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except SafetensorError as error:
        raise RatchetError(
            "adapter.truncated",
            f"not a complete safetensors file: {error}",
            where=where,
            fix="copy or export the adapter again",
        ) from None
    for name, tensor in tensors.items():
        dtype_name(tensor, f"{where}: {name}")
    return tensors


def read_config(data: bytes, where: str) -> dict[str, Any]:
    """Canonical configuration of a configuration file.

    Raises:
        RatchetError: adapter.bad_config for broken JSON, adapter.unsupported_config.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise RatchetError(
            "adapter.bad_config", f"not JSON: {error}", where=where, fix="export the adapter again"
        ) from None
    if not isinstance(raw, dict):
        raise RatchetError("adapter.bad_config", "not a JSON object", where=where, fix="export the adapter again")
    return canonical_config(raw, where)


def read_file(path: Path) -> bytes:
    """A file of an adapter.

    Raises:
        RatchetError: adapter.missing_file, naming what the folder does hold.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else "no such folder"
        raise RatchetError(
            "adapter.missing_file",
            f"no {path.name}",
            where=str(path.parent),
            fix=f"give a folder saved by peft; found there: {there or 'nothing'}",
        ) from None


def import_folder(folder: str | Path, binding: Binding) -> Adapter:
    """Read a folder written by `peft`'s save_pretrained, for the policy that `binding` describes.

    PEFT's files do not say which base they were trained on, so the caller's word is taken; keys and shapes are checked
    against the policy's layers when the adapter is staged.

    Raises:
        RatchetError: adapter.missing_file, adapter.truncated, adapter.wrong_dtype, adapter.bad_config,
            adapter.unsupported_config, adapter.is_base, adapter.pickled.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise RatchetError(
            "adapter.is_base",
            "this folder holds a base model, not an adapter",
            where=str(folder),
            fix=f"give a folder with {CONFIG}; name this one as the base",
        )
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise RatchetError(
            "adapter.pickled",
            f"{PICKLED} is a pickle: whoever opens it runs what it says",
            where=str(folder),
            fix="have its author save it with safe_serialization=True, or convert it where that risk is taken",
        )
    config = read_config(read_file(folder / CONFIG), str(folder / CONFIG))
    tensors = read_weights(read_file(folder / WEIGHTS), str(folder / WEIGHTS))
    return Adapter(tensors, config, binding)


def export_folder(adapter: Adapter, folder: str | Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` and `load_adapter` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(config_bytes(adapter.config))
    (folder / WEIGHTS).write_bytes(weights_bytes(adapter.tensors))
