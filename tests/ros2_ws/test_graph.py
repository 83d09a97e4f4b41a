"""The whole graph over DDS: simulated arm, safety node, policy node with its policy and recorder processes.

It matters because each part can be right and the graph still wrong: topics, clocks, orders of arrival, kills. Pinned:
an episode through ROS is bit by bit the one in process, and so is what is learned from it; an adapter is exchanged in
motion between two chunks; cancel comes to rest; a killed policy process latches a fault, holds, and moves again only
after a person cleared it; every task lies in the episode store as it was heard on the topics, opens in another
project's reader and takes a person's word; a success that nobody earned is refused; `ratchet ctl` and `ratchet doctor`
speak with the graph. Determinism: lock-step, so that no load of the machine changes what happens; waiting is for events
only.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from action_msgs.msg import GoalStatus
from ratchet_msgs import msg, srv
from ratchet_msgs.action import RunTask
from rclpy.serialization import deserialize_message
from rosbags.rosbag2 import Reader

from ratchet_ros.messages import qos
from ratchet_sim.robot import SimRobot
from ratchet_vla.adapters.lora.layers import attach, lora_config
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.episodes.library.annotations import Annotations
from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.samples import log_prob_gap, to_batch
from ratchet_vla.learner.update.step import UpdateConfig, Updater
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.testing.conformance.swap import noise
from tests.ros2_ws.graph import ROOT, Graph, Watcher, active, ratchet

POLICY = ROOT / "models" / "small-metaworld"
CONTRACT = str(ROOT / "robots" / "metaworld.yaml")
TASK, STATE, HORIZON = "door-open", 3, 64
ENDLESS = "assembly"  # a task that the policy was never shown: it moves on and on


@dataclass(frozen=True)
class Solved:
    """The first task's episode, run over the nodes once: the answer, what was heard of it, and its record."""

    answer: Any
    feedback: list[Any]
    applied: list[Any]
    chunks: list[Any]
    events: list[Any]
    card: Card


