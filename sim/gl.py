"""Off-screen OpenGL: chosen and checked before the first import of mujoco.

Knows the two environment variables and the Debian packages behind them. Knows no simulator.
"""

from __future__ import annotations

import ctypes.util
import os
import sys

from agent.errors import RatchetError

PACKAGES = "libegl1 libgl1 libosmesa6 libgl1-mesa-dri"
_LIBRARY = {"egl": "EGL", "osmesa": "OSMesa"}


def prepare() -> str:
    """Make MUJOCO_GL and PYOPENGL_PLATFORM agree (EGL unless the user chose OSMesa) and check that the library is there.

    Returns:
        The backend in force, "egl" or "osmesa".

    Raises:
        RatchetError: sim.gl_mismatch where the two variables disagree, sim.no_gl where the library is missing.
    """
    mujoco_gl, pyopengl = os.environ.get("MUJOCO_GL"), os.environ.get("PYOPENGL_PLATFORM")
    backend = mujoco_gl or pyopengl or "egl"
    if backend not in _LIBRARY:
        raise RatchetError(
            "sim.gl_mismatch", f"MUJOCO_GL={backend} cannot render off screen", fix="set MUJOCO_GL to egl or osmesa"
        )
    if mujoco_gl and pyopengl and mujoco_gl != pyopengl:
        raise RatchetError(
            "sim.gl_mismatch",
            f"MUJOCO_GL={mujoco_gl} but PYOPENGL_PLATFORM={pyopengl}",
            fix="set both to egl or both to osmesa",
        )
    if ctypes.util.find_library(_LIBRARY[backend]) is None:
        raise RatchetError(
            "sim.no_gl",
            f"lib{_LIBRARY[backend]} is not installed, so no frame can be rendered",
            where=f"MUJOCO_GL={backend}",
            fix=f"apt-get install {PACKAGES}",
        )
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
    # One software-rasteriser thread per process: workers already occupy every core.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if "mujoco" in sys.modules and not hasattr(sys.modules["mujoco"], "GLContext"):
        raise RatchetError(
            "sim.no_gl", "mujoco was imported before the GL backend was chosen", fix="import sim before mujoco"
        )
    return backend
