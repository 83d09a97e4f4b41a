"""What lies between an observation and the arm's command beside the forward itself, over real DDS between processes.

Two cameras, once 224 x 224 and once 640 x 480. Step by step: frames and state leave a driver's process, and the moment
its command topic has the answer counts; on the way are policy node, policy process (a fake policy) and safety node.
Beside it, the policy's hop alone (observation in, chunk out): ours through shared memory, and openpi's websocket client
with a server that speaks its protocol, where openpi-client installs; and LeRobot's async policy server, where an
environment with it is named. Same machine, same run, same arrays.

    python -m benchmarks.runtime.node_overhead [--quick] [--steps 500] [--lerobot lerobot-env/bin/python]

Exit 1 where the whole chain takes longer than 25 ms at the median with 640 x 480, half a control period at 20 Hz.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.ros_probe import ROOT, arguments, probe, write
from benchmarks.runtime import peers
from ratchet_vla.records import Observation
from ratchet_vla.runtime.inference.client import PolicyClient, PolicyLaunch
from ratchet_vla.testing.fake_contract import arm

GOAL = 0.025


def ours(width: int, height: int, steps: int) -> list[float]:
    """Seconds per request and answer through the policy process and shared memory, the fake policy's own time taken."""
    data = arm("joint_absolute", hz=20.0).to_dict()
    data["cameras"] = [{"name": f"camera{i}", "width": width, "height": height} for i in range(2)]
    from ratchet_vla.contract import RobotContract

    contract = RobotContract.from_dict(data)
    generator = np.random.default_rng(0)
    images = {c.name: generator.integers(0, 256, (height, width, 3), np.uint8) for c in contract.cameras}
    state = {s.name: np.zeros(s.size, np.float32) for s in contract.state}
    launch = PolicyLaunch(module="ratchet_vla.testing.fake_policy_worker", options={"chunk": 8}, nice=0)
    seconds = []
    with PolicyClient(contract, launch) as client:
        for number in range(steps + 20):
            seen = Observation(images, state, "move", float(number), number)
            began = time.perf_counter()
            client.request(seen)
            answers = client.wait(10.0)
            seconds.append(time.perf_counter() - began)
            assert answers
    return seconds[20:]


def spread(seconds: list[float]) -> dict[str, float]:
    p50, p90, p99 = (float(v) for v in np.percentile(seconds, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(seconds), "n": len(seconds)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lerobot", default="", help="python of an environment with lerobot and grpcio")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "node_overhead.json")
    given = parser.parse_args(argv)
    steps = 100 if given.quick else given.steps
    table = Table(title="Seconds beside the forward, 2 cameras, milliseconds")
    for column in ("what", "size", "p50", "p99", "max"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows: dict[str, Any] = {}
    for width, height in ((224, 224), (640, 480)):
        size = f"{width}x{height}"
        chain = probe("overhead_probe", sys.executable, "2", str(width), str(height), str(steps))
        rows[size] = {
            "observation to command": spread([s - chain["forward"] for s in chain["seconds"]]),
            "fake forward": chain["forward"],
            "policy hop, shared memory": spread(ours(width, height, steps)),
        }
        theirs = peers.openpi(width, height, steps)
        rows[size]["policy hop, openpi's websocket client"] = spread(theirs) if theirs else "does not install here"
        if given.lerobot:
            through = peers.lerobot(given.lerobot, width, height, steps)
            rows[size]["policy hop, LeRobot's async server"] = spread(through)
        for name, values in rows[size].items():
            if isinstance(values, dict):
                table.add_row(name, size, *(f"{values[k] * 1e3:.2f}" for k in ("p50", "p99", "max")))
            elif name != "fake forward":
                table.add_row(name, size, str(values), "", "")
    Console(width=100).print(table)
    facts = {
        "steps": steps,
        "rows": rows,
        "peers": {"openpi": peers.OPENPI, "lerobot": "0.6.1" if given.lerobot else ""},
    }
    write(given.output, "runtime.node_overhead", arguments(argv), facts)
    median = rows["640x480"]["observation to command"]["p50"]
    small = rows["224x224"]["observation to command"]["p50"]
    print(
        f"node_overhead: {median * 1e3:.1f} ms at 640x480, {small * 1e3:.1f} ms at 224x224, medians "
        f"(goal below {GOAL * 1e3:.0f} ms)"
    )
    return 0 if median < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
