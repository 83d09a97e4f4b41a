"""`ratchet inspect` and `ratchet adopt`: what a checkpoint expects, what a robot gives, and taking it into use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console

from ratchet_vla.cli import display
from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.discrete import masks
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.images import OPENVLA, PLAIN_BICUBIC
from ratchet_vla.policy.inspection import Report, Stated, inspect
from ratchet_vla.policy.protocol import PolicyInput
from ratchet_vla.records import Observation

FRAMES = 16  # observations on which an attention mask is checked
PER_EPISODE = 4  # of them from one episode, about: neighbouring steps look alike


@dataclass
class _Question:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder of the checkpoint, or a Hugging Face id that is in the local cache."""
    robot: Path
    """The robot's contract (YAML)."""
    cameras: tuple[str, ...] = ()
    """Names of the contract's cameras, in the order of the checkpoint's images."""
    state: tuple[str, ...] = ()
    """Names of the contract's state fields, in the checkpoint's order."""
    attention: Literal["", "bidirectional", "causal"] = ""
    """OpenVLA-OFT: the attention mask it was trained with, which its files do not say."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    """"autoregressive" for OpenVLA, "parallel" for OpenVLA-OFT."""
    images: Literal["openvla", "bicubic"] = "openvla"
    """How the training images were made: OpenVLA's evaluation (JPEG, Lanczos, crop), or bicubic alone."""
    statistics: str = ""
    """Key of the checkpoint's normalisation statistics; needed where it has several."""
    chunk: int = 0
    """Actions per chunk; 0 takes the number in the checkpoint's files."""
    tokenizer: str = ""
    """Folder or file of the tokenizer; needed where the checkpoint has none."""
    vlm: str = ""
    """SmolVLA: folder, or Hugging Face id, of the SmolVLM whose configuration it uses."""
    gripper: tuple[float, float] | None = None
    """The training data's numbers for open and for closed; the contract's if absent."""
    json: bool = False
    """Print the report as JSON."""

    def stated(self) -> Stated:
        """Collect what the user says about the checkpoint beyond its files."""
        return Stated(
            cameras=self.cameras,
            state=self.state,
            attention=self.attention,
            decoding=self.decoding,
            statistics_key=self.statistics,
            chunk=self.chunk,
            tokenizer=self.tokenizer,
            vlm=self.vlm,
            gripper=self.gripper,
            images=OPENVLA if self.images == "openvla" else PLAIN_BICUBIC,
        )


@dataclass
class Inspect(_Question):
    """Check a checkpoint against a robot before any motion; reads no weights. Exit 1 where it does not fit.

    Commands to copy:

        ratchet inspect models/small-metaworld --robot robots/metaworld.yaml

        ratchet inspect Haozhan72/Openvla-oft-SFT-libero-spatial --robot robots/libero.yaml --cameras agentview
            --attention causal --chunk 8 --images bicubic --json
    """

    def run(self) -> int:
        report = inspect(self.checkpoint, RobotContract.load(self.robot), self.stated())
        if self.json:
            print(json.dumps(report.as_dict()))
        else:
            show(report, Console(width=100))
        return 0 if report.fits else 1


