"""What no verb, node or plug-in reaches does not exist for a user; tested code that nobody can call only looks as if.

Pinned: every module is reached from an entry point, however late it is imported or named in a string, or lives in a
package `testing`; every public function and class is mentioned somewhere in the product beside its own definition. What
waits for a later way in is listed with its reason, and leaves the list when it has one. Modules are parsed, not
imported; the check itself is tried on a small tree.
"""

from __future__ import annotations

import ast
import collections
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("agent", "sim", "calibration", "ros2_ws/src/ratchet_ros")
CORRECTIONS = "corrections as training data: no verb trains from stored episodes yet"
DEVICES = "devices of a real arm: no verb or node opens these yet"

WAITING_MODULES = {
    "ratchet_vla.episodes.exchange.samples": CORRECTIONS,
    "ratchet_vla.runtime.teleop.operator": DEVICES,
    "ratchet_vla.runtime.teleop.devices": DEVICES,
}
WAITING_NAMES = {
    "calibration/ratchet_calibration/arms/action_checks.py paced": DEVICES,
    "calibration/ratchet_calibration/cameras/checks.py depth_scale": DEVICES,
    "sim/ratchet_sim/libero/env.py with_image_size": "benchmarks.calibration.drift draws at a camera's real size",
    "sim/ratchet_sim/workers/vector.py close_extras": "gymnasium calls it",
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules(root: Path) -> dict[str, Path]:
    """Import name -> file. The outermost folder with an __init__.py below a top, or the top itself, is a package."""
    found = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            packages = [i for i in range(1, len(parts)) if (root / Path(*parts[:i]) / "__init__.py").exists()]
            if packages:
                name = ".".join(parts[packages[0] - 1 :])
                found[name.removesuffix(".__init__")] = path
    return found


def named_in(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a module imports, at any depth, or names in a string ("ratchet_vla.runtime.inference.worker")."""
    reached: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            reached.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            reached |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[A-Za-z_][\w.]*(:\w+)?", str(node.value)):
            reached.add(str(node.value).split(":")[0])
    return {other for other in reached if other in known}


def entry_points(root: Path, known: dict[str, Path]) -> set[str]:
    """The command, the nodes, and what the project's metadata names (scripts and plug-ins)."""
    metadata = root / "pyproject.toml"
    found = set(re.findall(r'"([\w.]+):[\w.]+"', metadata.read_text() if metadata.exists() else ""))
    for name, path in known.items():
        if path.as_posix().endswith("cli/main.py") or ("ratchet_ros" in name and "\ndef main(" in path.read_text()):
            found.add(name)
    return {name for name in found if name in known}


def unreached(root: Path) -> tuple[set[str], set[str]]:
    """(modules, "file name" of public functions and classes) that nothing in the product reaches."""
    known = modules(root)
    waiting = sorted(entry_points(root, known))
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        fresh = named_in(name, known[name], known) - seen
        seen |= fresh
        waiting += sorted(fresh)
    lost = {n for n, p in known.items() if n not in seen and p.name != "__init__.py" and ".testing" not in n}
    text = "\n".join(p.read_text() for p in known.values())
    text = re.sub(r"^__all__ = \[[^\]]*\]", "", text, flags=re.MULTILINE)  # to be offered is not to be used
    words = collections.Counter(re.findall(r"\b[A-Za-z_]\w+\b", text))
    unused = set()
    for name, path in known.items():
        if name in lost or ".testing" in name:
            continue
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and not node.decorator_list and words[node.name] == 1:
                unused.add(f"{path.relative_to(root).as_posix()} {node.name}")
    return lost, unused


def test_everything_has_a_way_in_or_a_reason() -> None:
    lost, unused = unreached(ROOT)
    assert lost == set(WAITING_MODULES), "wire it in, move it to a package `testing`, or remove it; then the list"
    assert unused == set(WAITING_NAMES)


LATE = """
__all__ = ["nobody_calls_this"]


def used(name):
    return name


def nobody_calls_this():
    pass
"""


def test_the_check_finds_what_it_should(tmp_path: Path) -> None:
    files = {
        "agent/__init__.py": "",
        "agent/cli/__init__.py": "",
        "agent/cli/main.py": "def main():\n    from agent import late\n    late.used('agent.worker')\n\n\nmain()\n",
        "agent/late.py": LATE,
        "agent/worker.py": "",
        "agent/island.py": "import agent.shore\n",
        "agent/shore.py": "",
        "agent/testing/__init__.py": "",
        "agent/testing/double.py": "class Double:\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lost, unused = unreached(tmp_path)
    assert lost == {"agent.island", "agent.shore"}
    assert unused == {"agent/late.py nobody_calls_this"}
