"""A figure is found by its script's name alone, whichever group it lies in; two scripts of one name would be confused.

Pinned: every script of `benchmarks` lies in a group, file names are unique over all groups, and a results file's script
is there. Nothing is run.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"runtime", "learner", "adapters", "episodes", "calibration", "science", "product", "harness"}
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def test_every_script_has_its_group_and_a_name_of_its_own() -> None:
    assert {path.relative_to(ROOT / "benchmarks").parts[0] for path in SCRIPTS} == GROUPS
    assert [name for name, count in Counter(path.name for path in SCRIPTS).items() if count > 1] == []


def test_commands_in_the_documents_name_scripts_that_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"python -m (benchmarks\.[\w.]+)", page.read_text())}
    assert len(named) > 10
    assert {name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file()} == set()
