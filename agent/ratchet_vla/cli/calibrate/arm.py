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
from rich.table import Table

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
from ratchet_vla.cli import common
from ratchet_vla.cli.calibrate.camera import measure_lens, read_board, read_views
from ratchet_vla.contract import VerifiedFact, write_verified
from ratchet_vla.errors import RatchetError

POSES = "poses.json"
# What `--simulate` gives a camera of which nothing is known: a webcam's lens.
SIMULATED = CameraModel(640, 480, 610.0, 612.0, 325.0, 236.0, "brown5", (0.12, -0.25, 0.001, -0.0005, 0.01))
LENS_VIEWS = 25


@dataclass
class HandEye:
    """Where the camera is: on the hand, or beside the arm. From images with the robot's pose at each.

    The folder holds images and poses.json: {"000.png": {"position": [x, y, z], "orientation": [x, y, z, w]}, ...},
    base_T_flange in m. With --simulate a simulated arm takes the views by itself, through the interface of a real one.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of images and poses.json."""
    camera: str
    """Name of the camera; its newest intrinsics in the store are used."""
    mounting: Mounting
    """eye_in_hand: the camera moves with the hand. eye_to_hand: it stands beside the arm, the board is in the hand."""
    board: Path = Path("board.json")
    """Description of the board."""
    store: Path = Path("calibrations")
    """Folder of calibrations."""
    parent: str = ""
    """Name of the parent frame; the flange's or base's usual name if absent."""
    next_poses: int = 0
    """Print so many poses that would make the result more certain."""
    simulate: int = 0
    """Take so many views with a simulated arm into the folder first, and say how far the result is from the truth.
    Where there is no board or no lens of this camera yet, a usual one is simulated and measured first."""
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
        poses, found, encoded = self._read(board, console)
        result = handeye.calibrate(board, before.model, self.mounting, poses, found)
        mount = Mount.of(
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
        calibration: Calibration = dataclasses.replace(before, mount=mount, date=common.now(), images={})
        stored = store.put(
            calibration, {d.name: encoded[d.name] for d in found}, lambda c: report.write(c, None, result, poses)
        )
        show(console, result)
        for name, why in result.rejected.items():
            console.print(f"left out {name}: {why}", markup=False, soft_wrap=True)
        out: dict[str, Any] = {"id": stored.id, "report": str(self.store / stored.id / "report.html")}
        if truth is not None:
            apart = np.abs(difference(result.camera, truth))
            out["from_truth"] = {"mm": 1e3 * float(np.linalg.norm(apart[3:])),
                                 "degrees": float(np.degrees(np.linalg.norm(apart[:3]))),
                                 "inside_95": result.contains(truth)}  # fmt: skip
            console.print(
                f"from the truth: {out['from_truth']['mm']:.2f} mm, {out['from_truth']['degrees']:.3f} degrees, "
                f"{'inside' if out['from_truth']['inside_95'] else 'OUTSIDE'} the 95 % ellipsoid"
            )
        if self.next_poses:
            out["next"] = self._next(board, before.model, result, poses, found, console)
        good, assessment = report.assess(stored)
        console.print(f"{assessment}\ncalibration {stored.id[:12]}, report: {out['report']}", soft_wrap=True)
        if self.json:
            print(json.dumps(out | report.as_dict(None, result)))
        return 0 if good else 1

    def _read(self, board: Board, console: Console) -> tuple[list[Float], list[Detection], dict[str, bytes]]:
        path = self.folder / POSES
        try:
            raw = json.loads(path.read_text())
            poses = {str(n): from_quaternion(p["position"], p["orientation"]) for n, p in raw.items()}
        except FileNotFoundError:
            raise RatchetError(
                "calibration.no_poses", "no poses.json beside the images", where=str(path),
                fix="write base_T_flange of every image into it; see --help",
            ) from None  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RatchetError("calibration.bad_poses", f"{error!r}", where=str(path), fix="see --help") from None
        found, rejected, encoded = read_views(self.folder, board, console)
        for name, why in rejected.items():
            console.print(f"left out {name}: {why}", markup=False, soft_wrap=True)
        missing = [d.name for d in found if d.name not in poses]
        if missing:
            raise RatchetError(
                "calibration.mismatch", f"no pose for {missing[0]} and {len(missing) - 1} more", where=str(path),
                fix="give one pose for every image",
            )  # fmt: skip
        return [poses[d.name] for d in found], found, encoded

    def _lens(self, board: Board, store: CalibrationStore, console: Console) -> tuple[Calibration, CameraModel]:
        """The camera's newest intrinsics, and the lens that a simulated camera has: a known one's is measured first,
        from images of the board, as a real one's."""
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
                    fix=f"ratchet calibrate intrinsics IMAGE_SUFFIXES --camera {self.camera} --board {self.board} "
                    f"--store {self.store}",
                ) from None
        console.print(f"no lens of '{self.camera}' is calibrated: images for it are taken with the simulated camera")
        folder = self.folder / "lens"
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        scene = BoardScene(board, SIMULATED)
        try:
            for i, pose in enumerate(board_poses(board, SIMULATED, LENS_VIEWS, generator, (0.3, 0.6))):
                image = scene.photograph(pose, Look(), generator)
                cv2.imwrite(str(folder / f"{i:03d}.png"), image[..., ::-1])
        finally:
            scene.close()
        before, _, _ = measure_lens(folder, self.camera, board, SIMULATED.model, store, console)
        return before, SIMULATED

    def _take(self, board: Board, lens: CameraModel, model: CameraModel, console: Console) -> Float:
        """Views by a simulated arm; the camera's true pose. lens: its own; model: what is known of it."""
        arm = BoardArm(board, lens, self.mounting)
        try:
            with console.status("the simulated arm takes views") as status:
                views = Collector(arm, CAMERA, board, model, self.mounting, tell=status.update).automatic(self.simulate)
        finally:
            arm.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {}
        for image, seen, pose in zip(views.images, views.detections, views.poses, strict=True):
            cv2.imwrite(str(self.folder / seen.name), image[..., ::-1])
            told[seen.name] = {"position": pose[:3, 3].tolist(), "orientation": quaternion(pose).tolist()}
        (self.folder / POSES).write_text(json.dumps(told, indent=1) + "\n")
        return arm.truth

    def _next(
        self, board: Board, model: CameraModel, result: HandEyeResult, poses: list[Float], found: list[Detection],
        console: Console,
    ) -> list[dict[str, Any]]:  # fmt: skip
        generator, out = np.random.default_rng(0), []
        options = handeye.candidates(poses, 200, generator)
        for _ in range(self.next_poses):
            best, expected = handeye.suggest(board, model, result, options, found, poses)
            pose = options.pop(best)
            row = {"position": pose[:3, 3].round(4).tolist(), "orientation": quaternion(pose).round(5).tolist(),
                   "expected_mm": 1e3 * float(np.linalg.norm(expected[3:]))}  # fmt: skip
            out.append(row)
            console.print(
                f"next: {row['position']} {row['orientation']} -> {row['expected_mm']:.2f} mm", highlight=False
            )
        return out


