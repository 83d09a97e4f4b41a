"""Simulator workers as Ray actors, on this machine or on a cluster, for `ratchet_sim.workers.vector`.

Knows Ray and the commands of `ratchet_sim.workers.process`. Knows no policy: inference stays with the learner, actors
receive actions, and return frames and states. A lost actor is replaced and its episodes are replayed, as with a local
process. Ray trusts everyone who can reach its ports: keep a cluster inside a private network.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from ratchet_sim.workers.process import Command, Host, WorkerConfig
from ratchet_sim.workers.vector import WorkerLink, WorkerProcess
from ratchet_vla.errors import RatchetError

LOCAL = "local-ray"


class RayLauncher:
    """Connects to Ray once and starts one actor per worker.

    Args:
        address: "local-ray" starts Ray on this machine; "ray://host:port" or "host:port" joins a cluster on which the
            same version of this package is installed.
        cpus: cores that Ray reserves per worker.

    Raises:
        RatchetError: sim.no_ray where Ray is not installed, sim.no_cluster where the address does not answer.
    """

    def __init__(self, address: str = LOCAL, *, cpus: float = 1.0) -> None:
        try:
            import ray
        except ImportError:
            raise RatchetError(
                "sim.no_ray", "Ray is not installed", fix="pip install 'ratchet-vla[cluster]', or use local processes"
            ) from None
        # Otherwise Ray hides the GPU from actors that reserve none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._ray = ray
        if not ray.is_initialized():
            try:
                if address == LOCAL:
                    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
                else:
                    ray.init(address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise RatchetError(
                    "sim.no_cluster",
                    f"no Ray cluster answers: {error}",
                    where=address,
                    fix="start it, check the address",
                ) from None
        # No restarts by Ray: ChunkVectorEnv replaces a lost worker and replays its episodes.
        self._actor = ray.remote(num_cpus=cpus, max_restarts=0)(_Simulators)

    def __call__(self, config: WorkerConfig, arrays: Mapping[str, np.ndarray]) -> tuple[WorkerProcess, WorkerLink]:
        worker_actor = self._actor.remote(config)
        return _Process(self._ray, worker_actor), _Link(self._ray, worker_actor, arrays)


class _Simulators:
    """What runs in the actor: environments and arrays of its own."""

    def __init__(self, config: WorkerConfig) -> None:
        os.environ.update(config.environ)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in config.layout.fields().items()}
        self._host = Host(config, self._arrays)

    def run(
        self, command: Command, actions: dict[int, np.ndarray]
    ) -> tuple[RatchetError | None, dict[int, dict[str, np.ndarray]]]:
        """One round; the rows of every slot that it touched, actions left out."""
        for slot, chunk in actions.items():
            self._arrays["actions"][slot] = chunk
        error: RatchetError | None = None
        try:
            self._host.run(command)
        except RatchetError as refusal:
            error = refusal
        except Exception:  # noqa: BLE001 - goes to the learner, which names it
            trace = traceback.format_exc(limit=4).strip()
            error = RatchetError("sim.worker_error", trace, where=self._host.config.suite)
        # Only rows that changed cross the network.
        touched_slots = {*(reset.slot for reset in command.resets), *command.steps}
        rows = {
            slot: {name: array[slot].copy() for name, array in self._arrays.items() if name != "actions"}
            for slot in touched_slots
        }
        return error, rows


class _Process:
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def join(self, timeout: float | None = None) -> None:
        """Ray reaps its own processes."""

    def is_alive(self) -> bool:
        return False


class _Link:
    def __init__(self, ray: Any, actor: Any, arrays: Mapping[str, np.ndarray]) -> None:
        self._ray = ray
        self._actor = actor
        self._arrays = arrays
        self._answer: Any = None

    def send(self, command: Command | None) -> None:
        if command is None:
            self._ray.kill(self._actor)
            return
        actions = {slot: self._arrays["actions"][slot].copy() for slot in command.steps}
        self._answer = self._actor.run.remote(command, actions)

    def poll(self, timeout: float) -> bool:
        ready, _ = self._ray.wait([self._answer], timeout=timeout)
        return bool(ready)

    def recv(self) -> RatchetError | None:
        try:
            error, rows = self._ray.get(self._answer)
        except self._ray.exceptions.RayError as failure:
            raise EOFError(str(failure)) from None
        for slot, fields in rows.items():
            for name, row in fields.items():
                self._arrays[name][slot] = row
        return error  # type: ignore[no-any-return]

    def close(self) -> None:
        self._answer = None
