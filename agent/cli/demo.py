"""`ratchet demo`: the whole loop on two cores, in minutes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.cli import common, demo_ros, estimate, sequential
from agent.cli.computing import ComputingOptions
from agent.cli.recipes import DEMO, SHORT, Recipe
from agent.errors import RatchetError
from agent.learner.metrics import difference


@dataclass
class Demo(ComputingOptions):
    """Adapt the built-in VLA to two tasks by on-policy reinforcement learning, and show that it got better.

    Evaluates the base, learns task A then task B with one adapter, hot-swaps every new adapter into a running policy,
    evaluates all tasks again after each, writes a report with curves and videos. Then runs the same loop in LIBERO for
    a few minutes, which is too short to show a gain there.

    Commands to copy:

        ratchet demo

        ratchet demo --seed 3 --out runs/demo3 --json

        ratchet demo --suite libero_object      (hours on two cores)
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
    libero: bool = True
    """After Meta-World, also the short LIBERO part."""
    videos: bool = True
    """Write before/after GIFs."""
    ros: bool = False
    """Then run base and learned adapter through the ROS nodes, with a hot swap while the arm moves."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        console = Console(stderr=self.json)
        if self.suite not in DEMO:
            raise RatchetError(
                "cli.no_recipe",
                f"no measured demo recipe for suite '{self.suite}'",
                fix=f"suites with one: {', '.join(DEMO)}; for others use ratchet learn with a policy of your own",
            )
        speed = estimate.measure()
        recipes = [DEMO[self.suite]]
        if self.libero and self.suite == "metaworld":
            recipes.append(SHORT["libero_object"])
        expected = [60 * recipe.minutes * speed.factor for recipe in recipes]
        if all(expected):
            parts = " + ".join(estimate.minutes(seconds) for seconds in expected)
            console.print(f"about {estimate.minutes(sum(expected))} ({parts}) on this machine: {speed.told()}")
        results = [self._part(console, self.suite, DEMO[self.suite], self.out, "", expected[0])]
        if self.libero and self.suite == "metaworld":
            results.append(
                self._part(
                    console, "libero_object", SHORT["libero_object"], self.out / "libero", ", short", expected[1]
                )
            )
        if self.ros:
            policy = common.policy_folder(self.suite, None)
            demo_ros.run(results[0].folder, self.suite, DEMO[self.suite].tasks, policy, console)
        console.print(f"{sum(r.seconds for r in results) / 60:.1f} minutes in all")
        for result in results:
            console.print(f"report: {result.report}")
        if self.json:
            print(json.dumps({r.suite: r.as_dict() for r in results}))
        return 0

    def _part(
        self, console: Console, suite: str, recipe: Recipe, out: Path, note: str, expected: float
    ) -> sequential.Result:
        result = sequential.run(
            title=f"Ratchet demo on {suite}{note}",
            suite=suite,
            policy_folder=common.policy_folder(suite, None),
            config=recipe.sequence(self.seed),
            lora=recipe.lora,
            folder=out,
            workers=self.workers,
            slots=recipe.slots,
            videos=self.videos,
            console=console,
            expected=expected,
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
        return result
