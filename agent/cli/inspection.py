"""`ratchet inspect`: what a checkpoint expects, what the robot gives, and every misfit with its fix."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from agent.contract import RobotContract
from agent.policy.images import OPENVLA, PLAIN_BICUBIC
from agent.policy.inspection import Report, Stated, inspect


@dataclass
class Inspect:
    """Check a checkpoint against a robot before any motion; reads no weights. Exit 1 where it does not fit.

    Commands to copy:

        ratchet inspect models/small-metaworld --robot robots/metaworld.yaml

        ratchet inspect Haozhan72/Openvla-oft-SFT-libero-spatial --robot robots/libero.yaml --cameras agentview
            --attention causal --chunk 8 --images bicubic --json
    """

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

    def run(self) -> int:
        contract = RobotContract.load(self.robot)
        stated = Stated(
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
        report = inspect(self.checkpoint, contract, stated)
        if self.json:
            print(json.dumps(report.as_dict()))
        else:
            show(report, Console(width=100))
        return 0 if report.fits else 1


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
