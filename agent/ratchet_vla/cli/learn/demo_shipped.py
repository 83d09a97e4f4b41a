"""The LIBERO part of the demo: an adapter that a long run made, against its base, in minutes.

Knows the order of the part: the gate on shared episodes, videos, one update that goes on from the adapter, the report.
Its outcome is measured here and now; what stands on the shipped card is shown as what it is, an earlier measurement.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ratchet_sim import registry
from ratchet_sim.video import record
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.protocol import Card
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, estimate
from ratchet_vla.cli.adapters.promotion import print_decision
from ratchet_vla.cli.learn import sequential
from ratchet_vla.cli.learn.progress import Ticker, progress_bars
from ratchet_vla.cli.recipes import Shipped
from ratchet_vla.learner.gate.decision import Comparison, GateConfig, GateDecision
from ratchet_vla.learner.gate.keeper import Gatekeeper, earlier_tasks
from ratchet_vla.learner.measures.intervals import Interval, mean
from ratchet_vla.learner.report.page import write_report
from ratchet_vla.learner.report.run_folder import video_name
from ratchet_vla.learner.rollouts.specs import episode_keys, evaluation_specs
from ratchet_vla.learner.sequence import SequentialRun
from ratchet_vla.policy.checkpoints.own import AnyPolicy
from ratchet_vla.policy.noise import chunk_noise
from ratchet_vla.policy.protocol import PolicyInput

# What else the part does, in episodes of the gate: for the time that is left.
FILMED = 5.0  # a filmed episode
GRADIENT = 0.15  # an update, per episode that it learns from


@dataclass
class Result:
    """What the part leaves behind.

    Attributes:
        suite: Simulation suite.
        folder: Folder of the part.
        gate_decision: The gate's comparison of adapter and base, measured here.
        change: Adapter minus base, mean over the tasks that it learned.
        when_made: The decision on its card, with what it cost on tasks that it never learned.
        update: The one update from it, as plain data.
        swaps: The hot swaps, as plain data.
        seconds: How long it took.
        report: The HTML page.
    """

    suite: str
    folder: Path
    gate_decision: GateDecision
    change: Interval
    when_made: Mapping[str, Any]
    update: dict[str, Any]
    swaps: list[dict[str, Any]]
    seconds: float
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "folder": str(self.folder),
            "verdict": self.gate_decision.as_dict(),
            "change": dataclasses.asdict(self.change),
            "when_made": dict(self.when_made),
            "update": self.update,
            "swaps": self.swaps,
            "seconds": self.seconds,
            "report": str(self.report),
        }


def run(
    *,
    suite: str,
    shipped: Shipped,
    folder: Path,
    seed: int,
    workers: int,
    videos: bool,
    console: Console,
    expected: float = 0.0,
) -> Result:
    """Measure the shipped adapter against its base, then make one update from it. A part that was stopped goes on.

    expected: seconds that it should take here, 0 where nobody measured it.

    Raises:
        RatchetError: those of the store, the adapters' checks, the simulators and the learner.
    """
    started = time.perf_counter()
    part = _Part(suite, shipped, folder, seed, console)
    part.describe()
    env = common.make_vector(part.running.policy, suite, part.contract, workers, shipped.update.slots)
    try:
        with progress_bars(console) as progress, Ticker(part.running) as ticking:
            part.bars = _Bars(progress, part.weight(videos), expected)
            decision = part.measure(env)
            video = part.film(decision) if videos else None
            update = part.update(env)
    finally:
        env.close()
    change = mean([comparison.change for comparison in decision.comparisons])
    seconds = time.perf_counter() - started
    report = part.write(decision, change, video, update, ticking.count, seconds)
    swaps = sequential.swap_rows(part.running)
    return Result(suite, folder, decision, change, part.card.provenance.gate, update, swaps, seconds, report)


class _Bars:
    """What runs now, and how much of the part is left; a weight of 1 is an episode of the gate."""

    def __init__(self, progress: Progress, total: float, expected: float) -> None:
        self._progress = progress
        self._remaining = estimate.Remaining(total, expected)
        self._total_bar = progress.add_task("in all", total=round(total), note="")
        self._current_bar = progress.add_task("starting the simulators", total=None, note="")

    def now(self, description: str, done: int, total: int) -> None:
        """Show what runs now."""
        self._progress.update(self._current_bar, description=description, completed=done, total=total)

    def advance(self, weight: float) -> None:
        """Count work of this weight as done."""
        self._remaining.advance(weight)
        note = f"about {estimate.minutes(self._remaining.seconds())} left"
        self._progress.update(self._total_bar, completed=round(self._remaining.done), note=note)


class _Part:
    """The part's policy in use, its store and its folder."""

    def __init__(self, suite: str, shipped: Shipped, folder: Path, seed: int, console: Console) -> None:
        self.suite = suite
        self.shipped = shipped
        self.folder = folder
        self.seed = seed
        self.console = console
        self.gate = dataclasses.replace(shipped.gate, seed=seed)
        self.contract = registry.contract_for(suite)
        self.base = common.policy_folder(suite, None)
        source = FolderStore(shipped.store)
        self.card: Card = source.card("active")
        # The run has a store of its own: what it measures and learns must not change the one that is shipped.
        self.store = FolderStore(folder / "adapters", create=True)
        self.adapter_id = common.copy_adapter(self.store, source, "active")
        self.lora = common.lora_of(source, "active")
        self.running = common.open_running(self.base, self.contract, self.lora, self.store)
        self.learned = [self.card.provenance.task, *earlier_tasks(self.store, self.adapter_id, "")]
        self.tasks = common.find_tasks(suite, [*self.learned, *shipped.update.tasks])
        self.description: dict[str, Any] = {}
        self.bars: _Bars

    def weight(self, videos: bool) -> float:
        """Weigh all that is to be done, in episodes of the gate."""
        states = len(self.tasks[self.learned[0]].evaluation_states[: self.gate.episodes])
        recipe = self.shipped.update
        learned_from = recipe.updates * recipe.groups * recipe.group_size
        return (
            2 * states * self.gate.draws * len(self.learned)
            + (2 * FILMED if videos else 0)
            + (1 + GRADIENT) * learned_from
        )

    def describe(self) -> None:
        """Write run.json, and say which adapter this is."""
        self.description = common.describe_run(
            f"Ratchet demo on {self.suite}: an adapter that is shipped, against its base",
            common.command_line(),
            suite=self.suite,
            seed=self.seed,
            contract=f"{self.contract.name} {self.contract.id}",
            policy=str(self.base),
            base_hash=self.running.policy.base_hash,
            config={
                "gate": dataclasses.asdict(self.gate),
                "update": dataclasses.asdict(self.shipped.update.sequence(self.seed)),
                "lora": dataclasses.asdict(self.lora),
            },
        )
        common.write_json(self.folder / "run.json", self.description)
        self.console.print(
            f"[bold]{self.suite}[/]: adapter {self.adapter_id[:12]} from {self.shipped.store}, made in advance by "
            f"[italic]{self.card.provenance.notes}[/]",
            highlight=False,
        )

    def measure(self, env: ChunkVectorEnv) -> GateDecision:
        """Run the gate: base and adapter on the same initial states with the same noise, hot-swapped in between."""

        def show(kind: str, event: dict[str, Any]) -> None:
            if kind == "episode":
                self.bars.now(event["what"], event["done"], event["of"])
                self.bars.advance(1)

        folder = self.folder / "gate"
        keeper = Gatekeeper(self.running.serve, env, self.tasks, self.store, self.gate, folder, show)
        decision = keeper.run(self.adapter_id, "")
        print_decision(decision.as_dict(), self.console)
        if decision.decision == "promote" and self.store.tags().get("active") != self.adapter_id:
            self.store.promote(self.adapter_id, "passed the gate")
        return decision

    def film(self, decision: GateDecision) -> dict[str, Any]:
        """Film base and adapter on one initial state with one noise, where only the adapter succeeded if it can be."""
        task, key, why = telling(decision.comparisons)
        info = dataclasses.replace(self.tasks[task], horizon=self.gate.horizon or self.tasks[task].horizon)
        gate = self.gate
        specs = evaluation_specs(info, gate.episodes, self.seed, gate.horizon, purpose="gate", draws=gate.draws)
        spec = dict(zip(episode_keys(specs), specs, strict=True))[key]
        video: dict[str, Any] = {"task": task, "episode": key, "why": why}
        for done, (moment, adapter_id) in enumerate((("base", ""), ("adapter", self.adapter_id))):
            self.bars.now(f"filming {moment} on {task}", done, 2)
            path = self.folder / "videos" / video_name(task, moment)
            if not path.exists():
                act = acting(self.running.serve(adapter_id), self.gate, spec.seed)
                record(self.running.policy, info, spec.initial_state, path, act=act)
            video[moment] = str(path)
            self.bars.advance(FILMED)
        return video

    def update(self, env: ChunkVectorEnv) -> dict[str, Any]:
        """Make one on-policy update from the adapter on a task that is new to it; swap it in, but do not promote it."""
        recipe = self.shipped.update
        policy, adapter = common.open_policy(self.base, self.contract, self.lora)
        common.share_base(self.running.policy, policy)

        def show(kind: str, event: dict[str, Any]) -> None:
            if kind == "episode":
                self.bars.now(event["what"], event["done"], event["of"])
                self.bars.advance(1)
            elif kind == "update":
                self.bars.advance(GRADIENT * event["episodes"])

        sequence = SequentialRun(
            policy,
            adapter,
            env,
            self.tasks,
            self.store,
            self.running.serve,
            recipe.sequence(self.seed),
            self.folder / "state",
            show,
            origin=common.command_line(),
            start=self.adapter_id,
        )
        sequence.run()
        self.running.serve(sequence.adapter_ids[-1])
        lines = (self.folder / "state" / "updates.jsonl").read_text()
        (self.folder / "updates.jsonl").write_text(lines)
        update: dict[str, Any] = json.loads(lines.splitlines()[-1])
        return {**update, "to": sequence.adapter_ids[-1]}

    def write(
        self,
        decision: GateDecision,
        change: Interval,
        video: dict[str, Any] | None,
        update: dict[str, Any],
        forwards: int,
        seconds: float,
    ) -> Path:
        """Write comparison.json and the files that every run folder has, then the report; returns its path."""
        origin = self.card.provenance
        outcomes = {
            comparison.task: {
                "base": dict(comparison.active.episodes),
                "adapter": dict(comparison.candidate.episodes),
            }
            for comparison in decision.comparisons
        }
        common.write_json(
            self.folder / "comparison.json",
            {
                "adapter": {
                    "id": self.adapter_id,
                    "made by": origin.notes,
                    "stored": self.card.created,
                    "tasks learned": list(reversed(self.learned)),
                    "measured when it was made": "; ".join(measured_before(origin.gate, held_out=False)),
                    "changes the base's weights by": f"{origin.effect:.2%}" if origin.effect is not None else "",
                },
                "verdict": decision.as_dict(),
                "change": dataclasses.asdict(change),
                "outcomes": outcomes,
                "when_made": dict(origin.gate),
                "video": video,
                "update": update,
            },
        )
        line = [*reversed(self.store.lineage(update["to"]))]
        tasks = [self.store.card(identity).provenance.task for identity in line]
        common.write_json(self.folder / "adapters.json", sequential.adapter_rows(self.store, line, tasks))
        swaps = sequential.swap_rows(self.running)
        self.description |= {
            "finished": common.now(),
            "seconds": round(seconds, 1),
            "hot swaps": "; ".join(map(sequential.swap_line, swaps)),
            "forwards of the running policy meanwhile": forwards,
        }
        common.write_json(self.folder / "run.json", self.description)
        return write_report(self.folder)


