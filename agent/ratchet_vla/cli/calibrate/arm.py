"""`ratchet calibrate handeye|actions`: where the camera is on the arm, and whether actions do what the contract says.

Knows folders of images and poses, simulated arms and the screen. The measurements are calibration's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro
from rich.console import Console

from ratchet_calibration import report
from ratchet_calibration.arms import action_checks
from ratchet_calibration.boards.board import Board
from ratchet_calibration.boards.detection import Detection
from ratchet_calibration.cameras.model import CameraModel
from ratchet_calibration.geometry import Float, difference, from_quaternion, quaternion
from ratchet_calibration.handeye import estimate as handeye
from ratchet_calibration.handeye.collect import Collector
from ratchet_calibration.handeye.estimate import HandEyeResult
from ratchet_calibration.handeye.problem import Mounting
from ratchet_calibration.store.folder import CalibrationStore
from ratchet_calibration.store.record import Calibration, Mount
from ratchet_sim import registry
from ratchet_sim.board.arm import CAMERA, BoardArm
from ratchet_sim.board.scene import BoardScene, Look
from ratchet_sim.board.scene import poses as board_poses
from ratchet_sim.robot import SimRobot
from ratchet_vla.cli import common, display
from ratchet_vla.cli.calibrate.lens import Origin, measure_lens, print_rejected, read_board, read_views
from ratchet_vla.cli.calibrate.store import CALIBRATIONS
from ratchet_vla.contract import VerifiedFact, write_verified
from ratchet_vla.errors import RatchetError

POSES = "poses.json"
# What `--simulate` gives a camera of which nothing is known: a webcam's lens.
SIMULATED = CameraModel(640, 480, 610.0, 612.0, 325.0, 236.0, "brown5", (0.12, -0.25, 0.001, -0.0005, 0.01))
LENS_VIEWS = 25
CANDIDATES = 200  # poses that the next ones are chosen from


@dataclass
class HandEye:
    """Find where the camera is, on the hand or beside the arm, from images with the robot's pose at each.

    The folder holds images and poses.json: {"000.png": {"position": [x, y, z], "orientation": [x, y, z, w]}, ...},
    base_T_flange in m. With --simulate a simulated arm takes the views by itself, through the interface of a real one.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the images and poses.json."""
    camera: str
    """Name of the camera; its newest intrinsics in the store are used."""
    mounting: Mounting
    """eye_in_hand: the camera moves with the hand. eye_to_hand: it stands beside the arm, the board is in the hand."""
    board: Path = Path("board.json")
    """Description of the board (JSON), as `calibrate board` wrote it."""
    store: Path = CALIBRATIONS
    """Folder of the calibration store."""
    parent: str = ""
    """Name of the parent frame; the flange's or base's usual name if absent."""
    next_poses: int = 0
    """How many poses to print that would make the result more certain."""
    simulate: int = 0
    """How many views a simulated arm takes into the folder first; the result is then compared with the truth. Where
    there is no board or no lens of this camera yet, a usual one is simulated and measured first. 0 simulates
    nothing."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, width=100)
        store = CalibrationStore(self.store)
        if self.simulate and not self.board.is_file():
            board = Board()
            console.print(f"no {self.board}: the usual board of {board.columns} x {board.rows} is simulated")
        else:
            board = read_board(self.board)
        before, lens = self._lens(board, store, console)
        truth = self._take(board, lens, before.model, console) if self.simulate else None
        poses, detections, encoded = self._read(board, console)
        result = handeye.calibrate(board, before.model, self.mounting, poses, detections)
        calibration: Calibration = dataclasses.replace(before, mount=self._mount(result), date=common.now(), images={})
        images = {detection.name: encoded[detection.name] for detection in detections}
        stored = store.put(calibration, images, lambda identified: report.write(identified, None, result, poses))
        show(console, result)
        print_rejected(console, result.rejected)
        document: dict[str, Any] = {"id": stored.id, "report": str(self.store / stored.id / "report.html")}
        if truth is not None:
            document["from_truth"] = self._compare(result, truth, console)
        if self.next_poses:
            document["next"] = self._next(board, before.model, result, poses, detections, console)
        good, assessment = report.assess(stored)
        console.print(f"{assessment}\ncalibration {stored.id[:12]}, report: {document['report']}", soft_wrap=True)
        if self.json:
            print(json.dumps(document | report.as_dict(None, result)))
        return 0 if good else 1

    def _mount(self, result: HandEyeResult) -> Mount:
        return Mount.of(
            result.camera,
            mounting=self.mounting,
            parent=self.parent or ("flange" if self.mounting == "eye_in_hand" else "base"),
            child=f"{self.camera}_optical_frame",
            covariance=result.covariance,
            poses=len(result.used),
            rms=result.rms,
            held_out_pixels=result.held_out_pixels,
            held_out_position=result.held_out_position,
            held_out_rotation=result.held_out_rotation,
        )

    def _compare(self, result: HandEyeResult, truth: Float, console: Console) -> dict[str, Any]:
        """How far the estimate is from the simulated camera's true pose, and whether its uncertainty covers that."""
        distance = _distance(result.camera, truth)
        inside = result.contains(truth)
        console.print(
            f"from the truth: {distance['mm']:.2f} mm, {distance['degrees']:.3f} degrees, "
            f"{'inside' if inside else 'OUTSIDE'} the 95 % ellipsoid"
        )
        return {**distance, "inside_95": inside}

    def _read(self, board: Board, console: Console) -> tuple[list[Float], list[Detection], dict[str, bytes]]:
        path = self.folder / POSES
        try:
            raw = json.loads(path.read_text())
            poses = {str(name): from_quaternion(pose["position"], pose["orientation"]) for name, pose in raw.items()}
        except FileNotFoundError:
            raise RatchetError(
                "calibration.no_poses", "no poses.json beside the images", where=str(path),
                fix="write base_T_flange of every image into it; see --help",
            ) from None  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RatchetError("calibration.bad_poses", f"{error!r}", where=str(path), fix="see --help") from None
        detections, rejected, encoded = read_views(self.folder, board, console)
        print_rejected(console, rejected)
        missing = [detection.name for detection in detections if detection.name not in poses]
        if missing:
            raise RatchetError(
                "calibration.mismatch", f"no pose for {missing[0]} and {len(missing) - 1} more", where=str(path),
                fix="give one pose for every image",
            )  # fmt: skip
        return [poses[detection.name] for detection in detections], detections, encoded

    def _lens(self, board: Board, store: CalibrationStore, console: Console) -> tuple[Calibration, CameraModel]:
        """The camera's newest intrinsics, and the lens that a simulated camera has.

        Where nothing is known of the camera, its intrinsics are measured first, from images of the board, as a real
        one's.
        """
        try:
            before = store.load(store.resolve(self.camera))
            return before, before.model
        except RatchetError as error:
            if error.code != "calibration.unknown":
                raise
            if not self.simulate:
                raise RatchetError(
                    error.code,
                    f"the lens of '{self.camera}' is not calibrated yet",
                    where=error.where,
                    fix=f"ratchet calibrate intrinsics IMAGES --camera {self.camera} --board {self.board} "
                    f"--store {self.store}",
                ) from None
        console.print(f"no lens of '{self.camera}' is calibrated: images for it are taken with the simulated camera")
        folder = self.folder / "lens"
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        scene = BoardScene(board, SIMULATED)
        try:
            distances_m = (0.3, 0.6)
            for number, pose in enumerate(board_poses(board, SIMULATED, LENS_VIEWS, generator, distances_m)):
                image = scene.photograph(pose, Look(), generator)
                cv2.imwrite(str(folder / f"{number:03d}.png"), image[..., ::-1])
        finally:
            scene.close()
        before, _, _ = measure_lens(folder, Origin(self.camera), board, SIMULATED.model, store, console)
        return before, SIMULATED

    def _take(self, board: Board, lens: CameraModel, model: CameraModel, console: Console) -> Float:
        """Let a simulated arm take the views; returns the camera's true pose.

        Args:
            board: The board that it looks at.
            lens: The camera's true lens.
            model: The lens as it is known, which the collector plans with.
            console: Where progress is shown.
        """
        arm = BoardArm(board, lens, self.mounting)
        try:
            with console.status("the simulated arm takes views") as status:
                views = Collector(arm, CAMERA, board, model, self.mounting, tell=status.update).automatic(self.simulate)
        finally:
            arm.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        poses = {}
        for image, detection, pose in zip(views.images, views.detections, views.poses, strict=True):
            cv2.imwrite(str(self.folder / detection.name), image[..., ::-1])
            poses[detection.name] = {"position": pose[:3, 3].tolist(), "orientation": quaternion(pose).tolist()}
        (self.folder / POSES).write_text(json.dumps(poses, indent=1) + "\n")
        return arm.truth

    def _next(
        self,
        board: Board,
        model: CameraModel,
        result: HandEyeResult,
        poses: list[Float],
        detections: list[Detection],
        console: Console,
    ) -> list[dict[str, Any]]:
        """Poses that would make the result most certain, one after the other, with the uncertainty that is expected."""
        candidates = handeye.candidates(poses, CANDIDATES, np.random.default_rng(0))
        rows = []
        for _ in range(self.next_poses):
            best, expected = handeye.suggest(board, model, result, candidates, detections, poses)
            pose = candidates.pop(best)
            position = pose[:3, 3].round(4).tolist()
            orientation = quaternion(pose).round(5).tolist()
            expected_mm = 1e3 * float(np.linalg.norm(expected[3:]))
            rows.append({"position": position, "orientation": orientation, "expected_mm": expected_mm})
            console.print(f"next: {position} {orientation} -> {expected_mm:.2f} mm", highlight=False)
        return rows


