"""What a policy-gradient step costs beside the straightforward way: samples per second and peak memory.

A step: log-probabilities of given tokens through a policy with LoRA (PEFT) on all linear layers, the GRPO loss,
backward. The straightforward way (benchmarks/runtime/plain.py) computes the whole vocabulary's logits at all positions
and masks other ids to -inf, as the published code does; same weights, same batch. Gradients must be equal. Memory is
the peak of a fresh process over what it held before the step. Then whole updates, from episodes to changed parameters,
of the built-in policy on episodes that it samples in Meta-World, in both dtypes. A dtype that the processor emulates
gets fewer samples and repeats.

    python -m benchmarks.learner.update [--quick]

Exit 1 where a goal is missed: with a vocabulary of 32,064 at least 2 times faster or half the memory; equal gradients
in float32 (relative error < 1e-5); an update in the dtype that the device chooses not slower than in the other, beyond
the spread of five repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness.dtypes import EMULATED, REPEATS, Verdict, in_turn, pair
from benchmarks.harness.results import machine
from benchmarks.runtime.inference import ROOT, WORDS, observations, random_policy
from benchmarks.runtime.plain import Plain
from ratchet_sim import registry
from ratchet_vla.adapters.lora.layers import Lora, attach, lora_config
from ratchet_vla.cli.common import make_vector, open_policy, policy_folder
from ratchet_vla.cli.recipes import DEMO
from ratchet_vla.contract import PolicySpec, RobotContract
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import training_specs
from ratchet_vla.learner.update import grpo
from ratchet_vla.learner.update.minibatch import Minibatch
from ratchet_vla.learner.update.step import Updater
from ratchet_vla.policy import computing
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.network import PrismaticConfig
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.presets import small, spec_for

GOAL, EQUAL = 2.0, 1e-5
RANK = 32
ROWS = {
    "vocabulary 32064, hidden 256, 4 layers, 8 x 7": {"kind": "large", "samples": 16, "dtype": "float32"},
    "small, float32": {"kind": "small", "samples": 64, "dtype": "float32"},
    "small, bfloat16": {"kind": "small", "samples": 64, "dtype": "bfloat16"},
}
JUDGED = next(iter(ROWS))


def large_policy() -> PrismaticPolicy:
    """A Llama-sized vocabulary on a trunk that a CPU can train: LIBERO's action space, 56 action positions."""
    contract = RobotContract.load(ROOT / "robots/libero.yaml")
    spec: PolicySpec = spec_for(contract, cameras=["agentview"], state=(), chunk=8, statistics_key="random")
    dims = contract.action.dims
    statistics = Statistics(
        "random",
        tuple(d.unit for d in dims),
        tuple(d.low for d in dims),
        tuple(d.high for d in dims),
        tuple(d.name != "gripper" for d in dims),
    )
    base = small(image_size=spec.image_size, hidden=256, layers=4, compute_dtype="float32")
    config = PrismaticConfig(**{**vars(base), "vocabulary": 32000, "padded_vocabulary": 32064})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PrismaticPolicy(config, spec, statistics, train_tokenizer(WORDS, 300))


class Step:
    """One policy, one batch, and the gradient of one update by either way."""

    def __init__(self, kind: str, samples: int, dtype: str) -> None:
        self.dtype = dtype
        self.policy = large_policy() if kind == "large" else random_policy(dtype)
        self.lora: Lora = attach(self.policy.module, lora_config(RANK, RANK))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.lora.trainable():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.plain = Plain(self.policy)
        self.batch = observations(self.policy, samples, mixed=True)
        spec = self.policy.spec
        shape = (samples, spec.chunk, len(spec.action_names))
        self.tokens = torch.randint(0, spec.bins, shape, generator=generator)
        # Random tokens under a random head: about uniform when they were sampled, so that ratios are near 1.
        old = torch.full(shape, -5.545) + torch.randn(shape, generator=generator) * 0.05
        self.minibatch = Minibatch(
            old_log_prob=old,
            advantage=torch.randn(samples, generator=generator),
            valid=torch.ones(shape[:2], dtype=torch.bool),
            weight=torch.ones(samples),
            slots=float(samples),
            index=torch.zeros(samples, 2, dtype=torch.int64),
        )

    def __call__(self, way: str) -> None:
        """Adds to the gradients of the adapter's parameters."""
        policy = self.policy if way == "ours" else self.plain
        with self.policy.computing_in(self.dtype):  # whatever the device would choose
            log_prob, entropy = policy.log_prob(self.batch, self.tokens, 1.6)
            loss, _ = grpo.loss(log_prob, entropy, self.minibatch, grpo.GrpoConfig())
            loss.backward()  # type: ignore[no-untyped-call]

    def gradient(self, way: str) -> Tensor:
        self.clear()
        self(way)
        found = torch.cat([p.grad.flatten() for p in self.lora.trainable() if p.grad is not None])
        self.clear()
        return found

    def clear(self) -> None:
        for parameter in self.lora.trainable():
            parameter.grad = None


