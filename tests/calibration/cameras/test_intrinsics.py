"""Intrinsics and their uncertainty: a focal length that is 1 % off moves every grasp, and nobody sees it.

Pinned: the truth is found for every distortion model, and lies where the standard deviations say; the held-out error
is of views that were not used; a spoiled view is rejected by name; coverage says in words what is missing; a camera
model's projection, its derivative and its inverse agree. Determinism: corners with seeded noise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_calibration.boards import coverage
from ratchet_calibration.cameras import intrinsics
from ratchet_calibration.cameras.model import CameraModel
from tests.calibration import scenes
from tests.calibration.scenes import BOARD, CAMERA, LENS, pose, seen

MODELS = {
    "none": CAMERA,
    "radial": replace(CAMERA, model="radial", distortion=(-0.2, 0.06)),
    "brown5": LENS,
    "rational8": replace(CAMERA, model="rational8", distortion=(-0.2, 0.05, 5e-4, -3e-4, 0.004, 0.02, -0.01, 0.001)),
    "fisheye": replace(CAMERA, model="fisheye", distortion=(0.02, -0.01, 0.003, -0.001)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_camera_is_found(name: str) -> None:
    truth = MODELS[name]
    result = intrinsics.calibrate(BOARD, scenes.views(30, seed=1, camera=truth, noise=0.05), truth.model)
    assert result.camera.fx == pytest.approx(truth.fx, rel=2e-3)
    assert result.camera.fy == pytest.approx(truth.fy, rel=2e-3)
    assert (result.camera.cx, result.camera.cy) == pytest.approx((truth.cx, truth.cy), abs=1.5)
    assert result.noise == pytest.approx(0.05, rel=0.1)
    assert result.held_out_rms == pytest.approx(np.sqrt(2) * 0.05, rel=0.25)
    for value, true_value, deviation in zip(
        (result.camera.fx, result.camera.fy, result.camera.cx, result.camera.cy),
        (truth.fx, truth.fy, truth.cx, truth.cy),
        result.camera.deviations[:4],
        strict=True,
    ):
        assert abs(value - true_value) < 4 * deviation


def test_deviations_are_what_repeated_calibrations_scatter_by() -> None:
    results = [intrinsics.calibrate(BOARD, scenes.views(14, 3, noise=0.2), "none", held_out=0)]
    for seed in range(24):
        generator = np.random.default_rng(seed)
        clean = scenes.views(14, 3, noise=0.0)
        noisy = [replace(v, points=v.points + generator.normal(0, 0.2, v.points.shape)) for v in clean]
        results.append(intrinsics.calibrate(BOARD, noisy, "none", held_out=0))
    values = np.array([[r.camera.fx, r.camera.fy, r.camera.cx, r.camera.cy] for r in results])
    reported_deviations = np.mean([r.camera.deviations[:4] for r in results], axis=0)
    ratio = values.std(0, ddof=1) / reported_deviations
    assert ((ratio > 0.6) & (ratio < 1.6)).all(), ratio


def test_a_spoiled_view_is_rejected_by_name() -> None:
    views = scenes.views(20, seed=2, noise=0.05)
    views[7] = replace(views[7], points=views[7].points + [0.0, 4.0] * (views[7].ids[:, None] % 2))
    result = intrinsics.calibrate(BOARD, views, "none", held_out=0)
    assert list(result.rejected) == ["view 7"]
    assert "px" in result.rejected["view 7"]
    assert not result.views[7].used


def test_held_out_views_are_not_used() -> None:
    result = intrinsics.calibrate(BOARD, scenes.views(20, seed=2), "none", held_out=4)
    assert sum(v.held_out for v in result.views) == 4
    assert not any(v.held_out and v.used for v in result.views)


def test_coverage_says_what_is_missing() -> None:
    left_views = [seen(pose((0.3, 0, 0), (-0.1, 0.03 * k - 0.1, 0.5)), seed=k) for k in range(6)]
    hints = " ".join(coverage.measure(BOARD, left_views).missing)
    assert "at the right" in hints
    assert "tilted" in hints
    assert "more views" in hints
    assert coverage.measure(BOARD, scenes.views(60, seed=4)).missing == ()


def test_chosen_views_cover_more_than_the_first_ones() -> None:
    views = [seen(pose((0.01 * k, 0, 0), (0, 0, 0.6)), seed=k) for k in range(10)] + scenes.views(30, seed=4)
    chosen = coverage.choose(BOARD, views, 10)
    assert len(set(chosen)) == 10
    covered = coverage.measure(BOARD, [views[i] for i in chosen]).share
    assert covered > 1.5 * coverage.measure(BOARD, views[:10]).share


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), x=st.floats(-0.2, 0.2), y=st.floats(-0.15, 0.15), z=st.floats(0.4, 2.0))
def test_projection_derivative_and_inverse_agree(name: str, x: float, y: float, z: float) -> None:
    camera: CameraModel = MODELS[name]
    point = np.array([[x, y, z]])
    pixel = camera.project(point)
    assert camera.undistorted(pixel)[0] == pytest.approx([x / z, y / z], abs=1e-6)
    step = 1e-6
    for axis in range(3):
        moved_point = point.copy()
        moved_point[0, axis] += step
        slope = (camera.project(moved_point) - pixel)[0] / step
        assert camera.derivative(point)[0, :, axis] == pytest.approx(slope, abs=2e-2, rel=1e-3)
    assert CameraModel.from_dict(camera.to_dict(), "") == camera