class Running:
    """The graph and what was heard from it. Each test brings it to where it begins, so that any may run alone."""

    def __init__(self, folder: Path) -> None:
        policy = checkpoint.load(POLICY)
        self.base = policy.base_hash
        lora = attach(policy.module, lora_config(4, 8.0))
        store = FolderStore(folder / "store", create=True)
        self.adapter = store.put(noise(lora, policy, 1)).id
        store.tag("candidate", self.adapter)
        self.folder, self.episodes = folder, folder / "episodes"
        self.graph, self.watcher = Graph(folder), Watcher()
        timed: dict[str, Any] = {"contract": CONTRACT, "use_sim_time": True, "lock_step": True}
        self.graph.start("sim_robot_node", contract=CONTRACT, task=TASK, initial_state=STATE, lock_step=True)
        self.graph.start("safety_node", **timed)
        self.graph.start(
            "policy_node",
            **timed,
            policy=str(POLICY),
            store=str(folder / "store"),
            policy_python=str(ROOT / ".venv" / "bin" / "python"),
            judge="scene",
            mode="collect",
            robot=str(folder / "robot"),
            episodes=str(self.episodes),
            record_least_free_gb=0.1,
            record_wire="all",
            restarts=1,
        )
        self.applied = self.watcher.collect(msg.Applied, "applied", qos.EVENTS)
        self.chunks = self.watcher.collect(msg.ActionChunk, "chunks", qos.EVENTS)
        self.events = self.watcher.collect(msg.SafetyEvent, "safety_events", qos.EVENTS)
        self.scene = self.watcher.collect(msg.SceneStatus, "scene_status", qos.STATUS)
        try:
            active(self.watcher, "sim_robot_node", "safety_node", "policy_node")
        except BaseException:
            self.graph.stop()
            raise

    def forget(self) -> None:
        for heard in (self.applied, self.chunks, self.events):
            heard.clear()

    def at_rest(self) -> bool:
        """The newest command that was heard is a hold; results and commands are topics of their own, in any order."""
        last = self.applied[-1]
        return list(last.action) == [] and bool(last.marks & msg.Applied.HELD)

    def reset(self, state: int = STATE, task: str = TASK) -> None:
        request = srv.ResetScene.Request(task=task, initial_state=state)
        answer = self.watcher.call(srv.ResetScene, "/sim_robot_node/reset", request)
        assert answer.success, answer.message
        self.watcher.until(
            lambda: self.scene and (self.scene[-1].step, self.scene[-1].task) == (0, task), "scene at its start"
        )

    def run(self, **goal: Any) -> Any:
        """A goal that the scene can label, unless the fields say otherwise; its handle."""
        scene = self.scene[-1]
        goal = {"task": scene.task, "instruction": scene.instruction, "horizon": HORIZON} | goal
        return self.watcher.goal(RunTask, "/policy_node/run_task", RunTask.Goal(**goal))

    @functools.cached_property
    def solved(self) -> Solved:
        """The task that the policy solves, from its own initial state, greedily, on the base."""
        self.swap("base")
        self.reset()
        self.forget()
        feedback: list[Any] = []
        goal = RunTask.Goal(task=TASK, instruction=self.scene[-1].instruction, horizon=HORIZON)
        answer = self.watcher.result(self.watcher.goal(RunTask, "/policy_node/run_task", goal, feedback.append))
        self.watcher.until(self.at_rest, "the hold after the motion")
        card = EpisodeStore(self.episodes).card(answer.result.episode)
        return Solved(answer, feedback, list(self.applied), list(self.chunks), list(self.events), card)

    def swap(self, reference: str) -> None:
        """Have this adapter in force, if it is not."""
        wanted = self.base if reference == "base" else self.adapter
        listed = self.watcher.call(srv.ListAdapters, "/policy_node/list_adapters", srv.ListAdapters.Request())
        if {a.id: a.active for a in listed.adapters}[wanted]:
            return
        request = srv.SwapAdapter.Request(reference=reference, expected_id=wanted)
        answer = self.watcher.call(srv.SwapAdapter, "/policy_node/swap_adapter", request)
        assert answer.success, answer.message

    def endless(self) -> Any:
        """A motion that ends when somebody ends it; its handle."""
        self.reset(5, ENDLESS)
        self.forget()
        return self.run(horizon=100_000)


@pytest.fixture(scope="module")
def running(ros: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("graph"))
    yield made
    codes = made.graph.stop()
    made.watcher.close()
    logs = {n: made.graph.log(n) for n in codes}
    assert set(codes.values()) == {0}, logs
    assert not any("Traceback" in text for text in logs.values()), logs


def in_process() -> tuple[np.ndarray, bool]:
    """The plain way: observe, infer, execute the chunk; stop at success."""
    torch.set_num_threads(1)
    policy, robot = checkpoint.load(POLICY), SimRobot("metaworld", TASK, STATE)
    robot.connect()
    sent: list[np.ndarray] = []
    while True:
        seen = robot.observe()
        state = torch.from_numpy(np.concatenate([seen.state[n] for n in policy.spec.state]))[None]
        images = np.stack([seen.images[n] for n in policy.spec.cameras])[None]
        for action in policy.predict(PolicyInput(images, state, [seen.instruction])).actions[0].numpy():
            robot.act(action)
            sent.append(action)
            if robot.success() or len(sent) == HORIZON:
                solved = robot.success()
                robot.close()
                return np.stack(sent), solved


def child(running: Running, module: str) -> psutil.Process:
    """A process that policy_node started."""
    node = psutil.Process(running.graph.processes["policy_node"].pid)
    return next(p for p in node.children(recursive=True) if module in " ".join(p.cmdline()))


