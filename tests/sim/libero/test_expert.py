"""Demonstrations come from scripted experts; a learner is only as good as what they show, also after a disturbance.

Pinned: the expert solves a task of each suite from an evaluation state without rendering; it carries on when the
object is knocked away from it in the middle; noise is executed but never recorded, depends on the seed alone and stays
in range; grasp geometry on shapes whose answer is known by hand; refusals. Determinism: the simulator's and the seed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_sim.base import Expert, TaskEnv
from ratchet_sim.demonstrations import NoiseConfig
from ratchet_sim.libero.env import CONTRACT, LiberoTaskEnv
from ratchet_sim.libero.expert import LiberoExpert, make_libero_expert
from ratchet_sim.libero.grasp import APERTURE, grasps, rotation
from ratchet_sim.testing.noisy_expert import NoisyExpert
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32

OBJECT = "libero_object"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
SPATIAL = "libero_spatial"
BOWL = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
NOWHERE = np.zeros((0, 3))


@pytest.fixture(scope="module")
def soup() -> Iterator[LiberoTaskEnv]:
    env = LiberoTaskEnv(OBJECT, SOUP)
    yield env
    env.close()


def drive(env: LiberoTaskEnv, expert: Expert, limit: int = 300) -> int:
    """Steps until success; the limit plus one where there was none."""
    for step in range(limit):
        action = expert.act(env)
        assert action.dtype == np.float32
        assert all(d.low - 1e-6 <= a <= d.high + 1e-6 for a, d in zip(action, env.contract.action.dims, strict=True))
        env.step(action)
        if env.success():
            return step + 1
    return limit + 1


def test_expert_puts_the_soup_in_the_basket(soup: LiberoTaskEnv) -> None:
    soup.reset(40)
    expert = make_libero_expert(OBJECT, SOUP)
    expert.reset(soup)
    assert drive(soup, expert) < 150


def test_expert_puts_the_bowl_on_the_plate() -> None:
    env = LiberoTaskEnv(SPATIAL, BOWL)
    env.reset(40)
    expert = make_libero_expert(SPATIAL, BOWL)
    expert.reset(env)
    assert drive(env, expert) < 150
    env.close()


def test_expert_recovers_when_the_gripper_is_opened_on_the_way(soup: LiberoTaskEnv) -> None:
    soup.reset(3)
    expert = LiberoExpert()
    expert.reset(soup)
    body = soup.bodies["alphabet_soup_1"]
    lowest = 0.0
    for _ in range(150):
        lowest = max(lowest, float(soup.data.xpos[body][2]))
        if lowest > 0.15:
            break
        soup.step(expert.act(soup))
    assert lowest > 0.15
    for _ in range(12):
        action = expert.act(soup)
        action[-1] = -1.0
        soup.step(action)
    assert soup.data.xpos[body][2] < 0.1
    assert drive(soup, expert) < 300


def test_expert_succeeds_under_noise(soup: LiberoTaskEnv) -> None:
    soup.reset(5)
    noisy = NoisyExpert(LiberoExpert(), NoiseConfig(probability=0.05), seed=1)
    noisy.reset(soup)
    assert drive(soup, noisy) < 300


def test_unsupported_goals_are_refused() -> None:
    with pytest.raises(RatchetError) as refused:
        make_libero_expert("libero_goal", "turn_on_the_stove")
    assert refused.value.code == "sim.no_expert"
    env = LiberoTaskEnv("libero_goal", "turn_on_the_stove")
    with pytest.raises(RatchetError) as refused:
        LiberoExpert().reset(env)
    assert refused.value.code == "expert.unsupported_goal"
    env.close()


class Still(Expert):
    """Always the same action; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def reset(self, env: TaskEnv) -> None:
        self.asked = 0

    def act(self, env: TaskEnv) -> Float32:
        self.asked += 1
        return np.array([0.01, 0, 0, 0, 0, 0, 1.0], dtype=np.float32)


class OnlyContract:
    """As much of an environment as the noise looks at."""

    contract = RobotContract.load(CONTRACT)


def episode(seed: int, config: NoiseConfig, steps: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, Still]:
    still = Still()
    noisy = NoisyExpert(still, config, seed)
    env = OnlyContract()
    noisy.reset(env)  # type: ignore[arg-type]
    executed = []
    labels = []
    disturbed = []
    for _ in range(steps):
        executed.append(noisy.act(env))  # type: ignore[arg-type]
        labels.append(noisy.label.copy())
        disturbed.append(noisy.disturbed)
    return np.stack(executed), np.stack(labels), np.array(disturbed), still


