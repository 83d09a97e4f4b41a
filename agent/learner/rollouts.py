"""Rollouts: many episodes of one policy over a vector of environments, with batched inference.

Knows episodes, seeds and the order of work. Knows no simulator (environments are arguments) and no update rule.
While one group of environments runs its chunks, the policy infers for another: both sides stay busy.
Determinism: an episode's actions come from its own seed, its group's order of work depends on nothing but the list of
episodes, and inference runs once per group and round; the same list gives the same numbers, also after a worker died.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from agent.contract import RobotContract
from agent.episodes.earned import require_goal, require_temperature
from agent.errors import RatchetError
from agent.policy.commands import robot_actions
from agent.policy.computing import name_of
from agent.policy.noise import chunk_noise
from agent.policy.protocol import Policy, PolicyInput
from agent.records import Bool, Float32, Int64, UInt8


class ChunkEnv(Protocol):
    """What a vector of environments must offer; `sim.vector.ChunkVectorEnv` does."""

    groups: Sequence[Sequence[int]]
    arrays: Mapping[str, Any]
    chunk: int

    @property
    def contract(self) -> RobotContract: ...

    def submit(self, group: int, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, Float32]) -> None: ...

    def collect(self, group: int) -> None: ...


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to run: a task from an initial state, with the seed of its action noise.

    group: episodes of one group share task and initial state (GRPO's comparison group).
    """

    task: str
    instruction: str
    initial_state: int
    horizon: int
    seed: int
    group: int = 0


@dataclass
class RolloutBatch:
    """Episodes flattened to decisions. E episodes, N decisions (chunks), K actions of D dimensions each.

    images: (N, V, H, W, 3) uint8. state: (N, S) float32. instruction: (N,) index into `instructions`.
    tokens: (N, K, D) int64; of flow policies the chains, (N, steps + 1, H, A) float32.
    log_prob: (N, K, D) float32 under the sampling distribution.
    feature: (N, H) float32, what a value head reads; H = 0 for policies without one.
    valid: (N, K) bool, control steps that ran. episode: (N,) index into the episode arrays, in order of time.
    success: (E,) bool. steps: (E,) control steps run. group: (E,). adapter_id: the id that produced every action.
    compute_dtype: what every decision was computed in; "" where nobody recorded it.
    """

    images: UInt8
    state: Float32
    instruction: Int64
    instructions: list[str]
    tokens: Int64 | Float32
    log_prob: Float32
    feature: Float32
    valid: Bool
    episode: Int64
    success: Bool
    steps: Int64
    group: Int64
    temperature: float
    adapter_id: str
    compute_dtype: str = ""
    specs: list[EpisodeSpec] = field(default_factory=list)
    seconds: float = 0.0

    def policy_input(self, rows: Int64) -> PolicyInput:
        """The observations of some decisions, as the policy takes them."""
        return PolicyInput(
            images=self.images[rows],
            state=torch.from_numpy(self.state[rows]) if self.state.shape[1] else None,
            instructions=[self.instructions[i] for i in self.instruction[rows]],
        )


def one_dtype(names: set[str], whose: str) -> str:
    """The one dtype that everything was computed in.

    Raises:
        RatchetError: learner.mixed_dtypes, naming them.
    """
    if len(names) > 1:
        told = " and ".join(sorted(name or "an unrecorded dtype" for name in names))
        raise RatchetError(
            "learner.mixed_dtypes",
            f"one batch was computed in {told}",
            where=whose,
            fix="let all robots compute in one dtype: --dtype, or RATCHET_DTYPE",
        )
    return next(iter(names), "")


@dataclass
class Outcomes:
    """Result of an evaluation: successes in the order of the specs."""

    success: Bool
    steps: Int64
    seconds: float


@dataclass
class _Running:
    index: int
    rows: list[int] = field(default_factory=list)
    noise: np.random.Generator | None = None
    steps: int = 0


