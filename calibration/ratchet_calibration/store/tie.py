"""Binding of a contract's camera to its calibration, and refusal of another camera's.

Knows contracts as files and calibrations as records. Changes one value of a contract's file, nothing around it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from ratchet_calibration.store.record import Calibration
from ratchet_vla.contract import CameraSpec, RobotContract
from ratchet_vla.errors import RatchetError

FIELD = "calibration_id"


def require_fit(calibration: Calibration, contract: RobotContract, camera: CameraSpec) -> None:
    """Refuse a calibration that was not made of this camera of this robot.

    Raises:
        RatchetError: calibration.other_camera, calibration.other_robot, calibration.other_device,
            calibration.other_size.
    """
    remedy = f"calibrate '{camera.name}' itself, or tie one of its own: see `ratchet calibrate list`"

    def refuse(code: str, what: str, fix: str = remedy) -> RatchetError:
        return RatchetError(f"calibration.{code}", what, where=f"{contract.name}: camera {camera.name}", fix=fix)

    short_id = calibration.id[:12]
    if calibration.camera != camera.name:
        raise refuse("other_camera", f"{short_id} is of the camera '{calibration.camera}'")
    if calibration.robot and calibration.robot != contract.name:
        raise refuse("other_robot", f"{short_id} is of a camera of robot '{calibration.robot}'")
    # A path such as /dev/video0 names a socket, not a device; a simulator's camera has no serial.
    serial = "" if contract.simulator or camera.source.startswith("/") else camera.source
    if serial and calibration.camera_serial and serial != calibration.camera_serial:
        raise refuse(
            "other_device", f"{short_id} is of the device {calibration.camera_serial}, the contract has {serial}"
        )
    upright = camera.rotate in (0, 180)
    raw_size = (camera.width, camera.height) if upright else (camera.height, camera.width)
    if (calibration.model.width, calibration.model.height) != raw_size:
        raise refuse(
            "other_size",
            f"{short_id} is of images of {calibration.model.width} x {calibration.model.height}, "
            f"the contract has {raw_size[0]} x {raw_size[1]}",
            "calibrate at the contract's size; a calibration is of the raw image, before any rotation",
        )


def tie(path: Path, calibration: Calibration) -> tuple[RobotContract, RobotContract]:
    """Write a calibration's id into its camera's entry of a contract's file; the contract before and after.

    Everything else stays as it is, comments included. The file is exchanged at once or not at all.

    Raises:
        RatchetError: what `RobotContract.load` and `require_fit` raise; contract.unknown_camera, contract.not_written.
    """
    contract_before = RobotContract.load(path)
    if calibration.camera not in [camera.name for camera in contract_before.cameras]:
        raise RatchetError(
            "calibration.other_camera",
            f"{calibration.id[:12]} is of the camera '{calibration.camera}'",
            where=str(path),
            fix=f"this robot's cameras: {', '.join(camera.name for camera in contract_before.cameras)}",
        )
    require_fit(calibration, contract_before, contract_before.camera(calibration.camera))
    cameras = list(contract_before.cameras)
    for index, camera in enumerate(cameras):
        if camera.name == calibration.camera:
            cameras[index] = dataclasses.replace(camera, calibration_id=calibration.id)
    expected_contract = dataclasses.replace(contract_before, cameras=tuple(cameras))
    # The changed text is parsed and compared before it replaces the file: only the id may differ.
    scratch_path = path.with_name(f".{path.name}.new")
    try:
        scratch_path.write_text(_changed(path.read_text(), calibration))
        contract_after = RobotContract.load(scratch_path)
        if contract_after != expected_contract:
            raise RatchetError(
                "contract.not_written",
                "the camera's entry cannot be changed in place",
                where=str(path),
                fix=f"write {FIELD}: {calibration.id} into it by hand",
            )
        scratch_path.rename(path)
    except OSError as error:
        raise RatchetError("contract.not_written", str(error), where=str(path)) from None
    finally:
        scratch_path.unlink(missing_ok=True)
    return contract_before, contract_after


def _changed(text: str, calibration: Calibration) -> str:
    """The YAML text with the id in the entry of the camera, as a value or as a new field behind the others."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # it was loaded as a contract
    cameras = next(value for key, value in root.value if key.value == "cameras")
    entry = next(
        node
        for node in cameras.value
        if any(
            field_key.value == "name" and field_value.value == calibration.camera
            for field_key, field_value in node.value
        )
    )
    for key, value in entry.value:
        if key.value == FIELD:
            return text[: value.start_mark.index] + calibration.id + text[value.end_mark.index :]
    # Edited as text rather than dumped anew, so that comments and order survive.
    entry_end = entry.value[-1][1].end_mark.index
    if entry.flow_style:
        return f"{text[:entry_end]}, {FIELD}: {calibration.id}{text[entry_end:]}"
    indent = " " * entry.value[0][0].start_mark.column
    return f"{text[:entry_end]}\n{indent}{FIELD}: {calibration.id}{text[entry_end:]}"
