"""A person beside the arm, as a process: requests in, one JSON object a line; answers and the arm's status out.

Requests are those of `ratchet ctl` (`{"verb": "run", ...}`); a goal is asked for again while the nodes are still coming
up. `{"status": ...}` lines come by themselves, one for each change. An interrupt cancels the goal that runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import Any

import rclpy
from ratchet_msgs import msg
from rclpy.signals import SignalHandlerOptions

from ratchet_ros.messages import dds, qos
from ratchet_ros.tools import ctl
from ratchet_vla.errors import RatchetError

COMING_UP = (
    "ctl.no_answer",
    "goal.no_scene",
    "order.no_word",
    "order.other_adapter",
    "policy.not_ready",
    "ros.no_data",
    "ros.no_safety_node",
    "ros.not_active",
)
AGAIN = 0.2  # s between two looks at nodes that are coming up
SHOWN = ("state", "error", "adapter_id", "running", "motion", "motion_cause", "ticks", "missed", "asked", "restarts")


def say(**line: Any) -> None:
    print(json.dumps(line, default=str), flush=True)


class Beside:
    """One client node, and what it was last told."""

    def __init__(self) -> None:
        self.control = ctl.Control("", 10.0)
        self.shown: dict[str, Any] = {}
        self.control.node.create_subscription(msg.PolicyStatus, "policy_status", self._status, qos.STATUS)

    def _status(self, message: msg.PolicyStatus) -> None:
        seen = {name: getattr(message, name) for name in SHOWN}
        if seen != self.shown:
            self.shown = seen
            say(status=seen, at=time.monotonic())

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """patience: seconds for which a request is repeated while the nodes come up."""
        end = time.monotonic() + float(request.get("patience", 0.0))
        self.control.interrupted = False
        while True:
            try:
                return {"result": ctl.VERBS[request["verb"]](self.control, request), "at": time.monotonic()}
            except RatchetError as error:
                if error.code not in COMING_UP or time.monotonic() > end:
                    return {"error": error.as_dict()}
            until = time.monotonic() + AGAIN
            while time.monotonic() < until:
                self.control.executor.spin_once(timeout_sec=0.05)


def main() -> int:
    dds.load_profile(loopback=True)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    beside = Beside()
    requests: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)  # whoever asked is gone

    def interrupt(number: int, frame: object) -> None:
        beside.control.interrupted = True

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=read, daemon=True).start()
    while True:
        if requests.empty():
            beside.control.executor.spin_once(timeout_sec=0.02)
        elif (request := requests.get()) is not None:
            say(**beside.answer(request))


if __name__ == "__main__":
    raise SystemExit(main())
