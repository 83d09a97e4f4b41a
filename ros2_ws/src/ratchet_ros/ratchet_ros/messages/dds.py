"""Which Fast DDS profile this process runs under; settled before rclpy.init, because it is read once.

Knows environment variables, share folders and two shipped files. Knows no node.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


def shipped(name: str) -> Path:
    """A file of the package's config folder, in the source tree or installed."""
    here = Path(__file__).resolve()
    source = here.parents[2] / "config" / name
    if source.is_file():
        return source
    return share("ratchet_ros") / "config" / name


def share(package: str) -> Path:
    """A package's share folder: through the ament index of a sourced ROS, or in this environment's own prefix."""
    from ament_index_python.packages import get_package_share_directory

    if os.environ.get("AMENT_PREFIX_PATH"):
        return Path(get_package_share_directory(package))
    return Path(sys.prefix) / "share" / package


def variable() -> str:
    """The name that this distribution's Fast DDS reads without a warning: it changed after Jazzy."""
    distribution = os.environ.get("ROS_DISTRO", "")
    if distribution:
        return VARIABLES[1] if distribution in ("humble", "iron", "jazzy") else VARIABLES[0]
    return VARIABLES[1] if int(metadata.version("rclpy").split(".")[0]) < 8 else VARIABLES[0]


def profile() -> str:
    """The profile in force; empty where there is none."""
    return next((os.environ[v] for v in VARIABLES if os.environ.get(v)), "")


def load_profile(loopback: bool = False) -> str:
    """Put the shipped profile in force unless the user chose one (by either name); returns the file. Call before
    rclpy.init."""
    chosen = profile() or str(shipped("fastdds_loopback.xml" if loopback else "fastdds.xml"))
    os.environ[variable()] = chosen
    return chosen
