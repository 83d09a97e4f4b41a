"""Who may import whom. A wrong arrow (the learner reaching into a simulator, the runtime into ROS) costs weeks later.

Pinned: the layers of the house, the order among the things in every folder (no two need each other, however late they
import), small folders that say what they are, the homes of heavy or unsafe packages, packages nobody may use, and
loading that would execute what it loads. Every module is parsed, not imported. The checker itself is tested on a
synthetic tree.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Where import names are found: folder -> the names below it start here.
SOURCES = {
    "agent": "agent",
    "sim": "sim",
    "calibration": "calibration",
    "ros2_ws/src/ratchet_ros/ratchet_ros": "ros2_ws/src/ratchet_ros",
    "benchmarks": "",
    "launch": "",
}
# A module may import layers with a larger or equal number, and of equal ones only itself or its listed peers.
LAYERS = {
    "benchmarks": -1,
    "ratchet_vla.cli": 0,
    "ratchet_ros": 0,
    "launch": 0,
    "ratchet_vla.testing": 0,  # may use what it stands for; nothing but tests and benchmarks uses it
    "ratchet_sim.testing": 0,
    "ratchet_sim": 1,
    "ratchet_vla.learner": 1,
    "ratchet_vla.runtime": 1,
    "ratchet_vla.plan": 1,
    "ratchet_vla.episodes": 2,
    "ratchet_vla.link": 2,
    "ratchet_vla.adapters": 3,
    "ratchet_vla.policy": 4,
    "ratchet_vla.records": 5,
    "ratchet_vla.contract": 5,
    "ratchet_vla.storage": 6,
    "ratchet_vla.paths": 7,
    "ratchet_vla.errors": 7,
}
# What calibration may know of the rest; it stands outside the layers.
CALIBRATION = ("ratchet_vla.contract", "ratchet_vla.records", "ratchet_vla.storage", "ratchet_vla.errors")
OURS = ("ratchet_vla", "ratchet_sim", "ratchet_calibration", "ratchet_ros", "benchmarks", "launch")
PEERS = {("ratchet_sim", "ratchet_vla.runtime")}
HOMES = {
    "rclpy": ("ratchet_ros", "benchmarks.runtime.ros"),
    "mujoco": ("ratchet_sim", "benchmarks"),
    "libero": ("ratchet_sim", "benchmarks"),
    "metaworld": ("ratchet_sim", "benchmarks"),
    "robosuite": ("ratchet_sim", "benchmarks"),
    "zmq": ("ratchet_vla.link", "benchmarks"),
}
FORBIDDEN = {"timm", "torchvision", "lerobot", "pickle", "dill", "joblib", "tests"}
LARGEST_FOLDER = 12


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> str | None:
    matches = [layer for layer in LAYERS if inside(name, layer)]
    return max(matches, key=len, default=None)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Import name and file of everything in the house."""
    for folder, source in SOURCES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / source).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


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
    for module, path in modules(root):
        layer = layer_of(module)
        calibration = inside(module, "ratchet_calibration")
        found += [f"{module} {what}" for what in unsafe(path)]
        if layer is None and module != "ratchet_vla" and not calibration:
            found.append(f"{module} has no layer: add it to LAYERS")
        for name in sorted(imported(path)):
            if name in (".relative", ".computed"):
                found.append(f"{module} has a {name[1:]} import, which cannot be held to any rule")
                continue
            package = name.split(".")[0]
            if package in FORBIDDEN:
                found.append(f"{module} imports {package}, which nothing here may use")
            home = HOMES.get(package)
            if home and not any(inside(module, h) for h in home):
                found.append(f"{module} imports {package}, whose home is {' and '.join(home)}")
            if calibration and package in OURS and package != "ratchet_calibration":
                if not any(inside(name, known) for known in CALIBRATION):
                    found.append(f"{module} imports {name}; calibration knows contract and records at most")
                continue
            if package == "ratchet_calibration" and layer is not None and LAYERS[layer] > 1:
                found.append(f"{module} imports {name}, which lies above it")
            theirs = layer_of(name)
            if theirs is None or layer is None or theirs == layer:
                continue
            below = LAYERS[theirs] > LAYERS[layer]
            beside = LAYERS[theirs] == LAYERS[layer] and (layer, theirs) in PEERS
            if not (below or beside):
                found.append(f"{module} ({layer}) imports {name} ({theirs}), which lies above or beside it")
    return found


