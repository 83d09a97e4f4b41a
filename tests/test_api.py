"""What users build on has to be there tomorrow: a public name is exported on purpose, documented and on the page.

Pinned: every package is public in part or internal for a reason; every public module has an `__all__` whose names exist
and say what they are; docs/api.md is what the code gives; what the pages for extensions name is public; importing the
package costs nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import api_page

ROOT = Path(__file__).resolve().parents[1]
MODULES = [module for modules in api_page.PUBLIC.values() for module in modules]


def test_every_package_is_public_or_internal_for_a_reason() -> None:
    top = ROOT / "agent" / "ratchet_vla"
    packages = {f"ratchet_vla.{path.parent.name}" for path in top.glob("*/__init__.py")}
    packages |= {f"ratchet_vla.{path.stem}" for path in top.glob("*.py") if path.stem != "__init__"}
    known = {*api_page.PUBLIC, *MODULES, *api_page.INTERNAL}
    assert packages - known == set()
    assert set(api_page.INTERNAL) & {*api_page.PUBLIC, *MODULES} == set()
    assert set(api_page.INTERNAL) <= packages


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_say_what_they_are(module: str) -> None:
    names = api_page.exported(module)
    assert names, "no __all__"
    assert [name for name in names if api_page.summary_of(module, name) is None] == [], "no such name"
    assert [entry.name for entry in api_page.names(module) if not entry.summary] == [], "no docstring"


def test_the_page_is_what_the_code_gives() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "run `make api`"


def test_what_the_pages_for_extensions_name_is_public() -> None:
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "extend").glob("*.md")))
    named = {name.rpartition(".")[2] for name in re.findall(r"`((?:\w+\.)*[A-Z][a-z]\w+)`", text)}
    public = {name for module in MODULES for name in api_page.exported(module) or []}
    assert len(named) > 5
    assert named - public == {"Linear"}  # torch's


def test_importing_the_package_costs_nothing() -> None:
    script = "import sys, ratchet_vla.policy, ratchet_vla.learner; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
