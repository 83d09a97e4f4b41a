"""Whether the demo really improves: gain on both tasks over several seeds, each against its own 95 % interval.

Runs `ratchet demo` once per seed in a process of its own, or reads finished run folders, and counts the seeds in which
the gain on task A (after stage 1) and on task B (after stage 2) are both larger than their intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratchet_vla.cli.common import describe_run
from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import SuccessMatrix, difference, measures

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.8  # share of seeds


def interval(value: Interval | None) -> list[float] | None:
    return None if value is None else [round(v, 4) for v in (value.estimate, value.low, value.high)]


def read(folder: Path, seed: int) -> dict[str, Any]:
    """Gains, measures and time of one finished run."""
    matrix = SuccessMatrix.load(folder / "matrix.json")
    facts = json.loads((folder / "run.json").read_text())
    gains = {}
    for stage, task in enumerate(matrix.tasks, 1):
        before, after = matrix.get(0, task), matrix.get(stage, task)
        if before is None or after is None:
            raise SystemExit(f"{folder}: the run is not finished")
        gains[task] = interval(difference(after, before))
    found = measures(matrix)
    return {
        "seed": seed,
        "base_hash": facts["base_hash"],
        "gains": gains,
        "both": all(g is not None and g[1] > 0 for g in gains.values()),
        "rates": {
            t: [cell.rate.estimate if (cell := matrix.get(s, t)) else None for s in matrix.stages]
            for t in matrix.columns
        },
        "measures": {n: interval(getattr(found, n)) for n in ("avg", "nbt", "fwt", "zs")},
        "minutes": facts["seconds"] / 60,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo_seeds", help="one folder per seed goes here")
    parser.add_argument("--quick", action="store_true", help="only read runs that are finished already")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "demo_metaworld.json")
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        folder = options.out / f"seed{seed}"
        if not (folder / "matrix.json").exists():
            if options.quick:
                continue
            command = [sys.executable, "-m", "ratchet_vla.cli.main", "demo", "--seed", str(seed), "--out", str(folder)]
            subprocess.run([*command, "--no-videos", "--part", "learn"], check=True, cwd=ROOT)
        rows.append(read(folder, seed))
    if not rows:
        print("no finished run; leave out --quick to make them", file=sys.stderr)
        return 1
    table = Table(title="gain in points [95 % interval]")
    tasks = list(rows[0]["gains"])
    for column in ("seed", *tasks, "AVG", "NBT", "ZS", "minutes"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{100 * g[0]:+.0f} [{100 * g[1]:+.0f}, {100 * g[2]:+.0f}]" for g in row["gains"].values()]
        scores = [f"{100 * row['measures'][m][0]:.0f}" for m in ("avg", "nbt", "zs")]
        table.add_row(str(row["seed"]), *cells, *scores, f"{row['minutes']:.1f}")
    Console(width=100).print(table)
    share = sum(r["both"] for r in rows) / len(rows)
    facts = describe_run("demo over seeds", "python -m benchmarks.product.demo", goal=GOAL, share=share, seeds=rows)
    options.output.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"demo: {share:.0%} of {len(rows)} seeds improve on both tasks beyond the interval (goal >= {GOAL:.0%})")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
