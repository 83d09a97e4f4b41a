"""Who may import whom. A wrong arrow (the learner reaching into a simulator, the runtime into ROS) costs weeks later.

Pinned: the layers of the house, the homes of heavy or unsafe packages, packages nobody may use, and loading that would
execute what it loads. Every module is parsed, not imported. The checker itself is tested on a synthetic tree.
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
    "agent.testing": 0,  # may use what it stands for; nothing but tests and benchmarks uses it
    "sim.testing": 0,
    "sim": 1,
    "agent.learner": 1,
    "agent.runtime": 1,
    "agent.episodes": 2,
    "agent.link": 2,
    "agent.adapters": 3,
    "agent.policy": 4,
    "agent.records": 5,
    "agent.contract": 5,
    "agent.storage": 5,
    "agent.errors": 6,
    "agent.paths": 6,
}
# What calibration may know of the rest; it stands outside the layers.
CALIBRATION = ("agent.contract", "agent.records", "agent.storage", "agent.errors", "calibration")
OURS = ("agent", "sim", "calibration", "benchmarks", "ros2_ws", "launch")
PEERS = {("sim", "agent.runtime"), ("agent.records", "agent.contract"), ("agent.contract", "agent.records")}
HOMES = {
    "rclpy": ("ros2_ws",),
    "mujoco": ("sim", "benchmarks"),
    "libero": ("sim", "benchmarks"),
    "metaworld": ("sim", "benchmarks"),
    "robosuite": ("sim", "benchmarks"),
    "zmq": ("agent.link", "benchmarks"),
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
        elif isinstance(node, ast.ImportFrom):
            names.add(".relative")
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            names.add(name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ".computed")
    return names


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def unsafe(path: Path) -> list[str]:
    """Calls that execute what they load."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if ast.unparse(node.func) == "torch.load" and options.get("weights_only") is not True:
            found.append("calls torch.load without weights_only=True")
        if "trust_remote_code" in options and options["trust_remote_code"] is not False:
            found.append("trusts remote code")
        if _name(node.func) in ("load", "load_all") and ast.unparse(node.func).startswith("yaml."):
            found.append("calls yaml.load instead of yaml.safe_load")
        if options.get("allow_pickle"):
            found.append("lets numpy unpickle")
    return found


def violations(root: Path) -> list[str]:
    found = []
    for top in OURS:
        for path in sorted((root / top).rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            mine = layer_of(module)
            found += [f"{module} {what}" for what in unsafe(path)]
            if mine is None and module != "agent" and top != "calibration":
                found.append(f"{module} has no layer: add it to LAYERS")
            for name in sorted(imported(path)):
                if name in (".relative", ".computed"):
                    found.append(f"{module} has a {name[1:]} import, which cannot be held to any rule")
                    continue
                package = name.split(".")[0]
                if package in FORBIDDEN:
                    found.append(f"{module} imports {package}, which nothing here may use")
                home = HOMES.get(package)
                if home and not any(module == h or module.startswith(h + ".") for h in home):
                    found.append(f"{module} imports {package}, whose home is {' and '.join(home)}")
                if (
                    top == "calibration"
                    and package in OURS
                    and not any(name == known or name.startswith(known + ".") for known in CALIBRATION)
                ):
                    found.append(f"{module} imports {name}; calibration knows contract and records at most")
                if package == "calibration" and mine is not None and LAYERS[mine] > 1:
                    found.append(f"{module} imports {name}, which lies above it")
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
        ("agent/adapters/bad.py", "import agent.runtime.robot"),
        ("agent/link/bad.py", "from agent import cli"),
        ("agent/records.py", "import agent.policy.protocol"),
        ("agent/errors.py", "import agent.contract"),
        ("agent/policy/bad.py", "import timm"),
        ("agent/learner/bad.py", "import zmq.auth"),
        ("agent/learner/bad.py", "from ..runtime import robot"),
        ("agent/learner/bad.py", "importlib.import_module('sim.vector')"),
        ("agent/learner/bad.py", "importlib.import_module(name)"),
        ("agent/policy/bad.py", "import calibration.camera"),
        ("agent/unknown.py", "import json"),
        ("agent/runtime/bad.py", "from agent.testing.fake_arm import FakeArm"),
        ("sim/bad.py", "import sim.testing.libero_reference"),
        ("sim/bad.py", "import agent.cli.main"),
        ("sim/bad.py", "from agent.learner import grpo"),
        ("calibration/bad.py", "import agent.policy.protocol"),
        ("calibration/bad.py", "from sim import base"),
        ("benchmarks/bad.py", "import rclpy"),
        ("ros2_ws/src/bad.py", "import robosuite"),
        ("agent/policy/bad.py", "torch.load(path)"),
        ("agent/policy/bad.py", "torch.load(path, weights_only=False)"),
        ("agent/policy/bad.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        ("agent/policy/bad.py", "yaml.load(text)"),
        ("sim/bad.py", "np.load(path, allow_pickle=True)"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert violations(tmp_path)
    path.unlink()
    good = tmp_path / module.replace("unknown.py", "policy/good.py")
    good.parent.mkdir(parents=True, exist_ok=True)
    good.write_text("from agent.errors import RatchetError\ntorch.load(path, weights_only=True)\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("agent/learner/good.py", "import agent.episodes.recorder, agent.link.wire, agent.adapters.lora"),
        ("agent/runtime/good.py", "from agent.policy.protocol import Policy"),
        ("agent/adapters/good.py", "from agent import contract, errors, records"),
        ("agent/link/good.py", "import zmq"),
        ("sim/good.py", "import mujoco, agent.runtime.robot"),
        ("ros2_ws/src/good.py", "import rclpy, agent.runtime.loop, sim.robot"),
        ("calibration/good.py", "import agent.contract, agent.records, agent.errors, calibration.camera"),
        ("agent/cli/good.py", "import sim.registry, calibration.camera, agent.learner.grpo"),
    ],
)
def test_a_right_arrow_is_allowed(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []
