"""Perturbations of a task that no training included: camera, light, the robot's base.

Knows names and compiled MuJoCo models. Knows no task: success, initial states and instruction stay as they are, so
that a policy's score on `button-press@camera` beside `button-press` is the price of the change alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError

MARK = "@"
CAMERA_SHIFT = 0.05  # m, sideways in the image and up
LIGHT_FACTOR = 0.5  # of every lamp's diffuse and the headlight's light
BASE_SHIFT = (0.0, 0.03, 0.0)  # m, world frame: sideways, as a remounted arm
KINDS = {
    "camera": f"every fixed camera {100 * CAMERA_SHIFT:.0f} cm to its right and up",
    "light": f"all light at {LIGHT_FACTOR:.0%}",
    "base": f"the robot's base {100 * BASE_SHIFT[1]:.0f} cm to the side",
}


def split(name: str) -> tuple[str, str]:
    """`task@kind` -> (task, kind); kind is empty where the name has none.

    Raises:
        RatchetError: sim.unknown_perturbation.
    """
    task, separator, perturbation = name.partition(MARK)
    if separator and perturbation not in KINDS:
        raise RatchetError(
            "sim.unknown_perturbation", f"no perturbation '{perturbation}'", where=name, fix=", ".join(KINDS)
        )
    return task, perturbation


def moved_cameras(contract: RobotContract, model: Any) -> RobotContract:
    """The contract with every camera that hangs on nothing that moves shifted to its right and up."""
    cameras = []
    for contract_camera in contract.cameras:
        camera_spec = contract_camera
        camera_id = model.camera(camera_spec.source).id
        # Body 0 is the world: a camera on a moving body, such as the wrist's, keeps its place on the hand.
        if model.cam_bodyid[camera_id] == 0:
            rotation = np.asarray(model.cam_mat0[camera_id], np.float64).reshape(3, 3)  # columns: right, up, backwards
            position = np.array(camera_spec.position or model.cam_pos[camera_id], np.float64)
            shifted = position + CAMERA_SHIFT * (rotation[:, 0] + rotation[:, 1])
            camera_spec = dataclasses.replace(camera_spec, position=tuple(float(coordinate) for coordinate in shifted))
        cameras.append(camera_spec)
    return dataclasses.replace(contract, cameras=tuple(cameras))


def change_model(model: Any, kind: str, *, base: str) -> None:
    """Change a compiled model in place. base: the robot's root body."""
    if kind == "light":
        model.light_diffuse[:] *= LIGHT_FACTOR
        model.vis.headlight.diffuse[:] *= LIGHT_FACTOR
        model.vis.headlight.ambient[:] *= LIGHT_FACTOR
    elif kind == "base":
        model.body(base).pos[:] += np.array(BASE_SHIFT)
