"""Calibration report: an HTML page that says whether a calibration is good, and what the numbers mean.

Knows results and how to draw them. Measures nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ratchet_calibration.cameras.intrinsics import IntrinsicsResult
from ratchet_calibration.geometry import Float
from ratchet_calibration.handeye.estimate import HandEyeResult
from ratchet_calibration.store.record import Calibration

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Calibration of {{ c.camera }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid
#e4e7eb; }
img { max-width: 100%; } .assessment { padding: .6rem 1rem; border-left: 6px solid {{ colour }}; background: #f5f7fa; }
small { color: #616e7c; }
</style><h1>Calibration of {{ c.camera }}</h1>
<p class="assessment"><b>{{ assessment }}</b></p>
<p><small>{{ c.date }}, id {{ c.id[:12] }}, camera {{ c.camera_serial or "without serial" }}, robot {{ c.robot or
"not named" }}
{{ c.robot_serial }}</small></p>
<h2>The lens</h2>
<p>A calibrated camera predicts where each corner of the board appears. The table compares prediction and image,
also
on images that were kept out of the estimate: those are the honest figure.</p>
<table>{% for name, value, meaning in lens %}<tr><td>{{ name }}</td><td>{{ value }}</td><td><small>{{ meaning
}}</small></td>
</tr>{% endfor %}</table>
{% for warning in warnings %}<p>Better next time: {{ warning }}.</p>{% endfor %}
{% if images.coverage %}<figure><img alt="corners per part of the image" src="{{ images.coverage
}}"><figcaption>Where corners were
seen: white cells are parts of the image in which the lens is a guess.</figcaption></figure>
<figure><img alt="residuals" src="{{ images.residuals }}"><figcaption>How far each corner was from its prediction.
A round cloud is
noise; a ring, or a cloud with arms, means that the distortion model is too simple.</figcaption></figure>{% endif %}
{% if mount %}<h2>Where the camera is</h2>
<p>{{ mounting }}</p>
<table>{% for name, value, meaning in mount %}<tr><td>{{ name }}</td><td>{{ value }}</td><td><small>{{ meaning
}}</small></td></tr>
{% endfor %}</table>{% endif %}
{% if images.poses %}<figure><img alt="pose diversity" src="{{ images.poses }}"><figcaption>How the hand was
turned, and the error that
each robot pose seems to have. Turns about different axes, 20 degrees and more, are what makes the result
certain.</figcaption>
</figure>{% endif %}
{% if rejected %}<h2>Views that were left out</h2><table>{% for name, why in rejected.items() %}<tr><td>{{ name
}}</td><td>{{ why }}</td>
</tr>{% endfor %}</table>{% endif %}
{% if solvers %}<h2>Other solvers, same views</h2><table><tr><th>solver</th><th>apart mm</th><th>apart
degrees</th></tr>
{% for name, mm, degrees in solvers %}<tr><td>{{ name }}</td><td>{{ mm }}</td><td>{{ degrees }}</td></tr>{% endfor
%}</table>{% endif %}
</html>
"""


