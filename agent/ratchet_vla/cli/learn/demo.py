"""`ratchet demo`: the whole loop on two cores, in minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ratchet_vla.cli import common, estimate
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.learn import demo_ros, demo_shipped, retention, sequential
from ratchet_vla.cli.recipes import DEMO, SHIPPED, Recipe, Shipped
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.intervals import Interval
from ratchet_vla.learner.measures.metrics import difference

LIBERO = "libero_object"


@dataclass
class Demo(ComputingOptions):
    """Adapt the built-in VLA to two tasks by on-policy reinforcement learning, and show that it got better.

    Evaluates the base, learns task A then task B with one adapter, hot-swaps every new adapter into a running policy,
    evaluates all tasks again after each, writes a report with curves and videos. Then LIBERO, where one update takes
    minutes: an adapter that was made in advance is swapped into the running policy and measured against the base, and
    one update goes on from it.

    Commands to copy:

        ratchet demo

        ratchet demo --seed 3 --out runs/demo3 --json

        ratchet demo --part libero

        ratchet demo --suite libero_object      (what made the LIBERO adapter; ten updates of five minutes)
    """

    suite: str = "metaworld"
    """Simulation suite to learn in."""
    out: Path = Path("runs/demo")
    """Run folder; a run that was stopped goes on."""
    seed: int = 0
    """Root of all random numbers."""
    workers: int = 2
    """Simulator processes."""
    threads: int = 1
    """CPU threads for the policy."""
    part: Literal["both", "learn", "libero"] = "both"
    """What to run: learn (the tasks of --suite), libero (the adapter that is shipped for LIBERO-Object) or both. Suites
    other than Meta-World only learn."""
    held_out: tuple[str, ...] = ()
    """Tasks that are evaluated and never trained; those of the measured recipe if absent."""
    evaluation_episodes: int = 0
    """Episodes per task and evaluation; 0 for the measured recipe's."""
    reference: str = retention.BESIDE_THE_BASE
    """What holds the adapter to what it is not trained on: base (the set beside the base), a file, or none."""
    videos: bool = True
    """Write GIFs of each task before and after."""
    ros: bool = False
    """Afterwards run base and learned adapter through the ROS nodes, with a hot swap while the arm moves."""
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
        learns = self.part != "libero"
        libero = self.part == "libero" or (self.part == "both" and self.suite == "metaworld")
        recipes: list[Recipe | Shipped] = []
        if learns:
            recipes.append(DEMO[self.suite])
        if libero:
            recipes.append(SHIPPED[LIBERO])
        expected = _expect(recipes, console)
        results: list[sequential.Result | demo_shipped.Result] = []
        if learns:
            results.append(self._learn(console, expected[0]))
        if libero:
            results.append(self._libero(console, expected[-1]))
        if self.ros:
            policy = common.policy_folder(self.suite, None)
            demo_ros.run(self.out, self.suite, DEMO[self.suite].tasks, policy, console)
        console.print(f"{sum(result.seconds for result in results) / 60:.1f} minutes in all")
        for result in results:
            console.print(f"report: {result.report}")
        if self.json:
            print(json.dumps({result.suite: result.as_dict() for result in results}))
        return 0

    def _learn(self, console: Console, expected: float) -> sequential.Result:
        recipe = DEMO[self.suite]
        recipe = replace(
            recipe,
            held_out=self.held_out or recipe.held_out,
            evaluation_episodes=self.evaluation_episodes or recipe.evaluation_episodes,
        )
        result = sequential.run(
            sequential.RunPlan(
                title=f"Ratchet demo on {self.suite}",
                suite=self.suite,
                policy_folder=common.policy_folder(self.suite, None),
                config=recipe.sequence(self.seed),
                lora=recipe.lora,
                folder=self.out,
                workers=self.workers,
                slots=recipe.slots,
                videos=self.videos,
                expected=expected,
                retention=retention.Choice(self.reference),
            ),
            console,
        )
        for stage, task in enumerate(result.matrix.tasks, 1):
            before = result.matrix.get(0, task)
            after = result.matrix.get(stage, task)
            assert before is not None
            assert after is not None
            rates = f"{before.rate.estimate:.0%} -> {after.rate.estimate:.0%}"
            console.print(f"{task}: {rates}, gain {_in_points(difference(after, before))}")
        _print_swaps(console, result.swaps)
        return result

    def _libero(self, console: Console, expected: float) -> demo_shipped.Result:
        result = demo_shipped.run(
            suite=LIBERO,
            shipped=SHIPPED[LIBERO],
            folder=self.out / "libero",
            seed=self.seed,
            workers=self.workers,
            videos=self.videos,
            console=console,
            expected=expected,
        )
        tasks = ", ".join(comparison.task for comparison in result.gate_decision.comparisons)
        console.print(f"{tasks}: adapter against base {_in_points(result.change)}")
        for line in demo_shipped.measured_before(result.when_made, held_out=True):
            console.print(f"never learned, measured when it was made: {line}")
        update = result.update
        if update["to"] == update["adapter_id"]:
            outcome = f"and nothing could be learned from them: {update.get('skipped', 'no weight changed')}"
        else:
            ids = f"adapter {update['adapter_id'][:12]} -> {update['to'][:12]}"
            outcome = f"{ids}; too few for a gain: none is claimed, nothing is promoted"
        rate = f"{update['successes']} of {update['episodes']} episodes succeeded"
        console.print(f"one update on {update['task']}: {rate}, {outcome}")
        _print_swaps(console, result.swaps)
        return result


def _expect(recipes: Sequence[Recipe | Shipped], console: Console) -> list[float]:
    """Estimate the seconds that each part will take here, and print them where all were measured."""
    speed = estimate.measure()
    expected_s = [60 * recipe.minutes * speed.factor for recipe in recipes]
    if all(expected_s):
        each = f" ({' + '.join(map(estimate.minutes, expected_s))})" if len(expected_s) > 1 else ""
        console.print(f"about {estimate.minutes(sum(expected_s))}{each} on this machine: {speed.sentence()}")
    return expected_s


def _in_points(change: Interval) -> str:
    comparison = "larger than its interval" if change.low > 0 else "NOT larger than its interval"
    return f"{100 * change.estimate:+.0f} points [{100 * change.low:+.0f}, {100 * change.high:+.0f}], {comparison}"


def _print_swaps(console: Console, swaps: Sequence[Mapping[str, Any]]) -> None:
    for swap in swaps:
        console.print(f"hot swap {sequential.swap_line(swap)}")
