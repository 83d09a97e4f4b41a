"""How closely PrismaticPolicy follows the published OpenVLA-OFT action model on the same weights and inputs.

Each folder has `config.json`, `model.safetensors` (published tensor names) and what the published code computed from
them: `io.safetensors` with attention in both directions, `io_causal.safetensors` with causal attention. Compared in
float32: final hidden states, logits over temperature, greedy tokens and actions, log-probability and entropy of given
tokens. Error: norm of the difference over the norm of the published values.

    python -m benchmarks.science.parity_oft [FOLDER...] [--quick]

The check takes seconds, so `--quick` changes nothing. Exit 1 where a quantity misses the goal or a greedy token
differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.results import machine
from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.checkpoints import openvla as published
from ratchet_vla.policy.checkpoints.own import load_tensors
from ratchet_vla.policy.checkpoints.weights import read_weights
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.images import Preparation

GOAL = 1e-5
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
CAMERAS = ("agentview", "wrist")
Attention = Literal["bidirectional", "causal"]
FILES: dict[str, Attention] = {"io.safetensors": "bidirectional", "io_causal.safetensors": "causal"}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the published values; 0 for two equal tensors."""
    ours, theirs = ours.double(), theirs.double()
    scale = float(theirs.norm())
    return float((ours - theirs).norm()) / (scale if scale > 0 else 1.0)


def build(folder: Path, attention: Attention) -> tuple[PrismaticPolicy, published.Published, float]:
    """The folder's policy in float32, its translated configuration and its temperature.

    The folders hold token ids, not words: the tokenizer is a placeholder.
    """
    facts = json.loads((folder / "config.json").read_text())
    found = published.read(
        folder,
        attention=attention,
        contract=RobotContract.load(ROOT / "robots/libero.yaml"),
        cameras=CAMERAS[: facts["images"]],
        images=Preparation(),
    )
    policy = PrismaticPolicy(found.config, found.spec, found.statistics, train_tokenizer(["pick up the bowl"], 300))
    load_tensors(policy, read_weights(folder), str(folder))
    return policy, found, facts["temperature"]


@torch.no_grad()
def compare(folder: Path, file: str, attention: Attention, dtype: str = "float32") -> tuple[dict[str, float], int]:
    """Relative error per quantity, and how many greedy tokens differ, under the mask that is asked for.

    dtype: what our side computes in; the published side computed in float32.

    Raises:
        RatchetError: parity.missing_file; policy.bad_checkpoint.
    """
    for name in ("config.json", "model.safetensors", file):
        if not (folder / name).is_file():
            raise RatchetError("parity.missing_file", f"no {name}", where=str(folder), fix="name a golden OFT folder")
    policy, found, temperature = build(folder, attention)
    golden = load_file(folder / file)
    batch, slots = golden["greedy_tokens"].shape
    size, views = policy.spec.image_size, len(policy.spec.cameras)
    pixels = golden["pixel_values"].reshape(batch, views, 6, size, size)

    with policy.computing_in(dtype), policy.autocast():
        hidden = policy.hidden_states(pixels, golden["input_ids"], golden["attention_mask"].bool()).float()
        logits = policy.action_logits(hidden) / temperature
    log_prob = logits.log_softmax(-1)
    given = golden["given_tokens"] - found.first_action_id
    greedy = logits.argmax(-1)
    dims = len(policy.spec.action_names)
    actions = policy.actions_of(greedy.view(batch, -1, dims)).reshape(batch, slots)
    # Published actions are the driver's commands; ours are physical.
    scale = torch.tensor([d.command_scale for d in RobotContract.load(ROOT / "robots/libero.yaml").action.dims])
    errors = {
        "last hidden states": relative_error(hidden, golden["last_hidden_states"]),
        "logits / temperature": relative_error(logits, golden["action_logits_over_temperature"]),
        "log-probability of given tokens": relative_error(
            log_prob.gather(-1, given[..., None])[..., 0], golden["given_log_prob"]
        ),
        "entropy": relative_error(-(log_prob.exp() * log_prob).sum(-1), golden["entropy"]),
        "greedy actions": relative_error(actions, golden["greedy_actions"] * scale.repeat(slots // dims)),
    }
    return errors, int((greedy + found.first_action_id != golden["greedy_tokens"]).sum())


def cases(folders: list[Path]) -> list[tuple[Path, str, Attention]]:
    """What there is to check.

    Raises:
        RatchetError: parity.missing_file for a folder without published results.
    """
    found = []
    for folder in folders:
        here = [(folder, file, attention) for file, attention in FILES.items() if (folder / file).is_file()]
        if not here:
            raise RatchetError(
                "parity.missing_file", "no io.safetensors", where=str(folder), fix="name a golden OFT folder"
            )
        found += here
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="default: those under tests/golden")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; the full check is quick")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/parity_oft.json")
    arguments = parser.parse_args(argv)
    folders = arguments.folders or sorted(p.parent for p in GOLDEN.glob("*/io.safetensors"))

    table = Table(title="PrismaticPolicy against the published code (float32)")
    for column in ("folder", "attention", "quantity", "relative error", "other greedy tokens"):
        table.add_column(column, justify="right" if column.startswith(("relative", "other")) else "left")
    rows: list[dict[str, Any]] = []
    try:
        for folder, file, attention in cases(folders):
            errors, different = compare(folder, file, attention)
            rows.append(
                {"folder": folder.name, "attention": attention, "errors": errors, "different_tokens": different}
            )
            for i, (name, error) in enumerate(errors.items()):
                first = (folder.name, attention) if i == 0 else ("", "")
                table.add_row(*first, name, f"{error:.1e}", str(different) if i == 0 else "")
    except RatchetError as error:
        print(error, file=sys.stderr)
        return 1
    Console(width=110).print(table)

    worst = max(max(row["errors"].values()) for row in rows)
    different = sum(row["different_tokens"] for row in rows)
    result = {
        "command": ["python", "-m", "benchmarks.science.parity_oft", *[f.name for f in folders]],
        "machine": machine(),
        "repeats": 1,
        "spread": 0.0,
        "cases": rows,
        "worst": worst,
        "different_tokens": different,
        "goal": GOAL,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"greedy tokens that differ: {different}")
    print(f"parity_oft: {worst:.2e} (goal < {GOAL:.0e})")
    good = all(error < GOAL for row in rows for error in row["errors"].values())  # a NaN is not good
    return 0 if good and different == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
