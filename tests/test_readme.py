"""The README's tree is how a new reader finds the way; a folder that is not in it might as well be hidden.

Pinned: every package has its line, no line names a folder that is gone, and every dependency of the project has its
reason in the table.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

PACKAGES = (
    "agent/ratchet_vla",
    "sim/ratchet_sim",
    "calibration/ratchet_calibration",
    "ros2_ws/src/ratchet_ros/ratchet_ros",
)
# Folders of these are named one level deep in the tree; what lies deeper says in its own docstring what it is.
DEEPER = ("agent/ratchet_vla/cli", "ros2_ws/src/ratchet_ros/ratchet_ros")


def test_the_tree_is_the_tree() -> None:
    listed = set(re.findall(r"^([a-z0-9_]+(?:/[a-z0-9_]+)*)/ ", README, re.MULTILINE))
    packages = {
        path.parent.relative_to(ROOT).as_posix() for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")
    }
    shown = {p for p in packages if not any(p.startswith(top + "/") for top in DEEPER)}
    assert shown - listed == set()
    assert {folder for folder in listed if not (ROOT / folder).is_dir()} == set()


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
    page = (ROOT / "docs" / "architecture.md").read_text().replace("ros2_ws/…/", "ratchet_ros/")
    named = set(re.findall(r"[\w/]+/\w+\.py", page))
    homes = (ROOT, ROOT / "agent" / "ratchet_vla", ROOT / "ros2_ws" / "src" / "ratchet_ros", ROOT / "sim")
    assert len(named) > 30
    assert {name for name in named if not any((home / name).is_file() for home in homes)} == set()


def test_pages_for_extensions_name_what_is_there() -> None:
    """`policy/protocol.py`, `ratchet_sim/base.py`, `robots/`: below the repository, a source root or a package."""
    homes = [ROOT, *(ROOT / root for root in ("agent", "sim", "calibration", "ros2_ws/src/ratchet_ros"))]
    homes += [ROOT / "agent" / "ratchet_vla"]
    for page in sorted((ROOT / "docs" / "extend").glob("*.md")):
        named = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", page.read_text()))
        assert named, page.name
        assert {name for name in named if not any((home / name).exists() for home in homes)} == set(), page.name