def test_noise_is_executed_and_the_label_stays_clean() -> None:
    executed, labels, disturbed, still = episode(0, NoiseConfig(probability=0.1, grip_flip=0.5))
    clean = np.array([0.01, 0, 0, 0, 0, 0, 1.0], dtype=np.float32)
    assert (labels == clean).all()
    assert (executed[~disturbed] == clean).all()
    assert (executed[disturbed] != clean).any(axis=1).all()
    assert 0 < disturbed.sum() < len(disturbed)
    assert set(np.unique(executed[:, -1])) == {-1.0, 1.0}
    assert still.asked == len(executed)


@given(seed=st.integers(0, 2**31), probability=st.floats(0, 1), scale=st.floats(0, 3))
def test_noise_is_in_range_and_depends_on_the_seed_alone(seed: int, probability: float, scale: float) -> None:
    config = NoiseConfig(probability=probability, scale=scale)
    executed, _, disturbed, _ = episode(seed, config, steps=20)
    np.testing.assert_array_equal(executed, episode(seed, config, steps=20)[0])
    dims = OnlyContract.contract.action.dims
    assert (executed >= np.array([dim.low for dim in dims], np.float32)).all()
    assert (executed <= np.array([dim.high for dim in dims], np.float32)).all()
    if probability == 0:
        assert not disturbed.any()
    if probability == 1:
        assert disturbed.all()


def test_two_episodes_differ_in_their_noise() -> None:
    noisy = NoisyExpert(Still(), NoiseConfig(probability=1.0), 5)
    env = OnlyContract()
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    for target in (first, second):
        noisy.reset(env)  # type: ignore[arg-type]
        target.append(noisy.act(env))  # type: ignore[arg-type]
    assert not np.array_equal(first, second)


def box(x: float, y: float, z: float, centre: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) / 2
    return corners * [x, y, z] + centre


def test_a_narrow_box_is_taken_across_its_short_side() -> None:
    best = grasps(box(0.12, 0.04, 0.02), NOWHERE, 0.0)[0]
    assert best.kind == "centre"
    assert best.yaw == pytest.approx(0.0)  # the finger axis is world y at yaw 0
    np.testing.assert_allclose(best.position[:2], 0, atol=1e-9)
    turned = grasps(box(0.04, 0.12, 0.02), NOWHERE, 0.0)[0]
    assert abs(turned.yaw) > math.radians(50)


def test_a_wide_ring_is_taken_at_its_rim_with_radial_fingers() -> None:
    angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    ring = np.concatenate(
        [np.stack([0.05 * np.cos(angle), 0.05 * np.sin(angle), np.full(72, z)], 1) for z in (0, 0.05)]
    )
    candidates = grasps(ring + np.array([0.3, 0.1, 0.9]), NOWHERE, 0.0)
    assert {g.kind for g in candidates} == {"rim"}
    for grasp in candidates:
        outward = grasp.position[:2] - [0.3, 0.1]
        assert 0.04 < np.linalg.norm(outward) < 0.05
        assert abs(rotation(grasp.yaw)[:2, 0] @ outward) == pytest.approx(np.linalg.norm(outward), rel=1e-6)
        assert 0.9 < grasp.position[2] < 0.95


def test_a_neighbour_makes_the_hand_choose_another_side() -> None:
    thing = box(0.04, 0.04, 0.05)
    wall = np.stack(np.meshgrid(np.linspace(-0.05, 0.05, 20), [0.045], np.linspace(-0.02, 0.05, 20)), -1).reshape(-1, 3)
    free = grasps(thing, NOWHERE, 0.0)[0]
    blocked = grasps(thing, wall, 0.0)[0]
    assert free.yaw == pytest.approx(0.0)
    assert abs(blocked.yaw) > math.radians(40)


@given(width=st.floats(0.005, 0.2), depth=st.floats(0.005, 0.2), height=st.floats(0.01, 0.2))
def test_fingers_stay_above_the_support_and_the_palm_above_the_object(
    width: float, depth: float, height: float
) -> None:
    for grasp in grasps(box(width, depth, height, (0, 0, height / 2)), NOWHERE, 0.0):
        assert grasp.position[2] >= 0.013
        if grasp.kind == "centre":
            assert min(width, depth) <= APERTURE
            assert height - grasp.position[2] <= 0.031
