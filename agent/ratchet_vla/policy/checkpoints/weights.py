"""Weight files of a checkpoint: whole, in shards, or described by their headers alone.

Knows safetensors files, their index, and the small .pt files that OpenVLA-OFT puts beside them. Knows no network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ratchet_vla.errors import RatchetError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """One tensor as its file describes it. dtype: safetensors' name, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


def files_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, in order of their names; all exist.

    Raises:
        RatchetError: policy.is_adapter for an adapter's folder; policy.missing_shards; policy.bad_checkpoint.
    """
    index = folder / INDEX
    if not index.is_file():
        whole = folder / WHOLE
        if not whole.is_file() and (folder / "adapter_config.json").is_file():
            raise is_adapter(folder)
        if not whole.is_file():
            raise RatchetError("policy.bad_checkpoint", "no weights", where=str(whole), fix=f"add {WHOLE}")
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RatchetError(
            "policy.bad_checkpoint", f"the list of weight files is malformed: {error}", where=str(index)
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise RatchetError("policy.bad_checkpoint", f"weight file outside the folder: {name}", where=str(index))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RatchetError(
            "policy.missing_shards",
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}",
            where=str(folder),
            fix="complete the download",
        )
    return [folder / name for name in names]


def is_adapter(folder: Path) -> RatchetError:
    return RatchetError(
        "policy.is_adapter",
        "this folder holds a PEFT adapter, not a base model",
        where=str(folder),
        fix="give the base that the adapter was trained on, and the adapter as an adapter",
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors. Raises as `files_of` and `read_tensors`."""
    tensors: dict[str, Tensor] = {}
    for path in files_of(folder):
        tensors.update(read_tensors(path))
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises RatchetError policy.bad_checkpoint where the file is missing, truncated or not safetensors."""
    if not path.is_file():
        raise RatchetError("policy.bad_checkpoint", "no weights", where=str(path), fix="add model.safetensors")
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except safetensors.SafetensorError as error:
        raise _broken(path, error) from None


def read_headers(folder: Path) -> dict[str, Header]:
    """Names, shapes and types of all tensors, without reading any: seconds for a model of any size.

    Raises as `files_of`, and policy.wrong_dtype for tensors that are not floating point, as quantised ones are.
    """
    found: dict[str, Header] = {}
    for path in files_of(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    found[name] = Header(tuple(part.get_shape()), part.get_dtype())
        except safetensors.SafetensorError as error:
            raise _broken(path, error) from None
    wrong = sorted({h.dtype for h in found.values()} - DTYPES.keys())
    if wrong:
        raise wrong_dtype(wrong[0], str(folder))
    return found


def wrong_dtype(name: str, where: str) -> RatchetError:
    return RatchetError(
        "policy.wrong_dtype",
        f"weights of type {name} are not supported",
        where=where,
        fix=f"give the checkpoint in {', '.join(DTYPES.values())}",
    )


def component(folder: Path, name: str) -> dict[str, Tensor] | None:
    """A part that OpenVLA-OFT saved beside the model as `<name>--<step>_checkpoint.pt`; None where there is none.

    Raises:
        RatchetError: policy.bad_checkpoint for several of them, or a file that is not a plain dictionary of tensors.
    """
    found = sorted(folder.glob(f"{name}--*checkpoint.pt"))
    if not found:
        return None
    if len(found) > 1:
        raise RatchetError(
            "policy.bad_checkpoint",
            f"{len(found)} files of {name}: {', '.join(p.name for p in found[:3])}",
            where=str(folder),
            fix="leave the one that belongs to the weights",
        )
    try:
        state = torch.load(found[0], map_location="cpu", weights_only=True)
        return {key.removeprefix("module."): value.detach() for key, value in state.items()}
    except Exception as error:  # what the loader raises for foreign content has no common base
        raise _broken(found[0], error) from None


def _broken(path: Path, error: Exception) -> RatchetError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RatchetError(
        "policy.bad_checkpoint", f"the weights are broken: {text}", where=str(path), fix="copy the file again"
    )