def test_an_episode_over_topics_is_the_one_in_process(running: Running) -> None:
    expected, solved = in_process()
    run = running.solved
    result = run.answer.result
    assert run.answer.status == GoalStatus.STATUS_SUCCEEDED
    assert result.outcome == (RunTask.Result.OUTCOME_SUCCESS if solved else RunTask.Result.OUTCOME_FAILURE)
    assert result.outcome_source == "simulator"
    assert result.adapter_id == running.base
    assert solved
    assert result.termination == "success"
    sent = [a for a in run.applied if a.chunk_sequence >= 0]
    np.testing.assert_array_equal(np.array([a.action for a in sent], np.float32), expected)
    assert {a.marks for a in sent} == {0}
    assert [e.code for e in run.events] == []
    offsets = [(a.chunk_sequence, a.chunk_offset) for a in sent]
    assert offsets == sorted(offsets)
    assert run.feedback, "no feedback came"


def test_it_lies_in_the_store_as_it_was(running: Running) -> None:
    """The same topics that were heard here, and everything that learning and labelling need."""
    run, store = running.solved, EpisodeStore(running.episodes)
    card = run.card
    assert (card.task, card.success, card.source, card.reason) == (TASK, True, "simulator", "success")
    assert (card.adapter_id, card.mode, card.dropped) == (running.base, "collect", 0)
    assert card.session == next((running.folder / "robot" / "sessions").iterdir()).name
    reader = store.open(card.id)
    assert (reader.info.initial_state, reader.info.calibrations) == (STATE, {})
    episode = store.read(card.id)
    told = {a.number: a for a in run.applied if a.number}
    commands = [t for t in episode.ticks if t.command is not None]
    for tick, number in zip(episode.ticks, sorted(told), strict=False):
        sent = told[number]
        assert (tick.chunk_sequence, tick.chunk_offset) == (sent.chunk_sequence, sent.chunk_offset)
        assert tick.applied_marks == sent.marks
        assert (tick.reached is None) == (not sent.action)
        if tick.reached is not None:
            np.testing.assert_array_equal(tick.reached, np.array(sent.action, np.float32))
    assert len(commands) == sum(bool(a.action) for a in told.values())
    assert len(episode.steps) == len(run.chunks)
    for step, chunk in zip(episode.steps, run.chunks, strict=True):
        np.testing.assert_array_equal(step.chunk.actions.ravel(), np.array(chunk.actions, np.float32))
        assert set(step.observation.images) == {"corner2"}
        assert step.executed[: step.steps_run].all()
    assert [s.done for s in episode.steps] == [False] * (len(episode.steps) - 1) + [True]
    assert episode.steps[-1].reward == 1.0
    # The camera's stream is there too, from the first frame on that came after the first decision's.
    assert len(list(reader.frames("corner2"))) >= len(commands) - 1


def test_a_person_labels_it_through_the_node(running: Running) -> None:
    card, store = running.solved.card, EpisodeStore(running.episodes)
    request = srv.VerifyEpisode.Request(episode=card.name, label=srv.VerifyEpisode.Request.SUCCESS, person="Ada")
    answer = running.watcher.call(srv.VerifyEpisode, "/policy_node/verify", request)
    assert answer.success, answer.message
    label = Annotations(store).labels(card.id)[0]
    assert (label.value, label.annotator, label.viewed.via) == ("success", "Ada", "ros")
    nobody = srv.VerifyEpisode.Request(episode=card.name, label=1, person=" ")
    assert running.watcher.call(srv.VerifyEpisode, "/policy_node/verify", nobody).code == "episode.no_annotator"
    other = srv.VerifyEpisode.Request(episode="of yesterday", label=1, person="Ada")
    assert running.watcher.call(srv.VerifyEpisode, "/policy_node/verify", other).code == "episode.unknown"


