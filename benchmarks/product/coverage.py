"""Which share of the code's lines and branches the main tests run, processes that they start included.

Knows coverage.py's files of one run of the tests, package by package. Processes that are killed outright leave no file,
and the nodes' tests run in an environment of their own: what these alone reach counts as not run.

    make coverage        # = coverage run -m pytest, then python -m benchmarks.product.coverage

Exit 1 where the share is below `fail_under` of pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import coverage
from rich.console import Console
from rich.table import Table

from benchmarks.harness.results import machine

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "coverage.json"


@dataclass
class Share:
    """Lines and branches, and how many of them ran."""

    lines: int = 0
    lines_run: int = 0
    branches: int = 0
    branches_run: int = 0

    @property
    def percent(self) -> float:
        """Of lines and branches together, as coverage.py counts for `fail_under`."""
        return 100.0 * (self.lines_run + self.branches_run) / max(1, self.lines + self.branches)

    def add(self, summary: Mapping[str, int]) -> None:
        """Add one file, as coverage's JSON sums it up."""
        self.lines += summary["num_statements"]
        self.lines_run += summary["covered_lines"]
        self.branches += summary["num_branches"]
        self.branches_run += summary["covered_branches"]

    def as_dict(self) -> dict[str, Any]:
        """The counts and the percentage, for the results file."""
        return {**asdict(self), "percent": round(self.percent, 2)}


def by_package(files: Mapping[str, Mapping[str, Any]]) -> tuple[Share, dict[str, Share]]:
    """Sum up the files of a JSON report: the whole, and each package (`agent/ratchet_vla/runtime`)."""
    whole, packages = Share(), defaultdict[str, Share](Share)
    for file, report in files.items():
        whole.add(report["summary"])
        packages["/".join(Path(file).parts[:3])].add(report["summary"])
    return whole, dict(sorted(packages.items()))


def main() -> int:
    """Combine the run's files, write the result, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, required=True, help="test processes that the run had; kept beside it")
    processes = parser.parse_args().processes

    measured = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"))
    measured.combine()
    measured.save()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "coverage.json")
        measured.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    whole, packages = by_package(files)

    table = Table("package", "lines", "of them run", "branches", "of them run", "%")
    for name, share in {**packages, "all": whole}.items():
        row = (share.lines, share.lines_run, share.branches, share.branches_run, f"{share.percent:.1f}")
        table.add_row(name, *map(str, row))
    Console().print(table)
    result = {
        "command": "make coverage",
        "machine": machine(coverage=metadata.version("coverage")),
        "processes": processes,
        "whole": whole.as_dict(),
        "packages": {name: share.as_dict() for name, share in packages.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    floor = float(measured.get_option("report:fail_under") or 0.0)  # type: ignore[arg-type]
    print(f"coverage {whole.percent:.1f} % (floor: {floor:.0f} %)")
    return 0 if whole.percent >= floor else 1


if __name__ == "__main__":
    raise SystemExit(main())