def peak_bytes(kind: str, samples: int, dtype: str, way: str) -> None:
    """In a process of its own: print the growth of the peak by a step, in bytes."""
    torch.set_num_threads(1)
    step = Step(kind, samples, dtype)
    # Not getrusage: its peak survives exec, so that a child starts with its parent's.
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    step(way)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    """A figure of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peaks(row: dict[str, Any], way: str, repeats: int) -> list[int]:
    arguments = [row["kind"], str(row["samples"]), row["dtype"], way]
    found = []
    for _ in range(repeats):
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.learner.update", "--peak", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(int(run.stdout.split()[-1]))
    return found


def compare(row: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds per step (rounds alternate), relative error of the gradient, bytes of as many fresh processes."""
    step = Step(row["kind"], row["samples"], row["dtype"])
    ours, theirs = step.gradient("ours"), step.gradient("plain")
    error = float((ours - theirs).double().norm() / theirs.double().norm())
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(row["rounds"]):
        for way, found in seconds.items():
            began = time.perf_counter()
            step(way)
            found.append(time.perf_counter() - began)
            step.clear()
    memory = {way: peaks(row, way, repeats) for way in seconds} if repeats else {}
    return {
        **row,
        "gradient_error": error,
        "seconds": {w: {"p50": median(s), "min": min(s), "max": max(s)} for w, s in seconds.items()},
        "samples_per_second": {w: row["samples"] / median(s) for w, s in seconds.items()},
        "speed_up": median(p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True)),
        "peak_bytes": memory,
        "memory_ratio": median(memory["plain"]) / max(median(memory["ours"]), 1) if memory else 0.0,
    }


def sampled(groups: int, size: int) -> tuple[Any, Lora, RolloutBatch]:
    """The built-in policy with an empty adapter, and episodes of the demo's first task as its learner samples them."""
    suite, recipe = "metaworld", DEMO["metaworld"]
    contract = registry.contract_for(suite)
    policy, lora = open_policy(policy_folder(suite, None), contract, recipe.lora, "cpu")
    task = registry.task(suite, recipe.tasks[0])
    specs = training_specs(task, seed=0, stage=0, update=0, groups=groups, group_size=size)
    env = make_vector(policy, suite, contract, 1, size)
    try:
        _, batch = run_episodes(
            policy, env, specs, temperature=recipe.temperature, noise_correlation=recipe.noise_correlation
        )
    finally:
        env.close()
    assert batch is not None
    return policy, lora, batch


def first_episodes(batch: RolloutBatch, count: int) -> RolloutBatch:
    """A share of a batch."""
    rows = batch.episode < count
    by_decision = ("images", "state", "instruction", "tokens", "log_prob", "feature", "valid", "episode")
    kept: dict[str, Any] = {name: getattr(batch, name)[rows] for name in by_decision}
    kept |= {name: getattr(batch, name)[:count] for name in ("success", "steps", "group", "specs")}
    return dataclasses.replace(batch, **kept)


