"""One policy process: started with a scrubbed environment, greeted, its demands checked, frames shared, and ended.

Knows processes, the local socket and the handshake. Knows no requests for chunks and no restarts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ratchet_vla.contract import PolicySpec, RobotContract, require_compatible
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import python_path
from ratchet_vla.records import ActionChunk
from ratchet_vla.runtime.inference import wire
from ratchet_vla.runtime.inference.frames import FrameLayout, Frames, create_memory
from ratchet_vla.runtime.inference.worker import PROTOCOL

# What a ROS environment sets and another Python must not inherit.
SCRUBBED = ("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(frozen=True)
class PolicyLaunch:
    """How the policy process is started.

    options: for the server, see `server.open_prismatic`; JSON data.
    module: Python module that serves. python: its interpreter; the running one if empty. environment: added variables.
    nice: added to the process's niceness, so that inference never delays a control tick on a busy machine.
    memory_limit: bytes of private memory that the process may have; 0 for no limit.
    start_timeout: seconds until it must be ready. hang_timeout: seconds without an answer after which it is killed.
    restarts: how often in a row it is started again after a crash or a hang, see `restarts`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    module: str = "ratchet_vla.runtime.inference.worker"
    python: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    nice: int = 5
    memory_limit: int = 0
    start_timeout: float = 300.0
    hang_timeout: float = 10.0
    restarts: int = 0


@dataclass(frozen=True)
class PolicyStatus:
    """What the policy process is doing.

    state: stopped, starting, ready, busy, restarting or failed. swapping: an adapter is being staged.
    asked, answered: requests and answers so far. discarded: answers nobody waited for any more. busy_for: seconds since
    the request that is out. inference: seconds that the last answer took inside the process; error: why it failed.
    """

    state: str
    pid: int
    base_hash: str
    adapter_id: str
    swapping: bool
    asked: int
    answered: int
    discarded: int
    restarts: int
    busy_for: float
    inference: float
    error: str


@dataclass
class Request:
    """A question that is out. stamp, sequence: the observation's; sent: time.monotonic; wanted: not forgotten."""

    number: int
    stamp: float
    sequence: int
    temperature: float
    sent: float
    wanted: bool = True

    def answer(self, message: dict[str, Any], arrays: wire.Arrays) -> ActionChunk:
        """The chunk that answers it."""
        return ActionChunk(
            actions=arrays["actions"],
            tokens=arrays.get("tokens"),
            log_prob=arrays.get("log_prob"),
            adapter_id=message["adapter_id"],
            temperature=self.temperature,
            observation_stamp=self.stamp,
            observation_sequence=self.sequence,
            compute_dtype=message.get("compute_dtype", ""),
        )