def cycles(root: Path) -> list[str]:
    """Things in one folder, files or folders, that need each other: each must have its place above or below."""
    house = dict(modules(root))
    needs: dict[str, dict[str, dict[str, str]]] = {}  # folder -> thing -> needed thing -> who imports what
    for module, path in house.items():
        if path.name == "__init__.py":
            continue  # a package's own door to what is inside
        for name in imported(path):
            target = name
            while target and target not in house:
                target = target.rpartition(".")[0]
            ours, theirs = module.split("."), target.split(".")
            shared = 0
            while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
                shared += 1
            if shared == 0 or shared in (len(ours), len(theirs)):
                continue
            folder = ".".join(ours[:shared])
            needs.setdefault(folder, {}).setdefault(ours[shared], {})[theirs[shared]] = f"{module} -> {target}"
    found = []
    for folder, things in sorted(needs.items()):
        for thing in sorted(things):
            way = _way_back(things, thing)
            if way:
                found.append(f"in {folder}: " + "; ".join(things[a][b] for a, b in itertools.pairwise(way)))
    return found


def _way_back(things: dict[str, dict[str, str]], start: str) -> list[str]:
    """From a thing along its needs back to itself; empty where there is no such way."""
    waiting = [[start]]
    seen: set[str] = set()
    while waiting:
        way = waiting.pop()
        for needed in sorted(things.get(way[-1], {})):
            if needed == start:
                return [*way, start]
            if needed not in seen:
                seen.add(needed)
                waiting.append([*way, needed])
    return []


def untidy(root: Path) -> list[str]:
    """Folders that are too large or do not say what they are, and names that repeat their folder's."""
    found = []
    for folder, source in SOURCES.items():
        for init in sorted((root / folder).rglob("__init__.py")):
            package = ".".join(init.parent.relative_to(root / source).parts)
            words = ast.get_docstring(ast.parse(init.read_text())) or ""
            if len([line for line in words.splitlines() if line.strip()]) < 3:
                found.append(f"{package} does not say what it knows, what it does not, and where to begin")
            files = [path for path in init.parent.glob("*.py") if not path.name.startswith("__")]
            if len(files) > LARGEST_FOLDER:
                found.append(f"{package} has {len(files)} modules: make rooms")
            name = init.parent.name
            repeated = [p.stem for p in files if p.stem == name or p.stem.startswith((f"{name}_", f"{name[:-1]}_"))]
            found += [f"{package}.{stem} repeats its folder's name" for stem in repeated]
    return found


def test_the_house_keeps_its_rules() -> None:
    assert violations(ROOT) == []


def test_no_two_things_in_a_folder_need_each_other() -> None:
    assert cycles(ROOT) == []


def test_folders_are_small_and_say_what_they_are() -> None:
    assert untidy(ROOT) == []


