"""Launch files that nobody can run here must still be right: no wheel brings the launch package.

Pinned, with stand-ins for the launch modules: every configuration that is used was declared, every executable is a
console script of the package with its module, every parameter is one that the node declares, every shipped file exists,
package.xml depends on what is imported; the learner's command line is split without a shell. Nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ros2_ws.graph import ROOT

PACKAGE = ROOT / "ros2_ws" / "src" / "ratchet_ros"
NAMES = {
    "launch": ("LaunchDescription", "LaunchContext"),
    "launch.actions": (
        "DeclareLaunchArgument",
        "SetEnvironmentVariable",
        "ExecuteProcess",
        "OpaqueFunction",
        "Shutdown",
    ),
    "launch.conditions": ("IfCondition",),
    "launch.substitutions": ("LaunchConfiguration", "PathJoinSubstitution"),
    "launch_ros": (),
    "launch_ros.actions": ("LifecycleNode",),
    "launch_ros.substitutions": ("FindPackageShare",),
}


class Made:
    """Anything that a launch file makes: remembers what it was made with."""

    seen: list[Made] = []  # noqa: RUF012

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        Made.seen.append(self)

    def perform(self, context: dict[str, str]) -> str:
        return context[self.arguments[0]]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type[Made]]]:
    kinds: dict[str, type[Made]] = {}
    for module, names in NAMES.items():
        made = types.ModuleType(module)
        for name in names:
            kinds[name] = type(name, (Made,), {})
            setattr(made, name, kinds[name])
        monkeypatch.setitem(sys.modules, module, made)
    Made.seen = []
    yield kinds
    Made.seen = []


def load(name: str) -> Any:
    path = ROOT / "launch" / name
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scripts() -> dict[str, str]:
    text = (PACKAGE / "setup.py").read_text()
    return dict(re.findall(r'^    "(\w+)": "([\w.]+)",$', text, re.MULTILINE))


@pytest.mark.parametrize("name", ["real.launch.py", "sim.launch.py", "learner.launch.py"])
def test_a_launch_file_fits_the_package(stand_ins: dict[str, type[Made]], name: str) -> None:
    load(name).generate_launch_description()
    declared = [m for m in Made.seen if type(m) is stand_ins["DeclareLaunchArgument"]]
    assert all(m.options.get("description") for m in declared)
    names = [m.arguments[0] for m in declared]
    assert len(names) == len(set(names))
    used = {m.arguments[0] for m in Made.seen if type(m) is stand_ins["LaunchConfiguration"]}
    assert used <= set(names)
    if name != "learner.launch.py":
        assert used == set(names)  # an argument that does nothing would be a lie
    for node in (m for m in Made.seen if type(m) is stand_ins["LifecycleNode"]):
        assert node.options["package"] == "ratchet_ros"
        module = importlib.import_module(scripts()[node.options["executable"]])
        assert callable(module.main)
        kind = next(
            v
            for v in vars(module).values()
            if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "Parameters")
        )
        known = {f.name for f in dataclasses.fields(kind.Parameters)} | {"autostart", "use_sim_time"}
        given = {k for p in node.options["parameters"] if isinstance(p, dict) for k in p}
        assert given <= known, given - known
    for join in (m for m in Made.seen if type(m) is stand_ins["PathJoinSubstitution"]):
        assert PACKAGE.joinpath(*join.arguments[0][1:]).is_file()


def test_the_learner_gets_its_options_one_by_one(stand_ins: dict[str, type[Made]]) -> None:
    module = load("learner.launch.py")
    process = module.start({"ratchet": "/opt/ratchet", "options": "--suite 'a b' --port 5"})[0]
    assert process.options["cmd"] == ["/opt/ratchet", "learner", "--suite", "a b", "--port", "5"]
    assert "shell" not in process.options


def test_package_xml_names_what_is_imported() -> None:
    text = (PACKAGE / "package.xml").read_text()
    named = set(re.findall(r"<(?:exec_)?depend>([\w-]+)</", text))
    imported: set[str] = set()
    for path in [*(PACKAGE / "ratchet_ros").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    ros = {
        n for n in imported if n.endswith(("_msgs", "_srvs", "_interfaces")) or n in ("rclpy", "launch", "launch_ros")
    }
    assert ros <= named


def test_every_node_of_the_package_has_its_module_and_its_words() -> None:
    started = (PACKAGE / "ratchet_ros" / "__main__.py").read_text()
    for name, module in scripts().items():
        assert (PACKAGE / f"{module.replace('.', '/')}.py").is_file()
        assert f'case "{name}":' in started
    for path in (PACKAGE / "ratchet_ros").rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_every_field_of_every_message_is_explained() -> None:
    """A line of its own meaning, or a comment on the block: no file without words, no odd numbers without a unit."""
    for path in (ROOT / "ros2_ws" / "src" / "ratchet_msgs").rglob("*.[msa]*"):
        if path.suffix in (".msg", ".srv", ".action"):
            text = path.read_text()
            assert text.startswith("# "), path
            for line in text.splitlines():
                if re.match(r"float\d+ \w+", line):
                    assert "#" in line, (path.name, line)


def test_the_list_of_interfaces_is_complete() -> None:
    folder = ROOT / "ros2_ws" / "src" / "ratchet_msgs"
    listed = set(
        re.findall(r"^\s+((?:msg|srv|action)/\w+\.\w+)$", (folder / "CMakeLists.txt").read_text(), re.MULTILINE)
    )
    there = {str(p.relative_to(folder)) for k in ("msg", "srv", "action") for p in (folder / k).iterdir()}
    assert listed == there


@pytest.mark.parametrize("name", [name for name in sorted(scripts()) if name.endswith("_node")])
def test_parameters_are_typed_described_and_bounded(name: str) -> None:
    module = importlib.import_module(scripts()[name])
    kind = next(
        v.Parameters
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "Parameters")
    )
    for field in dataclasses.fields(kind):
        assert field.metadata["description"].endswith("."), field.name
        if field.type in ("int", "float"):
            assert field.metadata["low"] is not None, field.name
