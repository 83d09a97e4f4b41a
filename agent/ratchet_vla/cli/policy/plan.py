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
    """Estimate memory, disk, network and time of one update, and which cards it fits; no weights are loaded.

    Commands to copy:

        ratchet plan --base openvla-oft-7b --options.rank 32 --options.batch 8

        ratchet plan --base openvla-oft-7b --options.checkpointing --options.batch 4 --json

        ratchet plan --base pi0 --options.images 2 --options.batch 16

        ratchet plan --base models/mine --options.batch 64
    """

    base: str = "openvla-oft-7b"
    """Base policy: openvla-oft-7b, pi0, smolvla, small, small-flow, or the folder of a base. A folder says itself how
    many images the base sees."""
    options: plan.Options = field(default_factory=plan.Options)
    json: bool = False
    """Print the plan as JSON."""

    def run(self) -> int:
        bases = plan.bases()
        options = self.options
        shape = plan.Shape()
        if self.base in bases:
            config = bases[self.base]
        elif Path(self.base).is_dir():
            config, spec = adopted.read(self.base)
            options = dataclasses.replace(options, images=len(spec.cameras))
            shape = plan.Shape(spec.chunk, len(spec.action_names), spec.state_size if spec.state else 0)
        else:
            names = ", ".join(bases)
            raise RatchetError("plan.unknown_base", f"no base '{self.base}'", fix=f"one of {names}, or a base's folder")
        needs = plan.make(config, options, shape)
        if self.json:
            head = {"base": self.base, "options": dataclasses.asdict(options), "gpu": needs.gpu}
            print(json.dumps({**head, **dataclasses.asdict(needs)}))
        else:
            console = Console(width=100)
            console.print(_needs_table(self.base, options, needs))
            for card, size_bytes in plan.CARDS.items():
                console.print(_card_line(card, size_bytes, config, options, shape, needs), highlight=False)
        return 0


def _needs_table(base: str, options: plan.Options, needs: plan.Plan) -> Table:
    title = f"{base}, rank {options.rank}, {options.batch} samples at once"
    table = Table(title=title, box=None)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("how it is known")
    base_weights = f"{needs.parameters / 1e9:.2f} G weights, {options.base_bits} bits, counted"
    # label: (bytes, where the number comes from)
    rows = {
        "GPU: frozen base": (needs.weights, base_weights),
        "GPU: adapter": (needs.adapter, f"{needs.adapter_parameters / 1e6:.1f} M weights, float32, counted"),
        "GPU: gradient, Adam": (needs.optimiser, "three times the adapter, counted"),
        "GPU: kept for backward": (needs.activations, f"{needs.tokens} tokens per sample, measured coefficients"),
        "GPU: context, workspace": (needs.reserved, "allowance"),
        "GPU: together": (needs.gpu, ""),
        "host": (needs.host, f"{options.samples} frames as bytes, two adapters, 4 GiB for processes"),
        "disk": (needs.disk, "base, one update's episodes, a checkpoint"),
        "network, adapter": (needs.network_adapter, "float32, once per update"),
        "network, episodes": (needs.network_episodes, "lossless, at the share measured in simulation, once per update"),
    }
    for label, (size_bytes, source) in rows.items():
        table.add_row(label, f"{size_bytes / 1e9:.2f} GB", source)
    speed = f"arithmetic: {plan.SHARE:.0%} of an H100's rated speed, not measured"
    table.add_row("time of one update", f"{needs.seconds:.0f} s", speed)
    return table


def _card_line(
    card: str,
    size_bytes: float,
    config: plan.AnyConfig,
    options: plan.Options,
    shape: plan.Shape,
    needs: plan.Plan,
) -> str:
    """Whether an update fits a card, and with which milder options it would."""
    if needs.fits[card]:
        return f"[green]{card}: fits[/], {(size_bytes - needs.gpu) / 1e9:.1f} GB free"
    milder = plan.smallest(config, options, size_bytes, shape)
    if milder is None:
        return f"[red]{card}: does not fit[/], with no option here"
    names = [option.name for option in dataclasses.fields(milder)]
    changed = [f"{name} {getattr(milder, name)}" for name in names if getattr(milder, name) != getattr(options, name)]
    gigabytes = plan.make(config, milder, shape).gpu / 1e9
    note = " (8-bit weights are arithmetic only: none can be loaded)" if milder.base_bits == 8 else ""
    return f"[yellow]{card}: fits with {', '.join(changed)}[/]: {gigabytes:.1f} GB{note}"
