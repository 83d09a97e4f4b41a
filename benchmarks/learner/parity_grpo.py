"""How closely our GRPO update follows the published code on the same numbers.

Reads a folder with `grpo.json` and `grpo.safetensors` (rewards, dones, log-probabilities, and what the published code
made of them), computes the same quantities, and prints the largest relative error of each.

    python -m benchmarks.learner.parity_grpo [FOLDER] [--quick]

The check takes about a second, so `--quick` changes nothing. Exit 1 where a quantity misses the goal.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.results import machine
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.update import grpo
from ratchet_vla.learner.update.minibatch import flatten

GOAL = 1e-5
ROOT = Path(__file__).resolve().parents[2]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the published values; 0 for two equal tensors."""
    ours, theirs = ours.double(), theirs.double()
    scale = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) / (scale if scale > 0 else 1.0)


def until_success(dones: Tensor) -> Tensor:
    """(C + 1, E, K) published done flags, one chunk ahead, to (E, C, K) bool: steps no later than the first success."""
    episodes = dones.shape[1]
    flags = dones.permute(1, 0, 2).reshape(episodes, -1)
    steps_in_chunk = dones.shape[2]
    # The flag in front of a step says whether the episode had ended before it; the last flag says nothing of any step.
    ended_before = flags[:, steps_in_chunk - 1 : -1].cummax(dim=1).values
    return (~ended_before).reshape(episodes, -1, steps_in_chunk)


def compare(folder: Path) -> dict[str, float]:
    """Relative error per quantity, float32 throughout.

    Raises:
        RatchetError: parity.missing_file.
    """
    for name in ("grpo.json", "grpo.safetensors"):
        if not (folder / name).is_file():
            raise RatchetError("parity.missing_file", f"no {name}", where=str(folder), fix="name a golden grpo folder")
    facts = json.loads((folder / "grpo.json").read_text())
    golden = load_file(folder / "grpo.safetensors")

    rewards = golden["rewards"].permute(1, 0, 2)  # (C, E, K) -> (E, C, K)
    episodes, chunks, steps = rewards.shape
    dims = facts["action_dim"]

    def episode_major(flat: Tensor) -> Tensor:
        return flat.view(chunks, episodes, steps, dims).transpose(0, 1)

    valid = until_success(golden["dones"].bool())
    score = rewards.sum(dim=(1, 2))
    group = torch.arange(episodes) // facts["group_size"]
    low, high = facts["clip"]
    config = grpo.GrpoConfig(clip_low=low, clip_high=high, horizon=facts["max_episode_steps"])

    targets = grpo.targets(score, group, valid, config)
    batch = flatten(targets, episode_major(golden["old_log_prob"]), valid)
    new = episode_major(golden["new_log_prob"]).clone().requires_grad_()
    gathered = new[batch.index[:, 0], batch.index[:, 1]]
    loss, _ = grpo.loss(gathered, torch.zeros_like(gathered), batch, config)
    (gradient,) = torch.autograd.grad(loss, new)

    kept = valid & (targets.weight > 0)[:, None, None]
    # The published array is zero after the first success.
    advantage = targets.advantage[..., None] * valid
    return {
        "advantages": relative_error(advantage, golden["advantages"].permute(1, 0, 2)),
        "mask": relative_error(kept.float(), golden["loss_mask"].permute(1, 0, 2).float()),
        "valid_steps": relative_error(valid.sum(dim=(1, 2)), golden["valid_steps"][0, :, 0]),
        "loss": relative_error(loss.detach().view(1), golden["loss"]),
        "gradient": relative_error(gradient, episode_major(golden["grad_new_log_prob"])),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "tests/golden/grpo")
    parser.add_argument("--quick", action="store_true", help="accepted for uniformity; the full check is quick")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/parity_grpo.json")
    arguments = parser.parse_args(argv)
    try:
        errors = compare(arguments.folder)
    except RatchetError as error:
        print(error, file=sys.stderr)
        return 1

    table = Table(title="GRPO against the published code (float32)")
    table.add_column("quantity")
    table.add_column("relative error", justify="right")
    table.add_column("goal")
    for name, relative_error in errors.items():
        table.add_row(name, f"{relative_error:.2e}", f"< {GOAL:.0e}")
    Console(width=80).print(table)

    worst = max(errors.values())
    result = {
        "command": ["python", "-m", "benchmarks.learner.parity_grpo", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "repeats": 1,
        "spread": 0.0,
        "relative_error": errors,
        "worst": worst,
        "goal": GOAL,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"parity_grpo: worst relative error {worst:.2e} (goal < {GOAL:.0e})")
    return 0 if worst < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
