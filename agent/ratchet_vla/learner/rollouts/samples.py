"""Recorded episodes as a batch for the update, and back: the form in which a robot's experience reaches the optimiser.

Knows records, batches and the policy's order of cameras and state fields. Knows no file and no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.admission import sampled
from ratchet_vla.learner.rollouts.batch import RolloutBatch, one_dtype
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.policy.commands import robot_actions
from ratchet_vla.policy.computing import computing_as
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.records import ActionChunk, Episode, Float32, Observation, Step

ROWS = 64  # decisions per forward when features or log-probabilities are computed


def to_batch(
    episodes: Sequence[Episode], groups: Sequence[int], policy: Policy, *, features: bool = False
) -> RolloutBatch:
    """Episodes in the order given, as `run_episodes` would have returned them.

    groups: comparison group of each episode. Steps that a person drove, or that were clipped, skipped or blended, are
    not valid and have no gradient. features: compute what a value head reads, with the policy running their adapter.

    Raises:
        RatchetError: learner.bad_episode for a camera, state field or shape that the policy does not take,
            learner.off_policy where the episodes come from more than one adapter, learner.mixed_dtypes where their
            decisions were computed in more than one dtype.
    """
    spec = policy.spec
    steps = [(e, step) for e, episode in enumerate(episodes) for step in episode.steps]
    ids = {step.chunk.adapter_id for _, step in steps}
    temperatures = {step.chunk.temperature for _, step in steps}
    if len(ids) != 1 or len(temperatures) != 1:
        raise RatchetError("learner.off_policy", f"episodes of {len(ids)} adapters, {len(temperatures)} temperatures")
    dtype = one_dtype({step.chunk.compute_dtype for _, step in steps}, "episodes")
    texts = sorted({episode.instruction for episode in episodes})
    shape = policy.sampled_shape
    whole = len(shape) == 2
    rows_images, rows_state = [], []
    for e, step in steps:
        images, state = step.observation.images, step.observation.state
        missing = [n for n in spec.cameras if n not in images] + [n for n in spec.state if n not in state]
        tokens = step.chunk.tokens
        if missing or tokens is None or tokens.shape != shape:
            what = f"no {missing[0]}" if missing else f"tokens are {None if tokens is None else tokens.shape}"
            raise RatchetError("learner.bad_episode", what, where=f"{episodes[e].task}, episode {e}")
        rows_images.append(np.stack([images[name] for name in spec.cameras]))
        parts = [np.asarray(state[name], np.float32) for name in spec.state]
        rows_state.append(np.concatenate(parts) if parts else np.zeros(0, np.float32))
    batch = RolloutBatch(
        images=np.stack(rows_images),
        state=np.stack(rows_state),
        instruction=np.array([texts.index(episodes[e].instruction) for e, _ in steps], np.int64),
        instructions=texts,
        tokens=np.stack([np.asarray(step.chunk.tokens, np.int64 if whole else np.float32) for _, step in steps]),
        log_prob=np.stack([np.asarray(step.chunk.log_prob, np.float32) for _, step in steps]),
        feature=np.zeros((len(steps), 0), np.float32),
        valid=np.stack([sampled(step) for _, step in steps]),
        episode=np.array([e for e, _ in steps], np.int64),
        success=np.array([bool(episode.success) for episode in episodes]),
        steps=np.array([sum(s.steps_run for s in episode.steps) for episode in episodes], np.int64),
        group=np.array(groups, np.int64),
        temperature=temperatures.pop(),
        adapter_id=ids.pop(),
        compute_dtype=dtype,
    )
    if features:
        batch.feature = _features(batch, policy)
    return batch


def log_prob_gap(batch: RolloutBatch, policy: Policy, decisions: int = 32) -> float:
    """Mean absolute difference, nats per token, between recorded log-probabilities and this policy's own for the same
    tokens, over the first valid decisions: near 0 only where both sides run the same weights on the same pixels."""
    rows = np.flatnonzero(batch.valid.all(axis=1))[:decisions]
    if not len(rows):
        rows = np.flatnonzero(batch.valid.any(axis=1))[:decisions]
    with torch.no_grad(), computing_as(policy, batch.compute_dtype):
        ours, _ = policy.log_prob(batch.policy_input(rows), torch.from_numpy(batch.tokens[rows]), batch.temperature)
    gap = np.abs(ours.float().cpu().numpy() - batch.log_prob[rows])
    return float(gap[batch.valid[rows]].mean())


def to_episodes(
    batch: RolloutBatch, specs: Sequence[EpisodeSpec], policy: Policy, contract: RobotContract
) -> list[Episode]:
    """The episodes of a simulated rollout as records, one per spec, in their order; `to_batch` gives the batch back.

    Stamps are simulated seconds at the contract's rate.
    """
    spec = policy.spec
    sizes = {field.name: field.size for field in contract.state}
    bounds = np.cumsum([0, *(sizes[name] for name in spec.state)])
    actions = _actions(batch, policy, contract)
    found = []
    for e, wanted in enumerate(specs):
        episode = Episode(
            task=wanted.task,
            instruction=wanted.instruction,
            success=bool(batch.success[e]),
            success_source="simulator",
            initial_state=wanted.initial_state,
            seed=wanted.seed,
            adapter_id=batch.adapter_id,
            termination="success" if batch.success[e] else "horizon",
        )
        rows = np.flatnonzero(batch.episode == e)
        ran = 0
        for place, row in enumerate(rows):
            stamp = ran / contract.control_hz
            observation = Observation(
                images=dict(zip(spec.cameras, batch.images[row], strict=True)),
                state={n: batch.state[row, bounds[i] : bounds[i + 1]] for i, n in enumerate(spec.state)},
                instruction=wanted.instruction,
                stamp=stamp,
                sequence=place,
            )
            chunk = ActionChunk(
                actions=actions[row],
                tokens=batch.tokens[row],
                log_prob=batch.log_prob[row],
                adapter_id=batch.adapter_id,
                temperature=batch.temperature,
                observation_stamp=stamp,
                observation_sequence=place,
                compute_dtype=batch.compute_dtype,
            )
            count, last = int(batch.valid[row].sum()), place == len(rows) - 1
            won = last and bool(batch.success[e])
            episode.steps.append(Step(observation, chunk, batch.valid[row].copy(), float(won), last, count))
            ran += count
        found.append(episode)
    return found


def _actions(batch: RolloutBatch, policy: Policy, contract: RobotContract) -> Float32:
    """What the tokens or chains mean, (N, K, D) in the contract's units."""
    sampled = torch.from_numpy(batch.tokens)
    actions = policy.actions_of(sampled if sampled.ndim == 3 else sampled[:, -1]).float().cpu().numpy()
    return robot_actions(actions, policy.spec, contract)


def _features(batch: RolloutBatch, policy: Policy) -> Float32:
    parts = []
    for start in range(0, len(batch.tokens), ROWS):
        rows = np.arange(start, min(start + ROWS, len(batch.tokens)))
        with computing_as(policy, batch.compute_dtype):
            feature = policy.predict(batch.policy_input(rows)).feature
        if feature is None:
            raise RatchetError(
                "learner.no_feature", "this policy gives no feature for a value head", fix="use algorithm grpo"
            )
        parts.append(feature.float().cpu().numpy())
    return np.concatenate(parts)
