"""A graph of node processes: started together, watched, stopped in order, one folder of logs.

Knows processes and parameter files. Knows no ROS beyond its command line; needs no launch package.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ratchet_vla.cli.nodes import ros
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import REPOSITORY, python_path

GRACE_S = 10.0  # that a node has to come to rest after an interrupt
CODED = re.compile(r"\[(\w+\.\w+)\] ")  # how a node's refusal begins
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBC = ctypes.CDLL(None)
RESTART_S = 2.0  # until what runs beside the nodes is started again


@dataclass(frozen=True)
class NodeSpec:
    """One node's process.

    Attributes:
        module: Module of ratchet_ros that is run.
        name: Name of the node, and of its log.
        parameters: As the node declares them.
        remap: Topic names to replace: (the node's, the graph's).
        vital: Whether the graph ends with it.
    """

    module: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    remap: tuple[tuple[str, str], ...] = ()
    vital: bool = True


@dataclass
class _Running:
    """A process of the graph.

    Attributes:
        process: The process.
        vital: Whether the graph ends with it.
        command: Set where it is started again when it ends.
        restart_s: When it is started again, on the monotonic clock; 0 while it runs.
    """

    process: subprocess.Popen[bytes]
    vital: bool
    command: list[str] | None = None
    restart_s: float = 0.0


class Graph:
    """Processes with one log folder: nodes, and what runs beside them.

    Use as a context manager; leaving it stops everything, last started first.
    """

    def __init__(self, folder: Path, namespace: str = "", environment: dict[str, str] | None = None) -> None:
        self.folder = folder.resolve()  # absolute: the nodes run in a folder of their own
        self._namespace = namespace
        self._environment = ros.environment(environment)
        self._running: dict[str, _Running] = {}
        self._read_bytes: dict[str, int] = {}  # how far each log was read
        self._reported: set[str] = set()  # errors that `errors` has returned
        self._activated: set[str] = set()  # nodes that were active at some time
        self._refusals: dict[str, RatchetError] = {}  # what a node that was never active refused last

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
        """Start a process that is no node, in this process's environment and folder.

        The arm does not need it: where it ends, it is started again.
        """
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
                preexec_fn=_ending_with(os.getpid()),  # noqa: PLW1509 - one call into the kernel, no lock
            )

    def watch(self, until: Callable[[], bool] = lambda: False, tell: Callable[[str], None] = lambda line: None) -> None:
        """Wait until a vital node ends or `until` says so.

        Args:
            until: Asked several times a second.
            tell: Called with every new error of a node, each once.

        Raises:
            RatchetError: The error that the node ended with; else up.node_ended with the end of its log.
        """
        while not until():
            for name, running in self._running.items():
                if running.process.poll() is None:
                    continue
                if running.vital:
                    raise self._ended(name, running.process.returncode)
                if running.command is not None:
                    self._revive(name, running, tell)
            for line in self.errors():
                tell(line)
            time.sleep(0.2)  # how soon a dead node is noticed; the arm's hold does not depend on it

    def _ended(self, name: str, status: int) -> RatchetError:
        """Why the graph ends: the last line that the node logged."""
        self.errors()
        if name in self._refusals:
            return self._refusals[name]
        return RatchetError(
            "up.node_ended",
            f"{name} ended with status {status}: {self.tail(name)}",
            where=str(self.folder / f"{name}.log"),
            fix="correct what it says, then start again",
        )

    def _revive(self, name: str, running: _Running, tell: Callable[[str], None]) -> None:
        """Start what runs beside the nodes again, a moment after it ended."""
        now = time.monotonic()
        if not running.restart_s:
            tell(f"{name} ended with status {running.process.returncode}: {self.tail(name)}; started again")
            running.restart_s = now + RESTART_S
        elif now >= running.restart_s:
            self.beside(name, running.command or [])

    def errors(self) -> list[str]:
        """Return errors that the nodes logged since the last call, as `node: message`; repetitions are left out."""
        messages = []
        for name in self._running:
            path = self.folder / f"{name}.log"
            with path.open("rb") as log:
                log.seek(self._read_bytes.get(name, 0))
                unread = log.read()
            # A line that the node is still writing is left for the next call.
            complete = unread[: unread.rfind(b"\n") + 1]
            self._read_bytes[name] = self._read_bytes.get(name, 0) + len(complete)
            for line in complete.decode(errors="replace").splitlines():
                if line.startswith("[INFO]") and line.endswith("]: active"):
                    self._activated.add(name)
                elif line.startswith(("[ERROR]", "[FATAL]")):
                    message = line.split("]: ", 1)[-1]
                    self._note(name, message)
                    text = f"{name}: {message}"
                    if text not in self._reported:
                        self._reported.add(text)
                        messages.append(text)
        return messages

    def _note(self, name: str, message: str) -> None:
        """Keep an error with a code of a node that is not up yet: that is why it ends."""
        coded = CODED.match(message)
        if coded and name not in self._activated:
            origin = f"{name}, see {self.folder / f'{name}.log'}"
            self._refusals[name] = RatchetError(coded[1], message[coded.end() :], where=origin)

    def tail(self, name: str) -> str:
        """Return the last line of a node's log."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def stop(self) -> dict[str, int]:
        """Interrupt, wait, then kill; returns the exit statuses by node."""
        statuses = {}
        for name, running in reversed(self._running.items()):
            statuses[name] = _end(running.process)
        self._running = {}
        return statuses

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _ending_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process does first: it asks to be interrupted when its parent is killed.

    The arm then comes to rest, and no nodes that nobody watches stand in the way of the next graph. None where the
    system has no such signal.
    """
    if sys.platform != "linux":
        return None

    def ask_for_the_signal() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # it was killed before this call
            os._exit(1)

    return ask_for_the_signal


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
