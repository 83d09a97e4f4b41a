"""A graph of node processes: started together, watched, stopped in order, one folder of logs.

Knows processes and parameter files. Knows no ROS beyond its command line; needs no launch package.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent.cli import ros
from agent.errors import RatchetError
from agent.paths import REPOSITORY, python_path

GRACE = 10.0  # s that a node has to come to rest after an interrupt
# Refusals of what was given: a node that has not come up yet says these again for ever. Others pass by themselves, as a
# driver that is not there yet, or a policy process that died and is started again.
PASSING = "crashed|hung|start_timeout|stopped|not_ready|failed|out_of_memory"
LASTING = re.compile(rf"\[((?:compat|contract|adapter|policy)\.(?!{PASSING})\w+)\] ")
AGAIN = 2.0  # s until what runs beside the nodes is started again


@dataclass(frozen=True)
class NodeSpec:
    """One process. module: of ratchet_ros; parameters: as the node declares them; vital: the graph ends with it."""

    module: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    remap: tuple[tuple[str, str], ...] = ()
    vital: bool = True


@dataclass
class _Running:
    """A process of the graph. vital: the graph ends with it; command: set where it is started again when it ends."""

    process: subprocess.Popen[bytes]
    vital: bool
    command: list[str] | None = None
    again: float = 0.0  # when, on the monotonic clock; 0 while it runs


class Graph:
    """Processes with one log folder: nodes, and what runs beside them. Use as a context manager; leaving it stops
    everything, last started first."""

    def __init__(self, folder: Path, namespace: str = "", environment: dict[str, str] | None = None) -> None:
        self.folder, self._namespace = folder, namespace
        self._environment = ros.environment(environment)
        self._running: dict[str, _Running] = {}
        self._read: dict[str, int] = {}
        self._told: set[str] = set()
        self._up: set[str] = set()  # nodes that were active
        self._refused: RatchetError | None = None

    def start(self, spec: NodeSpec) -> None:
        """Start one node; it configures and activates itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{spec.name}.yaml"
        file.write_text(yaml.safe_dump({"/**": {"ros__parameters": {"autostart": True, **spec.parameters}}}))
        command = ros.command(spec.module, "--ros-args", "--params-file", str(file), "-r", f"__node:={spec.name}")
        for old, new in spec.remap:
            command += ["-r", f"{old}:={new}"]
        if self._namespace:
            command += ["-r", f"__ns:={self._namespace}"]
        self._running[spec.name] = _Running(self._open(spec.name, command, self._environment, REPOSITORY), spec.vital)

    def beside(self, name: str, command: list[str]) -> None:
        """Start a process that is no node, in this process's environment and folder. The arm does not need it: it is
        started again where it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": python_path()}
        self._running[name] = _Running(self._open(name, command, environment, Path.cwd()), False, command)

    def _open(
        self, name: str, command: list[str], environment: dict[str, str], folder: Path
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,  # an interrupt from the terminal reaches the nodes through `stop`, in order
            )

    def watch(self, until: Callable[[], bool] = lambda: False, tell: Callable[[str], None] = lambda line: None) -> None:
        """Wait until a vital node ends or `until` says so. tell: given every new error of a node, each once.

        Raises:
            RatchetError: up.node_ended with the end of its log; a node's own refusal of what it was given, where it has
                not come up yet: waiting does not mend that.
        """
        while not until():
            for name, running in self._running.items():
                if running.process.poll() is None:
                    continue
                if running.vital:
                    raise RatchetError(
                        "up.node_ended",
                        f"{name} ended with status {running.process.returncode}: {self.tail(name)}",
                        where=str(self.folder / f"{name}.log"),
                        fix="correct what it says, then start again",
                    )
                if running.command is not None:
                    self._revive(name, running, tell)
            for line in self.errors():
                tell(line)
            if self._refused is not None:
                raise self._refused
            time.sleep(0.2)  # how soon a dead node is noticed; the arm's hold does not depend on it

    def _revive(self, name: str, running: _Running, tell: Callable[[str], None]) -> None:
        """Start what runs beside the nodes again, a moment after it ended."""
        now = time.monotonic()
        if not running.again:
            tell(f"{name} ended with status {running.process.returncode}: {self.tail(name)}; started again")
            running.again = now + AGAIN
        elif now >= running.again:
            self.beside(name, running.command or [])

    def errors(self) -> list[str]:
        """Errors that the nodes logged since the last call, as `node: message`; one that repeats is told once."""
        found = []
        for name in self._running:
            path = self.folder / f"{name}.log"
            with path.open("rb") as log:
                log.seek(self._read.get(name, 0))
                new = log.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[name] = self._read.get(name, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if line.startswith("[INFO]") and line.endswith("]: active"):
                    self._up.add(name)
                elif line.startswith(("[ERROR]", "[FATAL]")):
                    said = line.split("]: ", 1)[-1]
                    self._note(name, said)
                    text = f"{name}: {said}"
                    if text not in self._told:
                        self._told.add(text)
                        found.append(text)
        return found

    def _note(self, name: str, said: str) -> None:
        running, lasting = self._running[name], LASTING.match(said)
        if lasting and running.vital and name not in self._up and self._refused is None:
            where = f"{name}, see {self.folder / f'{name}.log'}"
            self._refused = RatchetError(lasting[1], said[lasting.end() :], where=where)

    def tail(self, name: str) -> str:
        """The last line of a node's log."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def stop(self) -> dict[str, int]:
        """Interrupt, wait, then kill; exit statuses by node."""
        codes = {}
        for name, running in reversed(self._running.items()):
            codes[name] = _end(running.process)
        self._running = {}
        return codes

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
