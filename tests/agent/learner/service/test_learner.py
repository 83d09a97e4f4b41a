"""The learner service decides alone, overnight, and must decide the same every time.

The same journal gives the same state, and the same episodes the same adapters as a local run, with or without people,
labels and damage in between.

Pinned: equality with `SequentialRun` bit for bit, robot mode with sessions, labels and a person's decision, rejected
and held candidates, a wrong policy on the robot, a damaged checkpoint, alerts and metrics. Deterministic: seeded small
policy and fake environment, one thread, no sockets; episodes are put into the inbox by the test.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learner.small_world import (
    CONFIG,
    TASKS,
    FakeChunkEnv,
    contract,
    read_episode,
    tiny_policy,
    write_episode,
)
from ratchet_vla.adapters.protocol import BASE
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import GateConfig, GateDecision, Reason
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.samples import to_episodes
from ratchet_vla.learner.rollouts.specs import training_specs
from ratchet_vla.learner.sequence import SequenceConfig, SequentialRun
from ratchet_vla.learner.service.config import ServiceConfig, real_robot
from ratchet_vla.learner.service.learner import LearnerService
from ratchet_vla.learner.service.state import LearnerState
from ratchet_vla.learner.service.telemetry import Limits, Rates, Recorder, alerts, status, timeline
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.link.learner.inbox import Inbox, OfferedFile
from ratchet_vla.link.rollout_requests import RolloutRequest
from ratchet_vla.link.session_records import label_record, session_record
from ratchet_vla.storage.journal import Journal, read

Decide = Callable[[str, str], str]


class Bench:
    """A service without a link: the test plays the robot."""

    def __init__(self, folder: Path, config: ServiceConfig = CONFIG, decide: Decide = lambda c, a: "promote") -> None:
        torch.set_num_threads(1)
        self.folder, self.config, self.decide = folder, config, decide
        self.asked: list[tuple[str, str]] = []
        self.robot_policy, self.robot_lora = tiny_policy()
        self.sequence = 0
        self.open()

    def open(self) -> None:
        """A new process: everything from the disk."""
        policy, lora = tiny_policy()
        self.store = FolderStore(self.folder / "adapters", create=True)
        self.journal = Journal(self.folder / "journal.jsonl")
        self.inbox = Inbox(self.folder / "inbox", self.journal, reserve=0)
        self.service = LearnerService(
            self.folder, self.config, Trainer(policy, lora, self.config), self.store, self.journal, self.inbox.path,
            read_episode, self.gate, TASKS,
        )  # fmt: skip

    def close(self) -> None:
        self.inbox.close()
        self.journal.close()

    def reopen(self) -> None:
        self.close()
        self.open()

    def gate(self, candidate: str, active: str, held_out: tuple[str, ...]) -> GateDecision:
        self.asked.append((candidate, active))
        decision = self.decide(candidate, active)
        return GateDecision(decision, (Reason("gate.test", decision),), candidate, active, (), GateConfig())  # type: ignore[arg-type]

    def settle(self) -> LearnerState:
        while self.service.step():
            pass
        return self.service.state

    def put(self, content: bytes, kind: str, key: str) -> str:
        import hashlib

        self.sequence += 1
        sha = hashlib.sha256(content).hexdigest()
        start = self.inbox.offer(OfferedFile("robot-1", sha, len(content), kind, key, self.sequence))
        if start is not None:
            self.inbox.write(sha, start, memoryview(content)[start:])
            self.inbox.finish(sha)
        return sha

    def collect(self, success: bool | None = True, meta: dict[str, Any] | None = None) -> list[str]:
        """Run the rollout request as a robot does and put its episodes in. success: None leaves them unlabelled."""
        request = RolloutRequest.of(self.service.published_state())
        assert request is not None
        self.robot_lora.load(self.store.get(request.adapter).tensors)
        specs = training_specs(
            TASKS[request.task], seed=request.seed, stage=request.stage, update=request.update, groups=request.groups,
            group_size=request.group_size, horizon=request.horizon,
        )  # fmt: skip
        _, batch = run_episodes(
            self.robot_policy, FakeChunkEnv(), specs, temperature=request.temperature,
            noise_correlation=request.noise_correlation, adapter_id=request.adapter,
        )  # fmt: skip
        assert batch is not None
        shas = []
        for slot, episode in enumerate(to_episodes(batch, specs, self.robot_policy, contract())):
            episode.meta = {"order": request.id, "slot": slot, **(meta or {})}
            if success is None:
                episode.success, episode.success_source, episode.initial_state = None, "", -1
            path = self.folder / "episode.npz"
            write_episode(path, episode)
            shas.append(self.put(path.read_bytes(), "episode", f"{request.id}/{slot}"))
        return shas


def test_a_remote_run_gives_the_adapters_of_a_local_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "remote")
    state = bench.settle()
    for number in range(4):
        bench.collect()
        if number % 2:
            bench.reopen()
        state = bench.settle()
    assert state.phase == "done"
    policy, lora = tiny_policy()
    local = SequentialRun(
        policy, lora, FakeChunkEnv(), TASKS, FolderStore(tmp_path / "local", create=True),
        lambda adapter: policy,
        SequenceConfig(
            tasks=CONFIG.tasks, updates=CONFIG.updates, groups=CONFIG.groups, group_size=CONFIG.group_size,
            temperature=CONFIG.temperature, noise_correlation=CONFIG.noise_correlation, evaluation_episodes=1,
            seed=CONFIG.seed, update=CONFIG.update,
        ),
        tmp_path / "state",
    )  # fmt: skip
    local.run()
    assert [u["adapter"] for u in state.updates][1::2] == local.adapter_ids[1:]
    assert [s["learned"] for s in state.stages] == [True, True]
    assert state.active == local.adapter_ids[-1]
    assert bench.store.lineage(state.active)[0] == state.active
    bench.close()


def test_the_journal_alone_gives_the_state(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.settle()
    bench.collect()
    state = bench.settle()
    again = LearnerState.of(read(tmp_path / "journal.jsonl"))
    assert again == state
    bench.config = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(RatchetError, match=r"learn\.changed_run"):
        bench.reopen()
    bench.close()


def test_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    """Two learners get the same episodes in other orders, with doubles; they end with one adapter."""
    ends = []
    for name in ("a", "b"):
        bench = Bench(tmp_path / name)
        bench.settle()
        if name == "a":
            bench.collect()
        else:
            spare = Bench(tmp_path / "spare")
            spare.settle()
            shas = spare.collect()
            contents = [spare.inbox.path(sha).read_bytes() for sha in shas]
            for n, content in reversed(list(enumerate(contents))):
                bench.put(content, "episode", f"x{n}")
                bench.put(content, "episode", f"again{n}")
                bench.settle()
            spare.close()
        state = bench.settle()
        assert len(state.updates) == 1
        ends.append(state.training)
        bench.close()
    assert ends[0] == ends[1]


def test_episodes_of_another_adapter_are_kept_and_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.settle()
    shas = bench.collect()
    late = bench.inbox.path(shas[0]).read_bytes()
    state = bench.settle()
    bench.put(late + b"", "episode", "late-same")  # equal bytes: known, not counted again
    episode = read_episode(bench.inbox.path(shas[1]))
    episode.meta["note"] = "the same experience in other bytes"
    write_episode(tmp_path / "e.npz", episode)
    bench.put((tmp_path / "e.npz").read_bytes(), "episode", "late-other")
    bench.put(b"not an episode", "episode", "garbage")
    state = bench.settle()
    assert state.reasons() == {"inbox.other_adapter": 1, "inbox.unreadable": 1}
    assert state.counts()["used"] == CONFIG.slots
    assert state.accepted() == []
    bench.close()


@pytest.mark.parametrize("decision", ["reject", "hold"])
def test_what_the_gate_does_not_promote_is_tried_again_and_then_left(tmp_path: Path, decision: str) -> None:
    config = dataclasses.replace(CONFIG, tasks=("door-open", "push"), updates=1, attempts=2)
    bench = Bench(tmp_path, config, lambda candidate, active: decision)
    first = bench.settle().training
    bench.collect()
    state = bench.settle()
    assert state.attempt == 1
    # After a rejection the next attempt begins where the first did; after a hold it goes on.
    assert (state.training == first) == (decision == "reject")
    bench.collect()
    state = bench.settle()
    assert (state.stage, state.training, state.active) == (1, first, "")
    assert [s["learned"] for s in state.stages] == [False]
    assert bench.store.tags().get("active") is None
    bench.close()


def robot_config(**changes: Any) -> ServiceConfig:
    plain = real_robot(("door-open",), batch=6, updates=2, noise_correlation=0.5, **changes)
    return dataclasses.replace(plain, update=dataclasses.replace(plain.update, learning_rate=1e-2))


def test_on_a_robot_labels_and_the_end_of_the_session_complete_a_batch(tmp_path: Path) -> None:
    bench = Bench(tmp_path, robot_config(batch_when="session"))
    bench.settle()
    shas = bench.collect(success=None)
    assert bench.settle().counts()["waiting"] == 6
    assert bench.service.published_state()["order"]["have"] == 0
    for n, sha in enumerate(shas):
        bench.put(label_record(sha, n % 2 == 0, "anna"), "label", f"label/{sha}")
    state = bench.settle()
    assert state.phase == "collecting"
    assert bench.service.published_state()["order"]["have"] == 6
    assert [a.code for a in alerts(state, 0.0, 1 << 50, Limits())] == ["learner.session"]
    bench.put(session_record("s1", True, {}, []), "session", "session/s1")
    state = bench.settle()
    assert len(state.updates) == 1
    assert state.updates[0]["successes"] == 3
    assert state.updates[0]["adapter"] != state.updates[0]["before"]
    assert state.active == state.updates[0]["adapter"]
    assert bench.asked == [(state.active, "")]
    bench.reopen()
    assert LearnerState.of(bench.journal.events) == bench.settle()
    bench.close()


def test_a_label_that_is_no_persons_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, robot_config())
    bench.settle()
    [sha, *_] = bench.collect(success=None)
    for n, raw in enumerate(
        (
            b"not json",
            json.dumps({"episode": sha, "success": True, "source": "policy"}).encode(),
            json.dumps({"episode": "unknown", "success": True, "source": "human:anna"}).encode(),
        )
    ):
        bench.put(raw, "label", f"l{n}")
    assert bench.settle().counts()["waiting"] == 6
    with pytest.raises(RatchetError, match=r"link\.no_annotator"):
        label_record(sha, True, " ")
    bench.close()


@pytest.mark.parametrize("person", ["promotes", "declines"])
def test_a_held_candidate_waits_for_a_person(tmp_path: Path, person: str) -> None:
    bench = Bench(tmp_path, robot_config(batch_when="full"), lambda candidate, active: "hold")
    bench.settle()
    before = bench.service.state.training
    for sha_n, sha in enumerate(bench.collect(success=None)):
        bench.put(label_record(sha, sha_n < 2, "anna"), "label", f"l/{sha}")
    state = bench.settle()
    assert state.phase == "waiting"
    assert [a.code for a in alerts(state, 0.0, 1 << 50, Limits())] == ["learner.held"]
    candidate = state.candidate
    published = bench.service.published_state()
    assert (published["tags"]["candidate"], candidate in published["adapters"]) == (
        candidate,
        True,
    )  # a person may try it
    bench.reopen()
    if person == "promotes":
        bench.store.promote(candidate, "override: seen on the robot")
    else:
        bench.store.tag("declined", candidate, "hesitates")
    state = bench.settle()
    assert state.phase == "collecting"
    assert bench.service.published_state()["tags"]["candidate"] == ""
    assert state.training == (candidate if person == "promotes" else before)
    assert state.active == (candidate if person == "promotes" else "")
    bench.close()


def test_a_persons_rollback_restarts_the_task_from_there(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.settle()
    for _ in range(3):
        bench.collect()
        state = bench.settle()
    promoted = state.active
    assert (state.stage, state.update) == (1, 1)
    first = state.adapters[0]
    bench.store.tag("active", first, "back to the start")
    state = bench.settle()
    assert (state.active, state.training, state.update) == (first, first, 0)
    assert bench.service.published_state()["tags"]["active"] == first
    assert promoted in bench.store.ids()
    bench.store.tag("active", BASE, "not even that")
    state = bench.settle()
    assert (state.active, state.training, state.update) == ("", first, 0)
    published = bench.service.published_state()
    assert (published["tags"]["active"], BASE in published["adapters"]) == (BASE, False)
    bench.close()


def test_a_robot_with_another_policy_is_noticed_and_nothing_is_learned(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    state = bench.settle()
    before = state.training
    with torch.no_grad():
        for parameter in bench.robot_policy.module.parameters():
            parameter.mul_(1.2)
    bench.collect()
    state = bench.settle()
    assert state.training == before
    assert state.updates[0]["facts"]["code"] == "learner.policy_mismatch"
    assert [a.code for a in alerts(state, 0.0, 1 << 50, Limits())] == ["learner.policy_mismatch"]
    bench.close()


def test_a_damaged_checkpoint_is_computed_again(tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "damaged"):
        bench = Bench(tmp_path / name)
        bench.settle()
        bench.collect()
        state = bench.settle()
        path = tmp_path / name / "checkpoints" / state.checkpoint["file"]
        bench.collect()
        if name == "damaged":
            path.write_bytes(path.read_bytes()[:1000])
        bench.reopen()
        ends.append([u["adapter"] for u in bench.settle().updates])
        bench.close()
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2


def test_used_batches_and_old_adapters_are_cleared_where_wanted(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tasks=("push",), updates=5, keep_batches=1, keep_updates=1)
    bench = Bench(tmp_path, config)
    bench.settle()
    for _ in range(5):
        bench.collect()
        state = bench.settle()
    assert state.phase == "done"
    files = [p for p in (tmp_path / "inbox" / "files").iterdir() if p.suffix != ".json"]
    assert len(files) == config.slots
    assert set(bench.store.ids()) <= {state.adapters[0], state.active, *state.adapters[-2:]}
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) <= 2
    assert bench.store.verify() == [] or all(not p.fatal for p in bench.store.verify())
    bench.close()


def test_metrics_stand_once_whatever_is_cut_off(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.settle()
    bench.collect()
    bench.settle()
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.take(bench.journal.events)
    recorder.take(bench.journal.events)
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    [line] = path.read_text().splitlines()
    facts = json.loads(line)
    assert facts["episodes"] == CONFIG.slots
    assert {"approx_kl", "success", "log_prob_gap", "adapter"} <= facts.keys()
    assert list((tmp_path / "tensorboard").iterdir())
    bench.collect()
    bench.settle()
    path.write_text(line + "\n" + line[: len(line) // 2])
    again = Recorder(tmp_path, tensorboard=False)
    again.take(bench.journal.events)
    assert [json.loads(text)["update"] for text in path.read_text().splitlines()] == [0, 1]
    rates = Rates(window=60.0)
    rates.at(0.0, 0, 0)
    shown = status(bench.service.state, CONFIG.tasks, [], {}, 1 << 50, Limits(), rates.at(30.0, 4, 6_000_000))
    assert shown["rates"] == {"seconds": 30.0, "episodes_per_hour": 480.0, "bytes_per_second": 200_000.0}
    assert rates.at(90.0, 5, 6_000_000)["episodes_per_hour"] == pytest.approx(60.0)  # what is older has left the window
    assert json.loads(json.dumps(shown))["queue"][0] == {"task": "door-open", "state": "learned", "updates": 2}
    text = "\n".join(timeline(bench.journal.events))
    assert "update 1 of door-open" in text
    assert "is active, by the gate" in text
    bench.close()


def test_alerts_name_what_goes_bad() -> None:
    state = LearnerState(phase="collecting")
    assert [a.code for a in alerts(state, 1e9, 0, Limits())] == ["learner.sync", "learner.disk"]
    assert alerts(state, 1.0, 1 << 50, Limits()) == []
    for rates, expected in (([8, 8, 8, 2], True), ([8, 8, 8, 7], False), ([5, 0, 0], True), ([5, 0, 1], False)):
        state.updates = [{"successes": n, "episodes": ["x"] * 10, "stage": 0, "facts": {}} for n in rates]
        assert ([a.code for a in alerts(state, 1.0, 1 << 50, Limits())] == ["learner.success"]) == expected, rates


def test_settings_out_of_range_are_refused() -> None:
    for changes in ({"updates": 0}, {"tasks": ()}, {"tasks": ("a", "a")}, {"temperature": 0.0}, {"batch": 1}):
        with pytest.raises(RatchetError, match=r"learner\.bad_config"):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(RatchetError, match=r"learner\.bad_config"):
        dataclasses.replace(real_robot(("a",)), gate_each="task")
    assert real_robot(("a",)).update.grpo.estimator == "leave_one_out"
    assert np.isfinite(real_robot(("a",)).tolerance)