def updates(groups: int, size: int, budget: float) -> Verdict:
    """Whole updates in both dtypes, each from the same adapter and the same episodes."""
    choice, other = pair()
    policy, lora, whole = sampled(groups, size)
    part = first_episodes(whole, max(1, size // 2))

    def update(dtype: str, share: bool) -> int:
        lora.reset(0)
        updater = Updater(policy, lora.trainable(), DEMO["metaworld"].update, torch.Generator().manual_seed(0))
        batch = dataclasses.replace(part if share else whole, compute_dtype=dtype)
        return int(updater.update(batch)["samples"])

    works = {name: functools.partial(update, name) for name in (choice.name, other)}
    return Verdict(choice, other, in_turn(works, budget=budget))


def sized(row: dict[str, Any], quick: bool) -> dict[str, Any]:
    """A row with the samples and rounds that its dtype's speed allows."""
    cpu, choice = torch.device("cpu"), pair()[0]
    rate, best = (computing.speed(cpu, dtype, 0.05) for dtype in (computing.DTYPES[row["dtype"]], choice.dtype))
    emulated = best > EMULATED * rate
    samples = row["samples"] // (4 if quick else 1) // (8 if emulated else 1)
    return {**row, "samples": samples, "rounds": 2 if quick or emulated else REPEATS, "emulated": emulated}


def steps_table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="One policy-gradient step, one thread: ours beside the straightforward way")
    names = ("row", "samples", "samples/s", "straightforward", "x", "peak MB", "straight.", "x", "gradient error")
    for column in names:
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, found in rows.items():
        speed, peak = found["samples_per_second"], found["peak_bytes"]
        memory = [f"{median(peak[way]) / 1e6:.0f}" for way in ("ours", "plain")] if peak else ["-", "-"]
        table.add_row(
            name + (", emulated" if found["emulated"] else ""),
            str(found["samples"]),
            f"{speed['ours']:.1f}",
            f"{speed['plain']:.1f}",
            f"{found['speed_up']:.2f}",
            *memory,
            f"{found['memory_ratio']:.2f}" if peak else "-",
            f"{found['gradient_error']:.1e}",
        )
    return table


def updates_table(made: Verdict) -> Table:
    table = Table(title=f"Whole updates of small-metaworld, one thread\n{made.choice.reason}")
    for column in ("dtype", "repeats", "samples each", "ms per sample", "samples/s", "times as fast"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for name, side in made.sides.items():
        mine = name == made.choice.name
        table.add_row(
            f"{name}, this device's choice" if mine else name,
            str(len(side.seconds)),
            str(side.units),
            side.milliseconds,
            f"{1 / side.p50:.1f}",
            f"{made.ratio:.2f}" if mine else "",
        )
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and samples, memory of one row, a minute")
    parser.add_argument("--peak", nargs=4, metavar="WHAT", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/update.json")
    arguments = parser.parse_args(argv)
    if arguments.peak:
        kind, samples, dtype, way = arguments.peak
        peak_bytes(kind, int(samples), dtype, way)
        return 0
    torch.set_num_threads(1)
    quick = arguments.quick
    rows = {}
    for name, row in ROWS.items():
        row = sized(row, quick)
        memory = (1 if quick else 3) if name == JUDGED else 0 if quick or row["emulated"] else 1
        rows[name] = compare(row, memory)
    made = updates(*((2, 4, 10.0) if quick else (4, 8, 25.0)))
    console = Console(width=130)
    console.print(steps_table(rows))
    console.print(updates_table(made))

    judged = rows[JUDGED]
    result = {
        "command": ["python", "-m", "benchmarks.learner.update", *(sys.argv[1:] if argv is None else argv)],
        "machine": {**machine(), "peft": peft.__version__},
        "repeats": judged["rounds"],
        "spread": judged["seconds"],
        "rank": RANK,
        "rows": rows,
        "dtypes": made.as_dict(),
        "goal": {"faster_or_smaller": GOAL, "gradient_error": EQUAL, "choice": "not slower beyond the spread"},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    equal = all(r["gradient_error"] < EQUAL for r in rows.values() if r["dtype"] == "float32")
    print(f"gradients equal in float32: {'yes' if equal else 'NO'}")
    print(
        f"update: {judged['speed_up']:.2f} times faster, {judged['memory_ratio']:.2f} times less memory "
        f"(goal >= {GOAL:g} of either); whole updates in {made.figure}"
    )
    return 0 if equal and not made.slower and max(judged["speed_up"], judged["memory_ratio"]) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
