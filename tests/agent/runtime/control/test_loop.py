"""The loop decides which action reaches an arm at which moment; an action one period off is another motion.

Pinned: `collect` sends exactly what was sampled, `deploy` aligns, skips and blends by the clock and marks it, overruns
are counted and never caught up with, a person's commands are marked, faults end in a hold with the plan dropped, a
broken recorder stops nothing, and a success is earned: nothing that was solved before, by itself or by a person is the
policy's. A manual clock stands for time; nothing sleeps.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ControlTick, Mark, Observation
from ratchet_vla.runtime.clock import ExternalClock, ManualClock
from ratchet_vla.runtime.control import loop
from ratchet_vla.runtime.control.chunks import ChunkExecutor, CollectExecutor, DeployExecutor
from ratchet_vla.runtime.control.labelling import SceneLabeller
from ratchet_vla.runtime.control.loop import ControlLoop, Termination
from ratchet_vla.runtime.control.sink import MemorySink
from ratchet_vla.runtime.inference.source import PolicyFault
from ratchet_vla.runtime.safety.filter import SafetyConfig, SafetyFilter, SafetyState
from ratchet_vla.testing.fake_arm import FakeArm
from ratchet_vla.testing.fake_contract import arm
from tests.agent.runtime.control.sources import FakeSource

T = 0.05
K = 8
CONTRACT = arm("ee_delta", rotation="none")


def numbered(seen: Observation) -> np.ndarray:
    """Small actions that tell their chunk and their place in it."""
    out = np.zeros((K, 4), np.float32)
    out[:, 0] = 1e-4 * (1 + seen.sequence % 2)
    out[:, 1] = 1e-6 * np.arange(K) + 1e-5 * seen.sequence
    out[:, 3] = 1.0
    return out


class Rig:
    def __init__(
        self,
        executor: ChunkExecutor,
        *,
        delay: float = 0.0,
        contract: RobotContract = CONTRACT,
        config: SafetyConfig | None = None,
        **options: object,
    ) -> None:
        self.clock, self.sink = ManualClock(100.0), MemorySink()
        self.robot = FakeArm(contract, self.clock)
        self.robot.connect()
        self.source = FakeSource(self.clock, numbered, delay)
        self.safety = SafetyFilter(contract, config)
        self.loop = ControlLoop(
            self.robot,
            self.source,
            self.safety,
            executor,
            sink=self.sink,
            clock=self.clock,
            **options,  # type: ignore[arg-type]
        )
        self.loop.begin("task", "move")

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.loop.tick()

    @property
    def codes(self) -> list[str]:
        return [e.code for e in self.sink.events]


def test_collect_sends_exactly_what_was_sampled() -> None:
    rig = Rig(CollectExecutor(CONTRACT), lock_step=True)
    rig.run(3 * K)
    sent = [command for _, command in rig.robot.commands if command is not None]
    expected = np.concatenate([numbered(o) for o in rig.source.seen])
    np.testing.assert_array_equal(np.stack(sent), expected)
    assert [t.chunk_offset for t in rig.sink.ticks] == [*range(K)] * 3
    assert [t.chunk_sequence for t in rig.sink.ticks] == [0] * K + [1] * K + [2] * K
    assert all(t.marks == Mark.NONE for t in rig.sink.ticks)
    rig.loop.stop()
    assert [o.marks.tolist() for o in rig.sink.outcomes] == [[0] * K] * 3
    assert rig.codes == []


def test_collect_waits_standing_for_a_slow_policy_and_then_goes_on() -> None:
    rig = Rig(CollectExecutor(CONTRACT), delay=0.12)
    rig.run(40)
    offsets = [t.chunk_offset for t in rig.sink.ticks]
    assert offsets[:5] == [-1, -1, -1, 0, 1]
    assert offsets.count(-1) > 6
    assert [o for o in offsets if o >= 0][:16] == [*range(K), *range(K)]
    assert rig.codes == []


def test_deploy_overlaps_inference_with_motion_and_skips_what_is_past() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6, blend=0), delay=0.1)
    rig.run(60)
    moving = [t for t in rig.sink.ticks if t.chunk_sequence >= 0]
    assert [t.index for t in moving] == list(range(moving[0].index, 60))  # never a gap after the first chunk
    for before, after in itertools.pairwise(moving):
        if after.chunk_sequence == before.chunk_sequence:
            assert after.chunk_offset == before.chunk_offset + 1
        else:
            seen = rig.source.seen[after.chunk_sequence]
            assert after.deadline - seen.stamp == pytest.approx(after.chunk_offset * T, abs=T / 2)
            assert after.chunk_offset >= 2
    assert moving[0].chunk_offset == 0  # from standstill the head is not cut off
    skipped = [o.marks.tolist() for o in rig.sink.outcomes[1:-1]]
    assert skipped
    assert all(m[:2] == [Mark.SKIPPED] * 2 for m in skipped)


def test_the_first_slow_answer_does_not_make_deploy_skip_for_ever() -> None:
    executor = DeployExecutor(CONTRACT, use=6, blend=0)
    rig = Rig(executor, delay=0.35)
    rig.run(8)
    rig.source.delay = 0.05
    rig.run(60)
    assert executor.latency <= 0.1 + 1e-9


def test_deploy_blends_over_the_window_but_never_the_gripper() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6, blend=2), delay=0.1)
    rig.source.answer = lambda o: np.tile(
        np.array([1e-3 + 2e-3 * (o.sequence % 2), 0, 0, 1 - o.sequence % 2], np.float32), (K, 1)
    )
    rig.run(30)
    ticks = rig.sink.ticks
    first = next(i for i, t in enumerate(ticks) if t.chunk_sequence == 1)
    for i, weight in ((first, 1 / 3), (first + 1, 2 / 3)):
        assert ticks[i].marks & Mark.BLENDED
        assert ticks[i].command[0] == pytest.approx(1e-3 + 2e-3 * weight, rel=1e-4)  # type: ignore[index]
        assert ticks[i].sampled[0] == pytest.approx(3e-3)  # type: ignore[index]
    gripper = [float(t.command[3]) for t in ticks[first - 1 : first + 2]]  # type: ignore[index]
    assert gripper[0] == 1.0
    np.testing.assert_allclose(gripper[1:], [0.85, 0.7], atol=1e-6)  # its rate limit, not the blend


def test_the_hook_for_real_time_chunking_tells_what_will_have_been_sent() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6, blend=0), delay=0.1)
    rig.run(30)
    ahead = rig.source.aheads[4]
    assert rig.source.aheads[0] is None
    assert ahead is not None
    assert ahead.delay == 2  # the command of the observation's own tick, and the one while the answer is made
    asked = rig.source.seen[4].stamp
    sent = [t for t in rig.sink.ticks if t.deadline > asked - 1e-6][: ahead.delay]
    np.testing.assert_array_equal(
        ahead.previous_actions[: ahead.delay], np.stack([t.command for t in sent if t.command is not None])
    )
    # The answer is taken up at the action after those, so both count from the same moment.
    first = next(t for t in rig.sink.ticks if t.chunk_sequence == rig.source.seen[4].sequence)
    assert first.chunk_offset == ahead.delay


def test_overruns_are_counted_and_not_caught_up_with() -> None:
    rig = Rig(CollectExecutor(CONTRACT), lock_step=False)
    rig.run(4)
    rig.robot.on_act = lambda action: rig.clock.advance(0.17)
    rig.run(1)
    rig.robot.on_act = None
    rig.run(3)
    assert (rig.loop.timing.overruns, rig.loop.timing.missed) == (1, 3)
    deadlines = [round((t.deadline - 100.0) / T) for t in rig.sink.ticks]
    assert deadlines == [0, 1, 2, 3, 4, 8, 9, 10]


def test_a_persons_commands_are_marked_and_the_policy_begins_anew_after_them() -> None:
    contract = arm("ee_delta", rotation="none", ramp=0.3)
    rig = Rig(CollectExecutor(contract), contract=contract)
    rig.run(12)
    asked = len(rig.source.seen)
    mine = np.array([0.0, 1e-4, 0.0, 1.0], np.float32)
    for _ in range(5):
        rig.loop.human(mine)
        rig.run(1)
    human = rig.sink.ticks[-5:]
    assert all(t.marks & Mark.HUMAN and t.sampled is None and t.chunk_sequence == -1 for t in human)
    np.testing.assert_array_equal(human[-1].command, mine)
    rig.loop.human(None)
    rig.source.answer = lambda o: np.tile(np.array([0.02, 0, 0, 1.0], np.float32), (K, 1))
    rig.run(4)
    assert rig.source.seen[asked].stamp >= human[-1].stamp  # a new observation, not the old plan
    assert any(t.marks & Mark.RAMPED for t in rig.sink.ticks[-3:])


def test_a_person_who_falls_silent_is_not_repeated_for_ever() -> None:
    rig = Rig(CollectExecutor(CONTRACT))
    rig.loop.human(np.array([1e-3, 0, 0, 1.0], np.float32))
    rig.run(20)
    assert "safety.action_age" in rig.codes
    assert rig.robot.commands[-1][1] is None


def test_a_fault_of_the_policy_drops_the_plan_and_holds() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.1)
    rig.run(12)
    rig.source.faults.append(PolicyFault("policy.crashed", "on purpose"))
    rig.run(12)
    assert rig.safety.state is SafetyState.LATCHED
    assert rig.codes == ["policy.crashed"]
    assert rig.robot.commands[-1][1] is None
    assert rig.sink.outcomes[-1].marks[-1] == Mark.SKIPPED


def test_other_threads_are_let_in_between_the_command_and_what_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere Python would take the interpreter away in the middle of a tick, its command perhaps not out yet."""
    rig = Rig(CollectExecutor(CONTRACT))
    happened: list[tuple[int, int]] = []
    monkeypatch.setattr(
        loop, "offer_interpreter", lambda: happened.append((len(rig.robot.commands), len(rig.sink.ticks)))
    )
    rig.run(3)
    assert happened == [(1, 0), (2, 1), (3, 2)]


