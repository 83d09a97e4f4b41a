"""FakePolicy: a policy process without a model, for tests, benchmarks and dry runs of the graph.

Knows a sine around zero and every way to fail. Moves the first dimension and holds the others; needs NumPy only.
`PolicyLaunch(module="ratchet_vla.testing.fake_policy_worker", options={...})`; options:
  chunk, control_hz, image_size, seconds (thinking time per chunk), amplitude (of the range, 0..1), period_steps;
  fault: "" | crash | exit | oom | nan | shape | hang | slow, fault_at: number of the request it strikes (from 0).
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, UInt8
from ratchet_vla.runtime.inference.chunk_server import ChunkServer, Inferred
from ratchet_vla.runtime.inference.source import Ahead
from ratchet_vla.runtime.inference.worker import serve


def spec_for(contract: RobotContract, chunk: int, image_size: int) -> PolicySpec:
    """The demands of a policy that fits the contract in everything."""
    action = contract.action
    gripper = contract.action.gripper
    return PolicySpec(
        cameras=tuple(c.name for c in contract.cameras),
        image_size=image_size,
        state=tuple(s.name for s in contract.state),
        state_size=sum(s.size for s in contract.state),
        control_mode=action.control_mode,
        rotation=action.rotation,
        frame=action.frame,
        action_names=tuple(d.name for d in action.dims),
        action_units=tuple(d.unit for d in action.dims),
        gripper_dim=gripper.dim if gripper else None,
        gripper_open=gripper.open if gripper else None,
        gripper_closed=gripper.closed if gripper else None,
        chunk=chunk,
        control_hz=contract.control_hz,
        statistics_key="fake",
        bins=0,
    )


class FakePolicy:
    """Answers with a sine in the first dimension, continued from chunk to chunk through the measured state."""

    def __init__(self, options: dict[str, Any], contract: RobotContract) -> None:
        self.options = options
        self.contract = contract
        self.spec = spec_for(contract, int(options.get("chunk", 8)), int(options.get("image_size", 96)))
        self.base_hash = hashlib.sha256(b"fake policy").hexdigest()
        self.warnings: list[str] = []
        self.computing = ""  # nothing is computed
        self._adapter = str(options.get("adapter", "")) or self.base_hash
        self._lock = threading.Lock()
        self._asked = self._steps = 0
        self._adapters = [hashlib.sha256(f"fake adapter {i}".encode()).hexdigest() for i in range(2)]

    @property
    def adapter_id(self) -> str:
        return self._adapter

    def infer(
        self,
        images: list[UInt8],
        state: Float32,
        instruction: str,
        temperature: float,
        noise: Float32 | None,
        ahead: Ahead | None,
    ) -> Inferred:
        with self._lock:
            adapter = self._adapter
        number = self._asked
        self._asked = self._asked + 1
        fault = self.options.get("fault", "") if number == int(self.options.get("fault_at", 0)) else ""
        seconds = float(self.options.get("seconds", 0.0))
        if fault:
            self._strike(fault)
        if seconds:
            time.sleep(seconds)  # stands for a forward pass
        actions = self._actions(state)
        if fault == "nan":
            actions[1] = np.nan
        return Inferred(actions[:, :-1] if fault == "shape" else actions, None, None, adapter)

    def swap(self, reference: str, expected_id: str) -> dict[str, Any]:
        """Adapters "0" and "1" exist, or their ids, or "base"; staging takes as long as option swap_seconds says."""
        time.sleep(float(self.options.get("swap_seconds", 0.0)))  # stands for reading and checking files
        known = {"0": self._adapters[0], "1": self._adapters[1], "base": self.base_hash}
        new = known.get(reference, reference)
        if new not in known.values():
            raise RatchetError("adapter.unknown", f"no adapter {reference!r}", fix="0, 1 or base")
        with self._lock:
            old = self._adapter
            self._adapter = new
        return {"old_id": old, "new_id": new, "ready": 0.0, "waited": 0.0, "unavailable": 0.0, "warnings": []}

    def adapters(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "tags": [tag], "task": "", "stage": 0, "active": name == self._adapter}
            for tag, name in (("base", self.base_hash), ("0", self._adapters[0]), ("1", self._adapters[1]))
        ]

    def _actions(self, state: Float32) -> Float32:
        action = self.contract.action
        chunk = self.spec.chunk
        out = np.zeros((chunk, action.size), np.float32)
        dim = action.dims[0]
        span = float(self.options.get("amplitude", 0.2)) * min(abs(dim.low), abs(dim.high))
        turn = 2.0 * math.pi / float(self.options.get("period_steps", 40))
        if action.control_mode.endswith("absolute"):
            out[:] = self._here(state)
        phase = np.arange(self._steps, self._steps + chunk) * turn
        out[:, 0] += span * np.sin(phase)
        self._steps += int(self.options.get("advance", chunk))
        if action.gripper is not None:
            out[:, [d.name for d in action.dims].index(action.gripper.dim)] = action.gripper.open
        return out

    def _here(self, state: Float32) -> Float32:
        """The measured pose as an absolute action, where state fields follow the action's order."""
        out = np.zeros(self.contract.action.size, np.float32)
        count = min(len(state), self.contract.action.size)
        out[:count] = state[:count]
        return out

    def _strike(self, fault: str) -> None:
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "exit":
            os._exit(3)
        elif fault == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "slow":
            time.sleep(float(self.options.get("slow_seconds", 1.0)))  # the fault itself: a forward that takes too long
        elif fault == "oom":
            blocks = []
            while True:  # until the process's own memory limit refuses
                blocks.append(np.empty(1 << 26, np.uint8))
                if len(blocks) > 1 << 10:
                    sys.exit("no memory limit was set")


def open_fake(options: dict[str, Any], contract: RobotContract) -> ChunkServer:
    return FakePolicy(options, contract)


if __name__ == "__main__":
    raise SystemExit(serve(open_fake))
