"""A learner that lies after a crash costs more than one that stops: resumed runs must give the uninterrupted numbers.

Pinned: matrix, adapter ids and update log equal those of an undisturbed run, after an exception at any event or between
any two durable writes and after a real SIGKILL, which leaves no simulators behind; a changed configuration is refused.
Determinism: every random number derives from the seed; the killed process is stopped at an event that it announces.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import SuccessMatrix
from ratchet_vla.learner.methods.ewc import EWC
from ratchet_vla.learner.sequence import SequentialRun, Stop
from ratchet_vla.learner.update.step import Updater
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.noise import derive_seed
from tests.agent.learner import runs
from tests.agent.learner.runs import CONFIG, ROOT, start, tiny_with_adapter

TIMES = {"seconds", "seconds_rollout", "seconds_update"}


def quiet(kind: str, facts: dict[str, Any]) -> None:
    """Nobody watches."""


def outcome_of_updates(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "state" / "updates.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def outcome(folder: Path) -> dict[str, Any]:
    return {
        "matrix": json.loads((folder / "state" / "matrix.json").read_text()),
        "updates": outcome_of_updates(folder),
        "adapters": sorted(FolderStore(folder / "adapters").ids()),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    events: list[str] = []
    start(folder, lambda kind, facts: events.append(kind) if kind != "episode" else None)
    return outcome(folder), events


def test_a_run_has_every_stage_and_adapter(undisturbed: tuple[dict[str, Any], list[str]]) -> None:
    result, events = undisturbed
    assert events == [*["evaluated"] * 3, *(["update"] * 2 + ["stage"] + ["evaluated"] * 3) * 2]
    assert len(result["adapters"]) == 2
    assert [u["update"] for u in result["updates"]] == [1, 2, 1, 2]
    assert any("optimizer_steps" in u for u in result["updates"]), "no update found anything to learn from"


def test_a_shorter_horizon_holds_in_every_episode(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, horizon=4, updates=1, tasks=CONFIG.tasks[:1])  # one chunk
    start(tmp_path, quiet, config)
    (update,) = outcome(tmp_path)["updates"]
    assert update["decisions"] == update["episodes"]


@pytest.mark.parametrize("at", range(0, 15, 2))
def test_stopped_at_any_event_and_resumed(
    at: int, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        if kind == "episode":
            return
        if seen == at:
            raise Stop
        seen += 1

    with pytest.raises(Stop):
        start(tmp_path, stop)
    start(tmp_path, quiet)
    assert outcome(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("episode", [1, 20, 37])
def test_stopped_in_the_middle_of_a_rollout_and_resumed(
    episode: int, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "episode"
        if seen == episode:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    start(tmp_path, quiet)
    assert outcome(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("at", [4, 6])
def test_killed_and_resumed(at: int, undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.agent.learner.runs", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(at):
        assert process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.stdout.readline()
    simulators = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert simulators
    _, alive = psutil.wait_procs(simulators, timeout=60)
    assert alive == [], "a killed learner must not leave simulators running"
    start(tmp_path, quiet)
    assert outcome(tmp_path) == undisturbed[0]


def cut(owner: type, name: str, *, after: bool, on: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Stop right before or after the n-th call of a method: the instants between two durable writes."""

    def install(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        calls = 0

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == on and not after:
                raise Stop
            result = original(*args, **options)
            if calls == on:
                raise Stop
            return result

        patch.setattr(owner, name, wrapped)

    return install


@pytest.mark.parametrize(
    "install",
    [
        pytest.param(cut(SequentialRun, "_save", after=False, on=1), id="evaluated, not saved"),
        pytest.param(cut(SequentialRun, "_save", after=False, on=4), id="updated and logged, not saved"),
        pytest.param(cut(SequentialRun, "_log", after=False, on=2), id="updated, not logged"),
        pytest.param(cut(SequentialRun, "_finish_stage", after=False, on=1), id="learned, not stored"),
        pytest.param(cut(FolderStore, "put", after=True, on=1), id="stored, not tagged"),
        pytest.param(cut(FolderStore, "tag", after=True, on=2), id="tagged, not saved"),
        pytest.param(cut(SuccessMatrix, "save", after=False, on=5), id="evaluated, matrix not written"),
        pytest.param(cut(SuccessMatrix, "save", after=True, on=5), id="matrix written, not saved"),
        pytest.param(cut(Path, "rename", after=False, on=3), id="checkpoint written, not in place"),
        pytest.param(cut(Updater, "update", after=True, on=3), id="adapter changed, nothing written"),
    ],
)
def test_stopped_between_two_writes_and_resumed(
    install: Callable[[pytest.MonkeyPatch], None],
    undisturbed: tuple[dict[str, Any], list[str]],
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        with pytest.raises(Stop):
            start(tmp_path, quiet)
    start(tmp_path, quiet)
    assert outcome(tmp_path) == undisturbed[0]
    tags = FolderStore(tmp_path / "adapters").tags()
    assert tags["candidate"] in undisturbed[0]["adapters"]


def test_a_torn_log_line_is_dropped(undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "update":
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    with (tmp_path / "state" / "updates.jsonl").open("a") as file:
        file.write('{"task": "door-open", "stage": 1, "upd')
    start(tmp_path, quiet)
    assert outcome(tmp_path) == undisturbed[0]


def test_a_solved_task_is_over_and_the_next_one_is_not(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, updates=3)
    start(tmp_path / "all", quiet, config)
    everything = outcome(tmp_path / "all")["updates"]
    shares = [u["successes"] / u["episodes"] for u in everything]
    until = max(shares[:2])  # reached before the last update of the first task, which the test needs
    assert until > 0
    wanted = 1 + next(i for i, share in enumerate(shares) if share >= until)
    assert wanted < 3
    start(tmp_path / "until", quiet, dataclasses.replace(config, until=until))
    found = outcome(tmp_path / "until")
    assert [u["update"] for u in found["updates"] if u["stage"] == 1] == [*range(1, wanted + 1)]
    assert found["updates"][:wanted] == everything[:wanted], "the updates before it are the same"
    assert next(u["update"] for u in found["updates"] if u["stage"] == 2) == 1

    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "update"
        if seen == wanted:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path / "resumed", stop, dataclasses.replace(config, until=until))
    start(tmp_path / "resumed", quiet, dataclasses.replace(config, until=until))
    assert outcome(tmp_path / "resumed") == found, "a resumed run must remember that the task was solved"


def test_a_run_goes_on_from_a_stored_adapter(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "adapters", create=True)
    policy, lora = tiny_with_adapter()
    generator = torch.Generator().manual_seed(3)
    lora.load({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in lora.export().items()})
    first = store.put(lora.adapter(binding_of(policy)), Provenance(task="door-open", stage=2)).id
    config = dataclasses.replace(CONFIG, tasks=("push",), held_out=(), evaluation_episodes=0)
    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "update"
        assert kind != "evaluated"
        if seen:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop, config, begin=first)
    sequence = start(tmp_path, quiet, config, begin=first)
    updates = outcome_of_updates(tmp_path)
    assert updates[0]["adapter_id"] == first, "the first episodes are the stored adapter's"
    assert updates[1]["adapter_id"] != first
    assert sequence.adapter_ids[0] == first
    made = sequence.adapter_ids[1]
    assert store.lineage(made) == [made, first]
    assert store.card(made).provenance.stage == 3
    assert store.card(made).provenance.notes == "seq_ft: ratchet learn --tasks door-open"
    assert sequence.matrix.cells == {}
    with pytest.raises(RatchetError, match=r"learn\.changed_run"):
        start(tmp_path, quiet, config)
    with pytest.raises(RatchetError, match=r"learn\.cannot_start"):
        start(tmp_path / "ewc", quiet, config, method=EWC(), begin=first)


@pytest.mark.parametrize("until", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(until: float) -> None:
    with pytest.raises(RatchetError, match=r"learn\.bad_setting"):
        dataclasses.replace(CONFIG, until=until)


def test_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "update":
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    with pytest.raises(RatchetError, match=r"learn\.changed_run"):
        start(tmp_path, quiet, dataclasses.replace(CONFIG, updates=3))


def test_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "evaluated":
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    monkeypatch.setattr(runs, "tiny_with_adapter", other_policy)
    with pytest.raises(RatchetError, match=r"learn\.changed_run"):
        start(tmp_path, quiet)


def other_policy(rank: int = 4) -> tuple[PrismaticPolicy, Lora]:
    policy, lora = tiny_with_adapter()
    with torch.no_grad():
        next(iter(policy.base_tensors().values())).add_(1.0)
    policy.base_changed()
    return policy, lora


def test_an_unknown_task_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RatchetError, match=r"learn\.unknown_task.*door-open"):
        start(tmp_path, quiet, dataclasses.replace(CONFIG, tasks=("door-opn",)))
    assert not (tmp_path / "state").exists()


def test_a_finished_run_does_nothing_more(undisturbed: tuple[dict[str, Any], list[str]], tmp_path: Path) -> None:
    start(tmp_path, quiet)
    events: list[str] = []
    again = start(tmp_path, lambda kind, facts: events.append(kind))
    assert events == []
    assert isinstance(again, SequentialRun)
    assert outcome(tmp_path) == undisturbed[0]


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(a, b, c) for a in range(4) for b in ("x", "y") for c in range(4)}
    assert len(seeds) == 32
    assert all(0 <= s < 2**63 for s in seeds)