def write(
    calibration: Calibration,
    lens: IntrinsicsResult | None = None,
    hand: HandEyeResult | None = None,
    poses: Sequence[Float] = (),
) -> str:
    """The page as HTML in one file. poses: base_T_flange of the hand-eye views."""
    from ratchet_calibration.geometry import difference

    model = calibration.model
    names = ["fx", "fy", "cx", "cy", *(f"distortion {index + 1}" for index in range(len(model.distortion)))]
    values = [model.fx, model.fy, model.cx, model.cy, *model.distortion]
    deviations = list(model.deviations) or [float("nan")] * len(values)
    lens_rows = [
        ("held-out error", f"{calibration.held_out_rms:.3f} px", "below 0.3 px is good, above 1 px something is wrong"),
        ("error of the views used", f"{calibration.rms:.3f} px", f"{calibration.views} views"),
    ]
    for parameter, value, deviation in zip(names, values, deviations, strict=True):
        meaning = model.model if parameter.startswith("distortion") else "px; ± is two standard deviations"
        lens_rows.append((parameter, f"{value:.6g} ± {2 * deviation:.2g}", meaning))
    is_good, assessment = assess(calibration)
    images: dict[str, str] = {}
    if lens is not None:
        images |= {"coverage": _uri(_coverage(lens)), "residuals": _uri(_residuals(lens))}
    if hand is not None and len(poses):
        images["poses"] = _uri(_poses(hand, poses))
    solvers = []
    if hand is not None:
        for name, solver_pose in hand.solvers.items():
            disagreement = difference(hand.camera, solver_pose)  # (6,): rotation vector in rad, translation in m
            degrees = np.degrees(np.linalg.norm(disagreement[:3]))
            solvers.append((name, f"{1e3 * np.linalg.norm(disagreement[3:]):.2f}", f"{degrees:.3f}"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(PAGE).render(
        c=calibration,
        colour="#2f8132" if is_good else "#ba2525",
        assessment=assessment,
        lens=lens_rows,
        warnings=lens.warnings if lens else (),
        mount=_mount(calibration),
        mounting=_words(calibration),
        images={"coverage": "", "residuals": "", "poses": ""} | images,
        rejected=(lens.rejected if lens else {}) | (hand.rejected if hand else {}),
        solvers=solvers,
    )


def assess(calibration: Calibration) -> tuple[bool, str]:
    """Whether a calibration may be used, and why, in one sentence."""
    problems = []
    # Written as "not below", so that NaN counts as a problem.
    if not calibration.held_out_rms < 0.5:
        problems.append(f"images that the estimate had not seen are off by {calibration.held_out_rms:.2f} px")
    mount = calibration.mount
    if mount is not None:
        position_mm = 1e3 * float(np.sqrt(np.trace(np.reshape(mount.covariance, (6, 6))[3:, 3:])))
        if position_mm > 3:
            problems.append(f"the camera's place is only known to {position_mm:.1f} mm")
        if not mount.held_out_position < 0.006:
            problems.append(f"new views put the board {1e3 * mount.held_out_position:.1f} mm elsewhere")
    if problems:
        return False, "Not good enough: " + "; ".join(problems) + "."
    return True, "Good: the errors are as small as the images' noise allows."


def _words(calibration: Calibration) -> str:
    if calibration.mount is None:
        return ""
    if calibration.mount.mounting == "eye_in_hand":
        return "The camera is on the hand: its place is given against the flange and moves with it."
    return "The camera stands beside the arm: its place is given against the robot's base."


def _mount(calibration: Calibration) -> list[tuple[str, str, str]]:
    mount = calibration.mount
    if mount is None:
        return []
    deviations = np.sqrt(np.diag(np.reshape(mount.covariance, (6, 6))))
    return [
        (
            "position",
            ", ".join(f"{1e3 * number:.2f}" for number in mount.position) + " mm",
            f"{mount.child} in {mount.parent}",
        ),
        (
            "its uncertainty",
            ", ".join(f"{2e3 * number:.2f}" for number in deviations[3:]) + " mm",
            "two standard deviations along the camera's right, down and ahead",
        ),
        ("orientation", ", ".join(f"{number:.6f}" for number in mount.orientation), "quaternion x y z w"),
        (
            "its uncertainty",
            ", ".join(f"{2 * np.degrees(number):.3f}" for number in deviations[:3]) + " degrees",
            "two standard deviations",
        ),
        ("views", str(mount.poses), ""),
        ("reprojection error", f"{mount.rms:.3f} px", "with the robot's own pose errors estimated"),
        (
            "held-out error",
            (
                f"{mount.held_out_pixels:.2f} px, {1e3 * mount.held_out_position:.2f} mm, "
                f"{np.degrees(mount.held_out_rotation):.3f} degrees"
            ),
            "cross-validated, with poses as the robot tells them",
        ),
    ]


def _coverage(lens: IntrinsicsResult) -> Figure:
    figure = Figure(figsize=(5.5, 3.6), dpi=110)
    axes = figure.subplots()
    heat_map = axes.imshow(
        lens.coverage.counts, cmap="Blues", vmin=0, extent=(0, lens.camera.width, lens.camera.height, 0)
    )
    figure.colorbar(heat_map, ax=axes, label="views with corners there")
    axes.set(xlabel="px", ylabel="px")
    return figure


def _residuals(lens: IntrinsicsResult) -> Figure:
    figure = Figure(figsize=(12.5, 3.6), dpi=110)
    cloud, arrows, bars = figure.subplots(1, 3)
    for view in lens.views:
        if view.used or view.held_out:
            colour = "#d64545" if view.held_out else "#2680c2"
            cloud.plot(view.residual[:, 0], view.residual[:, 1], ".", markersize=2, color=colour)
    axis_limit = max(0.05, *(float(np.abs(view.residual).max()) for view in lens.views if view.used))
    cloud.set(
        xlim=(-axis_limit, axis_limit),
        ylim=(-axis_limit, axis_limit),
        xlabel="px across",
        ylabel="px down",
        aspect="equal",
    )
    shown_views = [view for view in lens.views if view.used or view.held_out]
    points, residual = (
        np.concatenate([getattr(view, attribute) for view in shown_views]) for attribute in ("points", "residual")
    )
    cells = np.array([12, 9])
    cell_of_point = np.clip((points * cells / [lens.camera.width, lens.camera.height]).astype(int), 0, cells - 1)
    cell_index = cell_of_point[:, 1] * cells[0] + cell_of_point[:, 0]
    # (cells, 2, 2) px: mean position and mean residual per cell, so that a pattern shows where single residuals are
    # noise.
    cell_means = np.array(
        [[points[cell_index == cell].mean(0), residual[cell_index == cell].mean(0)] for cell in np.unique(cell_index)]
    )
    quiver = arrows.quiver(*cell_means[:, 0].T, *cell_means[:, 1].T, color="#2680c2", angles="xy")
    arrows.quiverkey(quiver, 0.8, 1.05, 0.05, "0.05 px", labelpos="E")
    arrows.set(xlim=(0, lens.camera.width), ylim=(lens.camera.height, 0), xlabel="mean error by place")
    bars.bar(
        range(len(shown_views)),
        [view.rms for view in shown_views],
        color=["#d64545" if view.held_out else "#2680c2" for view in shown_views],
    )
    bars.set(xlabel="view (red: held out)", ylabel="error in px")
    return figure


def _poses(hand: HandEyeResult, poses: Sequence[Float]) -> Figure:
    from scipy.spatial.transform import Rotation

    figure = Figure(figsize=(9.0, 3.6), dpi=110)
    turn_axes, error_axes = figure.subplots(1, 2)
    used_poses = [poses[view] for view in hand.used]
    mean_rotation = Rotation.from_matrix([pose[:3, :3] for pose in used_poses]).mean()
    turned_deg = np.degrees(
        (mean_rotation.inv() * Rotation.from_matrix([pose[:3, :3] for pose in used_poses])).as_rotvec()
    )
    turn_axes.plot(turned_deg[:, 0], turned_deg[:, 1], "o", color="#2680c2")
    turn_axes.set(xlabel="turned about x, degrees", ylabel="turned about y, degrees", aspect="equal")
    error_axes.bar(range(len(used_poses)), 1e3 * np.linalg.norm(hand.errors[:, 3:], axis=1), color="#2680c2")
    error_axes.set(xlabel="view", ylabel="estimated error of the robot's pose, mm")
    return figure


def _uri(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    figure.tight_layout()
    png_buffer = io.BytesIO()
    figure.savefig(png_buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(png_buffer.getvalue()).decode()


def as_dict(lens: IntrinsicsResult | None, hand: HandEyeResult | None) -> dict[str, Any]:
    """For JSON: what a script wants to know."""
    fields: dict[str, Any] = {}
    if lens is not None:
        fields |= {
            "model": lens.camera.to_dict(),
            "rms": lens.rms,
            "held_out_rms": lens.held_out_rms,
            "rejected": lens.rejected,
            "warnings": list(lens.warnings),
        }
    if hand is not None:
        fields |= {
            "mounting": hand.mounting,
            "camera": hand.camera.tolist(),
            "deviations": hand.deviations.tolist(),
            "noise": vars(hand.noise),
            "held_out": {
                "px": hand.held_out_pixels,
                "m": hand.held_out_position,
                "rad": hand.held_out_rotation,
            },
            "rejected_poses": hand.rejected,
        }
    return fields
