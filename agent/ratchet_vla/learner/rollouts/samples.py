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
from ratchet_vla.records import ActionChunk, Episode, Float32, Int64, Observation, Step, UInt8

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
    steps = [step for episode in episodes for step in episode.steps]  # N decisions
    owner = np.repeat(np.arange(len(episodes)), [len(episode.steps) for episode in episodes])  # (N,)
    adapter_ids = {step.chunk.adapter_id for step in steps}
    temperatures = {step.chunk.temperature for step in steps}
    if len(adapter_ids) != 1 or len(temperatures) != 1:
        sources = f"{len(adapter_ids)} adapters, {len(temperatures)} temperatures"
        raise RatchetError("learner.off_policy", f"episodes of {sources}")
    compute_dtype = one_dtype({step.chunk.compute_dtype for step in steps}, "episodes")
    for episode_index, step in zip(owner.tolist(), steps, strict=True):
        problem = _problem(step, policy)
        if problem:
            task = episodes[episode_index].task
            raise RatchetError("learner.bad_episode", problem, where=f"{task}, episode {episode_index}")
    instructions = sorted({episode.instruction for episode in episodes})
    number_of_text = {text: number for number, text in enumerate(instructions)}
    instruction_by_episode = np.array([number_of_text[episode.instruction] for episode in episodes], np.int64)
    batch = RolloutBatch(
        images=np.stack([_images(step, policy) for step in steps]),
        state=np.stack([_state(step, policy) for step in steps]),
        instruction=instruction_by_episode[owner],
        instructions=instructions,
        tokens=_tokens(steps, policy),
        log_prob=np.stack([np.asarray(step.chunk.log_prob, np.float32) for step in steps]),
        feature=np.zeros((len(steps), 0), np.float32),
        valid=np.stack([sampled(step) for step in steps]),
        episode=owner.astype(np.int64),
        success=np.array([bool(episode.success) for episode in episodes]),
        steps=np.array([_steps_run(episode) for episode in episodes], np.int64),
        group=np.array(groups, np.int64),
        temperature=temperatures.pop(),
        adapter_id=adapter_ids.pop(),
        compute_dtype=compute_dtype,
    )
    if features:
        batch.feature = _features(batch, policy)
    return batch


def _problem(step: Step, policy: Policy) -> str:
    """What keeps the policy from taking this decision; empty where nothing does."""
    observation = step.observation
    missing = [name for name in policy.spec.cameras if name not in observation.images]
    missing += [name for name in policy.spec.state if name not in observation.state]
    if missing:
        return f"no {missing[0]}"
    tokens = step.chunk.tokens
    if tokens is None:
        return "tokens are None"
    return "" if tokens.shape == policy.sampled_shape else f"tokens are {tokens.shape}"


def _images(step: Step, policy: Policy) -> UInt8:
    """(V, H, W, 3), in the policy's order of cameras."""
    return np.stack([step.observation.images[name] for name in policy.spec.cameras])


def _state(step: Step, policy: Policy) -> Float32:
    """(S,), in the policy's order of state fields."""
    fields = [np.asarray(step.observation.state[name], np.float32) for name in policy.spec.state]
    return np.concatenate(fields) if fields else np.zeros(0, np.float32)


def _tokens(steps: Sequence[Step], policy: Policy) -> Int64 | Float32:
    """(N, K, D) int64 tokens, or a flow's chains in float32, which have one dimension more."""
    if len(policy.sampled_shape) == 2:
        return np.stack([np.asarray(step.chunk.tokens, np.int64) for step in steps])
    return np.stack([np.asarray(step.chunk.tokens, np.float32) for step in steps])


def _steps_run(episode: Episode) -> int:
    return sum(step.steps_run for step in episode.steps)