@dataclass
class Actions:
    """Small, announced motions of a simulated arm: sign and scale of every action, frame, gripper, latency.

    The same check runs on a real arm through its Robot; what it finds may be written into a contract as verified facts.
    """

    suite: str = "metaworld"
    """Suite of the simulated robot."""
    task: str = ""
    """Task whose scene it stands in; the suite's first if absent."""
    contract: Path | None = None
    """Contract to write the verified facts into; nothing is written if absent."""
    size: float = 0.25
    """Share of each dimension's range per step."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        console = Console(stderr=self.json, width=100)
        info = registry.task(self.suite, self.task) if self.task else registry.tasks(self.suite)[0]
        robot = SimRobot(self.suite, info.name, info.train_states[0])
        robot.connect()
        try:
            facts = action_checks.check(robot, lambda text: console.print(text, style="dim"), size=self.size)
        finally:
            robot.close()
        table = Table(title=f"actions of {robot.contract.name}, deltas in the {facts.frame}'s frame")
        for column in ("dimension", "moved / asked", "went elsewhere", "latency ms"):
            table.add_column(column)
        for d in facts.dims:
            table.add_row(d.name, f"{d.scale:+.2f}", f"{d.across:.0%}", f"{1e3 * d.latency:.0f}")
        console.print(table)
        console.print(f"gripper: {facts.gripper_open:.3f} when open, {facts.gripper_closed:.3f} when closed")
        for problem in facts.problems:
            console.print(f"problem: {problem}", style="red")
        if self.contract is not None:
            when = common.now()
            known = [VerifiedFact(f"{d.name}.scale", d.scale, "", when) for d in facts.dims]
            known += [
                VerifiedFact(f"{d.name}.latency", d.latency, "s", when) for d in facts.dims if np.isfinite(d.latency)
            ]
            known += [VerifiedFact("gripper.works", float(facts.gripper_works), "", when)]
            write_verified(self.contract, known)
            console.print(f"written into {self.contract}")
        if self.json:
            print(json.dumps(dataclasses.asdict(facts)))
        return 1 if facts.problems else 0


def show(console: Console, result: HandEyeResult) -> None:
    """The estimate beside OpenCV's own solvers."""
    table = Table(title=f"{result.mounting.replace('_', ' ')}, {len(result.used)} views")
    for column in ("", "x", "y", "z"):
        table.add_column(column)
    deviations = result.deviations
    table.add_row("position mm", *(f"{1e3 * x:.2f}" for x in result.camera[:3, 3]))
    table.add_row("± 2 deviations mm, camera's axes", *(f"{2e3 * x:.2f}" for x in deviations[3:]))
    table.add_row("± 2 deviations degrees", *(f"{2 * np.degrees(x):.3f}" for x in deviations[:3]))
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
    table = Table(title="OpenCV's solvers, distance from this result")
    for column in ("solver", "mm", "degrees"):
        table.add_column(column)
    for name, pose in result.solvers.items():
        d = difference(result.camera, pose)
        table.add_row(name, f"{1e3 * np.linalg.norm(d[3:]):.2f}", f"{np.degrees(np.linalg.norm(d[:3])):.3f}")
    console.print(table)