def path_of(root: Path, module: str) -> Path:
    homes = {"ratchet_vla": "agent", "ratchet_sim": "sim", "ratchet_calibration": "calibration"}
    homes["ratchet_ros"] = "ros2_ws/src/ratchet_ros"
    return root / homes.get(module.split("/", 1)[0], "") / module


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ratchet_vla/learner/bad.py", "import ratchet_sim.workers.vector"),
        ("ratchet_vla/learner/bad.py", "from ratchet_sim import registry"),
        ("ratchet_vla/policy/bad.py", "from ratchet_vla.adapters import lora"),
        ("ratchet_vla/runtime/bad.py", "import rclpy"),
        ("ratchet_vla/runtime/bad.py", "from ratchet_vla.learner import update"),
        ("ratchet_vla/policy/bad.py", "import mujoco"),
        ("ratchet_vla/episodes/bad.py", "import zmq"),
        ("ratchet_vla/episodes/bad.py", "import pickle"),
        ("ratchet_vla/adapters/bad.py", "import ratchet_vla.runtime.robots"),
        ("ratchet_vla/link/bad.py", "from ratchet_vla import cli"),
        ("ratchet_vla/plan/bad.py", "from ratchet_vla.learner import update"),
        ("ratchet_vla/records.py", "import ratchet_vla.policy.protocol"),
        ("ratchet_vla/storage/bad.py", "from ratchet_vla.adapters import identity"),
        ("ratchet_vla/errors.py", "import ratchet_vla.contract"),
        ("ratchet_vla/policy/bad.py", "import timm"),
        ("ratchet_vla/learner/bad.py", "import zmq.auth"),
        ("ratchet_vla/learner/bad.py", "from ..runtime import robots"),
        ("ratchet_vla/learner/bad.py", "importlib.import_module('ratchet_sim.workers')"),
        ("ratchet_vla/learner/bad.py", "importlib.import_module(name)"),
        ("ratchet_vla/policy/bad.py", "import ratchet_calibration.cameras"),
        ("ratchet_vla/unknown.py", "import json"),
        ("ratchet_vla/runtime/bad.py", "from ratchet_vla.testing.fake_arm import FakeArm"),
        ("ratchet_sim/bad.py", "import ratchet_sim.testing.libero_reference"),
        ("ratchet_sim/bad.py", "import ratchet_vla.cli.main"),
        ("ratchet_sim/bad.py", "from ratchet_vla.learner import update"),
        ("ratchet_calibration/bad.py", "import ratchet_vla.policy.protocol"),
        ("ratchet_calibration/bad.py", "from ratchet_sim import base"),
        ("benchmarks/bad.py", "import rclpy"),
        ("ratchet_ros/bad.py", "import robosuite"),
        ("ratchet_vla/policy/bad.py", "torch.load(path)"),
        ("ratchet_vla/policy/bad.py", "torch.load(path, weights_only=False)"),
        ("ratchet_vla/policy/bad.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        ("ratchet_vla/policy/bad.py", "yaml.load(text)"),
        ("ratchet_sim/bad.py", "np.load(path, allow_pickle=True)"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, module: str, line: str) -> None:
    path = path_of(tmp_path, module)
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert violations(tmp_path)
    path.unlink()
    good = path_of(tmp_path, module.replace("unknown.py", "policy/good.py"))
    good.parent.mkdir(parents=True, exist_ok=True)
    good.write_text("from ratchet_vla.errors import RatchetError\ntorch.load(path, weights_only=True)\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (
            "ratchet_vla/learner/good.py",
            "import ratchet_vla.episodes.recorder, ratchet_vla.link.wire, ratchet_vla.adapters",
        ),
        ("ratchet_vla/runtime/good.py", "from ratchet_vla.policy.protocol import Policy"),
        ("ratchet_vla/adapters/good.py", "from ratchet_vla import contract, errors, records"),
        ("ratchet_vla/contract/good.py", "from ratchet_vla.storage import documents"),
        ("ratchet_vla/link/good.py", "import zmq"),
        ("ratchet_sim/good.py", "import mujoco, ratchet_vla.runtime.robots"),
        ("ratchet_ros/good.py", "import rclpy, ratchet_vla.runtime.control, ratchet_sim.robot"),
        (
            "ratchet_calibration/good.py",
            "import ratchet_vla.contract, ratchet_vla.records, ratchet_calibration.cameras",
        ),
        (
            "ratchet_vla/cli/good.py",
            "import ratchet_sim.registry, ratchet_calibration.cameras, ratchet_vla.learner.update",
        ),
    ],
)
def test_a_right_arrow_is_allowed(tmp_path: Path, module: str, line: str) -> None:
    path = path_of(tmp_path, module)
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from ratchet_vla.runtime import two", "def late():\n    import ratchet_vla.runtime.one\n"),
        ("import ratchet_vla.runtime.two", "if TYPE_CHECKING:\n    from ratchet_vla.runtime.one import Thing\n"),
    ],
)
def test_two_that_need_each_other_are_found(tmp_path: Path, first: str, second: str) -> None:
    folder = tmp_path / "agent" / "ratchet_vla" / "runtime"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text(first + "\n")
    (folder / "two.py").write_text(second)
    assert cycles(tmp_path)
    (folder / "two.py").write_text("import json\n")
    assert cycles(tmp_path) == []


def test_folders_that_need_each_other_through_different_modules_are_found(tmp_path: Path) -> None:
    """Not a cycle of modules, and still no order among the folders."""
    runtime = tmp_path / "agent" / "ratchet_vla" / "runtime"
    for name, line in {
        "control/loop": "from ratchet_vla.runtime.robots import protocol",
        "control/clock": "import time",
        "robots/protocol": "import json",
        "robots/restamped": "from ratchet_vla.runtime.control.clock import Clock",
    }.items():
        (runtime / name).parent.mkdir(parents=True, exist_ok=True)
        (runtime / f"{name}.py").write_text(line + "\n")
    assert cycles(tmp_path)
    (runtime / "robots" / "restamped.py").write_text("import json\n")
    assert cycles(tmp_path) == []


def test_an_untidy_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "agent" / "ratchet_vla" / "cameras"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""One.\n\nTwo.\nThree.\n"""\n')
    (folder / "devices.py").write_text("")
    assert untidy(tmp_path) == []
    (folder / "camera_devices.py").write_text("")
    assert len(untidy(tmp_path)) == 1
    (folder / "__init__.py").write_text('"""Cameras."""\n')
    assert len(untidy(tmp_path)) == 2
    for number in range(LARGEST_FOLDER):
        (folder / f"more{number}.py").write_text("")
    assert len(untidy(tmp_path)) == 3