@dataclass
class Adopt(_Question):
    """Take a published checkpoint (OpenVLA, OpenVLA-OFT, SmolVLA, pi0, pi0.5) into use under a folder's name.

    The folder then goes wherever a policy is named (--policy): eval, learn, run, up. The weights stay where they are.
    Checks as `inspect` does and refuses what does not fit; with --frames also runs the model on recorded observations
    of its task, and refuses an attention mask that it was not trained with.

    Commands to copy:

        ratchet adopt Haozhan72/Openvla-oft-SFT-libero-spatial --robot robots/libero.yaml --cameras agentview
            --attention causal --chunk 8 --images bicubic --out models/oft-spatial

        ratchet adopt lerobot/smolvla_libero --robot robots/libero.yaml --cameras agentview wrist --state eef_position
            eef_rotation gripper --vlm HuggingFaceTB/SmolVLM2-500M-Video-Instruct --tokenizer
            HuggingFaceTB/SmolVLM2-500M-Video-Instruct --out models/smolvla
    """

    out: Path = Path("models/adopted")
    """New folder, which then stands for the checkpoint; must not hold a policy yet."""
    dtype: Literal["own", "float32", "bfloat16"] = "own"
    """Dtype of the weights in memory; own takes the checkpoint's."""
    frames: Path | None = None
    """Episode store with episodes of the checkpoint's task, on which its attention mask is checked. Loads the weights;
    nothing is checked if absent."""

    def run(self) -> int:
        contract = RobotContract.load(self.robot)
        console = Console(width=100, stderr=self.json)
        stated = dataclasses.replace(self.stated(), dtype=self.dtype)
        report = inspect(self.checkpoint, contract, stated)
        if not self.json:
            show(report, console)
        if not report.fits:
            if self.json:
                print(json.dumps(report.as_dict()))
            return 1
        if not stated.cameras:
            raise RatchetError(
                "policy.cameras_unstated",
                "nobody said which of the contract's cameras are the checkpoint's images",
                fix="name them in order with --cameras",
            )
        document = report.as_dict()
        if self.frames is not None:
            document |= self._check_attention(self.frames, report, contract, stated, console)
        adopted.adopt(self.checkpoint, contract, stated, self.out)
        if self.json:
            print(json.dumps({**document, "out": str(self.out)}))
        else:
            console.print(f"adopted: --policy {self.out}", soft_wrap=True)
        return 0

    def _check_attention(
        self, frames: Path, report: Report, contract: RobotContract, stated: Stated, console: Console
    ) -> dict[str, Any]:
        """Try the attention mask on recorded observations; nothing for models that have no choice of one.

        Raises:
            RatchetError: policy.no_frames, and what `masks.require` raises where another mask does better.
        """
        policy = adopted.open_published(report.folder, report.kind, contract, stated)
        if not isinstance(policy, PrismaticPolicy) or policy.config.decoding != "parallel":
            return {}
        check = masks.require(policy, observations(frames, policy.spec))
        result = "fits" if check.fits else "cannot be told from these frames"
        console.print(f"{check.attention} attention {result}: {check.stated:.2f} against {check.other:.2f}")
        return {"attention": {**dataclasses.asdict(check), "fits": check.fits}}


def observations(root: Path, spec: PolicySpec) -> PolicyInput:
    """Read up to `FRAMES` recorded observations of a store's episodes, some of each.

    Raises:
        RatchetError: policy.no_frames where no episode has the policy's cameras and state.
    """
    store = EpisodeStore(root)
    store.require_some()
    images = []  # each (V, H, W, 3) uint8, V cameras
    states = []  # each (S,) float, the policy's state fields one after the other
    instructions: list[str] = []
    for observation, instruction in _recorded(store):
        if len(instructions) == FRAMES:
            break
        if not _has_inputs(observation, spec):
            continue
        images.append(np.stack([observation.images[camera] for camera in spec.cameras]))
        values = [observation.state[field] for field in spec.state]
        states.append(np.concatenate(values) if values else np.zeros(0))
        instructions.append(observation.instruction or instruction)
    if not instructions:
        raise RatchetError(
            "policy.no_frames",
            f"no recorded decision has {', '.join((*spec.cameras, *spec.state))}",
            where=str(root),
            fix="record or import episodes of the checkpoint's own task",
        )
    state = torch.from_numpy(np.stack(states).astype(np.float32)) if spec.state else None
    return PolicyInput(np.stack(images), state, instructions)


def _recorded(store: EpisodeStore) -> Iterator[tuple[Observation, str]]:
    """About `PER_EPISODE` observations of each episode, with the episode's instruction."""
    for identity in sorted(store.cards()):
        episode = store.read(identity)
        stride = max(1, len(episode.steps) // PER_EPISODE)
        for step in episode.steps[::stride]:
            yield step.observation, episode.instruction


def _has_inputs(observation: Observation, spec: PolicySpec) -> bool:
    return set(spec.cameras) <= set(observation.images) and set(spec.state) <= set(observation.state)


def show(report: Report, console: Console) -> None:
    """Print what the checkpoint expects beside what the robot gives, then what does not fit."""
    title = f"{report.folder} ({report.kind}) for {report.contract}"
    columns = ("", "checkpoint expects", "robot gives")
    table = display.make_table(columns, title=title, folds=True, framed=False)
    for name in dict.fromkeys([*report.expects, *report.gives]):
        table.add_row(name, report.expects.get(name, ""), report.gives.get(name, ""))
    console.print(table)
    for finding in report.findings:
        colour = "red" if finding.fatal else "yellow"
        console.print(f"[{colour}]{finding.code}[/]: {finding.message}; {finding.fix}", highlight=False)
    console.print("[green]fits[/]" if report.fits else "[red]does not fit[/]")
