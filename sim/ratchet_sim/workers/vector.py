"""ChunkVectorEnv: many episodes in parallel over worker processes, as a gymnasium vector environment.

Knows slots, workers, shared memory, recycling and recovery. Knows no policy and no learning.
A step takes one action chunk per slot, runs it open loop and renders only the frame that the next decision needs.
A worker that dies, hangs or has served long enough is replaced, and its episodes are replayed from their initial state
with the same actions: simulators are deterministic, so nothing of the batch is lost.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from typing import Any, ClassVar, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from ratchet_sim import registry
from ratchet_sim.base import TaskEnv, unknown_name
from ratchet_sim.workers.process import Command, Layout, Reset, WorkerConfig, one_thread, worker_main
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

__all__ = ["ChunkVectorEnv"]


class WorkerProcess(Protocol):
    """Handle of a worker that hosts environments: a local process, or an actor on another machine."""

    def kill(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class WorkerLink(Protocol):
    """Channel to a worker. `recv` returns None or the round's error; raises EOFError or OSError where it is lost."""

    def send(self, command: Command | None) -> None: ...
    def poll(self, timeout: float) -> bool: ...
    def recv(self) -> RatchetError | None: ...
    def close(self) -> None: ...


Launcher = Callable[[WorkerConfig, Mapping[str, np.ndarray]], tuple[WorkerProcess, WorkerLink]]
"""Starts a worker, given its configuration and the arrays in which its results must appear."""


def local_process(config: WorkerConfig, arrays: Mapping[str, np.ndarray]) -> tuple[WorkerProcess, WorkerLink]:
    """A process of this machine, which writes into the shared memory behind `arrays` itself."""
    context = multiprocessing.get_context("spawn")
    parent_end, worker_end = context.Pipe()
    process = context.Process(target=worker_main, args=(worker_end, config), daemon=True)
    with one_thread():
        process.start()
    # The parent's copy must go, or a dead worker would never show as end of file.
    worker_end.close()
    return process, parent_end


@dataclass
class _Worker:
    slots: range
    process: WorkerProcess
    connection: WorkerLink
    pending: Command | None = None
    episodes: int = 0


@dataclass
class _Episode:
    task: str
    initial_state: int
    horizon: int
    chunks: list[np.ndarray] = field(default_factory=list)


