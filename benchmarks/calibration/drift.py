"""Whether a camera that was moved is noticed before a session, and an unmoved one left in peace.

A LIBERO scene seen by its fixed camera at 640 x 480. Reference and present image are of different initial states (the
objects and the arm are elsewhere), under other light (strength, colour and direction), with sensor noise of two grey
levels in eight frames that are averaged. In half of the trials the camera was moved in between: by 5 mm in a random
direction, or by 0.5 degree about a random axis.

    python -m benchmarks.calibration.drift [--quick]

Exit 1 where the goal is missed: at least 95 % of the moves caught, at most 2 % false alarms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.spatial.transform import Rotation

from benchmarks.harness.results import machine
from ratchet_calibration.cameras import drift
from ratchet_sim import registry
from ratchet_sim.libero.env import LiberoTaskEnv, with_image_size
from ratchet_vla.errors import RatchetError

ROOT = Path(__file__).resolve().parents[2]
SUITE, CAMERA = "libero_object", "agentview"
MOVE, TURN = 0.005, np.radians(0.5)
NOISE, FRAMES = 2.0, 8  # grey levels per channel and frame, frames that are averaged


class Scene:
    """One task whose camera and lights may be changed."""

    def __init__(self, task: str, states: tuple[int, ...]) -> None:
        contract = with_image_size(registry.contract_for(SUITE), 640, 480)
        env = registry.make_env(SUITE, task, contract)
        assert isinstance(env, LiberoTaskEnv)
        self.env = env
        self.states = states
        self.env.reset(states[0])
        model = self.env.model
        self.camera = model.camera(contract.camera(CAMERA).source).id
        self.position, self.orientation = model.cam_pos[self.camera].copy(), model.cam_quat[self.camera].copy()
        self.lights = model.light_diffuse.copy(), model.light_dir.copy(), model.vis.headlight.diffuse.copy()

    def view(self, state: int, generator: np.random.Generator, kind: str, lit: bool) -> NDArray[np.uint8]:
        """kind: "" for the camera where it was, "move" or "turn"."""
        model = self.env.model
        self.env.reset(state)
        model.cam_pos[self.camera], model.cam_quat[self.camera] = self.position, self.orientation
        diffuse, direction, headlight = self.lights
        model.light_diffuse[:], model.light_dir[:], model.vis.headlight.diffuse[:] = diffuse, direction, headlight
        if lit:
            factor = generator.uniform(0.6, 1.3) * generator.uniform(0.9, 1.1, 3)
            model.light_diffuse[:] *= factor
            model.vis.headlight.diffuse[:] *= factor
            turned = Rotation.from_rotvec(generator.normal(0, 0.2, 3)).apply(direction)
            model.light_dir[:] = turned
        axis = generator.normal(size=3)
        axis /= np.linalg.norm(axis)
        if kind == "move":
            model.cam_pos[self.camera] = self.position + MOVE * axis
        elif kind == "turn":
            before = Rotation.from_quat(self.orientation[[1, 2, 3, 0]])
            after = (before * Rotation.from_rotvec(TURN * axis)).as_quat()
            model.cam_quat[self.camera] = after[[3, 0, 1, 2]]
        image = self.env.render(CAMERA).astype(np.float32)
        noisy = (image + generator.normal(0, NOISE, image.shape) for _ in range(FRAMES))
        return drift.averaged([n.round().clip(0, 255).astype(np.uint8) for n in noisy])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one scene, 24 trials")
    parser.add_argument("--seed", type=int, default=0, help="other light, places and moves than those of seed 0")
    parser.add_argument("--image", type=Path, help="where to write the image of one caught move")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/drift.json")
    arguments = parser.parse_args(argv)
    console = Console(width=100)
    cv2.setNumThreads(1)
    tasks = registry.tasks(SUITE)[: 1 if arguments.quick else 5]
    per_scene = 24 if arguments.quick else 80
    rows: list[dict[str, Any]] = []
    shown = False
    for number, info in enumerate(tasks):
        scene = Scene(info.name, info.evaluation_states)
        generator = np.random.default_rng(arguments.seed + number)
        for trial in track(range(per_scene), f"scene {number + 1}", console=console):
            kind = ("", "move", "", "turn")[trial % 4]
            states = generator.choice(scene.states, 2, replace=False)
            reference = scene.view(int(states[0]), generator, "", lit=False)
            current = scene.view(int(states[1]), generator, kind, lit=True)
            started = time.perf_counter()
            try:
                found = drift.compare(reference, current)
                row = {"moved": found.moved, "agreed": found.agreed, "stayed": found.stayed, "code": ""}
                if found.moved and kind and not shown and arguments.image:
                    image = drift.comparison_image(reference, current, found)
                    cv2.imwrite(str(arguments.image), image[..., ::-1])
                    shown = True
            except RatchetError as error:
                row = {"moved": True, "agreed": float("nan"), "stayed": float("nan"), "code": error.code}
            rows.append(row | {"scene": info.name, "kind": kind, "seconds": time.perf_counter() - started})
        scene.env.close()
    shares = {k: float(np.mean([r["moved"] for r in rows if r["kind"] == k])) for k in ("", "move", "turn")}
    caught = float(np.mean([r["moved"] for r in rows if r["kind"]]))
    table = Table(title=f"drift, {len(tasks)} scenes, {len(rows)} trials")
    for column in ("camera", "trials", "alarm", "stayed median", "5 %", "95 %"):
        table.add_column(column)
    for kind, name in (("", "as it was"), ("move", "moved 5 mm"), ("turn", "turned 0.5 degree")):
        stayed = [r["stayed"] for r in rows if r["kind"] == kind and np.isfinite(r["stayed"])]
        values = [f"{np.percentile(stayed, q):.0%}" for q in (50, 5, 95)] if stayed else ["-"] * 3
        table.add_row(name, str(sum(r["kind"] == kind for r in rows)), f"{shares[kind]:.1%}", *values)
    console.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps(
            {
                "command": [
                    "python",
                    "-m",
                    "benchmarks.calibration.drift",
                    *(argv if argv is not None else sys.argv[1:]),
                ],
                "machine": machine(opencv=cv2.__version__),
                "trials": len(rows),
                "caught": caught,
                "caught_moves": shares["move"],
                "caught_turns": shares["turn"],
                "false_alarms": shares[""],
                "blind": sum(bool(r["code"]) for r in rows),
                "seconds": float(np.median([r["seconds"] for r in rows])),
                "threshold_stayed": drift.Threshold().stayed,
                "threshold_agreed_px": drift.Threshold().agreed,
                "agreed_px_when_still": float(np.nanmax([r["agreed"] for r in rows if not r["kind"]])),
            },
            indent=1,
        )
        + "\n"
    )
    console.print(
        f"drift: {caught:.1%} of moves caught, {shares['']:.1%} false alarms (goal >= 95 %, <= 2 %)", soft_wrap=True
    )
    return 0 if caught >= 0.95 and shares[""] <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
