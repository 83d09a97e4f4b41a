"""Rollouts: many episodes of one policy over a vector of environments, with batched inference.

Knows episodes, seeds and the order of work. Knows no simulator (environments are arguments) and no update rule.
While one group of environments runs its chunks, the policy infers for another: both sides stay busy.
Determinism: an episode's actions come from its own seed, its group's order of work depends on nothing but the list of
episodes, and inference runs once per group and round; the same list gives the same numbers, also after a worker died.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.success_rules import require_goal, require_temperature
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.batch import Outcomes, RolloutBatch
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.policy.commands import robot_actions
from ratchet_vla.policy.computing import name_of
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.policy.protocol import Chunks, Policy, PolicyInput
from ratchet_vla.records import Bool, Float32, Int64, UInt8

__all__ = ["ChunkEnv", "run_episodes"]


class ChunkEnv(Protocol):
    """What a vector of environments must offer; `ratchet_sim.workers.vector.ChunkVectorEnv` does."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """The slots of each worker."""

    @property
    def arrays(self) -> Mapping[str, Any]:
        """What the slots hold now: "images", "state" and more, the slot first."""

    @property
    def chunk(self) -> int:
        """Actions per chunk."""

    @property
    def contract(self) -> RobotContract:
        """What actions and state fields mean."""
        ...

    def submit(self, group: int, resets: Mapping[int, tuple[str, int, int]], steps: Mapping[int, Float32]) -> None:
        """Give a worker its next round without waiting for it.

        resets: slot -> task, initial state and horizon of a new episode. steps: slot -> chunk, (K, D).
        """
        ...

    def collect(self, group: int) -> None:
        """Wait until the worker's round is over; `arrays` then holds what came of it."""
        ...


@dataclass(frozen=True)
class _Sampling:
    """How actions are chosen and whether decisions are kept; see `run_episodes`."""

    temperature: float
    noise_correlation: float
    keep: bool
    shown: Callable[[int, UInt8], UInt8] | None


@dataclass(frozen=True)
class _Decision:
    """One decision: a row of each array of `RolloutBatch`. valid: (K,) bool, control steps of its chunk that ran."""

    images: UInt8
    state: Float32
    tokens: Int64 | Float32
    log_prob: Float32
    feature: Float32
    valid: Bool


@dataclass
class _Episode:
    """An episode under way. index: into the specs; steps: control steps run so far."""

    index: int
    spec: EpisodeSpec
    noise: np.random.Generator
    decisions: list[_Decision] = field(default_factory=list)
    steps: int = 0


@dataclass(frozen=True)
class _Ended:
    """An episode that is over."""

    success: bool
    steps: int
    decisions: tuple[_Decision, ...]


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
    if keep and not policy.gives_probabilities:
        raise RatchetError(
            "policy.no_probabilities",
            "this policy's head gives actions without probabilities, so nothing can be learned from its episodes",
            where=policy.spec.statistics_key,
            fix="evaluate it only, or learn with a checkpoint that has a head of tokens or of flow matching",
        )
    collection = _Collection(policy, env, specs, _Sampling(temperature, noise_correlation, keep, shown), progress)
    started = time.perf_counter()
    ended = collection.run()
    seconds = time.perf_counter() - started
    outcomes = Outcomes(
        np.array([episode.success for episode in ended], bool),
        np.array([episode.steps for episode in ended], np.int64),
        seconds,
    )
    if not keep:
        return outcomes, None
    return outcomes, _flatten(ended, specs, outcomes, temperature, adapter_id, name_of(policy))


