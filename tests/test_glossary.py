"""A private language creeps back one identifier at a time, and every reader pays for it; the glossary's words stay.

Pinned: former terms occur nowhere in code, docs, tests or benchmarks but where a stored key, an alias or a name in the
world needs them, and no such exception outlives its use; each former term is in the glossary; every former import of
docs/moved.md leads to a module. The check itself is tried on a made-up text.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("agent", "sim", "calibration", "ros2_ws/src", "launch", "benchmarks", "tests", "docs", "models", "robots")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".js", ".html", ".css", ".yaml", ".toml", ""}
# Terms that the field has a word for: as parts of identifiers, however they are joined, and in prose.
FORMER = {
    *("sight", "eyes", "courier", "shelf", "parcel", "parcels", "reception", "ruling", "ruled", "unruled", "workshop"),
    *("happening", "weather", "ledger"),
    *("footage", "referee", "takeover", "judgement", "judgements", "judging", "wiring"),
}
FORMER_PHRASES = ("by heart", "night without anybody")

# These pages and modules are about former terms.
ABOUT = {
    "docs/glossary.md",
    "docs/moved.md",
    "CHANGELOG.md",
    "agent/ratchet_vla/cli/former_names.py",
    "tests/agent/cli/test_former_names.py",
    "tests/test_glossary.py",
}
STORED = "a key or a kind of line in files that exist"
WORLD = "a thing in the world"
ALLOWED = {
    ("agent/ratchet_vla/errors.py", "sight"): "a former error code",
    ("agent/ratchet_vla/cli/policy/evaluate.py", "sight"): STORED,
    ("agent/ratchet_vla/cli/learn/pretrain.py", "eyes"): STORED,
    ("agent/ratchet_vla/cli/nodes/up.py", "courier"): STORED,
    ("tests/ros2_ws/test_up.py", "courier"): STORED,
    ("agent/ratchet_vla/learner/service/events.py", "ruled"): STORED,
    ("agent/ratchet_vla/learner/service/telemetry.py", "ruled"): STORED,
    ("agent/ratchet_vla/learner/service/state.py", "unruled"): STORED,
    ("agent/ratchet_vla/learner/service/learner.py", "unruled"): STORED,
    ("tests/ros2_ws/test_story.py", "unruled"): STORED,
    ("tests/test_earlier_files.py", "ledger"): STORED,
    ("sim/ratchet_sim/metaworld/env.py", "shelf"): WORLD,
    ("sim/ratchet_sim/metaworld/tasks.py", "shelf"): WORLD,
    ("models/README.md", "shelf"): WORLD,
    ("docs/calibration.md", "shelf"): WORLD,
}


def former_terms(text: str) -> set[str]:
    """The former terms in a text: `_sight`, `AdapterShelf` and `by heart`, but not `insight`."""
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}
    prose = " ".join(text.lower().split())
    return (FORMER & parts) | {phrase for phrase in FORMER_PHRASES if phrase in prose}


@functools.cache
def texts() -> dict[str, str]:
    """Path below the repository -> content, of everything that people write; results and golden files are data."""
    paths = [ROOT / page for page in PAGES]
    for top in TOPS:
        paths += [path for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    written = {}
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if "__pycache__" not in name and not name.startswith("tests/golden/"):
            written[name] = path.read_text()
    return written


def test_former_terms_do_not_come_back() -> None:
    used = {
        (name, term) for name, text in texts().items() if name not in ABOUT for term in former_terms(f"{name}\n{text}")
    }
    assert used - set(ALLOWED) == set(), "docs/glossary.md says what it is called now"
    assert set(ALLOWED) - used == set(), "not needed any more"


def test_the_glossary_names_every_former_term() -> None:
    formerly = " ".join(line.split("|")[-2] for line in texts()["docs/glossary.md"].splitlines() if line[:1] == "|")
    known = former_terms(formerly) | former_terms(texts()["docs/glossary.md"].split("\n## ")[0])
    singular = {term.removesuffix("s") for term in FORMER - {"eyes"}} | {"eyes", *FORMER_PHRASES}
    assert singular - known == set()


def test_the_glossary_is_found() -> None:
    for page in ("README.md", "docs/architecture.md"):
        assert "glossary.md" in texts()[page], page


def test_former_imports_lead_to_modules() -> None:
    modules_table = texts()["docs/moved.md"].split("\n## ")[0]
    rows = re.findall(r"^\| `[\w.*]+` \| `([\w.]+)", modules_table, re.MULTILINE)
    roots = [ROOT / root for root in ("agent", "sim", "calibration", "ros2_ws/src/ratchet_ros")]
    assert len(rows) > 250

    def exists(module: str) -> bool:
        place = module.rstrip(".").replace(".", "/")
        return any((root / f"{place}.py").is_file() or (root / place).is_dir() for root in roots)

    assert {module for module in rows if not exists(module)} == set()


def test_the_check_finds_what_it_should() -> None:
    assert former_terms("class AdapterShelf:\n    _sight = insight + COURIER_LOG") == {"shelf", "sight", "courier"}
    assert former_terms("it knows the motion by\nheart; eye_in_hand; overruled; led, gerund") == {"by heart"}