class ChunkVectorEnv(gymnasium.vector.VectorEnv):  # type: ignore[misc]  # its package is not followed
    """N slots spread over W worker processes. Autoreset is off: reset finished slots with `reset_mask`.

    Observations: {"images": (N, V, H, W, 3) uint8, "state": (N, S) float32}, views of shared memory, valid until the
    slot's next command. Actions: (N, K, D) float32, physical units of the contract.

    Args:
        suite: a suite of `ratchet_sim.registry`.
        slots_per_worker, workers: N = slots_per_worker * workers.
        cameras, state_fields: what the policy consumes, in its order; nothing else is rendered.
        chunk: K.
        recycle_after: episodes after which a worker is replaced; long-lived simulators leak.
        timeout: seconds for one round of a worker, model compilation included, before it counts as hung.
        launch: starts a worker; on other machines with `ratchet_sim.workers.ray_actors.RayLauncher`.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        suite: str,
        *,
        cameras: Sequence[str],
        state_fields: Sequence[str],
        chunk: int,
        workers: int = 2,
        slots_per_worker: int = 8,
        contract: RobotContract | None = None,
        recycle_after: int = 2000,
        timeout: float = 300.0,
        make_env: Callable[[str, str, RobotContract], TaskEnv] = registry.make_env,
        launch: Launcher = local_process,
    ) -> None:
        self._launch = launch
        self.suite = suite
        self.contract = contract or registry.contract_for(suite)
        self.tasks = {info.name: info for info in registry.tasks(suite)}
        camera_sizes = {(self.contract.camera(camera).height, self.contract.camera(camera).width) for camera in cameras}
        if len(camera_sizes) != 1:
            raise RatchetError("sim.camera_sizes", "all cameras of a policy must share one size", where=suite)
        field_sizes = {field.name: field.size for field in self.contract.state}
        unknown_fields = [name for name in state_fields if name not in field_sizes]
        if unknown_fields:
            raise unknown_name("state field", unknown_fields[0], field_sizes, "contract.unknown_state")
        height, width = camera_sizes.pop()
        self.num_envs = workers * slots_per_worker
        self.chunk = chunk
        layout = Layout(
            self.num_envs,
            len(cameras),
            height,
            width,
            sum(field_sizes[field] for field in state_fields),
            chunk,
            self.contract.action.size,
        )
        # One block for all workers: frames are written where the learner reads them, none is copied through a pipe.
        self._memory = shared_memory.SharedMemory(create=True, size=layout.nbytes)
        self.arrays = layout.views(self._memory)
        self._config = WorkerConfig(
            suite,
            self.contract,
            tuple(cameras),
            tuple(state_fields),
            layout,
            self._memory.name,
            make_env,
            {
                variable: os.environ[variable]
                for variable in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
                if variable in os.environ
            },
        )
        self._recycle_after = recycle_after
        self._timeout = timeout
        self._episodes: list[_Episode | None] = [None] * self.num_envs
        self.restarts = 0
        self.recycled = 0
        self.single_observation_space = spaces.Dict(
            {
                "images": spaces.Box(0, 255, layout.fields()["images"][0][1:], np.uint8),
                "state": spaces.Box(-np.inf, np.inf, (layout.state,), np.float32),
            }
        )
        low_limits = np.array([dim.low for dim in self.contract.action.dims], np.float32)
        high_limits = np.array([dim.high for dim in self.contract.action.dims], np.float32)
        self.single_action_space = spaces.Box(
            np.tile(low_limits, (chunk, 1)), np.tile(high_limits, (chunk, 1)), dtype=np.float32
        )
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.groups = [range(worker * slots_per_worker, (worker + 1) * slots_per_worker) for worker in range(workers)]
        self._workers = [self._start(slots) for slots in self.groups]

    # The asynchronous interface: one round of one group at a time, groups overlapping.

    def submit(self, group: int, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, np.ndarray]) -> None:
        """Start a round of one group (worker): resets (slot -> task, initial state, horizon), then chunks.

        Args:
            steps: slot -> (K, D) float32. A slot may not be in both. Collect the round with `collect`.

        Raises:
            RatchetError: sim.busy, sim.unknown_task, sim.not_reset, sim.bad_action; nothing was started then.
        """
        self._check(group, resets, steps)
        worker = self._workers[group]
        commands = []
        for slot, (task, initial_state, horizon) in resets.items():
            self._episodes[slot] = _Episode(task, initial_state, horizon)
            commands.append(Reset(slot, task, initial_state, horizon))
            worker.episodes += 1
        for slot, chunk in steps.items():
            episode = self._episodes[slot]
            assert episode is not None
            self.arrays["actions"][slot] = chunk
            episode.chunks.append(np.array(chunk, np.float32))
        if resets and worker.episodes > self._recycle_after:
            self._stop(worker)
            worker = self._workers[group] = self._start(worker.slots)
            self.recycled += 1
            # The fresh worker replays the episodes under way, this round's chunks included.
            self._restore(worker, Command(tuple(commands), tuple(steps)))
            return
        self._send(worker, Command(tuple(commands), tuple(steps)))

    def collect(self, group: int) -> None:
        """Wait for the group's round; results are in `arrays` (images, state, steps_run, done, success).

        Raises:
            RatchetError: sim.idle; sim.worker_lost, sim.worker_error or the task's own, after which the round's
                episodes are over and their slots must be reset.
        """
        # A round is tried on three workers; after the third loss the task itself is at fault.
        for attempt in range(3):
            worker = self._workers[group]
            if worker.pending is None:
                raise RatchetError("sim.idle", "no round was submitted", where=f"group {group}")
            try:
                if not worker.connection.poll(self._timeout):
                    raise EOFError(f"no answer in {self._timeout} s")
                refusal = worker.connection.recv()
            except (EOFError, OSError) as error:
                command = worker.pending
                self._kill(worker)
                self.restarts += 1
                self._workers[group] = self._start(worker.slots)
                if attempt == 2:
                    self._forget(worker.slots)
                    raise RatchetError(
                        "sim.worker_lost",
                        f"a simulator worker died three times in one round: {error}",
                        where=self.suite,
                    ) from None
                self._restore(self._workers[group], command)
                continue
            command = worker.pending
            worker.pending = None
            if isinstance(refusal, BaseException):
                self._forget([*(reset.slot for reset in command.resets), *command.steps])
                raise refusal
            return

    # The gymnasium interface, synchronous over all slots.

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start episodes.

        Args:
            seed: None: initial states are ids.
            options: "task" (one name or N names), "initial_state" (one id or N ids), optional "horizon" and
                "reset_mask" ((N,) bool, which slots).
        """
        if seed is not None:
            raise RatchetError("sim.seed", "initial states are chosen by id", fix='pass options={"initial_state": …}')
        if not options or "task" not in options or "initial_state" not in options:
            raise RatchetError("sim.options", "reset needs options with 'task' and 'initial_state'", where=self.suite)
        slot_count = self.num_envs
        task = options["task"]
        task_names = [task] * slot_count if isinstance(task, str) else list(task)
        initial_states = np.broadcast_to(np.asarray(options["initial_state"]), (slot_count,))
        reset_mask = np.asarray(options.get("reset_mask", np.ones(slot_count, bool)))
        resets = {}
        for slot in np.flatnonzero(reset_mask):
            self._require_task(task_names[slot])
            resets[int(slot)] = (
                task_names[slot],
                int(initial_states[slot]),
                int(options.get("horizon", self.tasks[task_names[slot]].horizon)),
            )
        self._round(resets, {})
        return self._observation(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run one chunk in every slot that is not done. Reward 1 where the chunk brought success."""
        was_live = ~self.arrays["done"].copy()
        self._round({}, {int(slot): actions[slot] for slot in np.flatnonzero(was_live)})
        success = self.arrays["success"].copy()
        done = self.arrays["done"].copy()
        info = {"steps_run": np.where(was_live, self.arrays["steps_run"], 0), "live": was_live}
        return self._observation(), (success & was_live).astype(np.float64), success, done & ~success, info

    def close_extras(self, **_: Any) -> None:
        for worker in self._workers:
            self._stop(worker)
        self.arrays = {}
        self._memory.close()
        self._memory.unlink()

    def _round(self, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, np.ndarray]) -> None:
        """One round of all groups; every group is collected, also where one of them refuses."""
        group_rounds = [
            (
                {slot: resets[slot] for slot in slots if slot in resets},
                {slot: steps[slot] for slot in slots if slot in steps},
            )
            for slots in self.groups
        ]
        for group, group_round in enumerate(group_rounds):
            self._check(group, *group_round)
        for group, group_round in enumerate(group_rounds):
            self.submit(group, *group_round)
        refusals: list[RatchetError] = []
        for group in range(len(group_rounds)):
            try:
                self.collect(group)
            except RatchetError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    def _require_task(self, name: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = registry.task(self.suite, name)

    def _check(self, group: int, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, np.ndarray]) -> None:
        if self._workers[group].pending is not None:
            raise RatchetError("sim.busy", "this group's last round was not collected", where=f"group {group}")
        for task, _, _ in resets.values():
            self._require_task(task)
        expected = self.single_action_space.shape
        for slot, chunk in steps.items():
            slot_text = f"slot {slot}"
            if self._episodes[slot] is None or slot in resets:
                raise RatchetError("sim.not_reset", "step before reset", where=slot_text, fix="reset the slot first")
            if np.shape(chunk) != expected or not np.isfinite(chunk).all():
                problem = f"a chunk must be {expected} finite numbers, got {np.shape(chunk)}"
                raise RatchetError("sim.bad_action", problem, where=slot_text, fix="nothing was sent")

    def _forget(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._episodes[slot] = None

    def _observation(self) -> dict[str, np.ndarray]:
        return {"images": self.arrays["images"].copy(), "state": self.arrays["state"].copy()}

    def _start(self, slots: range) -> _Worker:
        return _Worker(slots, *self._launch(self._config, self.arrays))

    def _send(self, worker: _Worker, command: Command) -> None:
        worker.pending = command
        with contextlib.suppress(OSError):  # a dead worker is found, replaced and its round repeated in `collect`
            worker.connection.send(command)

    def _restore(self, worker: _Worker, command: Command) -> None:
        """Bring a fresh worker to where the lost one was after `command`, by replaying every episode under way."""
        reset_slots = {reset.slot for reset in command.resets}
        resets = list(command.resets)
        for slot in worker.slots:
            episode = self._episodes[slot]
            if episode is None or slot in reset_slots:
                continue
            replay = np.stack(episode.chunks) if episode.chunks else None
            resets.append(Reset(slot, episode.task, episode.initial_state, episode.horizon, replay))
        # Chunks of this round are part of the history already, so nothing is left to step.
        self._send(worker, Command(tuple(resets), ()))

    def _kill(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join()

    def _stop(self, worker: _Worker) -> None:
        with contextlib.suppress(OSError):
            worker.connection.send(None)
            worker.process.join(10)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        worker.connection.close()
