"""What every results file says beside its figures: the machine that they were measured on.

Knows the processor, its load and versions. Knows no figure.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any


def machine(**more: Any) -> dict[str, Any]:
    """The machine as plain data. more: what only this benchmark depends on, such as a library's version."""
    from ratchet_vla.policy import computing  # torch with it, which a simulator's process need not load

    return {
        "processor": computing.processor(),
        "platform": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        **more,
    }
