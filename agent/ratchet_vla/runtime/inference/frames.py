"""Observations in memory that two processes share: a few slots, each with a sequence number before and after.

Knows bytes, sizes and who writes first. The memory has no name: it is an open file that the child inherits, so nothing
is left behind when either process is killed. A reader that meets a slot under rewriting notices and says so.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8

SLOTS = 3
ALIGN = 64


@dataclass(frozen=True)
class FrameLayout:
    """Where images and state lie in a slot. cameras: (name, height, width) in the policy's order; state: S values."""

    cameras: tuple[tuple[str, int, int], ...]
    state: int

    @property
    def offsets(self) -> list[int]:
        """Start of each image, then of the state, then the slot's size; bytes."""
        out = [2 * ALIGN]  # the two sequence numbers, each on a line of its own
        for _, height, width in self.cameras:
            out.append(_aligned(out[-1] + height * width * 3))
        out.append(_aligned(out[-1] + 4 * self.state))
        return out

    @property
    def nbytes(self) -> int:
        return SLOTS * self.offsets[-1]

    def to_dict(self) -> dict[str, Any]:
        return {"cameras": [list(c) for c in self.cameras], "state": self.state}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FrameLayout:
        return cls(tuple((str(n), int(h), int(w)) for n, h, w in raw["cameras"]), int(raw["state"]))


def create_memory() -> int:
    """A file descriptor of anonymous memory, of size 0 yet; the caller closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ratchet-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Frames:
    """One process's view of the shared slots. The writer makes the memory fit (`create=True`), the reader maps it."""

    def __init__(self, descriptor: int, layout: FrameLayout, *, create: bool) -> None:
        self.layout = layout
        if create:
            os.ftruncate(descriptor, layout.nbytes)
        self._map = mmap.mmap(descriptor, layout.nbytes)
        self._slots = [self._views(i * layout.offsets[-1]) for i in range(SLOTS)]
        self._written = 0

    def write(self, images: Sequence[UInt8], state: Float32) -> tuple[int, int]:
        """Copy one observation in; returns (slot, sequence) for the reader.

        Raises:
            RatchetError: runtime.bad_frame for an image or state of another shape.
        """
        for (name, height, width), image in zip(self.layout.cameras, images, strict=True):
            if image.shape != (height, width, 3) or image.dtype != np.uint8:
                raise RatchetError(
                    "runtime.bad_frame",
                    f"{image.dtype} {image.shape}, the contract says uint8 {(height, width, 3)}",
                    where=name,
                    fix="correct the camera driver or the contract",
                )
        if state.shape != (self.layout.state,):
            raise RatchetError("runtime.bad_frame", f"state of shape {state.shape}, expected ({self.layout.state},)")
        self._written += 1
        slot = self._written % SLOTS
        before, after, slot_images, values = self._slots[slot]
        before[0] = self._written
        for target, image in zip(slot_images, images, strict=True):
            np.copyto(target, image)
        values[:] = state
        after[0] = self._written
        return slot, self._written

    def read(self, slot: int, sequence: int) -> tuple[list[UInt8], Float32] | None:
        """Copies of the images and the state; None where the slot holds (or came to hold) another observation."""
        before, after, slot_images, values = self._slots[slot % SLOTS]
        if int(after[0]) != sequence:
            return None
        images, state = [p.copy() for p in slot_images], values.copy()
        return (images, state) if int(before[0]) == sequence else None

    def close(self) -> None:
        self._slots = []
        self._map.close()

    def _views(self, start: int) -> tuple[Any, Any, list[UInt8], Float32]:
        offsets = self.layout.offsets
        before = np.ndarray((1,), np.uint64, self._map, start)
        after = np.ndarray((1,), np.uint64, self._map, start + ALIGN)
        slot_images: list[UInt8] = [
            np.ndarray((h, w, 3), np.uint8, self._map, start + offset)
            for (_, h, w), offset in zip(self.layout.cameras, offsets, strict=False)
        ]
        values: Float32 = np.ndarray((self.layout.state,), np.float32, self._map, start + offsets[-2])
        return before, after, slot_images, values


def _aligned(size: int) -> int:
    return (size + ALIGN - 1) // ALIGN * ALIGN
