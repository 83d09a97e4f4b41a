"""A reference set: a small file of decisions that a base makes on many tasks, for adapters to be held to.

Knows the file's form and what it is bound to. Knows no policy: what the base would answer today is computed by whoever
uses the set, in the dtype of that machine, from the base that the file names. Images are JPEG at quality 85, so that a
few thousand decisions are a few megabytes; the base answers to the decoded images, at any time the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import simplejpeg

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.decisions import Decisions
from ratchet_vla.records import UInt8
from ratchet_vla.storage.canonical import canonical_json
from ratchet_vla.storage.documents import replacing

FORMAT = "ratchet.reference.v1"
FILE = "reference.safetensors"
"""Its name beside a base."""
JPEG_QUALITY = 85
"""The small base's answers to such images are 0.0003 nats per token from those to the raw ones."""


@dataclass(frozen=True)
class Origin:
    """What a reference set was made from.

    base_hash: of the policy that decided. source: suite, or the store that the episodes lie in. episodes: how many.
    success: share of them that succeeded, in [0, 1]; nothing is left out for having failed. temperature,
    noise_correlation: of the sampling. seed: of its random numbers.
    """

    base_hash: str
    source: str
    episodes: int
    success: float
    temperature: float
    noise_correlation: float
    seed: int


@dataclass(frozen=True)
class ReferenceSet:
    """Decisions and where they come from. id: SHA-256 of the contents; "" until it was written or read."""

    decisions: Decisions
    origin: Origin
    id: str = ""

    def require_base(self, base_hash: str, where: str) -> None:
        """Raises RatchetError reference.wrong_base."""
        if self.origin.base_hash != base_hash:
            raise RatchetError(
                "reference.wrong_base",
                f"the reference set belongs to base {self.origin.base_hash[:12]}, the policy is {base_hash[:12]}",
                where=where,
                fix="record one of this base with ratchet reference record, or --reference none",
            )


def save(path: Path, decisions: Decisions, origin: Origin) -> ReferenceSet:
    """Write a reference set; returns it as it will be read, with its id."""
    encoded = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(view), JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
        for images in decisions.images
        for view in images
    ]
    tensors = {
        "image_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "image_ends": np.cumsum([len(image) for image in encoded], dtype=np.int64),
        "state": decisions.state.astype(np.float32),
        "instruction": decisions.instruction.astype(np.int32),
        "sampled": _small(decisions.sampled),
    }
    meta = {
        "format": FORMAT,
        "views": str(decisions.images.shape[1]),
        "instructions": json.dumps(decisions.instructions),
        "tasks": json.dumps(decisions.tasks),
        "origin": json.dumps(dataclasses.asdict(origin), sort_keys=True),
    }
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, meta))
    return load(path)


def load(path: Path) -> ReferenceSet:
    """Read a reference set.

    Raises:
        RatchetError: reference.missing, reference.bad_file.
    """
    if not path.is_file():
        raise RatchetError(
            "reference.missing", "no such file", where=str(path), fix="ratchet reference record, or --reference none"
        )
    content = path.read_bytes()
    try:
        with safetensors.safe_open(str(path), "numpy") as file:
            meta: dict[str, str] = file.metadata() or {}
        if meta.get("format") != FORMAT:
            raise ValueError(f"its format is {meta.get('format', 'none')}, expected {FORMAT}")
        tensors = safetensors.numpy.load(content)
        decisions = _decisions(tensors, meta)
        origin = Origin(**json.loads(meta["origin"]))
    except (KeyError, TypeError, ValueError, OSError, safetensors.SafetensorError) as error:
        raise RatchetError(
            "reference.bad_file",
            f"no reference set: {error}",
            where=str(path),
            fix="record it again with ratchet reference record",
        ) from None
    return ReferenceSet(decisions, origin, _identity(tensors, meta))


def _identity(tensors: dict[str, Any], meta: dict[str, str]) -> str:
    """SHA-256 over metadata and tensors; the file's own order of metadata differs from one writing to the next."""
    total = hashlib.sha256(canonical_json(meta).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}:{tensor.dtype}:{tensor.shape}".encode())
        total.update(np.ascontiguousarray(tensor).tobytes())
    return total.hexdigest()


def _decisions(tensors: dict[str, Any], meta: dict[str, str]) -> Decisions:
    instructions = tuple(json.loads(meta["instructions"]))
    tasks = tuple(json.loads(meta["tasks"]))
    instruction = tensors["instruction"].astype(np.int64)
    count = len(instruction)
    lengths = {name: len(tensors[name]) for name in ("state", "sampled")}
    if set(lengths.values()) != {count} or len(tasks) != len(instructions):
        raise ValueError(f"{count} instructions, {lengths['state']} states, {lengths['sampled']} samples")
    if count and not 0 <= instruction.min() <= instruction.max() < len(instructions):
        raise ValueError("an instruction's number has no text")
    sampled = tensors["sampled"]
    return Decisions(
        images=_images(tensors["image_bytes"], tensors["image_ends"], int(meta["views"]), count),
        state=tensors["state"],
        instruction=instruction,
        instructions=instructions,
        tasks=tasks,
        sampled=sampled.astype(np.int64) if np.issubdtype(sampled.dtype, np.integer) else sampled,
    )


def _images(content: UInt8, ends: Any, views: int, count: int) -> UInt8:
    """(N, V, H, W, 3) from JPEG images one after the other; ends: where each one ends."""
    if len(ends) != views * count or (count and ends[-1] != len(content)):
        raise ValueError(f"{len(ends)} images for {count} decisions of {views} cameras")
    whole = content.tobytes()
    starts = [0, *ends[:-1]]
    images = [
        simplejpeg.decode_jpeg(whole[start:end], colorspace="RGB", fastdct=False, fastupsample=False)
        for start, end in zip(starts, ends, strict=True)
    ]
    stacked = np.stack(images)
    return stacked.reshape(count, views, *stacked.shape[1:])


def _small(sampled: Any) -> Any:
    """Bins in [0, 256) fit 16 bits; chains stay float32."""
    return sampled.astype(np.int16) if np.issubdtype(sampled.dtype, np.integer) else sampled.astype(np.float32)
