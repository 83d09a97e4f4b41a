"""Tests of the ROS nodes, in the ROS environment's Python (`make test` does that).

The main environment has no rclpy and collects nothing here. Every test process has a ROS domain of its own, on loopback
only.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratchet_vla.runtime.control import priority

HAS_ROS = importlib.util.find_spec("rclpy") is not None
if not HAS_ROS:
    collect_ignore_glob = ["test_*.py"]

_lock = None


def _take_domain() -> int:
    """A ROS domain that no other test process on this machine has; freed when this process ends."""
    global _lock  # noqa: PLW0603 - the lock lasts as long as the file is open
    for number in range(20, 100):
        file = Path(f"/tmp/ratchet-ros-domain-{number}").open("w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _lock = file
        return number
    raise RuntimeError("no free ROS domain")


if HAS_ROS:
    from ratchet_ros.messages import dds

    os.environ["ROS_DOMAIN_ID"] = str(_take_domain())
    for name in dds.VARIABLES:
        os.environ.pop(name, None)
    dds.load_profile(loopback=True)


@pytest.fixture(scope="module")
def ros() -> Iterator[None]:
    import rclpy

    rclpy.init()
    yield
    rclpy.try_shutdown()


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """A node in the test's own process asks for real-time scheduling: what runs after it must not inherit that."""
    yield
    priority.normal()
