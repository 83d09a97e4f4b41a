"""The command line is what people meet first: a typo must cost one clear line and exit code 2, never a traceback.

Pinned: every verb has help with a command to copy, refusals name what would have been right, `--json` refuses in JSON;
a verb that computes nothing does not load what computes.
Determinism: no simulator is started; every case ends before an environment is built.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli.main import main

ROOT = Path(__file__).resolve().parents[3]

VERBS = [
    "demo",
    "eval",
    "inspect",
    "learn",
    "pretrain",
    "plan",
    "adapters",
    "report",
    "episodes",
    "review",
    "run",
    "keys",
    "learner",
    "sync",
    "robot",
    "session",
    "status",
    "study",
    "calibrate",
    "doctor",
    "up",
    "ctl",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_command_to_copy(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.count(f"ratchet {verb}") >= 2  # the usage line and at least one example


@pytest.mark.parametrize(("verb", "heavy"), [("up", "torch"), ("ctl", "torch"), ("sync", "peft")])
def test_beside_an_arm_a_verb_loads_only_what_it_needs(verb: str, heavy: str) -> None:
    """Seconds of a robot's processor at every start."""
    script = (
        "import sys\nfrom ratchet_vla.cli.main import main\n"
        f"try:\n    main(['{verb}', '--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit('{heavy}' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["eval", "--tasks", "door-opn"], "sim.unknown_task", "door-open"),
        (["eval", "--suite", "libero_objct"], "sim.unknown_suite", "libero_object"),
        (["learn", "--tasks", "door-opn"], "sim.unknown_task", "door-open"),
        (
            ["eval", "--tasks", "door-open", "--vision-ablation", "--episodes", "1"],
            "vision_ablation.same_scene",
            "at least 2",
        ),
        (["eval", "--suite", "libero_object", "--policy", "nowhere"], "policy.bad_checkpoint", "nowhere"),
        (["adapters", "list", "--store", "nowhere"], "adapter.no_store", "nowhere"),
        (["report", "nowhere"], "report.no_run", "nowhere"),
        (["demo", "--suite", "libero_spatial"], "cli.no_recipe", "metaworld"),
        (["run", "--task", "door-opn"], "sim.unknown_task", "door-open"),
        (["run", "--task", "door-open", "--policy", "nowhere"], "policy.bad_checkpoint", "nowhere"),
        (["adapters", "promote", "--store", "nowhere"], "adapter.no_store", "nowhere"),
    ],
)
def test_refusals_are_one_line_with_a_code(
    arguments: list[str],
    code: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip()
    assert code in err
    assert hint in err
    assert "\n" not in err


def test_refusals_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--suite", "libero_objct", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "sim.unknown_suite"


def test_an_empty_store_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FolderStore(tmp_path / "store", create=True)
    assert main(["adapters", "list", "--store", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"adapters": [], "tags": {"active": "base"}}
    assert main(["adapters", "verify", "--store", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m ratchet_vla.cli.main study run --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 141)  # 0 where all of it was written before the reader left
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--shard"], "learn.one_process"), (["--device", "tpu9"], "policy.no_device")],
)
def test_what_a_single_process_cannot_do_is_refused(
    options: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["learn", "--tasks", "button-press", "--out", str(out), "--json", *options]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert not out.exists()
