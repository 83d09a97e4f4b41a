"""The policy's own process: answers observations with chunks and exchanges adapters beside it, until the pipe closes.

Knows messages, shared frames and one ChunkServer. Knows no ROS and no robot. Started by `client`, never by hand:
`python -m ratchet_vla.runtime.inference.worker --socket FD --memory FD`. A server for other policies brings its own
module, with `serve(open_server)` as its last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import resource
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_vla.contract import RobotContract, require_compatible
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.inference import wire
from ratchet_vla.runtime.inference.chunk_server import ChunkServer, OpenServer
from ratchet_vla.runtime.inference.frames import FrameLayout, Frames
from ratchet_vla.runtime.inference.source import Ahead
from ratchet_vla.runtime.inference.tag_watcher import TagWatcher

PROTOCOL = 1


class _Worker:
    def __init__(self, sock: socket.socket, memory: int, open_server: OpenServer) -> None:
        self._sock, self._memory, self._open = sock, memory, open_server
        self._sending = threading.Lock()
        self._swapping = threading.Lock()
        self._server: ChunkServer | None = None
        self._watched_tag = ("", "", 1.0)  # store, tag, seconds between looks
        self._told = ""
        self._frames: Frames | None = None

    def run(self) -> int:
        self._send(
            {
                "type": "hello",
                "protocol": PROTOCOL,
                "pid": os.getpid(),
                "python": platform.python_version(),
            }
        )
        while (got := wire.receive(self._sock)) is not None:
            message, arrays = got
            if message["type"] == "stop":
                return 0
            try:
                self._handle(message, arrays)
            except RatchetError as error:
                self._send({"type": "refused", "id": message.get("id", 0), "error": error.as_dict()})
                if message["type"] in ("start", "layout"):
                    return 2
        return 0

    def _handle(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        match message["type"]:
            case "start":
                self._start(message)
            case "layout":
                self._frames = Frames(self._memory, FrameLayout.from_dict(message["layout"]), create=False)
                self._send({"type": "serving"})
                store, tag, period = self._watched_tag
                if tag:
                    TagWatcher(Path(store) / "tags" / tag, period, lambda: self._follow(tag))
            case "infer":
                self._infer(message, arrays)
            case "swap":
                # Staging takes longer than a chunk; the forwards go on meanwhile in this thread.
                threading.Thread(target=self._swap, args=(message,), daemon=True).start()
            case "adapters":
                self._send({"type": "adapters", "id": message["id"], "rows": self._ready().adapters()})
            case unknown:
                raise RatchetError("wire.unknown_message", f"no message of type {unknown!r}")

    def _start(self, message: dict[str, Any]) -> None:
        limit = message.get("memory_limit", 0)
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.nice(message.get("nice", 0))
        contract = RobotContract.from_dict(message["contract"], "contract")
        options = message["options"]
        store, tag = str(options.get("store") or ""), str(options.get("follow") or "")
        if tag and (not store or not tag.replace("-", "").replace("_", "").isalnum()):
            raise RatchetError(
                "policy.cannot_follow", f"no tag '{tag}' to follow", where=store, fix="name a store and a tag in it"
            )
        # A quarter of a control period, so that what a tag's move leads to is in force within one.
        self._watched_tag = (store, tag, 0.25 / contract.control_hz)
        server = self._open(message["options"], contract)
        require_compatible(server.spec, contract)
        self._server = server
        self._send(
            {
                "type": "ready",
                "spec": dataclasses.asdict(server.spec),
                "base_hash": server.base_hash,
                "adapter_id": server.adapter_id,
                "warnings": server.warnings,
                "computing": server.computing,
            }
        )

    def _infer(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        number = message["id"]
        seen = self._frames.read(message["slot"], message["sequence"]) if self._frames else None
        if seen is None:
            self._fail(number, "policy.torn_frame", "the observation was overwritten while it was read")
            return
        ahead = Ahead(arrays["committed"], int(message["delay"])) if "committed" in arrays else None
        began = time.perf_counter()
        try:
            out = self._ready().infer(
                seen[0], seen[1], message["instruction"], float(message["temperature"]), arrays.get("noise"), ahead
            )
        except (MemoryError, RuntimeError) as error:
            full = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
            code = "policy.out_of_memory" if full or "can't allocate" in str(error) else "policy.failed"
            self._fail(number, code, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return
        except RatchetError as error:
            self._fail(number, "policy.failed", str(error))
            return
        sent: wire.Arrays = {"actions": np.asarray(out.actions, np.float32)}
        if out.tokens is not None and out.log_prob is not None:
            sent |= {"tokens": out.tokens, "log_prob": out.log_prob}
        seconds = time.perf_counter() - began
        facts = {"adapter_id": out.adapter_id, "compute_dtype": out.compute_dtype, "seconds": seconds}
        self._send({"type": "chunk", "id": number, **facts}, sent)

    def _follow(self, tag: str) -> bool:
        """Swap to where the tag points now; what came of it is told without having been asked for, as number 0."""
        with self._swapping:
            try:
                report = self._ready().swap(tag, "")
            except RatchetError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    self._send({"type": "refused", "id": 0, "error": error.as_dict()})
                return False
            self._told = ""
            self._send({"type": "swapped", "id": 0, "report": report})
            return True

    def _swap(self, message: dict[str, Any]) -> None:
        number = message["id"]
        with self._swapping:
            try:
                report = self._ready().swap(message["reference"], message["expected_id"])
            except RatchetError as error:
                self._send({"type": "refused", "id": number, "error": error.as_dict()})
            except Exception as error:  # told to whoever asked; the running adapter serves on
                fault = RatchetError("adapter.swap_failed", f"{type(error).__name__}: {error}")
                self._send({"type": "refused", "id": number, "error": fault.as_dict()})
            else:
                self._send({"type": "swapped", "id": number, "report": report})

    def _ready(self) -> ChunkServer:
        if self._server is None:
            raise RatchetError("policy.not_ready", "no policy is open", fix="send `start` first")
        return self._server

    def _fail(self, number: int, code: str, text: str) -> None:
        self._send({"type": "failed", "id": number, "code": code, "message": text})

    def _send(self, message: dict[str, Any], arrays: wire.Arrays | None = None) -> None:
        data = wire.pack(message, arrays)
        with self._sending:
            self._sock.sendall(data)


def serve(open_server: OpenServer) -> int:
    """Run this process until the control process stops it or is gone; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the control process decides when to stop
    adjust = Path("/proc/self/oom_score_adj")
    if adjust.exists():
        adjust.write_text("500")  # short of memory, the kernel takes this process before the one that holds the arm
    with socket.socket(fileno=arguments.socket) as sock:
        try:
            return _Worker(sock, arguments.memory, open_server).run()
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the control process is gone


if __name__ == "__main__":
    from ratchet_vla.runtime.inference.server import open_prismatic

    raise SystemExit(serve(open_prismatic))
