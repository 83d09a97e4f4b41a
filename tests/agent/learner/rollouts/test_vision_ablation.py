"""A policy that replays a motion seems to see, until the object stands elsewhere; vision ablation tells them apart.

Pinned: a policy that reads its image loses its success on others' images, one that does not loses nothing; what is
shown is the neighbour's image of the same decision; episodes that share a scene are refused.
Determinism: a greedy policy of two lines in a fake environment; frames encode initial state and step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import Cell
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec, evaluated
from ratchet_vla.learner.rollouts.vision_ablation import OtherImages, OwnImages, VisionAblation, compare
from ratchet_vla.policy.protocol import Chunks, PolicyInput
from tests import fakes
from tests.agent.learner.runs import tiny_policy

SPECS = [EpisodeSpec("door-open", "open the door", 100 + i, 12, seed=i) for i in range(12)]


class Mover:
    """Moves ahead where its image shows an even state, else back; blind, always ahead."""

    def __init__(self, looks: bool) -> None:
        self.spec, self.looks = tiny_policy().spec, looks

    def predict(self, batch: PolicyInput) -> Chunks:
        states = torch.as_tensor(batch.images)[:, 0, 0, 0, 0].int()
        sign = torch.where(states % 2 == 0, 1.0, -1.0) if self.looks else torch.ones(len(states))
        actions = torch.zeros(len(states), 4, 4)
        actions[:, :, 0] = 0.03 * sign[:, None]
        return Chunks(actions, None, None, None)


def ablation_of(looks: bool, workers: int, slots: int) -> VisionAblation:
    env = ChunkVectorEnv(
        "metaworld",
        cameras=("corner2",),
        state_fields=("hand", "gripper"),
        chunk=4,
        workers=workers,
        slots_per_worker=slots,
        make_env=fakes.make_two_sided,
    )
    policy = Mover(looks)
    own = OwnImages(len(SPECS))
    try:
        results = []
        for shown in (own, OtherImages(own, SPECS)):
            outcomes, _ = run_episodes(policy, env, SPECS, temperature=0.0, keep=False, shown=shown)  # type: ignore[arg-type]
            results.append(evaluated(SPECS, outcomes.success))
    finally:
        env.close()
    return compare({"door-open": results[0]}, {"door-open": results[1]})


@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (2, 3)])
def test_a_policy_that_looks_loses_its_success(workers: int, slots: int) -> None:
    ablation = ablation_of(True, workers, slots)
    assert ablation.loss.estimate == 1.0
    assert ablation.verdict == "looks"
    assert "uses its cameras: success falls" in ablation.sentence()


def test_a_policy_that_replays_a_motion_is_named() -> None:
    ablation = ablation_of(False, 2, 3)
    assert ablation.loss.estimate == 0.0
    assert ablation.verdict == "does not show that it looks"
    assert "replay a motion" in ablation.sentence()


def test_what_is_shown_is_the_neighbours_image_of_the_same_decision() -> None:
    own = OwnImages(3)
    for episode, length in ((1, 2), (0, 3), (2, 1)):
        for decision in range(length):
            image = np.full((1, 2, 2, 3), 10 * episode + decision, np.uint8)
            assert own(episode, image) is image
    others = OtherImages(own, SPECS[:3])
    nothing = np.zeros((1, 2, 2, 3), np.uint8)
    assert [int(others(0, nothing)[0, 0, 0, 0]) for _ in range(3)] == [10, 11, 11]  # episode 1 ended after 2
    assert int(others(2, nothing)[0, 0, 0, 0]) == 0
    assert int(others(1, nothing)[0, 0, 0, 0]) == 20


@pytest.mark.parametrize("specs", [SPECS[:1], [SPECS[0], SPECS[0]]])
def test_episodes_of_one_scene_are_refused(specs: list[EpisodeSpec]) -> None:
    with pytest.raises(RatchetError, match=r"vision_ablation\.same_scene"):
        OtherImages(OwnImages(len(specs)), specs)


def test_a_policy_that_fails_anyway_gives_no_result() -> None:
    assert compare({"t": Cell(1, 20)}, {"t": Cell(0, 20)}).verdict == "cannot be told"
