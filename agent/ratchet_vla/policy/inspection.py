"""What a checkpoint expects, what a robot gives, and every way in which the two do not fit, before anything moves.

Knows the checkpoint forms that this project reads, their files' headers, and contracts. Reads no weights and builds no
model in memory, so a checkpoint of any size takes seconds. Every finding has a stable code and says what to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ratchet_vla.contract import PolicySpec, RobotContract, compatibility
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import lerobot
from ratchet_vla.policy.checkpoints import openvla as published
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.checkpoints.adopted import RECORD, Kind, read_record
from ratchet_vla.policy.checkpoints.adopted import Stated as Stated
from ratchet_vla.policy.checkpoints.adopted import kind_of as kind_of
from ratchet_vla.policy.checkpoints.flow_weights import unused
from ratchet_vla.policy.checkpoints.hub import locate
from ratchet_vla.policy.checkpoints.weights import Header, component, read_headers
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.network import PrismaticConfig, PrismaticNetwork
from ratchet_vla.policy.discrete.text import load_tokenizer
from ratchet_vla.policy.flow.network import FlowConfig, FlowNetwork
from ratchet_vla.policy.flow.statistics import FlowStatistics
from ratchet_vla.policy.layers.vision import FusedDinoSiglip

__all__ = ["Finding", "Report", "inspect"]

WIDE, NARROW = 3.0, 0.02  # statistics' range over the robot's: beyond these another unit is likelier than another habit


@dataclass(frozen=True)
class Finding:
    """One misfit. fatal False is worth knowing only."""

    code: str
    message: str
    fix: str
    fatal: bool = True


@dataclass
class Report:
    """expects, gives: fact -> what the checkpoint says, what the contract says, in words."""

    kind: Kind
    folder: str
    contract: str
    expects: dict[str, str] = field(default_factory=dict)
    gives: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not any(f.fatal for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fits": self.fits}


# What to do about the contract's own codes.
_FIXES = {
    "compat.camera_missing": "add the camera to the contract, or name another with --cameras",
    "compat.state_missing": "add the field to the contract, or name others with --state",
    "compat.state_size": "name the fields that the checkpoint was trained with, in its order",
    "compat.control_mode": "use a checkpoint that commands as this robot does",
    "compat.rotation": "use a checkpoint with this rotation representation",
    "compat.frame": "use a checkpoint for this frame, or a controller that takes the checkpoint's",
    "compat.action_dims": "order and names must be the robot's: use its own checkpoint or contract",
    "compat.action_unit": "state the contract's units as the training data had them (command_scale)",
    "compat.gripper": "the contract must name the gripper's dimension as the checkpoint has it",
    "compat.gripper_polarity": "say which number is open and which closed with --gripper",
    "compat.control_hz": "run the robot at the checkpoint's rate",
}


def inspect(reference: str | Path, contract: RobotContract, stated: Stated | None = None) -> Report:
    """Look at a checkpoint for a robot.

    Raises:
        RatchetError: policy.no_checkpoint, policy.not_downloaded, policy.bad_checkpoint for a malformed record of
        adoption. Everything else becomes a finding.
    """
    stated = stated or Stated()
    trained_on = contract
    folder = locate(reference)
    if (folder / RECORD).is_file():  # what was stated then counts, and the robot of its data is another matter
        record = read_record(folder)
        stated = record.stated
        trained_on = record.contract
        folder = locate(record.checkpoint)
    kind = kind_of(folder)
    report = Report(kind, str(folder), contract.name)
    _contract(report, contract)
    readers: dict[str, Callable[[Path, RobotContract, Stated, Report], _Read]] = {
        "ratchet": _ratchet,
        "openvla": _openvla,
        "lerobot": _lerobot,
    }
    if kind in readers:
        try:
            found = readers[kind](folder, trained_on, stated, report)
            _describe(report, found)
            _tensors(report, found)
            _fit(report, found, contract)
        except RatchetError as error:
            report.findings.append(Finding(error.code, error.what, error.fix))
    elif kind == "adapter":
        fix = "inspect the base that it was trained on; load this with `ratchet adapters`"
        report.findings.append(Finding("policy.is_adapter", "this folder holds a PEFT adapter, not a base model", fix))
    else:
        what = "no configuration of a form that is known (Ratchet, OpenVLA, LeRobot)"
        report.findings.append(Finding("policy.bad_checkpoint", what, "name a folder with a config.json"))
    return report


@dataclass
class _Read:
    config: PrismaticConfig | FlowConfig
    spec: PolicySpec
    statistics: Statistics | FlowStatistics
    headers: dict[str, Header]


def _ratchet(folder: Path, contract: RobotContract, stated: Stated, report: Report) -> _Read:
    config, spec, statistics = checkpoint.read(folder)
    load_tokenizer(folder / "tokenizer.json")
    return _Read(config, spec, statistics, read_headers(folder))


def _openvla(folder: Path, contract: RobotContract, stated: Stated, report: Report) -> _Read:
    attention = stated.attention
    if not attention:
        if stated.decoding == "parallel":
            what = (
                "the file does not say which attention mask it was trained with, and the wrong one gives wrong actions"
            )
            fix = "state --attention bidirectional or causal; `masks.check` tells from a few frames which one fits"
            report.findings.append(Finding("policy.attention_unstated", what, fix))
        attention = "causal"
    _unstated_cameras(report, stated, "one or more")
    found = published.read(
        folder,
        attention=attention,
        contract=contract,
        cameras=stated.cameras or (contract.cameras[0].name,),
        state=stated.state,
        statistics_key=stated.statistics_key,
        chunk=stated.chunk,
        decoding=stated.decoding,
        images=stated.images,
    )
    load_tokenizer(folder / "tokenizer.json")
    headers = read_headers(folder)
    for name, place in (("action_head", "action_head."), ("proprio_projector", "state_projector.")):
        for key, value in (component(folder, name) or {}).items():
            headers[place + key.removeprefix("model.")] = Header(tuple(value.shape), "F32")
    if found.config.head == "l1":
        what = "a regression (L1) head: it predicts, but gives no probabilities to learn from"
        report.findings.append(
            Finding("policy.no_probabilities", what, "for learning take a discrete checkpoint", False)
        )
    return _Read(found.config, found.spec, found.statistics, headers)


def _lerobot(folder: Path, contract: RobotContract, stated: Stated, report: Report) -> _Read:
    features = [
        name
        for name, f in json.loads((folder / "config.json").read_text())["input_features"].items()
        if f.get("type") == "VISUAL" and "empty_camera" not in name
    ]
    _unstated_cameras(report, stated, ", ".join(features))
    cameras = stated.cameras or tuple(c.name for c in contract.cameras[: len(features)])
    found = lerobot.read(
        folder,
        contract=contract,
        cameras=cameras,
        state=stated.state or tuple(s.name for s in contract.state),
        tokenizer=stated.tokenizer,
        vlm=stated.vlm,
        gripper=stated.gripper,
    )
    load_tokenizer(found.tokenizer)
    return _Read(found.config, found.spec, found.statistics, found.headers)


def _unstated_cameras(report: Report, stated: Stated, images: str) -> None:
    if not stated.cameras:
        what = f"nobody said which of the contract's cameras are the checkpoint's images ({images})"
        report.findings.append(Finding("inspect.cameras_unstated", what, "name them in order with --cameras", False))


def _contract(report: Report, contract: RobotContract) -> None:
    gripper = contract.action.gripper
    action = contract.action
    report.gives = {
        "cameras": ", ".join(f"{c.name} {c.width}x{c.height} turned {c.rotate}°" for c in contract.cameras),
        "orientation": "upright, RGB: the contract's rotation and mirror are applied before the policy sees an image",
        "state": ", ".join(f"{s.name}[{s.size}] {s.unit}" for s in contract.state) or "none",
        "actions": ", ".join(f"{d.name} {d.unit} {d.low:g}…{d.high:g}" for d in action.dims),
        "control": _control(action.control_mode, action.rotation, action.frame, contract.control_hz),
        "gripper": f"{gripper.dim}: open {gripper.open:g}, closed {gripper.closed:g}" if gripper else "none",
    }


def _describe(report: Report, found: _Read) -> None:
    spec = found.spec
    config = found.config
    how = config.preparation()
    steps = [how.resize, *(["JPEG first"] if how.jpeg else []), *([f"crop {how.crop:g}"] if how.crop < 1 else [])]
    ranges = zip(spec.action_names, spec.action_units, *_range(found.statistics, spec), strict=True)
    count = sum(torch.Size(h.shape).numel() for h in found.headers.values())
    report.expects = {
        "model": _model(config),
        "weights": f"{count / 1e6:.1f} M parameters, {', '.join(sorted({h.dtype for h in found.headers.values()}))}",
        "cameras": f"{', '.join(spec.cameras)} at {spec.image_size}x{spec.image_size} ({', '.join(steps)})",
        "orientation": "upright, RGB",
        "state": f"{', '.join(spec.state)} ({spec.state_size} values)" if spec.state else "none",
        "actions": ", ".join(f"{n} {u} {lo:.3g}…{hi:.3g}" for n, u, lo, hi in ranges),
        "statistics": spec.statistics_key,
        "control": _control(spec.control_mode, spec.rotation, spec.frame, spec.control_hz),
        "gripper": f"{spec.gripper_dim}: open {spec.gripper_open}, closed {spec.gripper_closed}",
        "horizon": f"{spec.chunk} actions, {spec.chunk / spec.control_hz:.2f} s",
    }


def _control(mode: str, rotation: str, frame: str, rate: float) -> str:
    return f"{mode}, rotation {rotation}, frame {frame}, {rate:g} Hz"


def _model(config: PrismaticConfig | FlowConfig) -> str:
    if isinstance(config, FlowConfig):
        return f"flow, {config.steps} steps, expert {config.expert.width} beside {config.language.width}"
    return f"{config.head}, {config.decoding}, {config.attention} attention, {config.layers} x {config.hidden}"


def _range(statistics: Statistics | FlowStatistics, spec: PolicySpec) -> tuple[list[float], list[float]]:
    """Where nearly all actions of the training data lie; a gripper that is not scaled has its own two numbers."""
    if isinstance(statistics, Statistics):
        ends = sorted((spec.gripper_open or 0.0, spec.gripper_closed or 0.0))
        low = [q if m else ends[0] for q, m in zip(statistics.q01, statistics.mask, strict=True)]
        high = [q if m else ends[1] for q, m in zip(statistics.q99, statistics.mask, strict=True)]
        return low, high
    pairs = list(zip(statistics.action_offset, statistics.action_scale, strict=True))
    return [o - 2 * s for o, s in pairs], [o + 2 * s for o, s in pairs]


def _tensors(report: Report, found: _Read) -> None:
    """Names and shapes of the files' tensors against those of a network that has no memory."""
    config = found.config
    spec = found.spec
    given = found.headers
    with torch.device("meta"):
        if isinstance(config, FlowConfig):
            network: torch.nn.Module = FlowNetwork(config)
        else:
            dims = len(spec.action_names)
            network = PrismaticNetwork(config, spec.chunk * dims, spec.state_size if spec.state else 0, dims)
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}

    def without_effect(name: str) -> bool:
        if isinstance(config, FlowConfig):
            return unused(name, config)
        tower = network.vision_backbone
        return isinstance(tower, FusedDinoSiglip) and tower.unused(f".{name}")

    missing = sorted(set(wanted) - set(given))
    extra = sorted(n for n in set(given) - set(wanted) if not without_effect(n))
    shapes = sorted(n for n in set(given) & set(wanted) if given[n].shape != wanted[n])
    words = [n for n in shapes if n.endswith("embed_tokens.weight") and given[n].shape[1:] == wanted[n][1:]]
    if words:
        what = f"the weights have {given[words[0]].shape[0]} tokens, the configuration {wanted[words[0]][0]}"
        report.findings.append(Finding("policy.wrong_vocabulary", what, "take the configuration of these weights"))
    for name, keys in (("missing", missing), ("extra", extra), ("of another shape", sorted(set(shapes) - set(words)))):
        if keys:
            what = f"{len(keys)} tensors {name}: {', '.join(keys[:3])}"
            fix = "check that configuration and weights are of one checkpoint"
            report.findings.append(Finding("policy.bad_checkpoint", what, fix))


