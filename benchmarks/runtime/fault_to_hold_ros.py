"""How long an arm goes on after each fault, through the ROS nodes: from the blow to the hold at the arm's own topic.

Policy node, policy process and safety node are processes; the driver publishes states at 100 Hz and two cameras at
30 Hz; all traffic is DDS in real time. A killed safety node is not in the table: nothing of ours is left then, and the
robot's own driver has to time out.

    python -m benchmarks.runtime.fault_to_hold_ros [--quick] [--repeats 5]

Exit 1 where a hold took longer than the contract allows for that fault.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.ros_probe import ROOT, arguments, probe, write


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fault_to_hold_ros.json")
    given = parser.parse_args(argv)
    repeats = 1 if given.quick else given.repeats
    told = probe("fault_probe", sys.executable, str(repeats))
    table = Table(title=f"From fault to hold through the nodes, {told['hz']:g} Hz, {repeats} times each")
    for column in ("fault", "seen as", "median ms", "worst ms", "allowed ms", ""):
        table.add_column(column, justify="left" if column in ("fault", "seen as", "") else "right")
    within = 0
    for name, row in told["rows"].items():
        row["within"] = max(row["seconds"]) <= row["allowed"]
        within += row["within"]
        table.add_row(
            name,
            ", ".join(row["codes"]),
            f"{np.median(row['seconds']) * 1e3:.0f}",
            f"{max(row['seconds']) * 1e3:.0f}",
            f"{row['allowed'] * 1e3:.0f}",
            "ok" if row["within"] else "LATE",
        )
    Console(width=100).print(table)
    facts = {"repeats": repeats, "contract": {"hz": told["hz"], "times": told["times"]}, "faults": told["rows"]}
    write(given.output, "runtime.fault_to_hold_ros", arguments(argv), facts)
    count = len(told["rows"])
    worst = max(max(r["seconds"]) for r in told["rows"].values())
    print(f"fault_to_hold_ros: {within} of {count} faults within the contract, worst {worst * 1e3:.0f} ms (goal all)")
    return 0 if within == count else 1


if __name__ == "__main__":
    sys.exit(main())
