"""How many threads compute, and whether more than one are worth it at present.

Knows torch's threads and a measurement of half a second. Knows no model.
Threads wait for each other after every product. Where another program has one of their cores they wait for the
scheduler, a hundred times per chunk: two threads on two busy cores take forty times as long as one.
"""

from __future__ import annotations

import time

import torch

MEASURED_FOR = 0.25  # s per number of threads


def use(count: int) -> str:
    """Compute with so many threads in this process from now on.

    Returns:
        A warning where one thread would be faster at present; "" otherwise.
    """
    count = max(1, count)
    torch.set_num_threads(count)
    if count == 1:
        return ""
    many = products_per_second(count)
    one = products_per_second(1)
    torch.set_num_threads(count)
    if many >= one:
        return ""
    return (
        f"{count} threads compute {many / one:.2f} times as fast as one at present: other programs use the cores, or "
        "this one may not; use 1"
    )


def products_per_second(count: int) -> float:
    """Matrix products of a small policy's size a second, with so many threads; leaves torch set to them."""
    torch.set_num_threads(count)
    x = torch.full((256, 256), 0.5)
    weight = torch.full((256, 1024), 0.5)
    x @ weight  # threads are started
    done = 0
    began = time.perf_counter()
    while time.perf_counter() - began < MEASURED_FOR:
        x @ weight
        done += 1
    return done / (time.perf_counter() - began)
