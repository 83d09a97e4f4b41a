"""Taking the views of a hand-eye calibration with an arm: go to a pose, stand still, look, choose the next pose.

Knows a Robot's measured hand pose and its deltas, and what the estimate wants to see next. The arm may also be guided
by hand: then nothing is commanded, and a view is taken whenever the arm stands still somewhere new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from agent.contract import RobotContract
from agent.errors import RatchetError
from agent.records import Float32, Observation
from calibration import handeye
from calibration.arm import Arm
from calibration.boards import Board
from calibration.camera_model import CameraModel
from calibration.detection import Detection, detect
from calibration.geometry import Float, difference, small, transform
from calibration.handeye_problem import Mounting
from calibration.handeye_views import LEAST_POSES

STEPS = 600  # control steps that one way may take
CLOSE = (1e-3, np.radians(0.2))  # m and rad from where it should be
NEW = (0.03, np.radians(8.0))  # m or rad from every view so far, when guided by hand


@dataclass
class Views:
    """What was seen: pictures as taken, corners, and base_T_flange as the robot told it."""

    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
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
        fields = {s.name: s for s in arm.contract.state}
        self._position = limits.position_state or next(
            (n for n, s in fields.items() if s.unit == "m" and s.size == 3), ""
        )
        self._rotation = limits.rotation_state or next(
            (n for n, s in fields.items() if s.unit in ("rad", "quaternion_xyzw") and s.size in (3, 4)), ""
        )
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
        """Take a view where the arm is; False (and a word to the person) where it shows nothing of use."""
        seen = self.arm.observe()
        image = seen.images[self.camera]
        try:
            found = detect(self.board, image, f"{len(self.views.poses):03d}.png")
        except RatchetError as error:
            self.tell(error.what)
            return False
        self.views.pictures.append(image)
        self.views.detections.append(found)
        self.views.poses.append(self._pose_of(seen))
        return True

    def automatic(self, count: int) -> Views:
        """Move the arm by itself: first around the present pose, then where the estimate gains most.

        Raises:
            RatchetError: calibration.no_board where the start shows no board; calibration.few_views where too few poses
                show it.
        """
        start = self.pose()
        if not self.look():
            raise RatchetError(
                "calibration.no_board", "the board is not seen from here", where=self.camera,
                fix="bring the arm to a pose from which the camera sees the whole board, about 0.4 m away",
            )  # fmt: skip
        tries = 0
        while len(self.views.poses) < count and tries < 6 * count:
            tries += 1
            target = self._next(start)
            if self.go(target):
                self.look()
        self.go(start)
        self.arm.hold()
        if len(self.views.poses) < LEAST_POSES:
            raise RatchetError(
                "calibration.few_views", f"only {len(self.views.poses)} poses show the board", where=self.camera,
                fix="put the board nearer to the middle of the picture, or guide the arm by hand",
            )  # fmt: skip
        return self.views

    def guided(self, count: int, still: int = 5) -> Views:
        """The arm is moved by a person; a view is taken when it has stood still for so many observations."""
        before = self.pose()
        quiet = 0
        while len(self.views.poses) < count:
            self.pace()
            here = self.pose()
            moved = difference(before, here)
            quiet = quiet + 1 if np.linalg.norm(moved[3:]) < 2e-4 and np.linalg.norm(moved[:3]) < 5e-4 else 0
            before = here
            if quiet == still and self._new(here) and self.look():
                self.tell(f"view {len(self.views.poses)} of {count}")
        return self.views

    def go(self, target: Float) -> bool:
        """Move to a pose in deltas that the contract allows; False where it does not get there."""
        contract = self.arm.contract
        if contract.action.control_mode != "ee_delta":
            raise RatchetError(
                "calibration.guide_by_hand", f"{contract.action.control_mode} cannot be driven to a pose here",
                where=contract.name, fix="use --guided and move the arm by hand",
            )  # fmt: skip
        dims = contract.action.dims
        gripper = contract.action.gripper
        low = np.array([d.low for d in dims])
        high = np.array([d.high for d in dims])
        for _ in range(STEPS):
            here = self.pose()
            gap = target[:3, 3] - here[:3, 3]
            turn = Rotation.from_matrix(target[:3, :3] @ here[:3, :3].T).as_rotvec()
            if np.linalg.norm(gap) < CLOSE[0] and np.linalg.norm(turn) < CLOSE[1]:
                for _ in range(3):  # a camera sees what was, not what is
                    self.arm.act(self._rest(contract))
                    self.pace()
                return True
            action = self._rest(contract)
            wanted = np.concatenate([gap, turn])
            places = [i for i, d in enumerate(dims) if gripper is None or d.name != gripper.dim]
            share = np.max(np.abs(wanted[: len(places)]) / np.maximum(high[places], 1e-9), initial=1.0)
            action[places] = np.clip(wanted[: len(places)] / share, low[places], high[places])
            self.arm.act(action)
            self.pace()
        return False

    def _rest(self, contract: RobotContract) -> Float32:
        out = np.zeros(contract.action.size, np.float32)
        gripper = contract.action.gripper
        if gripper is not None:
            out[[d.name for d in contract.action.dims].index(gripper.dim)] = gripper.open
        return out

    def _next(self, start: Float) -> Float:
        allowed = self._allowed
        if len(self.views.poses) >= LEAST_POSES + 2:
            try:
                found = handeye.calibrate(
                    self.board, self.model, self.mounting, self.views.poses, self.views.detections, folds=0
                )
                options = handeye.candidates(self.views.poses, 60, self.generator, allowed)
                best, expected = handeye.suggest(
                    self.board, self.model, found, options, self.views.detections, self.views.poses
                )
                self.tell(f"uncertainty after the next view about {1e3 * np.linalg.norm(expected[3:]):.2f} mm")
                return options[best]
            except RatchetError as error:
                self.tell(error.what)  # not enough yet: go on around the start
        while True:
            turn = self.generator.normal(size=3)
            turn *= np.radians(self.generator.uniform(12, 30)) / np.linalg.norm(turn)
            pose = start @ small(np.concatenate([turn, self.generator.uniform(-0.06, 0.06, 3)]))
            if allowed(pose):
                return pose

    def _allowed(self, pose: Float) -> bool:
        limits = self.arm.contract.limits
        if not limits.workspace_low:
            return True
        inside = (pose[:3, 3] >= np.add(limits.workspace_low, 0.01)) & (
            pose[:3, 3] <= np.subtract(limits.workspace_high, 0.01)
        )
        return bool(inside.all())

    def _new(self, here: Float) -> bool:
        apart = [difference(p, here) for p in self.views.poses]
        return all(np.linalg.norm(d[3:]) > NEW[0] or np.linalg.norm(d[:3]) > NEW[1] for d in apart)

    def _pose_of(self, seen: Observation) -> Float:
        value = np.asarray(seen.state[self._rotation], float)
        turn = Rotation.from_quat(value) if len(value) == 4 else Rotation.from_rotvec(value)
        return transform(turn.as_matrix(), np.asarray(seen.state[self._position], float)[:3])
