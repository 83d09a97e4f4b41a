"""Where the checkout lies, and how a process that we start finds our packages wherever it is started from.

Knows folders and `PYTHONPATH`. Knows nothing of what lies in them.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROBOTS = REPOSITORY / "robots"
MODELS = REPOSITORY / "models"
# The folders that our import names are found in.
SOURCES = tuple(REPOSITORY / root for root in ("agent", "sim", "calibration"))


def python_path(*before: Path, inherited: bool = True) -> str:
    """A value for `PYTHONPATH`: `before`, then our packages, then what this process has."""
    paths = [str(path) for path in (*before, *SOURCES)]
    if inherited and os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return os.pathsep.join(paths)