def test_what_failed_while_the_arm_was_at_rest_and_is_mended_is_no_fault_of_the_next_episode() -> None:
    rig = Rig(CollectExecutor(CONTRACT))
    rig.run(K)
    rig.loop.stop()
    rig.source.poll()
    rig.source.faults.append(PolicyFault("policy.crashed", "on purpose"))
    rig.loop.begin("task", "move")
    rig.run(K)
    assert rig.codes == []
    assert rig.safety.state is not SafetyState.LATCHED


def test_late_repeated_and_reordered_chunks_are_dropped() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.1)
    rig.run(20)
    rig.source.extra += [rig.sink.chunks[-1], rig.sink.chunks[0]]
    chunks = len(rig.sink.chunks)
    rig.run(2)
    assert set(rig.codes) <= {"safety.chunk_sequence"}
    assert [c.observation_sequence for c in rig.sink.chunks] == sorted(
        {c.observation_sequence for c in rig.sink.chunks}
    )
    assert len(rig.sink.chunks) - chunks <= 1


def test_a_silent_policy_holds_the_arm_within_the_contracts_time_and_motion_resumes_without_a_jump() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.1)
    rig.source.answer = lambda o: np.tile(np.array([0.01 * (-1) ** o.sequence, 0, 0, 1.0], np.float32), (K, 1))
    rig.run(20)
    rig.source.silent = True
    silenced = rig.clock.now()
    rig.run(40)
    standing = next(now for now, c in rig.robot.commands if now > silenced and c is None)
    assert standing - silenced <= CONTRACT.watchdog.policy_timeout + CONTRACT.watchdog.stop_time + 2 * T
    place = rig.robot.position
    rig.source.silent = False
    rig.run(20)
    assert rig.safety.state is SafetyState.RUNNING
    later = [c for now, c in rig.robot.commands if now > silenced + 40 * T and c is not None]
    assert abs(later[0][0]) <= 2.0 * T * T * 1.001  # one period of the acceleration limit
    assert np.abs(rig.robot.position - place).max() < 0.2