class PolicyProcess:
    """A process that serves one policy; made anew for every restart. `start` and `end` belong to one thread."""

    def __init__(self, launch: PolicyLaunch) -> None:
        self.launch = launch
        self.spec: PolicySpec | None = None
        self.base_hash = self.adapter_id = self.computing = ""
        self.warnings: list[str] = []
        self.frames: Frames | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self, contract: RobotContract, adapter: str, base_hash: str = "") -> None:
        """Start it and wait until it serves. adapter: id or tag to run; base_hash: what it must be, if known.

        Raises:
            RatchetError: compat.refused and whatever the policy refuses; policy.bad_python, policy.start_timeout,
                policy.crashed, policy.protocol, policy.another_base. Nothing is left running then.
        """
        mine, theirs = socket.socketpair()
        memory = create_memory()
        self._sock = mine
        environment = {k: v for k, v in os.environ.items() if k not in SCRUBBED}
        environment["PYTHONPATH"] = python_path(inherited=False)
        environment |= self.launch.environment
        command = [self.launch.python or sys.executable, "-m", self.launch.module]
        command += ["--socket", str(theirs.fileno()), "--memory", str(memory)]
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            theirs.close()
            self._handshake(mine, memory, contract, adapter, base_hash)
        except OSError as error:
            self.end()
            raise RatchetError(
                "policy.bad_python", f"{command[0]} cannot be started: {error}", fix="name the policy's interpreter"
            ) from None
        except RatchetError:
            self.end()
            raise
        finally:
            theirs.close()
            os.close(memory)

    def send(self, message: dict[str, Any], arrays: wire.Arrays | None = None) -> bool:
        """Send without ever waiting; False where the other side is gone or its buffer is full."""
        if self._sock is None:
            return False
        data = wire.pack(message, arrays)
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    def receive(self) -> tuple[dict[str, Any], wire.Arrays] | None:
        """Wait for the next message; None where the process is gone."""
        return wire.receive(self._sock) if self._sock is not None else None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def ask_to_stop(self) -> None:
        """Politely, for two seconds."""
        if self._process is not None and self.send({"type": "stop"}):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2.0)

    def exit_status(self) -> str:
        """How it ended; it is made to end where it has only closed the socket."""
        if self._process is None:
            return "not started"
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def end(self) -> None:
        """Kill what still runs and free everything; safe to call more than once."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        if self._sock is not None:
            with contextlib.suppress(OSError):  # the other side may have closed it first
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
        if self.frames is not None:
            self.frames.close()
            self.frames = None

    def _handshake(
        self, sock: socket.socket, memory: int, contract: RobotContract, adapter: str, base_hash: str
    ) -> None:
        sock.settimeout(self.launch.start_timeout)
        start = {
            "type": "start",
            "contract": contract.to_dict(),
            "options": {**self.launch.options, "adapter": adapter},
            "nice": self.launch.nice,
            "memory_limit": self.launch.memory_limit,
        }
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then `_expect` tells how it ended
            sock.sendall(wire.pack(start))
        hello = self._expect(sock, "hello")
        if hello["protocol"] != PROTOCOL:
            raise RatchetError(
                "policy.protocol",
                f"the policy process speaks protocol {hello['protocol']}, this one {PROTOCOL}",
                fix="install the same version of ratchet in both environments",
            )
        ready = self._expect(sock, "ready")
        demands: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in ready["spec"].items()}
        spec = PolicySpec(**demands)
        warnings = [f"{m.code}: {m.message}" for m in require_compatible(spec, contract)]
        if base_hash and ready["base_hash"] != base_hash:
            raise RatchetError(
                "policy.another_base", "the restarted process serves another base", fix="end the session"
            )
        cameras = [contract.camera(name) for name in spec.cameras]
        layout = FrameLayout(tuple((c.name, c.height, c.width) for c in cameras), spec.state_size if spec.state else 0)
        self.frames = Frames(memory, layout, create=True)
        sock.sendall(wire.pack({"type": "layout", "layout": layout.to_dict()}))
        self._expect(sock, "serving")
        sock.settimeout(None)
        self.spec, self.base_hash, self.adapter_id = spec, ready["base_hash"], ready["adapter_id"]
        self.warnings = [*ready["warnings"], *warnings]
        self.computing = ready.get("computing", "")

    def _expect(self, sock: socket.socket, kind: str) -> dict[str, Any]:
        try:
            got = wire.receive(sock)
        except TimeoutError:
            raise RatchetError(
                "policy.start_timeout", f"no '{kind}' within {self.launch.start_timeout} s", fix="raise start_timeout"
            ) from None
        if got is None:
            raise RatchetError("policy.crashed", f"the policy process ended while starting ({self.exit_status()})")
        message = got[0]
        if message["type"] == "refused":
            raise remote_error(message["error"])
        if message["type"] != kind:
            raise RatchetError("policy.protocol", f"expected '{kind}', got {message['type']!r}")
        return message


def remote_error(raw: dict[str, str]) -> RatchetError:
    """The policy process's refusal as this process's error."""
    return RatchetError(raw["code"], raw["what"], where=raw["where"], fix=raw["fix"])


def launch_with(launch: PolicyLaunch, **options: Any) -> PolicyLaunch:
    """The same launch with some server options replaced."""
    return dataclasses.replace(launch, options={**launch.options, **options})
