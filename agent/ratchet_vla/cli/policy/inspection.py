"""`ratchet inspect` and `ratchet adopt`: what a checkpoint expects, what a robot gives, and taking it into use."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.episodes.library.store import EpisodeStore
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.discrete import masks
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.images import OPENVLA, PLAIN_BICUBIC
from ratchet_vla.policy.inspection import Report, Stated, inspect
from ratchet_vla.policy.protocol import PolicyInput

FRAMES = 16  # observations that an attention mask is judged by


@dataclass
class _Question:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder, or a Hugging Face id that is in the cache."""
    robot: Path
    """The robot's contract."""
    cameras: tuple[str, ...] = ()
    """The contract's cameras in the order of the checkpoint's images."""
    state: tuple[str, ...] = ()
    """The contract's state fields in the checkpoint's order."""
    attention: Literal["", "bidirectional", "causal"] = ""
    """OpenVLA-OFT: the mask it was trained with, which its files do not say."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    """"autoregressive" for OpenVLA, "parallel" for OpenVLA-OFT."""
    images: Literal["openvla", "bicubic"] = "openvla"
    """How the training images were made: OpenVLA's evaluation (JPEG, Lanczos, crop), or bicubic alone."""
    statistics: str = ""
    """Which of the checkpoint's statistics."""
    chunk: int = 0
    """Actions per chunk, where the files do not say."""
    tokenizer: str = ""
    """Folder or file of the tokenizer, where the checkpoint has none."""
    vlm: str = ""
    """SmolVLA: folder with its SmolVLM's configuration."""
    gripper: tuple[float, float] | None = None
    """The data's numbers for open and closed, where they are not the contract's."""
    json: bool = False
    """Print the report as JSON."""

    def stated(self) -> Stated:
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
    """Folder that will stand for it; must not hold a policy."""
    dtype: Literal["own", "float32", "bfloat16"] = "own"
    """Of the parameters in memory; "own" takes the checkpoint's."""
    frames: Path | None = None
    """Store of episodes of the checkpoint's task, on which its attention mask is checked; loads the weights."""

    def run(self) -> int:
        contract, console = RobotContract.load(self.robot), Console(width=100, stderr=self.json)
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
        data = report.as_dict()
        if self.frames is not None:
            policy = adopted.open_published(report.folder, report.kind, contract, stated)
            if isinstance(policy, PrismaticPolicy) and policy.config.decoding == "parallel":
                found = masks.require(policy, observations(self.frames, policy.spec))
                data["attention"] = {**dataclasses.asdict(found), "fits": found.fits}
                conclusion = "fits" if found.fits else "cannot be told from these frames"
                console.print(f"{found.attention} attention {conclusion}: {found.stated:.2f} against {found.other:.2f}")
        adopted.adopt(self.checkpoint, contract, stated, self.out)
        if self.json:
            print(json.dumps({**data, "out": str(self.out)}))
        else:
            console.print(f"adopted: --policy {self.out}", soft_wrap=True)
        return 0


def observations(root: Path, spec: PolicySpec) -> PolicyInput:
    """Up to `FRAMES` recorded observations of a store's episodes, in turn from each.

    Raises:
        RatchetError: policy.no_frames where no episode has the policy's cameras and state.
    """
    store = EpisodeStore(root)
    store.require_some()
    images, states = [], []
    words: list[str] = []
    for name in sorted(store.cards()):
        episode = store.read(name)
        for step in episode.steps[:: max(1, len(episode.steps) // 4)]:
            seen = step.observation
            if set(spec.cameras) <= set(seen.images) and set(spec.state) <= set(seen.state) and len(words) < FRAMES:
                images.append(np.stack([seen.images[c] for c in spec.cameras]))
                states.append(np.concatenate([seen.state[s] for s in spec.state]) if spec.state else np.zeros(0))
                words.append(seen.instruction or episode.instruction)
    if not words:
        raise RatchetError(
            "policy.no_frames",
            f"no recorded decision has {', '.join((*spec.cameras, *spec.state))}",
            where=str(root),
            fix="record or import episodes of the checkpoint's own task",
        )
    state = torch.from_numpy(np.stack(states).astype(np.float32)) if spec.state else None
    return PolicyInput(np.stack(images), state, words)


def show(report: Report, console: Console) -> None:
    table = Table(title=f"{report.folder} ({report.kind}) for {report.contract}", box=None)
    for column in ("", "checkpoint expects", "robot gives"):
        table.add_column(column, overflow="fold")
    for fact in dict.fromkeys([*report.expects, *report.gives]):
        table.add_row(fact, report.expects.get(fact, ""), report.gives.get(fact, ""))
    console.print(table)
    for finding in report.findings:
        colour = "red" if finding.fatal else "yellow"
        console.print(f"[{colour}]{finding.code}[/]: {finding.message}; {finding.fix}", highlight=False)
    console.print("[green]fits[/]" if report.fits else "[red]does not fit[/]")
