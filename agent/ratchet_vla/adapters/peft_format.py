"""PEFT adapter folders: read and write `adapter_model.safetensors` and `adapter_config.json`.

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

from ratchet_vla.adapters.identity import Adapter, Binding, canonical_config, dtype_name
from ratchet_vla.errors import RatchetError

__all__ = ["export_folder", "import_folder"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The weights file, as PEFT writes it."""
    # safetensors refuses tensors that share memory, such as views of one received buffer.
    unshared = {tensor_name: tensor.detach().contiguous().clone() for tensor_name, tensor in sorted(tensors.items())}
    file_bytes: bytes = safetensors.torch.save(unshared, metadata={"format": "pt"})
    return file_bytes


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The configuration file: PEFT's full one, so that any version of it can read it."""
    from ratchet_vla.adapters.lora.layers import (
        peft_config,  # peft takes seconds to load, and whoever only reads needs none of it
    )

    config_fields = peft_config(config).to_dict()
    config_fields["peft_type"] = "LORA"
    config_fields["inference_mode"] = True
    config_fields["target_modules"] = config["target_modules"]
    # Settings of the running process, which PEFT does not save either.
    config_fields.pop("runtime_config", None)
    return (json.dumps(config_fields, indent=2, sort_keys=True) + "\n").encode()


def read_weights(file_bytes: bytes, source: str) -> dict[str, Tensor]:
    """Parse a weights file into tensors.

    Raises:
        RatchetError: adapter.truncated for a cut or malformed file, adapter.wrong_dtype.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(file_bytes)
    except SafetensorError as error:
        raise RatchetError(
            "adapter.truncated",
            f"not a complete safetensors file: {error}",
            where=source,
            fix="copy or export the adapter again",
        ) from None
    for tensor_name, tensor in tensors.items():
        dtype_name(tensor, f"{source}: {tensor_name}")
    return tensors


def read_config(file_bytes: bytes, source: str) -> dict[str, Any]:
    """Parse a configuration file into its canonical form.

    Raises:
        RatchetError: adapter.bad_config for broken JSON, adapter.unsupported_config.
    """
    try:
        config_fields = json.loads(file_bytes)
    except ValueError as error:
        raise RatchetError(
            "adapter.bad_config", f"not JSON: {error}", where=source, fix="export the adapter again"
        ) from None
    if not isinstance(config_fields, dict):
        raise RatchetError("adapter.bad_config", "not a JSON object", where=source, fix="export the adapter again")
    return canonical_config(config_fields, source)


def read_file(file_path: Path) -> bytes:
    """Read a file of an adapter folder.

    Raises:
        RatchetError: adapter.missing_file, naming what the folder does hold.
    """
    try:
        return file_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        file_names = "no such folder"
        if file_path.parent.is_dir():
            file_names = ", ".join(sorted(sibling.name for sibling in file_path.parent.iterdir()))
        raise RatchetError(
            "adapter.missing_file",
            f"no {file_path.name}",
            where=str(file_path.parent),
            fix=f"give a folder saved by peft; found there: {file_names or 'nothing'}",
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
            f"{PICKLED} is a pickle: loading it executes code from the file",
            where=str(folder),
            fix="ask its author to save it with safe_serialization=True, or convert it in a sandbox",
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