def measured_before(decision: Mapping[str, Any], held_out: bool) -> list[str]:
    """Word the gate's decision on a card, a line per task: of held-out tasks, or of those that were learned."""
    return [
        f"{row['task']}: {row['active']:.0%} -> {row['candidate']:.0%}, {100 * row['change']:+.0f} points "
        f"[{100 * row['low']:+.0f}, {100 * row['high']:+.0f}], {row['episodes']} pairs"
        for row in decision.get("tasks", ())
        if (row["role"] == "held_out") == held_out
    ]


def acting(policy: AnyPolicy, gate: GateConfig, seed: int) -> Callable[[PolicyInput], Tensor]:
    """Return how the gate's episodes act: greedily, or sampled with the noise of this seed."""
    noise = np.random.Generator(np.random.Philox(key=seed))
    shape = (policy.spec.chunk, len(policy.spec.action_names))

    def act(batch: PolicyInput) -> Tensor:
        if gate.temperature == 0:
            return policy.predict(batch).actions
        return policy.sample(batch, gate.temperature, torch.from_numpy(chunk_noise(noise, shape, 0.0))[None]).actions

    return act


def telling(comparisons: Sequence[Comparison]) -> tuple[str, str, str]:
    """Return task and key of the episode that shows the difference best, and why it was chosen, in words."""
    chosen = max(comparisons, key=lambda comparison: comparison.gains)
    trials = f"of {chosen.active.trials} episodes"
    for key, solved in chosen.active.episodes.items():
        if chosen.candidate.episodes[key] and not solved:
            why = (
                f"the first {trials} that only the adapter solved; {chosen.gains} are such, {chosen.losses} the reverse"
            )
            return chosen.task, key, why
    first = next(iter(chosen.active.episodes))
    return chosen.task, first, f"the first {trials}: none was solved by the adapter alone"
