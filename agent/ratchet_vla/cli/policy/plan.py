"""`ratchet plan`: what training a base will need, before any of it is rented."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ratchet_vla.errors import RatchetError
from ratchet_vla.plan import requirements as plan
from ratchet_vla.policy.checkpoints import adopted


@dataclass
class PlanCommand:
    """Memory, disk, network and time of one update, and which cards it fits; nothing is loaded.

    Commands to copy:

        ratchet plan --base openvla-oft-7b --options.rank 32 --options.batch 8

        ratchet plan --base openvla-oft-7b --options.checkpointing --options.batch 4 --json

        ratchet plan --base pi0 --options.images 2 --options.batch 16

        ratchet plan --base models/mine --options.batch 64
    """

    base: str = "openvla-oft-7b"
    """Which base: openvla-oft-7b, pi0, smolvla, small, small-flow, or the folder of one's own or of an adopted one,
    which says itself how many images it sees."""
    options: plan.Options = field(default_factory=plan.Options)
    json: bool = False
    """Print the plan as JSON."""

    def run(self) -> int:
        known, options, shape = plan.bases(), self.options, plan.Shape()
        if self.base in known:
            config = known[self.base]
        elif Path(self.base).is_dir():
            config, spec = adopted.read(self.base)
            options = dataclasses.replace(options, images=len(spec.cameras))
            shape = plan.Shape(spec.chunk, len(spec.action_names), spec.state_size if spec.state else 0)
        else:
            names = ", ".join(known)
            raise RatchetError("plan.unknown_base", f"no base '{self.base}'", fix=f"one of {names}, or a base's folder")
        made = plan.make(config, options, shape)
        if self.json:
            data = dataclasses.asdict(made)
            print(json.dumps({"base": self.base, "options": dataclasses.asdict(options), "gpu": made.gpu, **data}))
        else:
            show(self.base, config, options, made, Console(width=100), shape)
        return 0


def show(
    name: str,
    config: plan.AnyConfig,
    options: plan.Options,
    made: plan.Plan,
    console: Console,
    shape: plan.Shape = plan.Shape(),  # noqa: B008
) -> None:
    table = Table(title=f"{name}, rank {options.rank}, {options.batch} samples at once", box=None)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("how it is known")
    gb = {
        "GPU: frozen base": (made.weights, f"{made.parameters / 1e9:.2f} G weights, {options.base_bits} bits, counted"),
        "GPU: adapter": (made.adapter, f"{made.adapter_parameters / 1e6:.1f} M weights, float32, counted"),
        "GPU: gradient, Adam": (made.optimiser, "three times the adapter, counted"),
        "GPU: kept for backward": (made.activations, f"{made.tokens} tokens per sample, measured coefficients"),
        "GPU: context, workspace": (made.reserved, "allowance"),
        "GPU: together": (made.gpu, ""),
        "host": (made.host, f"{options.samples} frames as bytes, two adapters, 4 GiB for processes"),
        "disk": (made.disk, "base, one update's episodes, a checkpoint"),
        "network, adapter": (made.network_adapter, "float32, once per update"),
        "network, episodes": (made.network_episodes, "lossless, at the share measured in simulation, once per update"),
    }
    for label, (size, how) in gb.items():
        table.add_row(label, f"{size / 1e9:.2f} GB", how)
    speed = f"arithmetic: {plan.SHARE:.0%} of an H100's rated speed, not measured"
    table.add_row("time of one update", f"{made.seconds:.0f} s", speed)
    console.print(table)
    for card, size in plan.CARDS.items():
        if made.fits[card]:
            console.print(f"[green]{card}: fits[/], {(size - made.gpu) / 1e9:.1f} GB free", highlight=False)
            continue
        milder = plan.smallest(config, options, size, shape)
        if milder is None:
            console.print(f"[red]{card}: does not fit[/], with no option here", highlight=False)
            continue
        changed = ", ".join(
            f"{f.name} {getattr(milder, f.name)}"
            for f in dataclasses.fields(milder)
            if getattr(milder, f.name) != getattr(options, f.name)
        )
        need = plan.make(config, milder, shape).gpu / 1e9
        note = " (8-bit weights are arithmetic only: none can be loaded)" if milder.base_bits == 8 else ""
        console.print(f"[yellow]{card}: fits with {changed}[/]: {need:.1f} GB{note}", highlight=False)
