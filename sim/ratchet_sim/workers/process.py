"""Simulator worker process: hosts task environments in slots and answers commands through shared memory.

Knows slots, tasks and chunks of actions. Knows no policy, no torch and nothing of episodes beyond the current one.
The protocol with the parent is in `Command` and `SlotState`; arrays travel through shared memory, never a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from ratchet_sim.base import TaskEnv
from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.success_rules import already_solved
from ratchet_vla.errors import RatchetError

# Workers use all cores; threads inside each would fight over them. OpenMP, two of BLAS, and the software rasteriser.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")
TASKS_PER_SLOT = 3  # environments kept per slot; a compiled scene takes tens to hundreds of megabytes


class Layout(NamedTuple):
    """Shapes of the shared block: N slots, V cameras, K actions of D dimensions, S state values."""

    slots: int
    cameras: int
    height: int
    width: int
    state: int
    chunk: int
    action: int

    def fields(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        slot_count = self.slots
        return {
            "images": ((slot_count, self.cameras, self.height, self.width, 3), np.dtype(np.uint8)),
            "state": ((slot_count, self.state), np.dtype(np.float32)),
            "actions": ((slot_count, self.chunk, self.action), np.dtype(np.float32)),
            "steps_run": ((slot_count,), np.dtype(np.int32)),
            "done": ((slot_count,), np.dtype(np.bool_)),
            "success": ((slot_count,), np.dtype(np.bool_)),
        }

    @property
    def nbytes(self) -> int:
        return sum(_aligned(int(np.prod(shape)) * dtype.itemsize) for shape, dtype in self.fields().values())

    def views(self, memory: shared_memory.SharedMemory) -> dict[str, np.ndarray]:
        arrays = {}
        offset = 0
        for name, (shape, dtype) in self.fields().items():
            arrays[name] = np.ndarray(shape, dtype, buffer=memory.buf, offset=offset)
            offset += _aligned(int(np.prod(shape)) * dtype.itemsize)
        return arrays


def _aligned(size: int) -> int:
    # 64 bytes: each array begins on a cache line of its own.
    return (size + 63) // 64 * 64


class Reset(NamedTuple):
    """Put a slot at the start of an episode; `replay` restores an episode already under way, action by action."""

    slot: int
    task: str
    initial_state: int
    horizon: int
    replay: np.ndarray | None = None  # (M, K, D) chunks executed so far


class Command(NamedTuple):
    """One round of work for a worker: resets first, then one chunk for each slot in `steps`; frames at the end."""

    resets: tuple[Reset, ...]
    steps: tuple[int, ...]


@dataclass
class WorkerConfig:
    """Configuration that a worker starts with; pickled to the new process, so it holds plain values only."""

    suite: str
    contract: RobotContract
    cameras: tuple[str, ...]
    state_fields: tuple[str, ...]
    layout: Layout
    memory_name: str
    make_env: Callable[[str, str, RobotContract], TaskEnv]
    environ: dict[str, str] = field(default_factory=dict)


@dataclass
class _Slot:
    env: TaskEnv
    horizon: int
    steps: int = 0


class Host:
    """Slots and their environments, working on arrays that somebody else reads; `views` as in `Layout.fields`."""

    def __init__(self, config: WorkerConfig, views: dict[str, np.ndarray]) -> None:
        self.config = config
        self.views = views
        self.envs: dict[tuple[int, str], TaskEnv] = {}
        self.slots: dict[int, _Slot] = {}

    def run(self, command: Command) -> None:
        for reset in command.resets:
            self._reset(reset)
        for slot in command.steps:
            self._step(slot, self.views["actions"][slot])
        for slot in {*(reset.slot for reset in command.resets), *command.steps}:
            self._publish(slot)

    def close(self) -> None:
        for env in self.envs.values():
            env.close()

    def _reset(self, reset: Reset) -> None:
        env_key = (reset.slot, reset.task)
        if env_key in self.envs:
            self.envs[env_key] = self.envs.pop(
                env_key
            )  # dictionaries keep their order: the slot's oldest task comes first
        else:
            slot_keys = [env_key_of_slot for env_key_of_slot in self.envs if env_key_of_slot[0] == reset.slot]
            if len(slot_keys) >= TASKS_PER_SLOT:
                self.envs.pop(slot_keys[0]).close()
            self.envs[env_key] = self.config.make_env(self.config.suite, reset.task, self.config.contract)
        env = self.envs[env_key]
        env.reset(reset.initial_state)
        # An episode that is solved before its first action would count as a success that no policy earned.
        if env.success():
            raise already_solved(f"{reset.task}, initial state {reset.initial_state}")
        self.slots[reset.slot] = _Slot(env, reset.horizon)
        self.views["done"][reset.slot] = False
        self.views["success"][reset.slot] = False
        self.views["steps_run"][reset.slot] = 0
        if reset.replay is not None:
            # Simulators are deterministic, so the same actions lead back to the state that was lost.
            for chunk in reset.replay:
                self._step(reset.slot, chunk)

    def _step(self, index: int, chunk: np.ndarray) -> None:
        slot = self.slots[index]
        steps_run = 0
        for action in chunk:
            if slot.steps >= slot.horizon or slot.env.success():
                break
            slot.env.step(action)
            slot.steps += 1
            steps_run += 1
        success = slot.env.success()
        self.views["steps_run"][index] = steps_run
        self.views["success"][index] = success
        self.views["done"][index] = success or slot.steps >= slot.horizon

    def _publish(self, index: int) -> None:
        """Frames and state for the next decision; a finished episode needs none."""
        if self.views["done"][index]:
            return
        env = self.slots[index].env
        for view, camera in enumerate(self.config.cameras):
            self.views["images"][index, view] = env.render(camera)
        if self.config.state_fields:
            state = env.state()
            self.views["state"][index] = np.concatenate([state[name] for name in self.config.state_fields])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For the start of a worker: the environment in which its libraries, when they are loaded, take one thread each."""
    previous_values = {variable: os.environ.get(variable) for variable in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for variable, value in previous_values.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def worker_main(connection: Connection, config: WorkerConfig) -> None:
    """Entry point of the process: answer commands until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    os.environ.update(config.environ)
    memory = shared_memory.SharedMemory(name=config.memory_name)
    try:
        host = Host(config, config.layout.views(memory))
        while True:
            try:
                command = connection.recv()
            except EOFError:
                return
            if command is None:
                return
            try:
                host.run(command)
                connection.send(None)
            except RatchetError as error:
                connection.send(error)
            except Exception:  # noqa: BLE001 - goes to the parent, which names it
                connection.send(
                    RatchetError("sim.worker_error", traceback.format_exc(limit=4).strip(), where=config.suite)
                )
    finally:
        host.close()
        host.views.clear()
        memory.close()
