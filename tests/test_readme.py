"""The README's tree is how a new reader finds the way; a module that is not in it might as well be hidden.

Pinned: every module has its line, no line names a file that is gone, and every
dependency of the project has its reason in the table.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


TOPS = ("agent", "sim", "calibration", "benchmarks", "ros2_ws/src/ratchet_ros/ratchet_ros")


def test_the_tree_is_the_tree() -> None:
    tree = README.replace("ros2_ws/src/ratchet_ros/…/", "ros2_ws/src/ratchet_ros/ratchet_ros/")
    listed = set(re.findall(rf"^((?:{'|'.join(TOPS)})/\S+\.py) ", tree, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT)) for top in TOPS for path in (ROOT / top).rglob("*.py") if path.name != "__init__.py"
    }
    assert listed == there


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["sim"],
        *project["optional-dependencies"]["dev"],
    ]
    names = {re.split(r"[<>=\[]", w)[0].strip().lower() for w in wanted}
    table = README[README.index("## Dependencies") :].lower()
    assert {n for n in names if n not in table} == set()


def test_the_picture_of_the_way_round_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().replace("ros2_ws/…/", "ros2_ws/src/ratchet_ros/ratchet_ros/")
    named = set(re.findall(r"[\w/]+/\w+\.py", page))
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).is_file()} == set()
