"""OpenGL back end for off-screen rendering, chosen before MuJoCo is imported.

Knows the two environment variables, the shared libraries behind them and the Debian packages that contain those.
Knows no simulator and imports none.
"""

from __future__ import annotations

import ctypes
import os
import sys

from ratchet_vla.errors import RatchetError

PACKAGES = "libegl1 libgl1 libosmesa6 libgl1-mesa-dri"
# Any one name of each group must load; PyOpenGL wants libGL under both back ends.
_LIBRARIES = {
    "egl": (("libEGL.so.1", "libEGL.so"), ("libGL.so.1", "libGL.so")),
    "osmesa": (("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"), ("libGL.so.1", "libGL.so")),
}
_checked: set[str] = set()


def configure_gl(backend: str | None = None) -> str:
    """Set MUJOCO_GL and PYOPENGL_PLATFORM to one back end; call it before the first import of mujoco.

    Args:
        backend: "egl" or "osmesa"; None takes MUJOCO_GL, then PYOPENGL_PLATFORM, then "egl".

    Returns:
        The back end in force.

    Raises:
        RatchetError: sim.bad_gl where the variables name something else or contradict each other or `backend`;
            sim.gl_too_late where MuJoCo was imported under another setting.
    """
    settings = {
        variable: os.environ.get(variable, "").strip().lower() for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    chosen = backend or settings["MUJOCO_GL"] or settings["PYOPENGL_PLATFORM"] or "egl"
    remedy = "set MUJOCO_GL and PYOPENGL_PLATFORM both to egl, or both to osmesa"
    if chosen not in _LIBRARIES:
        raise RatchetError("sim.bad_gl", f"'{chosen}' is not an off-screen back end", where="MUJOCO_GL", fix=remedy)
    for variable, setting in settings.items():
        if setting and setting != chosen:
            raise RatchetError("sim.bad_gl", f"{variable}={setting} contradicts '{chosen}'", where=variable, fix=remedy)
    # MuJoCo reads the variable once, while it is imported.
    if "mujoco" in sys.modules and not settings["MUJOCO_GL"]:
        raise RatchetError(
            "sim.gl_too_late",
            "mujoco was imported before the OpenGL back end was chosen",
            where="MUJOCO_GL",
            fix=f"import sim before mujoco, or set MUJOCO_GL={chosen} in the environment",
        )
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = chosen
    return chosen


def no_gl(backend: str, detail: str) -> RatchetError:
    """The refusal for a machine on which nothing can be rendered: sim.no_gl."""
    return RatchetError(
        "sim.no_gl",
        f"cannot render with MUJOCO_GL={backend}: {detail}",
        where="MUJOCO_GL",
        fix=f"install the Debian packages {PACKAGES}, or try MUJOCO_GL=osmesa with PYOPENGL_PLATFORM=osmesa",
    )


def require_gl(backend: str) -> None:
    """Check that the back end's shared libraries load.

    Raises:
        RatchetError: sim.no_gl naming the missing library and the packages that bring it.
    """
    if backend in _checked:
        return
    for alternatives in _LIBRARIES[backend]:
        if not any(_loads(library) for library in alternatives):
            raise no_gl(backend, f"{alternatives[0]} is missing")
    _checked.add(backend)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
