"""How long the tests will take on this machine: said at the start, and kept up to date.

Knows how many seconds each file took on the reference machine (durations.json, written by `--record-durations`) and a
measurement of two seconds. Changes nothing about the tests. `python -m tests.time_left N` says it for all of
`make test`, where N processes share the main tests.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ratchet_vla.cli import estimate

DURATIONS = Path(__file__).with_name("durations.json")
UNKNOWN = 0.5  # s, of a test in a file that nobody has timed
FEW = 120.0  # s; below, nothing is said
EVERY = 60.0  # s between two lines
LINT = 45.0  # s, of ruff, typos and mypy without a cache
ROS = "tests/ros2_ws/"


class TimeLeft:
    """Weighs each test by what its file took before. With xdist, lives in the process that hands the tests out."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._known = known_seconds()
        self._weights: dict[str, float] = {}
        self._taken: defaultdict[str, float] = defaultdict(float)
        self._left: estimate.Remaining | None = None
        self._told = 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._begin([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        if not self._weights:  # every worker collects the same tests
            self._begin(ids)

    def _begin(self, tests: Sequence[str]) -> None:
        count = Counter(test.split("::")[0] for test in tests)
        self._weights = {file: self._known.get(file, UNKNOWN * n) / n for file, n in count.items()}
        total = sum(self._weights[file] * n for file, n in count.items())
        if total < FEW or self._config.option.collectonly:
            return
        speed = estimate.measure()
        expected = total * speed.factor / processes(self._config)
        self._left = estimate.Remaining(total, expected)
        self._say(f"about {estimate.minutes(expected)} for {len(tests)} tests on this machine: {speed.sentence()}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self._taken[file] += report.duration
        if report.when != "teardown" or self._left is None:
            return
        self._left.advance(self._weights.get(file, UNKNOWN))
        if time.monotonic() - self._told >= EVERY:
            self._say(f"about {estimate.minutes(self._left.seconds())} left")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.getoption("--record-durations"):
            taken = {file: round(seconds, 1) for file, seconds in self._taken.items()}
            DURATIONS.write_text(json.dumps(dict(sorted({**self._known, **taken}.items())), indent=1) + "\n")

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        terminal: Any = self._config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(text)


def processes(config: pytest.Config) -> int:
    """How many processes run tests at once."""
    return int(getattr(config.option, "numprocesses", None) or 1)


def known_seconds() -> dict[str, float]:
    """Seconds of each test file on the reference machine."""
    known: dict[str, float] = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    return known


def main() -> int:
    """Print the estimate for lint and both runs of tests."""
    speed = estimate.measure()
    known = known_seconds()
    ros = sum(seconds for file, seconds in known.items() if file.startswith(ROS))
    at_once = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    parts = {"lint": LINT, "tests": (sum(known.values()) - ros) / at_once, "ROS tests": ros}
    told = ", ".join(f"{name} {estimate.minutes(seconds * speed.factor)}" for name, seconds in parts.items())
    whole = estimate.minutes(sum(parts.values()) * speed.factor)
    print(f"about {whole} ({told}) on this machine: {speed.sentence()}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
