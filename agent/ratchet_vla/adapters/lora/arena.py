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
        # Sorted, so that two processes that attach the same layers lay their memory out alike.
        self.places: dict[str, Place] = {}
        self.sizes: dict[torch.dtype, int] = {}
        for tensor_name in sorted(tensors):
            tensor = tensors[tensor_name]
            offset = self.sizes.get(tensor.dtype, 0)
            self.places[tensor_name] = Place(tensor_name, tuple(tensor.shape), tensor.dtype, offset)
            elements_per_line = ALIGNMENT // tensor.element_size()
            # -(-a // b) rounds up: the next tensor begins on a cache line.
            self.sizes[tensor.dtype] = offset + -(-tensor.numel() // elements_per_line) * elements_per_line


class Arena:
    """Memory for one adapter: `blocks[dtype]` is flat, `views[name]` are its tensors. Starts as zeros: no effect.

    pinned: page-locked host memory, which a GPU copies from while it computes.
    """

    def __init__(self, layout: Layout, device: torch.device, pinned: bool = False) -> None:
        self.layout = layout
        self.blocks = {
            dtype: torch.zeros(element_count, dtype=dtype, device=device, pin_memory=pinned)
            for dtype, element_count in layout.sizes.items()
        }
        # Views, not copies: writing a view writes the block, and copy_ below moves whole blocks.
        self.views = {
            position.name: self.blocks[position.dtype][position.offset :][: torch.Size(position.shape).numel()].view(
                position.shape
            )
            for position in layout.places.values()
        }

    def copy_(self, source: Arena) -> None:
        """Copy another arena's content into this one: one copy per dtype, on the current stream."""
        # non_blocking matters from pinned memory to a GPU only; the caller synchronises before it reads.
        for dtype, block in self.blocks.items():
            block.copy_(source.blocks[dtype], non_blocking=True)

    @property
    def bytes(self) -> int:
        return sum(block.numel() * block.element_size() for block in self.blocks.values())