GOALS: list[tuple[dict[str, Any], str]] = [
    ({}, "goal.already_solved"),
    ({"task": "button-press", "instruction": "press the button"}, "goal.other_task"),
    ({"instruction": "stand still"}, "goal.other_instruction"),
    ({"instruction": ""}, "goal.no_instruction"),
    ({"task": ""}, "goal.no_task"),
    ({"temperature": float("nan")}, "goal.bad_temperature"),
]


def test_what_would_be_an_unearned_success_is_refused_and_moves_nothing(running: Running) -> None:
    running.swap("base")
    running.reset()
    assert running.watcher.result(running.run()).result.termination == "success"
    running.watcher.until(lambda: running.scene[-1].success, "a solved scene")
    running.forget()
    for goal, code in GOALS:
        answer = running.watcher.result(running.run(**goal))
        result = answer.result
        assert answer.status == GoalStatus.STATUS_ABORTED
        assert (result.termination, result.code) == ("refused", code)
        assert (result.outcome, result.outcome_source, result.ticks) == (RunTask.Result.OUTCOME_UNJUDGED, "", 0)
    assert not [a for a in running.applied if a.number]


def test_a_person_records_by_hand(running: Running) -> None:
    """A lock-step simulation stands still meanwhile, so there are no ticks; frames and a discarding label are there."""
    running.reset()
    kind, name = srv.RecordEpisode.Request, "/policy_node/record"
    for words, code in (({}, "goal.no_task"), ({"task": "wave"}, "goal.no_instruction")):
        assert running.watcher.call(srv.RecordEpisode, name, kind(request=kind.START, **words)).code == code
    started = running.watcher.call(srv.RecordEpisode, name, kind(request=kind.START, task="wave", instruction="wave"))
    assert started.success, started.message
    again = kind(request=kind.START, task="wave", instruction="wave")
    assert running.watcher.call(srv.RecordEpisode, name, again).code == "recorder.busy"
    refused = running.watcher.result(running.run()).result
    assert (refused.termination, refused.code) == ("refused", "recorder.busy")
    running.reset()
    ended = running.watcher.call(srv.RecordEpisode, name, kind(request=kind.DISCARD))
    assert (ended.success, ended.episode) == (True, started.episode)
    assert running.watcher.call(srv.RecordEpisode, name, kind(request=kind.STOP)).code == "recorder.idle"
    store = EpisodeStore(running.episodes)
    card = store.card(started.episode)
    assert (card.task, card.mode, card.reason, card.success) == ("wave", "demonstration", "discarded", None)
    assert Annotations(store).status(card.id).state == "discarded"
    assert list(store.open(card.id).frames("corner2"))


