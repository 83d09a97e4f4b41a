"""The control process's end of the policy process: start it, ask it, exchange its adapter, notice that it is gone.

Knows requests, answers and restarts. Imports no model code: neither torch nor transformers reach the process that holds
the arm. A dead, hanging or swapping policy is only a late chunk, which the safety filter knows how to handle.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.episodes.success_rules import require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Observation
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


TAKES_NO_MESSAGES = "the policy process takes no messages"


@dataclass(frozen=True)
class PolicyLoss:
    """Why the policy process no longer serves: a stable code and a reason in words."""

    code: str
    reason: str


class PolicyClient:
    """A ChunkSource over a policy in another process.

    Methods are safe from any thread and never wait for the policy, except `start`, `wait` and `stop`. The thread
    "policy-replies" reads answers, notices that the process is gone and starts the next one; every other thread only
    sends. Sampling is greedy until `sample` is called.
    """

    def __init__(self, contract: RobotContract, launch: PolicyLaunch) -> None:
        self.contract = contract
        self.launch = launch
        self.spec: PolicySpec | None = None
        self.base_hash = ""
        self.warnings: list[str] = []
        self.computing = ""  # the dtype of the policy's products and why, in words
        self._adapter_id = ""
        self._restart_adapter = str(launch.options.get("adapter", ""))  # that the next process starts with
        self._state = "stopped"
        self._error = ""
        self._link: PolicyProcess | None = None
        self._reader: threading.Thread | None = None
        # Protects every private field here. Reentrant, as `_kill` is called with it held; never held while the process
        # is waited for, so that the control loop's `poll` and `request` return at once.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # a reply, another state, or the end
        self._replies: deque[Reply] = deque()
        self._open_request: Request | None = None  # the chunk that was asked for and not answered
        self._calls = Calls()
        self._last_number = 0  # of requests and calls alike
        self._asked = 0
        self._answered = 0
        self._discarded = 0
        self._restarts = Restarts(launch.restarts)
        self._inference_s = 0.0
        self._kill_reason: PolicyLoss | None = None  # set before this client kills the process itself
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
            self._state = "failed"
            self._error = str(error)
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
            self._changed.notify_all()
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
        """Whether a chunk may be requested now."""
        return self._state == "ready" and self._open_request is None

    def request(self, observation: Observation, ahead: Ahead | None = None) -> None:
        """Ask for a chunk of this observation. Raises RatchetError policy.not_ready unless `ready`."""
        with self._lock:
            spec = self.spec
            link = self._link
            frames = link.frames if link is not None else None
            if not self.ready or link is None or frames is None or spec is None:
                raise RatchetError("policy.not_ready", f"the policy is {self._state}", fix="ask when `ready` is true")
            state = [observation.state[name] for name in spec.state]
            slot, sequence = frames.write(
                [observation.images[name] for name in spec.cameras],
                np.concatenate(state).astype(np.float32) if state else np.zeros(0, np.float32),
            )
            noise = self._sampling.draw((spec.chunk, len(spec.action_names)))
            arrays: dict[str, Any] = {} if noise is None else {"noise": noise}
            if ahead is not None:
                arrays["committed"] = np.asarray(ahead.previous_actions, np.float32)
            self._last_number += 1
            message = {
                "type": "infer",
                "id": self._last_number,
                "slot": slot,
                "sequence": sequence,
                "instruction": observation.instruction,
                "temperature": self._sampling.temperature,
                "delay": ahead.delay if ahead else 0,
            }
            self._open_request = Request(
                self._last_number,
                observation.stamp,
                observation.sequence,
                self._sampling.temperature,
                time.monotonic(),
            )
            self._asked += 1
            if not link.send(message, arrays):
                self._kill("policy.hung", TAKES_NO_MESSAGES)

    def poll(self) -> list[Reply]:
        """The replies since the last call; kills a process that has not answered for too long."""
        with self._lock:
            request = self._open_request
            if request is not None and time.monotonic() - request.sent > self.launch.hang_timeout:
                self._kill("policy.hung", f"no answer for {self.launch.hang_timeout} s")
            replies = list(self._replies)
            self._replies.clear()
            return replies

    def wait(self, timeout: float) -> list[Reply]:
        """As `poll`, but wait for a reply at most this long, in seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._replies), timeout)
        return self.poll()

    def forget(self) -> None:
        """Drop chunks that are here or on their way; faults stay."""
        with self._lock:
            if self._open_request is not None:
                self._open_request.wanted = False
            faults: deque[Reply] = deque(reply for reply in self._replies if isinstance(reply, PolicyFault))
            self._discarded += len(self._replies) - len(faults)
            self._replies = faults

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
        """What the process is doing, and counters since this client was made."""
        with self._lock:
            request = self._open_request
            return PolicyStatus(
                state="busy" if self._state == "ready" and request is not None else self._state,
                pid=self._link.pid if self._link else 0,
                base_hash=self.base_hash,
                adapter_id=self._adapter_id,
                swapping=self._calls.swapping,
                asked=self._asked,
                answered=self._answered,
                discarded=self._discarded,
                restarts=self._restarts.total,
                busy_for=time.monotonic() - request.sent if request else 0.0,
                inference=self._inference_s,
                error=self._error,
            )

    # -- inside: the process -------------------------------------------------------------------------------------

    def _launch(self) -> None:
        link = PolicyProcess(self.launch)
        with self._lock:
            self._require_running()
            self._link = link
        link.start(self.contract, self._restart_adapter, self.base_hash)
        with self._lock:
            self._require_running()
            self.spec = link.spec
            self.base_hash = link.base_hash
            self.warnings = link.warnings
            self.computing = link.computing
            self._adapter_id = link.adapter_id
            self._restart_adapter = link.adapter_id
            self._state = "ready"
            self._error = ""
            self._kill_reason = None
            self._restarts.serving(time.monotonic())
            self._changed.notify_all()

    def _require_running(self) -> None:
        if self._state == "stopped":
            raise RatchetError("policy.stopped", "the policy process was stopped while it started")

    def _kill(self, code: str, reason: str) -> None:
        """Kill the process, once; the lock must be held. The reader thread notices the end and reports this reason."""
        if self._link is not None and self._kill_reason is None:
            self._kill_reason = PolicyLoss(code, reason)
            self._link.kill()

    def _end(self) -> None:
        with self._lock:
            link = self._link
            self._link = None
            self._open_request = None
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
                reply = link.receive()
            except (RatchetError, OSError) as error:
                reply = None
                if isinstance(error, RatchetError):
                    with self._lock:
                        self._kill("policy.failed", str(error))
            if reply is not None:
                message, arrays = reply
                self._take(message, arrays)
            elif not self._start_again():
                return

    def _take(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        with self._changed:
            number = message.get("id", 0)
            if message["type"] in ("chunk", "failed"):
                self._answer(message, arrays)
                self._changed.notify_all()
            future = self._calls.take(number)
            if message["type"] == "swapped":
                self._adapter_id = message["report"]["new_id"]
                self._restart_adapter = self._adapter_id
                self._error = ""
                self._changed.notify_all()
            if future is None:
                if message["type"] == "refused":  # the tag that the policy follows leads to something that does not fit
                    self._error = str(remote_error(message["error"]))
                return
        if message["type"] == "refused":
            future.set_exception(remote_error(message["error"]))
        else:
            future.set_result(message["rows"] if message["type"] == "adapters" else message["report"])

    def _answer(self, message: dict[str, Any], arrays: wire.Arrays) -> None:
        """A chunk, or the fault in its place; the lock must be held."""
        request = self._open_request
        if request is None or request.number != message["id"]:
            self._discarded += 1
            return
        self._open_request = None
        if not request.wanted:
            self._discarded += 1
            return
        self._answered += 1
        if message["type"] == "failed":
            self._replies.append(PolicyFault(message["code"], message["message"]))
        else:
            self._adapter_id = message["adapter_id"]
            self._inference_s = float(message["seconds"])
            self._replies.append(request.answer(message, arrays))

    def _start_again(self) -> bool:
        """The process is gone: start the next one. Reader thread. True where one serves in its place."""
        with self._lock:
            if self._state == "stopped":
                return False
            loss = self._kill_reason
            if loss is None:
                how = self._link.exit_status() if self._link else "not started"
                loss = PolicyLoss("policy.crashed", f"the policy process ended ({how})")
        pause_s = self._restarts.pause(time.monotonic())
        while True:
            stopped = self._report_loss(loss, restarting=pause_s is not None)
            if stopped or pause_s is None:
                return False
            with self._changed:
                if self._changed.wait_for(lambda: self._state == "stopped", pause_s):
                    return False
            try:
                self._launch()
                return True
            except (RatchetError, OSError) as error:
                loss = PolicyLoss("policy.crashed", f"started again in vain: {error}")
                may_pass = not isinstance(error, RatchetError) or passes(error.code)
                pause_s = self._restarts.pause(time.monotonic()) if may_pass else None

    def _report_loss(self, loss: PolicyLoss, *, restarting: bool) -> bool:
        """Tell the control loop, and whoever waits for an answer that none comes. True where `stop` came before."""
        with self._changed:
            futures = self._calls.take_all()
            stopped = self._state == "stopped"
            if not stopped:
                self._state = "restarting" if restarting else "failed"
                self._error = loss.reason
                self._replies.append(PolicyFault(loss.code, loss.reason))
            self._changed.notify_all()
        for future in futures:  # outside the lock: a future's callbacks may call this client
            future.set_exception(RatchetError(loss.code, loss.reason, fix="ask again when the policy is ready"))
        self._end()
        return stopped

    def _call(self, message: dict[str, Any]) -> Future[Any]:
        with self._lock:
            if self._link is None or self._state != "ready":
                return refused(
                    RatchetError("policy.not_ready", f"the policy is {self._state}", fix="ask when it is ready")
                )
            self._last_number += 1
            future = self._calls.add(self._last_number, message["type"])
            if not self._link.send({**message, "id": self._last_number}):
                self._kill("policy.hung", TAKES_NO_MESSAGES)
        return future
