"""The control process's end of the policy process: start it, ask it, exchange its adapter, notice that it is gone.

Knows requests, answers and restarts. Imports no model code: neither torch nor transformers reach the process that holds
the arm. A dead, hanging or swapping policy is only a late chunk, which the safety filter knows how to handle.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.episodes.success_rules import require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, Observation
from ratchet_vla.runtime.inference import wire
from ratchet_vla.runtime.inference.calls import Calls, refused
from ratchet_vla.runtime.inference.process import (
    PolicyLaunch,
    PolicyProcess,
    PolicyStatus,
    Request,
    launch_with,
    remote_error,
)
from ratchet_vla.runtime.inference.restarts import Restarts
from ratchet_vla.runtime.inference.source import Ahead, Noise, PolicyFault, Reply, Sampling
from ratchet_vla.runtime.startup_retries import passes

__all__ = ["PolicyClient", "PolicyLaunch", "PolicyStatus", "launch_with"]


class PolicyClient:
    """A ChunkSource over a policy in another process. Methods are safe from any thread and never wait for the policy,
    except `start`, `wait` and `stop`.

    sampling: see `sample`; greedy until it is called.
    """

    def __init__(self, contract: RobotContract, launch: PolicyLaunch) -> None:
        self.contract, self.launch = contract, launch
        self.spec: PolicySpec | None = None
        self.base_hash = ""
        self.warnings: list[str] = []
        self.computing = ""  # the dtype of the policy's products and why, in words
        self._adapter_id = ""
        self._wanted_adapter = str(launch.options.get("adapter", ""))
        self._state, self._error = "stopped", ""
        self._link: PolicyProcess | None = None
        self._reader: threading.Thread | None = None
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._replies: deque[Reply] = deque()
        self._out: Request | None = None
        self._calls = Calls()
        self._numbers = self._asked = self._answered = self._discarded = 0
        self._restarts = Restarts(launch.restarts)
        self._inference = 0.0
        self._killed_for = ""
        self._sampling = Sampling()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> PolicySpec:
        """Start the process and wait until it can answer: loaded, compatible, warmed up.

        Raises:
            RatchetError: compat.refused and whatever the policy refuses; policy.start_timeout, policy.crashed,
                policy.protocol.
        """
        with self._lock:
            if self._link is not None:
                raise RatchetError("policy.running", "the policy process runs already", fix="stop it first")
            self._state = "starting"
        try:
            self._launch()
        except RatchetError as error:
            self._end()
            self._state, self._error = "failed", str(error)
            raise
        self._reader = threading.Thread(target=self._read, name="policy-replies", daemon=True)
        self._reader.start()
        assert self.spec is not None
        return self.spec

    def stop(self) -> None:
        """End the process: politely, then by force. Safe to call more than once."""
        with self._lock:
            if self._state == "stopped":
                return
            self._state = "stopped"
            self._arrived.notify_all()
            link = self._link
        if link is not None:
            link.ask_to_stop()
        self._end()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
            self._reader = None

    def __enter__(self) -> PolicyClient:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # -- chunks --------------------------------------------------------------------------------------------------

    def sample(self, temperature: float, seed: int, noise: Noise | None = None) -> None:
        """From the next request on: sample at this temperature (0 acts greedily), with noise from this seed.

        noise: draws (K, D) float32 uniform in [0, 1); independent numbers if absent. Seeded per episode as rollouts
            are, so that the same seed gives the same actions in process and through the runtime.

        Raises:
            RatchetError: goal.bad_temperature.
        """
        require_temperature(temperature)
        with self._lock:
            self._sampling = Sampling(temperature, seed, noise)

    @property
    def ready(self) -> bool:
        return self._state == "ready" and self._out is None

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        with self._lock:
            if not self.ready or self._link is None or self._link.frames is None or self.spec is None:
                raise RatchetError("policy.not_ready", f"the policy is {self._state}", fix="ask when `ready` is true")
            spec, link = self.spec, self._link
            state = [observation.state[name] for name in spec.state]
            slot, sequence = self._link.frames.write(
                [observation.images[name] for name in spec.cameras],
                np.concatenate(state).astype(np.float32) if state else np.zeros(0, np.float32),
            )
            noise = self._sampling.draw((spec.chunk, len(spec.action_names)))
            arrays: dict[str, Any] = {} if noise is None else {"noise": noise}
            if ahead is not None:
                arrays["committed"] = np.asarray(ahead.previous_actions, np.float32)
            self._numbers += 1
            message = {
                "type": "infer",
                "id": self._numbers,
                "slot": slot,
                "sequence": sequence,
                "instruction": observation.instruction,
                "temperature": self._sampling.temperature,
                "delay": ahead.delay if ahead else 0,
            }
            now = time.monotonic()
            temperature = self._sampling.temperature
            self._out = Request(self._numbers, observation.stamp, observation.sequence, temperature, now)
            self._asked += 1
            if not link.send(message, arrays):
                self._kill("policy.hung", "the policy process takes no messages")

    def poll(self) -> list[Reply]:
        with self._lock:
            out = self._out
            if out is not None and time.monotonic() - out.sent > self.launch.hang_timeout and not self._killed_for:
                self._kill("policy.hung", f"no answer for {self.launch.hang_timeout} s")
            replies = list(self._replies)
            self._replies.clear()
            return replies

    def wait(self, timeout: float) -> list[Reply]:
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._replies), timeout)
        return self.poll()

    def forget(self) -> None:
        with self._lock:
            if self._out is not None:
                self._out.wanted = False
            self._discarded += sum(isinstance(r, ActionChunk) for r in self._replies)
            self._replies = deque(r for r in self._replies if isinstance(r, PolicyFault))

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def adapter_id(self) -> str:
        """Id of the adapter that the last answer or swap named; the base's hash where none is loaded."""
        return self._adapter_id

    def swap(self, reference: str, expected_id: str = "") -> Future[dict[str, Any]]:
        """Ask for another adapter: id, tag, or "base". Motion goes on; the flip falls between two chunks.

        Returns:
            A future with the swap report (`adapters.hotswap.SwapReport` as data), or the RatchetError that refused it;
            a refused swap leaves the running adapter as it is.
        """
        return self._call({"type": "swap", "reference": reference, "expected_id": expected_id})

    def adapters(self) -> Future[list[dict[str, Any]]]:
        """A future with what could be swapped to: id, tags, task, stage, active."""
        return self._call({"type": "adapters"})

    # -- status --------------------------------------------------------------------------------------------------

    def status(self) -> PolicyStatus:
        with self._lock:
            out = self._out
            return PolicyStatus(
                state="busy" if self._state == "ready" and out is not None else self._state,
                pid=self._link.pid if self._link else 0,
                base_hash=self.base_hash,
                adapter_id=self._adapter_id,
                swapping=self._calls.swapping > 0,
                asked=self._asked,
                answered=self._answered,
                discarded=self._discarded,
                restarts=self._restarts.total,
                busy_for=time.monotonic() - out.sent if out else 0.0,
                inference=self._inference,
                error=self._error,
            )

    # -- inside: the process -------------------------------------------------------------------------------------

    def _launch(self) -> None:
        link = PolicyProcess(self.launch)
        with self._lock:
            self._require_running()
            self._link = link
        link.start(self.contract, self._wanted_adapter, self.base_hash)
        with self._lock:
            self._require_running()
            self.spec, self.base_hash, self.warnings = link.spec, link.base_hash, link.warnings
            self.computing = link.computing
            self._adapter_id = self._wanted_adapter = link.adapter_id
            self._state, self._error, self._killed_for = "ready", "", ""
            self._restarts.serving(time.monotonic())
            self._arrived.notify_all()

    def _require_running(self) -> None:
        if self._state == "stopped":
            raise RatchetError("policy.stopped", "the policy process was stopped while it started")

    def _kill(self, code: str, why: str) -> None:
        """With the lock held. The reader thread notices the end and tells it."""
        if self._link is not None and not self._killed_for:
            self._killed_for = f"{code}\n{why}"
            self._link.kill()

    def _end(self) -> None:
        with self._lock:
            link, self._link, self._out = self._link, None, None
        if link is not None:
            link.end()

    # -- inside: replies -----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """The reader thread: replies into the queue; after a crash, the next start."""
        while True:
            link = self._link
            if link is None:
                return
            try:
                got = link.receive()
            except (RatchetError, OSError) as error:
                got = None
                if isinstance(error, RatchetError):
                    with self._lock:
                        self._kill("policy.failed", str(error))
            if got is not None:
                self._take(*got)
            elif not self._lost():
                return

    def _take(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        with self._arrived:
            number = message.get("id", 0)
            if message["type"] in ("chunk", "failed"):
                self._answer(message, arrays)
                self._arrived.notify_all()
            future = self._calls.take(number)
            if message["type"] == "swapped":
                self._adapter_id = self._wanted_adapter = message["report"]["new_id"]
                self._error = ""
                self._arrived.notify_all()
            if future is None:
                if message["type"] == "refused":  # the tag that the policy follows leads to something that does not fit
                    self._error = str(remote_error(message["error"]))
                return
        if message["type"] == "refused":
            future.set_exception(remote_error(message["error"]))
        else:
            future.set_result(message["rows"] if message["type"] == "adapters" else message["report"])

    def _answer(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        out = self._out
        if out is None or out.number != message["id"]:
            self._discarded += 1
            return
        self._out = None
        if not out.wanted:
            self._discarded += 1
            return
        self._answered += 1
        if message["type"] == "failed":
            self._replies.append(PolicyFault(message["code"], message["message"]))
        else:
            self._adapter_id = message["adapter_id"]
            self._inference = float(message["seconds"])
            self._replies.append(out.answer(message, arrays))

    def _lost(self) -> bool:
        """The process is gone. True where another one serves in its place."""
        with self._lock:
            if self._state == "stopped":
                return False
            how = self._link.exit_status() if self._link else "not started"
            code, why = (self._killed_for or f"policy.crashed\nthe policy process ended ({how})").split("\n", 1)
        pause = self._restarts.pause(time.monotonic())
        while self._down(code, why, again=pause is not None):
            with self._arrived:
                if self._arrived.wait_for(lambda: self._state == "stopped", pause):
                    return False
            try:
                self._launch()
                return True
            except (RatchetError, OSError) as error:
                code, why = "policy.crashed", f"started again in vain: {error}"
                mends = not isinstance(error, RatchetError) or passes(error.code)
                pause = self._restarts.pause(time.monotonic()) if mends else None
        return False

    def _down(self, code: str, why: str, *, again: bool) -> bool:
        """Tell what happened, and to whoever waits for an answer that none comes. True where another start follows."""
        with self._arrived:
            waiting = self._calls.take_all()
            stopped = self._state == "stopped"
            if not stopped:
                self._state, self._error = "restarting" if again else "failed", why
                self._replies.append(PolicyFault(code, why))
            self._arrived.notify_all()
        for future in waiting:
            future.set_exception(RatchetError(code, why, fix="ask again when the policy is ready"))
        self._end()
        return again and not stopped

    def _call(self, message: dict[str, Any]) -> Future[Any]:
        with self._lock:
            if self._link is None or self._state != "ready":
                return refused(
                    RatchetError("policy.not_ready", f"the policy is {self._state}", fix="ask when it is ready")
                )
            self._numbers += 1
            future = self._calls.add(self._numbers, message["type"])
            if not self._link.send({**message, "id": self._numbers}):
                self._kill("policy.hung", "the policy process takes no messages")
        return future