def learned(batch: RolloutBatch) -> dict[str, torch.Tensor]:
    """The adapter after one update from a fresh one."""
    policy = checkpoint.load(POLICY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = attach(policy.module, lora_config(4, 8.0))
    config = UpdateConfig(learning_rate=1e-3, minibatches=2)
    Updater(policy, lora.trainable(), config, torch.Generator().manual_seed(0)).update(batch)
    return lora.export()


def test_what_is_learned_from_the_nodes_is_what_is_learned_from_the_process(running: Running) -> None:
    """Sampled decisions of the same task, states and seeds are equal in both stores, and so is an update from them.

    The temperature is one that float32 does not hold.
    """
    kept, hot = running.folder / "in_process", 1.6
    running.swap("base")
    asked = ["run", "--task", TASK, "--episodes", "2", "--horizon", "26", "--temperature", str(hot), "--seed", "3"]
    asked += ["--record", str(kept), "--python", str(ROOT / ".venv" / "bin" / "python")]
    code, told = ratchet(*asked)
    assert code == 0
    here, pairs = EpisodeStore(kept), []
    for row in told["episodes"]:
        info = here.open(row["episode"]).info
        running.reset(info.initial_state)
        result = running.watcher.result(running.run(horizon=26, temperature=hot, seed=info.seed)).result
        pairs.append((here.read(row["episode"]), EpisodeStore(running.episodes).read(result.episode)))
    for one, other in pairs:
        assert (one.seed, one.initial_state, one.success) == (other.seed, other.initial_state, other.success)
        assert len(one.steps) == len(other.steps) > 3
        for a, b in zip(one.steps, other.steps, strict=True):
            assert a.observation.images.keys() == b.observation.images.keys() == {"corner2"}
            arrays: list[tuple[np.ndarray | None, np.ndarray | None]] = [
                (a.observation.images["corner2"], b.observation.images["corner2"]),
                *zip(a.observation.state.values(), b.observation.state.values(), strict=True),
                (a.chunk.actions, b.chunk.actions),
                (a.chunk.tokens, b.chunk.tokens),
                (a.chunk.log_prob, b.chunk.log_prob),
                (a.executed, b.executed),
            ]
            for mine, theirs in arrays:
                assert mine is not None
                assert theirs is not None
                assert (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes())
            facts = [(s.chunk.adapter_id, s.chunk.temperature, s.chunk.compute_dtype) for s in (a, b)]
            assert facts[0] == facts[1]
            assert facts[0][:2] == (running.base, hot)
            assert (a.reward, a.done, a.steps_run) == (b.reward, b.done, b.steps_run)
    policy = checkpoint.load(POLICY)
    batches = [to_batch(episodes, [0, 0], policy) for episodes in zip(*pairs, strict=True)]
    for name, values in vars(batches[0]).items():
        theirs = getattr(batches[1], name)
        assert np.array_equal(values, theirs) if isinstance(values, np.ndarray) else values == theirs, name
    assert log_prob_gap(batches[0], policy) < 1e-4  # a learner refuses beyond 0.05
    updates = []
    for batch in batches:
        batch.success[:] = [True, False]  # whatever a processor's rounding made of them: equals teach nothing
        updates.append(learned(batch))
    for name, tensor in updates[0].items():
        assert torch.equal(tensor, updates[1][name]), name
    assert any(t.abs().max() > 0 for name, t in updates[0].items() if "lora_B" in name)


def test_an_adapter_is_exchanged_in_motion_between_two_chunks(running: Running) -> None:
    running.swap("base")
    handle = running.endless()
    running.watcher.until(lambda: len(running.applied) > 20, "motion")
    refused = running.watcher.call(
        srv.SwapAdapter, "/policy_node/swap_adapter", srv.SwapAdapter.Request(reference="nobody")
    )
    assert not refused.success
    assert refused.code == "adapter.unknown"
    before = len(running.applied)
    swap = srv.SwapAdapter.Request(reference="candidate", expected_id=running.adapter)
    answer = running.watcher.call(srv.SwapAdapter, "/policy_node/swap_adapter", swap)
    assert answer.success, answer.message
    assert (answer.old_id, answer.new_id) == (running.base, running.adapter)
    running.watcher.until(lambda: running.chunks[-1].adapter_id == running.adapter, "a chunk of the new adapter")
    running.watcher.until(lambda: len(running.applied) > before + 30, "motion with it")
    cancel = handle.cancel_goal_async()
    result = running.watcher.result(handle)
    assert cancel.done()
    assert result.status == GoalStatus.STATUS_CANCELED
    assert result.result.termination == "cancelled"
    assert (result.result.outcome, result.result.outcome_source) == (RunTask.Result.OUTCOME_UNJUDGED, "")
    of_chunk: dict[int, set[str]] = {}
    for a in running.applied:
        if a.chunk_sequence >= 0:
            of_chunk.setdefault(a.chunk_sequence, set()).add(a.adapter_id)
    assert all(len(ids) == 1 for ids in of_chunk.values())
    order = [next(iter(of_chunk[n])) for n in sorted(of_chunk)]
    flip = order.index(running.adapter)
    assert order == [running.base] * flip + [running.adapter] * (len(order) - flip)
    numbers = [a.number for a in running.applied if a.number]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))  # no tick without its command
    assert not [e for e in running.events if e.latched]
    listed = running.watcher.call(srv.ListAdapters, "/policy_node/list_adapters", srv.ListAdapters.Request())
    assert {a.id: a.active for a in listed.adapters} == {running.base: False, running.adapter: True}