class _Store:
    """Grows decision by decision; one allocation per decision, stacked once at the end."""

    def __init__(self) -> None:
        self.images: list[UInt8] = []
        self.state: list[Float32] = []
        self.tokens: list[Int64 | Float32] = []
        self.log_prob: list[Float32] = []
        self.feature: list[Float32] = []
        self.valid: list[Bool] = []


def run_episodes(
    policy: Policy,
    env: ChunkEnv,
    specs: Sequence[EpisodeSpec],
    *,
    temperature: float,
    adapter_id: str = "",
    keep: bool = True,
    noise_correlation: float = 0.0,
    progress: Callable[[int, bool], None] | None = None,
    shown: Callable[[int, UInt8], UInt8] | None = None,
) -> tuple[Outcomes, RolloutBatch | None]:
    """Run every episode to its end.

    temperature: sampling temperature; 0.0 acts greedily (and then `keep` must be False: nothing to learn from).
    keep: return the decisions too.
    noise_correlation: in [0, 1), of the sampling noise between the K actions of a chunk, see `chunk_noise`.
    progress: called with (episodes finished, success) after each episode.
    shown: for checks of what a policy looks at: given an episode's index and its images (V, H, W, 3), returns those
        that the policy sees instead. Called once per decision, in the order of the episode's decisions.

    Raises:
        RatchetError: rollout.no_episodes, rollout.bad_horizon, rollout.greedy_batch, goal.no_task,
            goal.no_instruction, goal.bad_temperature before anything runs; rollout.not_finite, goal.already_solved for
            an initial state that is solved before the first action, and those of the environment.
    """
    if not specs:
        raise RatchetError("rollout.no_episodes", "the list of episodes is empty", fix="ask for at least one")
    require_temperature(temperature)
    for spec in specs:
        require_goal(spec.task, spec.instruction)
        if spec.horizon < 1:
            raise RatchetError(
                "rollout.bad_horizon", f"{spec.horizon} control steps", where=spec.task, fix="give 1 or more"
            )
    if keep and temperature <= 0:
        raise RatchetError("rollout.greedy_batch", "greedy episodes have no log-probabilities to learn from")
    if keep and not getattr(policy, "gives_probabilities", True):
        raise RatchetError(
            "policy.no_probabilities",
            "this policy's head gives actions without probabilities, so nothing can be learned from its episodes",
            where=policy.spec.statistics_key,
            fix="evaluate it only, or learn with a checkpoint that has a head of tokens or of flow matching",
        )
    started = time.perf_counter()
    queues = [deque(range(g, len(specs), len(env.groups))) for g in range(len(env.groups))]
    running: dict[int, _Running] = {}
    success = np.zeros(len(specs), bool)
    steps = np.zeros(len(specs), np.int64)
    rows_of: list[list[int]] = [[] for _ in specs]
    store = _Store()
    finished = 0
    waiting = []

    def resets(group: int, slots: Sequence[int]) -> dict[int, tuple[str, int, int]]:
        chosen = {}
        for slot in slots:
            if queues[group]:
                index = queues[group].popleft()
                spec = specs[index]
                running[slot] = _Running(index, noise=np.random.Generator(np.random.Philox(key=spec.seed)))
                chosen[slot] = (spec.task, spec.initial_state, spec.horizon)
        return chosen

    for g, slots in enumerate(env.groups):
        first = resets(g, slots)
        if first:
            env.submit(g, first, {})
            waiting.append(g)
    pending: dict[int, list[int]] = {g: [] for g in waiting}  # slots whose chunk is under way
    while waiting:
        g = waiting.pop(0)
        env.collect(g)
        arrays = env.arrays
        free: list[int] = []
        for slot in pending[g]:
            run = running[slot]
            ran = int(arrays["steps_run"][slot])
            run.steps += ran
            if keep:
                store.valid[run.rows[-1]] = np.arange(env.chunk) < ran
            if arrays["done"][slot]:
                success[run.index] = bool(arrays["success"][slot])
                steps[run.index] = run.steps
                rows_of[run.index] = run.rows
                finished += 1
                del running[slot]
                free.append(slot)
                if progress is not None:
                    progress(finished, bool(success[run.index]))
        live = [s for s in env.groups[g] if s in running]
        chunks = _decide(
            policy,
            env,
            [(s, running[s], specs[running[s].index]) for s in live],
            temperature,
            noise_correlation,
            keep,
            store,
            shown,
        )
        again = resets(g, free)
        pending[g] = live
        if chunks or again:
            env.submit(g, again, chunks)
            waiting.append(g)
    seconds = time.perf_counter() - started
    outcomes = Outcomes(success, steps, seconds)
    if not keep:
        return outcomes, None
    batch = _flatten(store, rows_of, specs, success, steps, temperature, adapter_id, seconds)
    batch.compute_dtype = name_of(policy)
    return outcomes, batch