def test_a_broken_recorder_stops_nothing() -> None:
    rig = Rig(CollectExecutor(CONTRACT), lock_step=True)

    def broken(tick: object) -> None:
        raise OSError("disk full")

    rig.sink.tick = broken  # type: ignore[method-assign]
    rig.run(10)
    assert len(rig.robot.commands) == 10
    assert isinstance(rig.loop.sink.error, OSError)  # type: ignore[attr-defined]


def test_a_refusing_robot_is_a_fault() -> None:
    rig = Rig(CollectExecutor(CONTRACT))
    rig.run(4)
    rig.robot.faults.refuse = True
    rig.run(12)
    assert rig.safety.state is SafetyState.LATCHED
    assert rig.safety.cause == "runtime.robot"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("frozen_frames", "safety.observation_age"),
        ("frozen_state", "safety.observation_age"),
        ("not_finite", "safety.state"),
    ],
)
def test_lost_cameras_and_states_hold_within_the_contracts_time(fault: str, code: str) -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.1)
    rig.run(12)
    setattr(rig.robot.faults, fault, True)
    struck = rig.clock.now()
    rig.run(20)
    assert rig.codes[0] == code
    standing = next(now for now, c in rig.robot.commands if now > struck and c is None)
    assert standing - struck <= CONTRACT.watchdog.observation_max_age + CONTRACT.watchdog.stop_time + 2 * T