def test_a_cancelled_task_has_come_to_rest(running: Running) -> None:
    handle = running.endless()
    running.watcher.until(lambda: len(running.applied) > 10, "motion")
    handle.cancel_goal_async()
    assert running.watcher.result(handle).result.termination == "cancelled"
    running.watcher.until(running.at_rest, "the hold after the cancelled motion")
    status = running.watcher.collect(msg.SafetyStatus, "safety_status", qos.STATUS)
    running.watcher.until(lambda: status and status[-1].state == "idle", "an idle command filter")


def test_ctl_and_doctor_speak_with_the_graph(running: Running) -> None:
    running.swap("candidate")
    code, status = ratchet("ctl", "status")
    assert code == 0
    assert status["policy"]["adapter_id"] == running.adapter
    assert status["safety"]["state"] == "idle"
    code, told = ratchet("ctl", "swap", "base")
    assert code == 0
    assert told["new_id"] == running.base
    code, told = ratchet("ctl", "params", "policy_node", "hold_timeout", "7.5")
    assert (code, told[0]["value"]) == (0, 7.5)
    code, told = ratchet("ctl", "params", "policy_node", "hold_timeout", "-1.0")
    assert (code, told["error"]["code"]) == (2, "ctl.parameter_refused")
    code, told = ratchet("ctl", "params", "policy_node", "blend", "3")
    assert (code, told["error"]["code"]) == (2, "ctl.parameter_refused")
    assert "fixed while" in told["error"]["what"]
    running.reset()
    code, told = ratchet("ctl", "run", TASK, "--instruction", running.scene[-1].instruction, "--horizon", "64")
    assert (code, told["outcome"]) == (0, "success")
    code, found = ratchet("doctor", "--contract", CONTRACT, "--running", "--sim-time", "--seconds", "1")
    levels = {f["code"]: f["level"] for f in found}
    assert levels["doctor.segment"] == levels["doctor.nodes"] == "ok"
    assert "doctor.second_publisher" not in levels


def test_the_e_stop_latches_until_a_person_clears_it(running: Running) -> None:
    running.swap("base")
    handle = running.endless()
    running.watcher.until(lambda: len(running.applied) > 10, "motion")
    code, _ = ratchet("ctl", "stop")
    assert code == 0
    result = running.watcher.result(handle)
    assert result.status == GoalStatus.STATUS_ABORTED
    assert result.result.termination == "fault"
    assert result.result.outcome == RunTask.Result.OUTCOME_UNJUDGED
    running.reset()
    refused = running.watcher.result(running.run()).result
    assert (refused.termination, refused.code) == ("refused", "safety.latched")
    code, told = ratchet("ctl", "clear", "Ada")
    assert (code, told["error"]["code"]) == (2, "safety.e_stop")
    assert ratchet("ctl", "stop", "--release")[0] == 0
    # One service clears what a person was told about, in both filters; a second time there is nothing to clear.
    ask, clear = srv.ClearFault.Request(person="Ada"), "/policy_node/clear_fault"
    assert running.watcher.call(srv.ClearFault, clear, srv.ClearFault.Request()).code == "safety.no_operator"
    answer = running.watcher.call(srv.ClearFault, clear, ask)
    assert (answer.success, "safety.e_stop" in answer.cleared) == (True, True), answer.message
    assert running.watcher.call(srv.ClearFault, clear, ask).code == "safety.not_latched"
    code, told = ratchet("ctl", "clear", "Ada")
    assert (code, told) == (0, {"cleared": "nothing was latched"})
    running.reset()
    assert running.watcher.result(running.run()).result.termination == "success"


