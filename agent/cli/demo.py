"""`ratchet demo`: the whole loop on two cores, in minutes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.cli import common, sequential
from agent.errors import RatchetError
from agent.learner.metrics import difference


@dataclass
class Demo:
    """Adapt the built-in VLA to two tasks by on-policy reinforcement learning, and show that it got better.

    Evaluates the base, learns task A then task B with one adapter, hot-swaps every new adapter into a running policy,
    evaluates all tasks again after each, writes a report with curves and videos.

    Commands to copy:

        ratchet demo

        ratchet demo --seed 3 --out runs/demo3 --json
    """

    suite: str = "metaworld"
    """Suite to learn in."""
    out: Path = Path("runs/demo")
    """Run folder; a run that was stopped goes on."""
    seed: int = 0
    """Root of all random numbers."""
    workers: int = 2
    """Simulator processes."""
    threads: int = 1
    """Threads for the policy."""
    videos: bool = True
    """Write before/after GIFs."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        from agent.cli.recipes import DEMO

        common.threads(self.threads)
        console = Console(stderr=self.json)
        if self.suite not in DEMO:
            raise RatchetError(
                "cli.no_recipe",
                f"no measured demo recipe for suite '{self.suite}'",
                fix=f"suites with one: {', '.join(DEMO)}; for others use ratchet learn with a policy of your own",
            )
        recipe = DEMO[self.suite]
        result = sequential.run(
            title=f"Ratchet demo on {self.suite}",
            suite=self.suite,
            policy_folder=common.policy_folder(self.suite, None),
            config=recipe.sequence(self.seed),
            lora=recipe.lora,
            folder=self.out,
            workers=self.workers,
            slots=recipe.slots,
            videos=self.videos,
            console=console,
        )
        for stage, task in enumerate(result.matrix.tasks, 1):
            before, after = result.matrix.get(0, task), result.matrix.get(stage, task)
            assert before is not None
            assert after is not None
            gain = difference(after, before)
            verdict = "larger than its interval" if gain.low > 0 else "NOT larger than its interval"
            rates = f"{before.rate.estimate:.0%} -> {after.rate.estimate:.0%}"
            console.print(
                f"{task}: {rates}, gain {100 * gain.estimate:+.0f} points "
                f"[{100 * gain.low:+.0f}, {100 * gain.high:+.0f}], {verdict}"
            )
        for swap in result.swaps:
            console.print(
                f"hot swap {swap['from']} -> {swap['to']}: ready in {swap['ready_ms']:.0f} ms, "
                f"policy unavailable {swap['unavailable_ms']:.3f} ms"
            )
        console.print(f"{result.seconds / 60:.1f} minutes; report: {result.report}")
        if self.json:
            print(json.dumps(result.as_dict()))
        return 0
