"""One contiguous block of memory per adapter and dtype, with a view per tensor.

Knows names, shapes and offsets, so that staging, copying and switching an adapter handle one block and not hundreds of
tensors. Knows nothing of PEFT, files or policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, and what vectorised kernels like


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: `offset` counts elements in the block of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


class Layout:
    """The order of an adapter's tensors in memory: sorted by name, each aligned to 64 bytes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.places: dict[str, Place] = {}
        self.sizes: dict[torch.dtype, int] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            offset = self.sizes.get(tensor.dtype, 0)
            self.places[name] = Place(name, tuple(tensor.shape), tensor.dtype, offset)
            step = ALIGNMENT // tensor.element_size()
            self.sizes[tensor.dtype] = offset + -(-tensor.numel() // step) * step


class Arena:
    """Memory for one adapter: `blocks[dtype]` is flat, `views[name]` are its tensors. Starts as zeros: no effect.

    pinned: page-locked host memory, which a GPU copies from while it computes.
    """

    def __init__(self, layout: Layout, device: torch.device, pinned: bool = False) -> None:
        self.layout = layout
        self.blocks = {
            dtype: torch.zeros(n, dtype=dtype, device=device, pin_memory=pinned) for dtype, n in layout.sizes.items()
        }
        self.views = {
            place.name: self.blocks[place.dtype][place.offset :][: torch.Size(place.shape).numel()].view(place.shape)
            for place in layout.places.values()
        }

    def copy_(self, other: Arena) -> None:
        """Take over another arena's content: one copy per dtype, on the current stream."""
        for dtype, block in self.blocks.items():
            block.copy_(other.blocks[dtype], non_blocking=True)

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.blocks.values())