def log_prob_gap(batch: RolloutBatch, policy: Policy, decisions: int = 32) -> float:
    """Mean absolute difference between recorded log-probabilities and this policy's own for the same tokens.

    In nats per token, over the first valid decisions; near 0 only where both sides run the same weights on the same
    pixels.
    """
    rows = np.flatnonzero(batch.valid.all(axis=1))[:decisions]
    if not len(rows):
        # Every chunk was cut short or intervened in: decisions with some valid steps have to do.
        rows = np.flatnonzero(batch.valid.any(axis=1))[:decisions]
    with torch.no_grad(), computing_as(policy, batch.compute_dtype):
        own_log_prob, _ = policy.log_prob(
            batch.policy_input(rows), torch.from_numpy(batch.tokens[rows]), batch.temperature
        )
    gap = np.abs(own_log_prob.float().cpu().numpy() - batch.log_prob[rows])
    return float(gap[batch.valid[rows]].mean())


def to_episodes(
    batch: RolloutBatch, specs: Sequence[EpisodeSpec], policy: Policy, contract: RobotContract
) -> list[Episode]:
    """The episodes of a simulated rollout as records, one per spec, in their order; `to_batch` gives the batch back.

    Stamps are simulated seconds at the contract's rate.
    """
    spec = policy.spec
    size_of_field = {field.name: field.size for field in contract.state}
    field_bounds = np.cumsum([size_of_field[name] for name in spec.state])[:-1]  # where one field ends
    actions = _actions(batch, policy, contract)
    episodes = []
    for episode_index, episode_spec in enumerate(specs):
        episode = Episode(
            task=episode_spec.task,
            instruction=episode_spec.instruction,
            success=bool(batch.success[episode_index]),
            success_source="simulator",
            initial_state=episode_spec.initial_state,
            seed=episode_spec.seed,
            adapter_id=batch.adapter_id,
            termination="success" if batch.success[episode_index] else "horizon",
        )
        rows = np.flatnonzero(batch.episode == episode_index)
        steps_before = 0
        for decision_index, row in enumerate(rows):
            stamp = steps_before / contract.control_hz
            fields = np.split(batch.state[row], field_bounds)  # one empty array for a policy without state
            observation = Observation(
                images=dict(zip(spec.cameras, batch.images[row], strict=True)),
                state=dict(zip(spec.state, fields, strict=False)),
                instruction=episode_spec.instruction,
                stamp=stamp,
                sequence=decision_index,
            )
            chunk = ActionChunk(
                actions=actions[row],
                tokens=batch.tokens[row],
                log_prob=batch.log_prob[row],
                adapter_id=batch.adapter_id,
                temperature=batch.temperature,
                observation_stamp=stamp,
                observation_sequence=decision_index,
                compute_dtype=batch.compute_dtype,
            )
            steps_run = int(batch.valid[row].sum())
            is_last = decision_index == len(rows) - 1
            succeeded = is_last and bool(batch.success[episode_index])
            episode.steps.append(
                Step(observation, chunk, batch.valid[row].copy(), float(succeeded), is_last, steps_run)
            )
            steps_before += steps_run
        episodes.append(episode)
    return episodes


def _actions(batch: RolloutBatch, policy: Policy, contract: RobotContract) -> Float32:
    """What the tokens or chains mean, (N, K, D) in the contract's units."""
    samples = torch.from_numpy(batch.tokens)
    final = samples if samples.ndim == 3 else samples[:, -1]  # the last element of a chain is the action
    actions = policy.actions_of(final).float().cpu().numpy()
    return robot_actions(actions, policy.spec, contract)


def _features(batch: RolloutBatch, policy: Policy) -> Float32:
    features = []
    for start in range(0, len(batch.tokens), ROWS):
        rows = np.arange(start, min(start + ROWS, len(batch.tokens)))
        with computing_as(policy, batch.compute_dtype):
            feature = policy.predict(batch.policy_input(rows)).feature
        if feature is None:
            raise RatchetError(
                "learner.no_feature", "this policy gives no feature for a value head", fix="use algorithm grpo"
            )
        features.append(feature.float().cpu().numpy())
    return np.concatenate(features)
