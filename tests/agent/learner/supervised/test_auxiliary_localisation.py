"""Localisation that learns nothing leaves a policy that replays a motion, and its success rate does not show it.

Pinned: targets are positions within their own task, and only those that vary; the tower finds a square in the image,
on images it was not trained on; embeddings and action head that take no part stay as they were; a killed training goes
on to the same numbers.
Determinism: drawn squares, a fixed seed, two threads at most.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.auxiliary_localisation import LocalisationObjective, normalised_positions
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer, Progress
from tests.agent.learner.runs import tiny_policy

CONFIG = PretrainConfig(steps=80, batch=32, learning_rate=3e-3, save_every=20, shift=0, brightness=0.05)


class Squares:
    """A white square somewhere on grey; the scene says where, in metres, beside a coordinate that never changes."""

    tasks = ["door-open"]  # noqa: RUF012 - the protocol's fields
    instructions = ["open the door"]  # noqa: RUF012

    def __init__(self, count: int = 400) -> None:
        generator = np.random.default_rng(0)
        at = generator.integers(8, 80, (count, 2))
        self.images = np.full((count, 1, 96, 96, 3), 60, np.uint8)
        for image, (x, y) in zip(self.images, at, strict=True):
            image[0, y : y + 10, x : x + 10] = 220
        self.scene = np.concatenate([at / 100, np.full((count, 1), 0.3)], 1).astype(np.float32)
        self.state = np.zeros((count, 4), np.float32)
        self.actions = generator.uniform(-0.02, 0.02, (count, 4, 4)).astype(np.float32)
        self.task, self.start = np.zeros(count, np.int64), np.arange(count)

    def __len__(self) -> int:
        return len(self.task)


def test_targets_are_positions_within_their_task() -> None:
    scene = np.array([[0.0, 5.0, 0.1], [0.2, 5.0, 0.1], [9.0, 1.0, np.nan], [9.0, 2.0, np.nan]], np.float32)
    targets, varies = normalised_positions(scene, np.array([0, 0, 1, 1]))
    assert varies.tolist() == [[True, False, False], [False, True, False]]
    np.testing.assert_allclose(targets, [[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0]], atol=1e-6)


def train(folder: Path, stop_at: int = 0) -> tuple[list[Progress], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Reports, and the network's tensors before and after."""
    torch.set_num_threads(1)
    data, policy = Squares(), tiny_policy()
    before = {n: t.clone() for n, t in policy.network.state_dict().items()}
    torch.manual_seed(0)
    objective = LocalisationObjective(policy, data.scene, data.task)
    reports: list[Progress] = []

    def watch(report: Progress) -> None:
        reports.append(report)
        if report.step == stop_at:
            raise KeyboardInterrupt

    Pretrainer(policy, objective.trained(), data, CONFIG, folder, objective=objective).run(watch, every=10)
    return reports, before, dict(policy.network.state_dict())


def test_the_tower_finds_the_square_and_the_action_head_stays(tmp_path: Path) -> None:
    reports, before, after = train(tmp_path / "whole")
    assert reports[-1].validation_error < 0.15  # deviations; guessing gives 0.85
    assert reports[-1].validation_error < 0.6 * reports[0].validation_error
    for name, tensor in before.items():
        learned = name.startswith(("vision_backbone", "projector")) or "embed_tokens" in name
        assert torch.equal(tensor, after[name]) != learned, name
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=50)
    again = train(tmp_path / "cut")[2]
    assert all(torch.equal(after[name], again[name]) for name in after)


@pytest.mark.parametrize("scene", [np.zeros((400, 0), np.float32), np.full((400, 2), 0.5, np.float32)])
def test_samples_that_do_not_tell_are_refused(scene: np.ndarray) -> None:
    with pytest.raises(RatchetError, match=r"learn\.no_scene"):
        LocalisationObjective(tiny_policy(), scene, np.zeros(400, np.int64))