class _Collection:
    """The work of one call of `run_episodes`: which episode is in which slot, and whose turn it is."""

    def __init__(
        self,
        policy: Policy,
        env: ChunkEnv,
        specs: Sequence[EpisodeSpec],
        sampling: _Sampling,
        progress: Callable[[int, bool], None] | None,
    ) -> None:
        self._policy = policy
        self._env = env
        self._specs = specs
        self._sampling = sampling
        self._progress = progress
        groups = len(env.groups)
        self._queues = [deque(range(group, len(specs), groups)) for group in range(groups)]
        self._running: dict[int, _Episode] = {}  # by slot
        self._ended: dict[int, _Ended] = {}  # by index into the specs

    def run(self) -> list[_Ended]:
        """Run every episode to its end; their results in the order of the specs."""
        waiting: list[int] = []  # groups whose environments are at work, oldest first
        for group, slots in enumerate(self._env.groups):
            first = self._resets(group, slots)
            if first:
                self._env.submit(group, first, {})
                waiting.append(group)
        deciding: dict[int, list[int]] = {group: [] for group in waiting}  # slots whose chunk is under way
        # While the policy infers for the oldest group, the others' environments are at work.
        while waiting:
            group = waiting.pop(0)
            self._env.collect(group)
            free = [slot for slot in deciding[group] if self._take(slot)]
            live = [slot for slot in self._env.groups[group] if slot in self._running]
            chunks = self._decide(live) if live else {}
            again = self._resets(group, free)
            deciding[group] = live
            if chunks or again:
                self._env.submit(group, again, chunks)
                waiting.append(group)
        return [self._ended[index] for index in range(len(self._specs))]

    def _resets(self, group: int, slots: Sequence[int]) -> dict[int, tuple[str, int, int]]:
        """The group's next episodes into free slots."""
        chosen = {}
        for slot in slots:
            if self._queues[group]:
                index = self._queues[group].popleft()
                spec = self._specs[index]
                # Counter-based, so that episodes of neighbouring seeds are independent.
                noise = np.random.Generator(np.random.Philox(key=spec.seed))
                self._running[slot] = _Episode(index, spec, noise)
                chosen[slot] = (spec.task, spec.initial_state, spec.horizon)
        return chosen

    def _take(self, slot: int) -> bool:
        """What became of a slot's chunk; True where its episode is over."""
        arrays = self._env.arrays
        episode = self._running[slot]
        ran = int(arrays["steps_run"][slot])
        episode.steps += ran
        if self._sampling.keep:
            # Control steps after the first success or the horizon did not run and must get no gradient.
            valid = np.arange(self._env.chunk) < ran
            episode.decisions[-1] = dataclasses.replace(episode.decisions[-1], valid=valid)
        if not arrays["done"][slot]:
            return False
        del self._running[slot]
        success = bool(arrays["success"][slot])
        self._ended[episode.index] = _Ended(success, episode.steps, tuple(episode.decisions))
        if self._progress is not None:
            self._progress(len(self._ended), success)
        return True

    def _decide(self, slots: list[int]) -> dict[int, Float32]:
        """One chunk for each of these slots, decided together: slot -> (K, D) in the robot's physical units."""
        env = self._env
        policy = self._policy
        sampling = self._sampling
        episodes = [self._running[slot] for slot in slots]
        images = env.arrays["images"][slots]  # fancy indexing copies out of shared memory
        if sampling.shown is not None:
            pairs = zip(episodes, images, strict=True)
            images = np.stack([sampling.shown(episode.index, own_images) for episode, own_images in pairs])
        state = env.arrays["state"][slots]
        batch = PolicyInput(
            images=images,
            state=torch.from_numpy(state) if state.shape[1] else None,
            instructions=[episode.spec.instruction for episode in episodes],
        )
        if sampling.temperature > 0:
            shape = (env.chunk, len(policy.spec.action_names))
            noise = np.stack([chunk_noise(episode.noise, shape, sampling.noise_correlation) for episode in episodes])
            chunks = policy.sample(batch, sampling.temperature, torch.from_numpy(noise))
        else:
            chunks = policy.predict(batch)
        actions = chunks.actions.float().cpu().numpy()
        if not np.isfinite(actions).all():
            where = episodes[0].spec.task
            raise RatchetError("rollout.not_finite", "the policy gave an action that is not finite", where=where)
        if sampling.keep:
            self._keep(episodes, images, state, chunks)
        commands = robot_actions(actions, policy.spec, env.contract)
        return dict(zip(slots, commands, strict=True))

    def _keep(self, episodes: list[_Episode], images: UInt8, state: Float32, chunks: Chunks) -> None:
        assert chunks.tokens is not None
        assert chunks.log_prob is not None
        tokens = chunks.tokens.cpu().numpy()
        log_prob = chunks.log_prob.float().cpu().numpy()
        feature = np.zeros((len(episodes), 0), np.float32)
        if chunks.feature is not None:
            feature = chunks.feature.cpu().numpy()
        unknown = np.zeros(self._env.chunk, bool)  # which steps ran is known when the chunk has run
        rows = zip(images, state, tokens, log_prob, feature, strict=True)
        for episode, row in zip(episodes, rows, strict=True):
            episode.decisions.append(_Decision(*row, unknown))


def _flatten(
    ended: Sequence[_Ended],
    specs: Sequence[EpisodeSpec],
    outcomes: Outcomes,
    temperature: float,
    adapter_id: str,
    compute_dtype: str,
) -> RolloutBatch:
    """Decisions of all episodes, episode after episode, in order of time."""
    decisions = [decision for episode in ended for decision in episode.decisions]
    tokens: Any = np.stack([decision.tokens for decision in decisions])  # bins or chains
    owner = np.repeat(np.arange(len(ended), dtype=np.int64), [len(episode.decisions) for episode in ended])  # (N,)
    instructions = sorted({spec.instruction for spec in specs})
    number_of_text = {text: number for number, text in enumerate(instructions)}
    instruction_by_episode = np.array([number_of_text[spec.instruction] for spec in specs], np.int64)
    return RolloutBatch(
        images=np.stack([decision.images for decision in decisions]),
        state=np.stack([decision.state for decision in decisions]),
        instruction=instruction_by_episode[owner],
        instructions=instructions,
        tokens=tokens,
        log_prob=np.stack([decision.log_prob for decision in decisions]),
        feature=np.stack([decision.feature for decision in decisions]),
        valid=np.stack([decision.valid for decision in decisions]),
        episode=owner,
        success=outcomes.success,
        steps=outcomes.steps,
        group=np.array([spec.group for spec in specs], np.int64),
        temperature=temperature,
        adapter_id=adapter_id,
        compute_dtype=compute_dtype,
        specs=list(specs),
        seconds=outcomes.seconds,
    )