def _fit(report: Report, found: _Read, contract: RobotContract) -> None:
    spec = found.spec
    for m in compatibility(spec, contract):
        report.findings.append(Finding(m.code, m.message, _FIXES.get(m.code, "change the contract"), m.fatal))
    cameras = [c for c in contract.cameras if c.name in spec.cameras]
    exact = not found.config.preparation().any_size()
    for camera in cameras:
        size = (camera.width, camera.height)
        if exact and size != (spec.image_size, spec.image_size):
            what = (
                f"'{camera.name}' gives {size[0]}x{size[1]}, this model takes {spec.image_size}x{spec.image_size} only"
            )
            report.findings.append(Finding("compat.image_size", what, "set the camera's size in the contract"))
        elif min(size) * 2 < spec.image_size:
            what = f"'{camera.name}' gives {size[0]}x{size[1]}, which is blown up to {spec.image_size}"
            report.findings.append(Finding("compat.image_blown_up", what, "let the camera give larger images", False))
    if spec.action_names != tuple(d.name for d in contract.action.dims):
        return
    _ranges(report, found.statistics, spec, contract)
    gripper = contract.action.gripper
    if gripper and (spec.gripper_open, spec.gripper_closed) != (gripper.open, gripper.closed):
        what = f"gripper numbers differ and are translated: open {spec.gripper_open} becomes {gripper.open}"
        report.findings.append(Finding("compat.gripper_translated", what, "nothing; check it once by eye", False))


def _ranges(report: Report, statistics: Statistics | FlowStatistics, spec: PolicySpec, contract: RobotContract) -> None:
    names: Sequence[str] = spec.action_names
    for name, low, high, dim in zip(names, *_range(statistics, spec), contract.action.dims, strict=True):
        if name == spec.gripper_dim:
            continue
        ratio = (high - low) / (dim.high - dim.low)
        apart = high < dim.low or low > dim.high
        if apart or ratio > WIDE or ratio < NARROW:
            what = f"'{name}' was {low:.3g}…{high:.3g} {dim.unit} in training, the robot takes {dim.low:g}…{dim.high:g}"
            fix = "statistics of another robot or another unit: use this robot's checkpoint, or correct command_scale"
            report.findings.append(Finding("compat.statistics_range", what, fix, apart or ratio > WIDE))
