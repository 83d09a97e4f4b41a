"""`ratchet up sim` is how people without the launch package start everything; it must come up, and go down clean.

Pinned: all nodes become active, one log folder holds parameters and logs, a sync agent runs beside them and again when
it was killed, an interrupt ends every process with status 0, the session's end waits for the learner, and nothing is
left running; what cannot work is refused before anything starts.
Determinism: a fake policy; waiting is for events.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ratchet_vla.cli.main import main
from ratchet_vla.cli.nodes import graph as graphs
from ratchet_vla.cli.nodes import ros as ros_environment
from ratchet_vla.errors import RatchetError
from ratchet_vla.paths import python_path
from ratchet_vla.runtime.session.manifest import Session
from tests.ros2_ws.graph import ROOT, Graph, Watcher, active

FAKE = ["--policy-module", "ratchet_vla.testing.fake_policy_worker", "--policy-options", '{"image_size": 96}']


def test_up_brings_the_nodes_up_and_down(ros: None, tmp_path: Path) -> None:
    logs, robot = tmp_path / "logs", tmp_path / "robot"
    command = [sys.executable, "-m", "ratchet_vla.cli.main", "up", "sim", "--logs", str(logs), "--json", *FAKE]
    command += ["--robot", str(robot), "--learner", "tcp://127.0.0.1:9", "--plain", "--speed", "0.5"]
    environment = dict(os.environ) | {"PYTHONPATH": python_path(inherited=False)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    watcher = Watcher()
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["nodes"] == ["sim_robot_node", "safety_node", "policy_node"]
        assert told["courier"] is True
        active(watcher, *told["nodes"])
        first = sync_agent_of(watcher, robot)
        first.kill()
        watcher.until(lambda: sync_agent_of(watcher, robot).pid != first.pid, "another sync agent in its place")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        for node in told["nodes"]:  # who waits for the others says so, and it is no error
            assert not [line for line in (logs / f"{node}.log").read_text().splitlines() if line.startswith("[ERROR]")]
    finally:
        if process.poll() is None:
            process.kill()
        watcher.close()
    assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert not list((robot / "episodes").glob("*/*.mcap*"))
    files = {f"{n}.{k}" for n in told["nodes"] for k in ("yaml", "log")}
    assert {p.name for p in logs.iterdir()} == {*files, "sync.log"}
    (session,) = (robot / "sessions").iterdir()
    assert Session.read(session).reason == "powered down"
    (record,) = (robot / "outbox" / "queue").iterdir()  # the session's end waits for the learner
    assert json.loads(record.read_text())["key"] == f"session/{session.name}"


def sync_agent_of(watcher: Watcher, robot: Path) -> psutil.Process:
    """The process that wrote the robot's status last."""

    def told() -> psutil.Process | None:
        try:
            return psutil.Process(json.loads((robot / "status.json").read_text())["pid"])
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None

    process: psutil.Process = watcher.until(told, "the sync agent's status")
    return process


def test_a_learner_is_not_reached_without_its_keys(
    ros: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["up", "sim", "--learner", "tcp://127.0.0.1:9", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "link.no_key"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["up", "real", "--contract", "robots/nothing.yaml"], "contract.missing_file"),
        (["up", "real", "--contract", "robots/so101.yaml", "--cameras", "front=polaroid:1"], "up.bad_camera"),
        (["up", "real", "--contract", "robots/so101.yaml", "--cameras", "back=uvc:0"], "contract.unknown_camera"),
        (["up", "real", "--contract", "robots/so101.yaml", "--joy", "x=0"], "up.no_operator"),
        (["ctl", "status", "--limit", "0.5"], "ctl.nobody"),
    ],
)
def test_what_cannot_work_is_refused_first(
    ros: None, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code


def test_without_ros_the_way_to_get_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("RATCHET_ROS_PYTHON", "ROS_DISTRO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ros_environment, "BUILT_IN", tmp_path / "none")
    assert main(["doctor", "--json"]) == 1
    (missing,) = [r for r in json.loads(capsys.readouterr().out) if r["code"] == "ros.no_environment"]
    assert (missing["level"], "make ros" in missing["fix"]) == ("error", True)
    assert main(["ctl", "status", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "ros.no_environment"


def test_a_node_that_ends_ends_the_graph_with_its_last_word(tmp_path: Path) -> None:
    with graphs.Graph(tmp_path) as graph:
        graph.start(graphs.NodeSpec("nonsense_node", "nonsense"))
        with pytest.raises(RatchetError, match="nonsense") as refused:
            graph.watch()
    assert refused.value.code == "up.node_ended"


def say(folder: Path, *lines: str) -> None:
    with (folder / "policy_node.log").open("a") as log:
        log.writelines(f"{line}\n" for line in lines)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["[ERROR] [1.2] [policy_node]: [compat.refused] policy does not fit (ur5e); use another"], "compat.refused"),
        (["[ERROR] [1.2] [policy_node]: [ros.no_data] a", "[ERROR] [1.2] [policy_node]: [adapter.unknown] b"],
         "adapter.unknown"),
        (["[INFO] [1.1] [policy_node]: active", "[ERROR] [1.2] [policy_node]: [adapter.unknown] b"], "up.node_ended"),
    ],
)  # fmt: skip
def test_what_a_node_ended_with_is_what_the_graph_ends_with(lines: list[str], code: str, tmp_path: Path) -> None:
    with graphs.Graph(tmp_path) as graph:
        graph.start(graphs.NodeSpec("nonsense_node", "policy_node"))  # ends by itself
        say(tmp_path, *lines)
        with pytest.raises(RatchetError) as refused:
            graph.watch()
    assert refused.value.code == code
    assert str(refused.value).count(f"[{code}]") == 1
    assert "policy_node.log" in str(refused.value)


def test_what_waiting_does_not_mend_is_told_once_and_ends_the_node(ros: None, tmp_path: Path) -> None:
    """The real node, started as a launch file does, without the graph that watches it."""
    graph = Graph(tmp_path)
    node = graph.start("safety_node", contract=str(tmp_path / "none.yaml"))
    assert node.wait(60.0) == 2
    errors = [line for line in graph.log("safety_node").splitlines() if line.startswith("[ERROR]")]
    assert len(errors) == 1, errors
    assert "[contract.missing_file]" in errors[0]


def test_a_policy_that_does_not_fit_ends_up_with_that_code(ros: None, tmp_path: Path) -> None:
    """The real node, given a base of another robot."""
    command = [sys.executable, "-m", "ratchet_vla.cli.main", "up", "sim", "--logs", str(tmp_path / "logs"), "--json"]
    command += ["--policy", str(ROOT / "models/small-libero-object"), "--robot", str(tmp_path / "robot")]
    environment = dict(os.environ) | {"PYTHONPATH": python_path(inherited=False)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["error"]["code"] == "compat.refused"


def test_an_error_of_a_node_is_told_once(tmp_path: Path) -> None:
    with graphs.Graph(tmp_path) as graph:
        graph.start(graphs.NodeSpec("nonsense_node", "nonsense", vital=False))
        with (tmp_path / "nonsense.log").open("a") as log:
            log.write("[ERROR] [1.2] [nonsense]: [a.b] broken\n[INFO] [1.3] [nonsense]: fine\n")
        assert [e for e in graph.errors() if "broken" in e] == ["nonsense: [a.b] broken"]
        with (tmp_path / "nonsense.log").open("a") as log:
            log.write("[ERROR] [2.2] [nonsense]: [a.b] broken\n")
        assert graph.errors() == []