def test_a_camera_that_repeats_itself_while_the_arm_moves_is_noticed() -> None:
    rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.05, frozen_after=0.3)
    rig.source.answer = lambda o: np.tile(np.array([2e-3 * (-1) ** o.sequence, 0, 0, 1.0], np.float32), (K, 1))
    rig.run(12)
    assert rig.codes == []
    images = rig.robot._images()
    rig.robot._images = lambda: images  # type: ignore[method-assign]
    rig.run(20)
    assert "safety.frozen_frame" in rig.codes


def test_a_robot_that_cannot_tell_its_state_is_a_hold_and_one_that_cannot_see_runs_out_of_actions() -> None:
    for blind, code in ((False, "safety.observation_age"), (True, "observation.skew")):
        rig = Rig(DeployExecutor(CONTRACT, use=6), delay=0.1)
        rig.run(12)
        observe = rig.robot.observe

        def broken(cameras: bool = True, blind: bool = blind, observe: object = observe) -> Observation:
            if cameras or not blind:
                raise RatchetError("observation.skew", "too far apart", where="wrist")
            return observe(cameras)  # type: ignore[operator, no-any-return]

        rig.robot.observe = broken  # type: ignore[method-assign]
        rig.run(20)
        assert rig.codes[0] == code
        assert rig.safety.state is SafetyState.HOLDING
        assert rig.robot.commands[-1][1] is None
        rig.robot.observe = observe  # type: ignore[method-assign]
        rig.run(12)
        assert rig.safety.state is SafetyState.RUNNING


def test_an_error_in_mid_motion_leaves_the_arm_held() -> None:
    rig = Rig(CollectExecutor(CONTRACT))

    def broken(tick: object) -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        rig.loop.run_episode("t", "move", horizon=50, on_tick=broken)
    assert rig.robot.commands[-1][1] is None
    assert rig.sink.episodes[-1][:2] == ("end", "fault")


def test_the_first_tick_on_a_told_clock_has_a_whole_period() -> None:
    """An episode begins anywhere between two steps of a simulation; what is left of this one may be too short."""
    clock = ExternalClock(stall_timeout=60.0)
    clock.update(100.0)
    robot = FakeArm(CONTRACT, clock)
    robot.connect()
    loop = ControlLoop(
        robot, FakeSource(clock, numbered), SafetyFilter(CONTRACT), CollectExecutor(CONTRACT), clock=clock
    )
    loop.begin("task", "move")
    clock.update(100.0 + T)
    assert loop.tick().deadline == 100.0 + T
    assert loop.timing.missed == 0


@pytest.mark.parametrize("may_pause", [False, True])
def test_a_told_clock_that_stops_holds_the_arm(may_pause: bool) -> None:
    """A fault, unless it is a simulation's, in which nothing moves where time stands: then the task goes on with it."""
    clock = ExternalClock(stall_timeout=0.01)
    clock.update(100.0)
    robot = FakeArm(CONTRACT, clock)
    robot.connect()
    safety = SafetyFilter(CONTRACT, SafetyConfig(clock_may_pause=may_pause))
    loop = ControlLoop(
        robot, FakeSource(clock, numbered), safety, CollectExecutor(CONTRACT), sink=MemorySink(), clock=clock
    )
    loop.begin("task", "move")
    for k in range(1, 6):
        clock.update(100.0 + k * T)
        loop.tick()
    assert safety.state is SafetyState.RUNNING
    missed = loop.timing.missed
    ticks = [loop.tick() for _ in range(12)]  # nobody tells the time any more
    assert robot.commands[-1][1] is None
    if not may_pause:
        assert (safety.state, safety.cause) == (SafetyState.LATCHED, "safety.clock")
        return
    assert (safety.state, safety.cause) == (SafetyState.HOLDING, "safety.clock_paused")
    assert len({tick.deadline for tick in ticks}) == 1  # its deadlines wait as well
    for k in range(6, 20):
        clock.update(100.0 + k * T)
        loop.tick()
    assert safety.state in (SafetyState.RAMPING, SafetyState.RUNNING)
    assert robot.commands[-1][1] is not None
    assert loop.timing.missed == missed


