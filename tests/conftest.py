"""What all tests share: a line about the time that is left."""

from __future__ import annotations

import os

# As the Makefile does, for whoever starts pytest by hand: test processes and their simulators share the cores, and
# threads that wait for each other made the same tests four times slower. Before anything imports torch.
for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402

from tests.time_left import TimeLeft  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each file for estimates")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist, the controller alone tells
        config.pluginmanager.register(TimeLeft(config), "time-left")
