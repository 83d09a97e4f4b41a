"""Collection of hand-eye calibration views with an arm: go to a pose, stand still, take a view, choose the next.

Knows a Robot's measured hand pose and its deltas, and what the estimate wants to see next. The arm may also be guided
by hand: then nothing is commanded, and a view is taken whenever the arm stands still somewhere new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ratchet_calibration.arms.protocol import Arm
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection, detect
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, difference, small, transform
from ratchet_calibration.handeye import estimate as handeye
from ratchet_calibration.handeye.problem import Mounting
from ratchet_calibration.handeye.views import LEAST_POSES
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation

STEPS = 600  # control steps that one way may take
# Close enough is far below what the arm's own pose error adds to a view; NEW keeps guided views apart from each
# other.
CLOSE = (1e-3, np.radians(0.2))  # m and rad from where it should be
NEW = (0.03, np.radians(8.0))  # m or rad from every view so far, when guided by hand


@dataclass
class Views:
    """Views taken so far: raw images, corners, and base_T_flange as reported by the robot."""

    images: list[NDArray[np.uint8]] = field(default_factory=list)
    detections: list[Detection] = field(default_factory=list)
    poses: list[Float] = field(default_factory=list)


class Collector:
    """One arm, one camera, one board."""

    def __init__(
        self,
        arm: Arm,
        camera: str,
        board: Board,
        model: CameraModel,
        mounting: Mounting,
        *,
        pace: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda text: None,
        seed: int = 0,
    ) -> None:
        """camera: name in the contract. pace: waits for the next control step, where `act` does not advance time.

        Raises:
            RatchetError: calibration.no_pose_state where the contract does not measure the hand's pose.
        """
        self.arm = arm
        self.camera = camera
        self.board = board
        self.model = model
        self.mounting = mounting
        self.pace = pace
        self.tell = tell
        self.generator = np.random.default_rng(seed)
        self.views = Views()
        limits = arm.contract.limits
        fields = {field.name: field for field in arm.contract.state}
        # The contract names the fields where several would fit; otherwise the first of the right unit and size.
        positions = [name for name, field in fields.items() if field.unit == "m" and field.size == 3]
        rotation_units = ("rad", "quaternion_xyzw")
        rotations = [name for name, field in fields.items() if field.unit in rotation_units and field.size in (3, 4)]
        self._position = limits.position_state or (positions[0] if positions else "")
        self._rotation = limits.rotation_state or (rotations[0] if rotations else "")
        if self._position not in fields or self._rotation not in fields:
            raise RatchetError(
                "calibration.no_pose_state",
                "no state fields measure position and orientation of the hand",
                where=arm.contract.name,
                fix="name them in limits.position_state and limits.rotation_state",
            )

    def pose(self) -> Float:
        """base_T_flange, as measured."""
        return self._pose_of(self.arm.observe(cameras=False))

    def look(self) -> bool:
        """Take a view at the present pose; False, with a message to the person, where it is of no use."""
        observation = self.arm.observe()
        image = observation.images[self.camera]
        try:
            detection = detect(self.board, image, f"{len(self.views.poses):03d}.png")
        except RatchetError as error:
            self.tell(error.what)
            return False
        self.views.images.append(image)
        self.views.detections.append(detection)
        self.views.poses.append(self._pose_of(observation))
        return True

    def automatic(self, count: int) -> Views:
        """Move the arm automatically: first around the present pose, then to where the estimate gains most.

        Raises:
            RatchetError: calibration.no_board where the start shows no board; calibration.few_views where too few poses
                show it.
        """
        start_pose = self.pose()
        if not self.look():
            raise RatchetError(
                "calibration.no_board",
                "the board is not visible from the start pose",
                where=self.camera,
                fix="bring the arm to a pose from which the camera sees the whole board, about 0.4 m away",
            )
        attempts = 0
        # Six attempts per view: some poses cannot be reached or do not show the board.
        while len(self.views.poses) < count and attempts < 6 * count:
            attempts += 1
            target_pose = self._next(start_pose)
            if self.go(target_pose):
                self.look()
        # The arm ends where the person put it, whatever the views were.
        self.go(start_pose)
        self.arm.hold()
        if len(self.views.poses) < LEAST_POSES:
            raise RatchetError(
                "calibration.few_views",
                f"only {len(self.views.poses)} poses show the board",
                where=self.camera,
                fix="put the board nearer to the middle of the image, or guide the arm by hand",
            )
        return self.views

    def guided(self, count: int, still: int = 5) -> Views:
        """A person moves the arm; a view is taken whenever it stood still for `still` observations at a new pose."""
        previous_pose = self.pose()
        still_count = 0
        while len(self.views.poses) < count:
            self.pace()
            current_pose = self.pose()
            motion = difference(previous_pose, current_pose)
            # Still means: less than 0.2 mm and 0.03 degrees between two observations.
            is_still = np.linalg.norm(motion[3:]) < 2e-4 and np.linalg.norm(motion[:3]) < 5e-4
            still_count = still_count + 1 if is_still else 0
            previous_pose = current_pose
            if still_count == still and self._new(current_pose) and self.look():
                self.tell(f"view {len(self.views.poses)} of {count}")
        return self.views

    def go(self, target: Float) -> bool:
        """Move to a pose (base_T_flange) by deltas within the contract's range; False where it is not reached."""
        contract = self.arm.contract
        if contract.action.control_mode != "ee_delta":
            raise RatchetError(
                "calibration.guide_by_hand",
                f"{contract.action.control_mode} cannot be driven to a pose here",
                where=contract.name,
                fix="use --guided and move the arm by hand",
            )
        dims = contract.action.dims
        gripper = contract.action.gripper
        low_limits = np.array([dim.low for dim in dims])
        high_limits = np.array([dim.high for dim in dims])
        for _ in range(STEPS):
            current_pose = self.pose()
            position_error = target[:3, 3] - current_pose[:3, 3]  # m, base frame
            rotation_error = Rotation.from_matrix(target[:3, :3] @ current_pose[:3, :3].T).as_rotvec()
            if np.linalg.norm(position_error) < CLOSE[0] and np.linalg.norm(rotation_error) < CLOSE[1]:
                for _ in range(3):  # frames lag behind the state by up to a few steps
                    self.arm.act(self._rest(contract))
                    self.pace()
                return True
            action = self._rest(contract)
            displacement = np.concatenate([position_error, rotation_error])
            moving_dims = [index for index, dim in enumerate(dims) if gripper is None or dim.name != gripper.dim]
            # One factor for all dimensions, so that the hand moves along the straight line to the target.
            overshoot = np.max(
                np.abs(displacement[: len(moving_dims)]) / np.maximum(high_limits[moving_dims], 1e-9), initial=1.0
            )
            action[moving_dims] = np.clip(
                displacement[: len(moving_dims)] / overshoot, low_limits[moving_dims], high_limits[moving_dims]
            )
            self.arm.act(action)
            self.pace()
        return False

    def _rest(self, contract: RobotContract) -> Float32:
        action = np.zeros(contract.action.size, np.float32)
        gripper = contract.action.gripper
        if gripper is not None:
            action[[dim.name for dim in contract.action.dims].index(gripper.dim)] = gripper.open
        return action

    def _next(self, start_pose: Float) -> Float:
        allowed = self._allowed
        # Two views more than the estimate needs, so that rejecting one does not end it.
        if len(self.views.poses) >= LEAST_POSES + 2:
            try:
                estimate = handeye.calibrate(
                    self.board, self.model, self.mounting, self.views.poses, self.views.detections, folds=0
                )
                candidate_poses = handeye.candidates(self.views.poses, 60, self.generator, allowed)
                best_index, expected_deviations = handeye.suggest(
                    self.board, self.model, estimate, candidate_poses, self.views.detections, self.views.poses
                )
                self.tell(
                    f"uncertainty after the next view about {1e3 * np.linalg.norm(expected_deviations[3:]):.2f} mm"
                )
                return candidate_poses[best_index]
            except RatchetError as error:
                self.tell(error.what)  # not enough yet: go on around the start
        while True:
            rotation_vector = self.generator.normal(size=3)
            # At least 12 degrees: a smaller turn says little of the camera's position (handeye_views.LEAST_TURN).
            rotation_vector *= np.radians(self.generator.uniform(12, 30)) / np.linalg.norm(rotation_vector)
            pose = start_pose @ small(np.concatenate([rotation_vector, self.generator.uniform(-0.06, 0.06, 3)]))
            if allowed(pose):
                return pose

    def _allowed(self, pose: Float) -> bool:
        limits = self.arm.contract.limits
        if not limits.workspace_low:
            return True
        # One centimetre inside the workspace, so that lag and overshoot stay inside too.
        inside = (pose[:3, 3] >= np.add(limits.workspace_low, 0.01)) & (
            pose[:3, 3] <= np.subtract(limits.workspace_high, 0.01)
        )
        return bool(inside.all())

    def _new(self, current_pose: Float) -> bool:
        motions = [difference(pose, current_pose) for pose in self.views.poses]
        return all(np.linalg.norm(motion[3:]) > NEW[0] or np.linalg.norm(motion[:3]) > NEW[1] for motion in motions)

    def _pose_of(self, observation: Observation) -> Float:
        rotation_values = np.asarray(observation.state[self._rotation], float)
        rotation = (
            Rotation.from_quat(rotation_values) if len(rotation_values) == 4 else Rotation.from_rotvec(rotation_values)
        )
        return transform(rotation.as_matrix(), np.asarray(observation.state[self._position], float)[:3])