def _decide(
    policy: Policy,
    env: ChunkEnv,
    live: list[tuple[int, _Running, EpisodeSpec]],
    temperature: float,
    noise_correlation: float,
    keep: bool,
    store: _Store,
    shown: Callable[[int, UInt8], UInt8] | None,
) -> dict[int, Float32]:
    if not live:
        return {}
    slots = [slot for slot, _, _ in live]
    images = env.arrays["images"][slots]  # fancy indexing copies out of shared memory
    if shown is not None:
        images = np.stack([shown(run.index, own) for (_, run, _), own in zip(live, images, strict=True)])
    state = env.arrays["state"][slots]
    batch = PolicyInput(
        images=images,
        state=torch.from_numpy(state) if state.shape[1] else None,
        instructions=[spec.instruction for _, _, spec in live],
    )
    if temperature > 0:
        shape = (env.chunk, len(policy.spec.action_names))
        noise = np.stack([chunk_noise(r.noise, shape, noise_correlation) for _, r, _ in live if r.noise is not None])
        chunks = policy.sample(batch, temperature, torch.from_numpy(noise))
    else:
        chunks = policy.predict(batch)
    actions = chunks.actions.float().cpu().numpy()
    if not np.isfinite(actions).all():
        raise RatchetError("rollout.not_finite", "the policy gave an action that is not finite", where=live[0][2].task)
    if keep:
        assert chunks.tokens is not None
        assert chunks.log_prob is not None
        tokens, log_prob = chunks.tokens.cpu().numpy(), chunks.log_prob.float().cpu().numpy()
        feature = np.zeros((len(live), 0), np.float32) if chunks.feature is None else chunks.feature.cpu().numpy()
        for i, (_, run, _) in enumerate(live):
            run.rows.append(len(store.tokens))
            store.images.append(images[i])
            store.state.append(state[i])
            store.tokens.append(tokens[i])
            store.log_prob.append(log_prob[i])
            store.feature.append(feature[i])
            store.valid.append(np.zeros(env.chunk, bool))  # known when the chunk has run
    commands = robot_actions(actions, policy.spec, env.contract)
    return {slot: commands[i] for i, slot in enumerate(slots)}


def _flatten(
    store: _Store,
    rows_of: list[list[int]],
    specs: Sequence[EpisodeSpec],
    success: Bool,
    steps: Int64,
    temperature: float,
    adapter_id: str,
    seconds: float,
) -> RolloutBatch:
    order = np.array([row for rows in rows_of for row in rows], np.int64)
    episode = np.array([e for e, rows in enumerate(rows_of) for _ in rows], np.int64)
    instructions = sorted({spec.instruction for spec in specs})
    index = {text: i for i, text in enumerate(instructions)}
    return RolloutBatch(
        images=np.stack([store.images[i] for i in order]),
        state=np.stack([store.state[i] for i in order]),
        instruction=np.array([index[specs[e].instruction] for e in episode], np.int64),
        instructions=instructions,
        tokens=np.stack([store.tokens[i] for i in order]),
        log_prob=np.stack([store.log_prob[i] for i in order]),
        feature=np.stack([store.feature[i] for i in order]),
        valid=np.stack([store.valid[i] for i in order]),
        episode=episode,
        success=success,
        steps=steps,
        group=np.array([spec.group for spec in specs], np.int64),
        temperature=temperature,
        adapter_id=adapter_id,
        specs=list(specs),
        seconds=seconds,
    )
