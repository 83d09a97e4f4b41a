"""Import of MuJoCo and robosuite for LIBERO: back end chosen first, no log file, no output.

Knows what those packages do on import. Knows no task.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterator

from ratchet_sim.gl import configure_gl

configure_gl()
# One software-rasteriser thread per process: worker processes already occupy every core.
os.environ.setdefault("LP_NUM_THREADS", "1")

import mujoco  # noqa: E402  (the back end must be chosen before the first import)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the benchmark prints to the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def trim_memory() -> None:
    """Return freed memory to the system.

    Compiling a task leaves about 400 MB of holes in the heap, and robosuite's objects refer to each other in cycles
    that hold 260 MB of textures until they are collected.
    """
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if malloc_trim is not None:
        malloc_trim(0)


def _import_robosuite() -> None:
    """robosuite opens /tmp/robosuite.log when imported, which fails on a machine shared with another user."""
    original_handler = logging.FileHandler
    logging.FileHandler = lambda *_, **__: logging.NullHandler()  # type: ignore[assignment,misc]
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import robosuite  # noqa: F401
    finally:
        logging.FileHandler = original_handler  # type: ignore[misc]


_import_robosuite()

__all__ = ["mujoco", "quiet", "trim_memory"]