@dataclass
class Actions:
    """Check actions by small, announced motions of a simulated arm: sign, scale, frame, gripper, latency.

    The same check runs on a real arm through its Robot; what it finds may be written into a contract as verified facts.
    """

    suite: str = "metaworld"
    """Simulation suite of the robot."""
    task: str = ""
    """Name of the task whose scene it stands in; the suite's first if absent."""
    contract: Path | None = None
    """Robot contract (YAML) to write what was verified into; nothing is written if absent."""
    size: float = 0.25
    """How far to move, as a share (0 to 1) of each dimension's range per step."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, width=100)
        info = registry.task(self.suite, self.task) if self.task else registry.tasks(self.suite)[0]
        robot = SimRobot(self.suite, info.name, info.train_states[0])
        robot.connect()
        try:
            checked = action_checks.check(robot, lambda text: console.print(text, style="dim"), size=self.size)
        finally:
            robot.close()
        columns = ("dimension", "moved / asked", "went elsewhere", "latency ms")
        title = f"actions of {robot.contract.name}, deltas in the {checked.frame}'s frame"
        table = display.make_table(columns, title=title)
        for dim in checked.dims:
            table.add_row(dim.name, f"{dim.scale:+.2f}", f"{dim.across:.0%}", f"{1e3 * dim.latency:.0f}")
        console.print(table)
        console.print(f"gripper: {checked.gripper_open:.3f} when open, {checked.gripper_closed:.3f} when closed")
        for problem in checked.problems:
            console.print(f"problem: {problem}", style="red")
        if self.contract is not None:
            when = common.now()
            verified = [VerifiedFact(f"{dim.name}.scale", dim.scale, "", when) for dim in checked.dims]
            for dim in checked.dims:
                if np.isfinite(dim.latency):  # a dimension that did not move has none
                    verified.append(VerifiedFact(f"{dim.name}.latency", dim.latency, "s", when))
            verified.append(VerifiedFact("gripper.works", float(checked.gripper_works), "", when))
            write_verified(self.contract, verified)
            console.print(f"written into {self.contract}")
        if self.json:
            print(json.dumps(dataclasses.asdict(checked)))
        return 1 if checked.problems else 0


def _distance(first: Float, second: Float) -> dict[str, float]:
    """How far two poses (4, 4) are apart, in mm and in degrees."""
    apart = difference(first, second)  # rotation vector (rad), then translation (m)
    return {
        "mm": 1e3 * float(np.linalg.norm(apart[3:])),
        "degrees": float(np.degrees(np.linalg.norm(apart[:3]))),
    }


def show(console: Console, result: HandEyeResult) -> None:
    """Print the estimate beside those of OpenCV's own solvers."""
    title = f"{result.mounting.replace('_', ' ')}, {len(result.used)} views"
    table = display.make_table(("", "x", "y", "z"), title=title)
    # Three deviations of the rotation (rad), then three of the position (m).
    rotation_rad = result.deviations[:3]
    position_m = result.deviations[3:]
    table.add_row("position mm", *(f"{1e3 * value:.2f}" for value in result.camera[:3, 3]))
    table.add_row("± 2 deviations mm, camera's axes", *(f"{2e3 * value:.2f}" for value in position_m))
    table.add_row("± 2 deviations degrees", *(f"{2 * np.degrees(value):.3f}" for value in rotation_rad))
    console.print(table)
    noise = result.noise
    console.print(
        f"error {result.rms:.3f} px; new views are off by {result.held_out_pixels:.2f} px, "
        f"{1e3 * result.held_out_position:.2f} mm, {np.degrees(result.held_out_rotation):.3f} degrees "
        "(cross-validated)\n"
        f"the robot's own poses seem to be off by {1e3 * noise.translation:.2f} mm and "
        f"{np.degrees(noise.rotation):.3f} degrees per axis",
        highlight=False,
    )
    title = "OpenCV's solvers, distance from this result"
    table = display.make_table(("solver", "mm", "degrees"), title=title)
    for name, pose in result.solvers.items():
        distance = _distance(result.camera, pose)
        table.add_row(name, f"{distance['mm']:.2f}", f"{distance['degrees']:.3f}")
    console.print(table)
