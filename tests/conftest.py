"""What all tests share: a line about the time that is left."""

from __future__ import annotations

import pytest

from tests.time_left import TimeLeft


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each file for estimates")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist, the controller alone tells
        config.pluginmanager.register(TimeLeft(config), "time-left")
