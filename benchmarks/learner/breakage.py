"""Fault injection, for `faults.py` beside it and for tests: kills, torn files, full disks, clocks, network, lies.

Everything is seeded and strikes at a counted step, so that a printed seed gives the same faults again.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learner.small_world import CHUNK, contract
from ratchet_vla.records import ActionChunk, Episode, Observation, Step
from ratchet_vla.storage.files import Files


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process. kind: kill, torn, full, clock, network or foreign; at: how many steps (system calls
    or phases) after the one before, or after the process began; seed: of its details."""

    kind: str
    at: int
    seed: int
    where: str = ""  # only at a step of this name, such as `phase update` or `write journal.jsonl`


class FaultyFiles(Files):
    """Counts steps and lets one fault after the other strike. What strikes is first written to `struck`, so that the
    next life of the process goes on with the faults that are left."""

    def __init__(self, faults: Sequence[Fault], struck: Path | None = None) -> None:
        self._faults, self._struck = list(faults), struck
        self._count = self._full = 0
        self._durable: dict[Path, int] = {}
        self.network = NetworkFaults(0, 0)
        self.foreign: list[int] = []

    def step(self, call: str, path: Path) -> None:
        self._count += 1
        if call == "open":
            self._durable[path] = path.stat().st_size if path.exists() else 0
        if self._full and call in ("write", "open", "mkdir"):
            self._full -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if not self._faults or self._count < self._faults[0].at:
            return
        fault = self._faults[0]
        if not f"{call} {path.name}".startswith(fault.where):
            return
        if fault.kind == "torn" and (call != "fsync" or not path.is_file()):
            return  # waits for the next file that is written and not yet durable
        if fault.kind == "full" and call not in ("write", "open"):
            return
        self._faults.pop(0)
        self._count = 0
        self._tell(fault, f"{call} {path.name}")
        if fault.kind == "full":
            self._full = fault.seed % 4
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if fault.kind == "clock":
            jump(fault.seed)
        elif fault.kind == "network":
            self.network = NetworkFaults(fault.seed)
        elif fault.kind == "foreign":
            self.foreign.append(fault.seed)
        else:
            if fault.kind == "torn":
                # A power cut before the data were forced out: the name may be there, the last bytes are not.
                durable = self._durable.get(path, 0)
                size = path.stat().st_size
                os.truncate(path, durable + random.Random(fault.seed).randrange(max(size - durable, 1)))
            os.kill(os.getpid(), signal.SIGKILL)

    def tamper(self, frames: list[Any]) -> list[list[Any]]:
        """What a link gets as its `tamper`."""
        return self.network(frames)

    def _tell(self, fault: Fault, where: str) -> None:
        if self._struck is None:
            return
        handle = os.open(self._struck, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.write(handle, (json.dumps([fault.kind, fault.at, fault.seed, where]) + "\n").encode())
        os.close(handle)


class NetworkFaults:
    """Drops, doubles and reorders messages at random for a while."""

    def __init__(self, seed: int, messages: int = 60) -> None:
        self._random, self._left = random.Random(seed), messages
        self._late: list[list[Any]] = []

    def __call__(self, frames: list[Any]) -> list[list[Any]]:
        out: list[list[Any]] = []
        self._left -= 1
        luck = self._random.random() if self._left > 0 else 1.0
        if luck < 0.15:
            self._late.append(frames)
        elif luck < 0.25:
            out = [frames, frames]
        elif luck >= 0.4:
            out = [frames]
        if self._late and (self._left <= 0 or self._random.random() < 0.5):
            out.append(self._late.pop(0))
        return out


def jump(seed: int) -> None:
    """Set this process's wall clock off by up to a year, either way."""
    offset = random.Random(seed).uniform(-3e7, 3e7)
    real = time.time
    time.time = lambda: real() + offset


def foreign_episode(request: Mapping[str, Any], seed: int) -> Episode:
    """An episode that must never enter an update: another adapter, however well everything else fits."""
    draw = np.random.default_rng(seed)
    camera = contract().camera("corner2")
    adapter = draw.bytes(32).hex()
    image = np.zeros((camera.height, camera.width, 3), np.uint8)
    state = {"hand": np.zeros(3, np.float32), "gripper": np.zeros(1, np.float32)}
    seen = Observation({"corner2": image}, state, request["instruction"], 0.0, 0)
    tokens, log_prob = draw.integers(0, 255, (CHUNK, 4)), np.full((CHUNK, 4), -3.0, np.float32)
    actions = np.zeros((CHUNK, 4), np.float32)
    chunk = ActionChunk(actions, tokens, log_prob, adapter, request["temperature"], 0.0, 0)
    episode = Episode(request["task"], request["instruction"], success=True, success_source="simulator")
    # Half of them lie about their adapter in the header.
    episode.adapter_id = request["adapter"] if seed % 2 else adapter
    episode.steps = [Step(seen, chunk, np.ones(CHUNK, bool), 1.0, True, CHUNK)]
    episode.meta = {"order": request["id"], "slot": seed % request["slots"]}
    return episode
