"""How benchmarks start a probe in the ROS environment's Python and read its answer.

Knows processes and JSON. Imports no ROS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.results import machine
from ratchet_vla.cli.nodes import ros

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = "101"


def probe(module: str, *arguments: str) -> Any:
    """Run benchmarks/runtime/ros/<module>.py in a domain of its own; the last line of its output, read as JSON."""
    environment = ros.environment({"ROS_DOMAIN_ID": DOMAIN})
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        environment.pop(name, None)
    command = [ros.python(), "-m", f"benchmarks.runtime.ros.{module}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(path: Path, module: str, arguments: list[str], facts: dict[str, Any]) -> None:
    """The result with command and machine."""
    head = {"command": ["python", "-m", f"benchmarks.{module}", *arguments], "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **facts}, indent=2) + "\n")


def arguments(argv: list[str] | None) -> list[str]:
    return list(sys.argv[1:] if argv is None else argv)
