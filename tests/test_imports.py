"""Who may import whom. A wrong arrow (the learner reaching into a simulator, the runtime into ROS) costs weeks later.

Pinned: the layers of the house, the homes of heavy or unsafe packages, and packages nobody may use. Every module is
parsed, not imported. The checker itself is tested on a synthetic tree, so that it can fail.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import layers with a larger or equal number, and of equal ones only itself or its listed peers.
LAYERS = {
    "agent.cli": 0,
    "ros2_ws": 0,
    "launch": 0,
    "benchmarks": -1,
    "sim": 1,
    "agent.learner": 1,
    "agent.runtime": 1,
    "agent.episodes": 2,
    "agent.link": 2,
    "agent.adapters": 3,
    "agent.policy": 4,
    "agent.records": 5,
    "agent.contract": 5,
    "agent.errors": 6,
}
PEERS = {("sim", "agent.runtime"), ("agent.records", "agent.contract"), ("agent.contract", "agent.records")}
HOMES = {
    "rclpy": ("ros2_ws",),
    "mujoco": ("sim", "benchmarks"),
    "libero": ("sim", "benchmarks"),
    "metaworld": ("sim", "benchmarks"),
    "robosuite": ("sim", "benchmarks"),
    "zmq": ("agent.link",),
}
FORBIDDEN = {"timm", "torchvision", "lerobot", "pickle", "dill", "joblib"}


def layer_of(name: str) -> str | None:
    matches = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    return max(matches, key=len, default=None)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def violations(root: Path) -> list[str]:
    found = []
    for top in ("agent", "sim", "calibration", "benchmarks", "ros2_ws", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            mine = layer_of(module)
            for name in sorted(imported(path)):
                package = name.split(".")[0]
                if package in FORBIDDEN:
                    found.append(f"{module} imports {package}, which nothing here may use")
                home = HOMES.get(package)
                if home and not any(module == h or module.startswith(h + ".") for h in home):
                    found.append(f"{module} imports {package}, whose home is {' and '.join(home)}")
                theirs = layer_of(name)
                if theirs is None or mine is None or theirs == mine:
                    continue
                if LAYERS[theirs] < LAYERS[mine] or (LAYERS[theirs] == LAYERS[mine] and (mine, theirs) not in PEERS):
                    found.append(f"{module} ({mine}) imports {name} ({theirs}), which lies above or beside it")
    return found


def test_the_house_keeps_its_rules() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("agent/learner/bad.py", "import sim.vector"),
        ("agent/learner/bad.py", "from sim import registry"),
        ("agent/policy/bad.py", "from agent.adapters import lora"),
        ("agent/runtime/bad.py", "import rclpy"),
        ("agent/runtime/bad.py", "from agent.learner import grpo"),
        ("agent/policy/bad.py", "import mujoco"),
        ("agent/episodes/bad.py", "import zmq"),
        ("agent/episodes/bad.py", "import pickle"),
        ("sim/bad.py", "import agent.cli.main"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert violations(tmp_path)
    path.write_text("from agent.errors import RatchetError\n")
    assert violations(tmp_path) == []