def test_a_killed_policy_process_holds_the_arm_until_it_is_cleared(running: Running) -> None:
    running.swap("base")
    handle = running.endless()
    running.watcher.until(lambda: len(running.applied) > 10, "motion")
    child(running, "inference.worker").send_signal(signal.SIGKILL)
    result = running.watcher.result(handle)
    assert (result.result.termination, result.result.code) == ("fault", "policy.crashed")
    running.watcher.until(running.at_rest, "the hold after the crash")
    assert ratchet("ctl", "clear", "Ada")[0] == 0
    status = running.watcher.collect(msg.PolicyStatus, "policy_status", qos.STATUS)
    running.watcher.until(lambda: status and status[-1].state == "ready" and status[-1].restarts == 1, "a new process")
    running.reset()
    assert running.watcher.result(running.run()).result.termination == "success"


def test_a_killed_recorder_costs_one_file_and_no_motion(running: Running) -> None:
    """The arm goes on, the result says what is missing, the next task is recorded and the cut-off file recovered."""
    running.swap("base")
    kept = set(EpisodeStore(running.episodes).cards())
    handle = running.endless()
    running.watcher.until(lambda: len(running.applied) > 30, "motion")
    child(running, "recorder.process").send_signal(signal.SIGKILL)
    before = len(running.applied)
    running.watcher.until(lambda: len(running.applied) > before + 20, "motion without a recorder")
    handle.cancel_goal_async()
    result = running.watcher.result(handle).result
    assert (result.termination, result.episode) == ("cancelled", "")
    assert "recorder.lost" in result.message
    assert not [e for e in running.events if e.latched]
    running.reset()
    result = running.watcher.result(running.run()).result
    assert (result.termination, EpisodeStore(running.episodes).card(result.episode).reason) == ("success", "success")
    new = [c for i, c in EpisodeStore(running.episodes).cards().items() if i not in kept]
    cut = [c for c in new if c.recovered]
    assert len(new) == 2
    assert [(c.task, c.reason, c.success) for c in cut] == [(ENDLESS, "cut_off", None)]
    assert cut[0].ticks > 0


def test_a_session_has_its_manifest(running: Running) -> None:
    running.swap("base")
    running.swap("candidate")
    running.swap("base")
    manifest = json.loads(next((running.folder / "robot" / "sessions").glob("*/session.json")).read_text())
    assert manifest["base_hash"] == running.base
    ids = [identity for _, identity in manifest["adapters"]]
    assert ids[0] == running.base
    assert ids[-3:] == [running.base, running.adapter, running.base]


def test_rosbags_reads_a_recording_as_a_bag(running: Running) -> None:
    """Records and topics as on the wire, side by side."""
    card, store = running.solved.card, EpisodeStore(running.episodes)
    with Reader(store.path(card.id)) as reader:
        kinds = {c.topic: c.msgtype for c in reader.connections}
        sent = [deserialize_message(d, msg.Command) for c, _, d in reader.messages() if c.topic == "/command"]
        images = sum(c.topic == "/corner2/image_raw" for c, _, _ in reader.messages())
    assert kinds["/ratchet/tick"] == "ratchet_msgs/msg/RecordedTick"
    assert kinds["/ratchet/cameras/corner2/image_raw/compressed"] == "sensor_msgs/msg/CompressedImage"
    assert kinds["/corner2/image_raw"] == "sensor_msgs/msg/Image"
    assert {"/hand_pose", "/gripper/joint_states", "/applied", "/chunks"} < set(kinds)
    assert set(store.open(card.id).info.wire) >= {t for t in kinds if not t.startswith("/ratchet/")}
    ticks = store.read(card.id).ticks
    commands = [t.command for t in ticks if t.command is not None]
    assert np.array_equal([np.array(c.action, np.float32) for c in sent if c.kind == msg.Command.ACTION], commands)
    assert images >= len(commands) - 1