def test_a_clock_that_stands_for_good_ends_the_episode_after_the_longest_hold() -> None:
    clock = ExternalClock(stall_timeout=0.01)
    clock.update(100.0)
    robot = FakeArm(CONTRACT, clock)
    robot.connect()
    executor, safety = CollectExecutor(CONTRACT), SafetyFilter(CONTRACT, SafetyConfig(clock_may_pause=True))
    loop = ControlLoop(robot, FakeSource(clock, numbered), safety, executor, clock=clock)
    end = loop.run_episode("t", "move", horizon=3, hold_timeout=5 * T)
    assert (end.termination, end.reason) == (Termination.HOLD_TIMEOUT, "safety.clock_paused")


def test_episodes_end_for_a_reason_apart_from_success() -> None:
    def rig() -> Rig:
        return Rig(CollectExecutor(CONTRACT))

    end = (r := rig()).loop.run_episode("t", "move", horizon=20)
    assert (end.termination, end.success) == (Termination.HORIZON, None)
    assert r.sink.episodes[-1] == ("end", "horizon", "None", "")
    end = (r := rig()).loop.run_episode("t", "move", horizon=20, labeller=SceneLabeller(lambda: len(r.sink.ticks) > 7))
    assert (end.termination, end.success, end.ticks >= 8) == (Termination.SUCCESS, True, True)
    assert r.sink.episodes[-1] == ("end", "success", "True", "simulator")
    end = (r := rig()).loop.run_episode("t", "move", horizon=20, on_tick=lambda t: r.loop.cancel())
    assert end.termination is Termination.CANCELLED
    assert r.robot.commands[-1][1] is None
    r = rig()
    fault = PolicyFault("policy.crashed", "on purpose")
    end = r.loop.run_episode("t", "move", horizon=20, on_tick=lambda t: r.source.faults.append(fault))
    assert (end.termination, end.reason) == (Termination.FAULT, "policy.crashed")
    r = rig()
    r.source.silent = True
    end = r.loop.run_episode("t", "move", horizon=400, hold_timeout=1.0, labeller=SceneLabeller(lambda: False))
    assert (end.termination, end.success, end.reason) == (Termination.HOLD_TIMEOUT, None, "safety.policy_timeout")


def test_a_solved_scene_and_a_goal_without_words_move_nothing() -> None:
    for solved, instruction, code in ((True, "move", "already_solved"), (False, "", "no_instruction")):
        rig = Rig(CollectExecutor(CONTRACT))
        rig.sink.episodes.clear()
        with pytest.raises(RatchetError) as caught:
            rig.loop.run_episode("t", instruction, horizon=20, labeller=SceneLabeller(functools.partial(bool, solved)))
        assert caught.value.code == f"goal.{code}"
        assert (rig.robot.commands, rig.sink.episodes) == ([], [])


def test_a_success_without_a_decision_of_the_policy_is_nobodys() -> None:
    rig = Rig(CollectExecutor(CONTRACT), delay=1.0)  # the answer comes long after the scene has solved itself
    labeller = SceneLabeller(lambda: len(rig.sink.ticks) >= 4)
    end = rig.loop.run_episode("t", "move", horizon=20, labeller=labeller)
    assert (end.termination, end.success, end.decisions) == (Termination.SUCCESS, None, 0)
    assert rig.sink.episodes[-1] == ("end", "success", "None", "")


def test_what_a_person_solved_or_stopped_is_not_the_policys() -> None:
    rig = Rig(CollectExecutor(CONTRACT), lock_step=True)

    def intervene(tick: ControlTick) -> None:
        rig.loop.human(np.array([1e-4, 0.0, 0.0, 1.0], np.float32) if 4 <= tick.index < 8 else None)

    labeller = SceneLabeller(lambda: len(rig.sink.ticks) > 12)
    end = rig.loop.run_episode("t", "move", horizon=40, labeller=labeller, on_tick=intervene)
    assert (end.termination, end.success, end.human_ticks) == (Termination.SUCCESS, None, 4)
    rig = Rig(CollectExecutor(CONTRACT), lock_step=True)

    def cancel(tick: ControlTick) -> None:
        if tick.index == 10:
            rig.loop.cancel()

    end = rig.loop.run_episode("t", "move", horizon=40, labeller=SceneLabeller(lambda: False), on_tick=cancel)
    assert (end.termination, end.success, end.decisions) == (Termination.CANCELLED, None, 2)
    end = rig.loop.run_episode("t", "move", horizon=24, labeller=SceneLabeller(lambda: False))
    assert (end.termination, end.success, end.source, end.decisions) == (Termination.HORIZON, False, "simulator", 3)
