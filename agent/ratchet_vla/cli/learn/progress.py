"""What a run shows while it goes on: bars, lines, time left, and a policy that is asked all the while.

Knows the terminal and a run's events. Knows nothing of what is learned.
"""

from __future__ import annotations

import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from ratchet_vla.cli import common, estimate
from ratchet_vla.learner.sequence import SequenceConfig

TRAINED = 3.0  # what an episode that is learned from costs, in episodes that are only evaluated; two cores


class Ticker:
    """Keeps asking the running policy for chunks at 1 Hz, so that every swap happens on a policy in use."""

    def __init__(self, running: common.Running) -> None:
        self.running = running
        self.count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from ratchet_vla.adapters.swap.canary import canary_input

        batch = canary_input(self.running.policy.spec)
        while not self._stop.wait(1.0):
            with self.running.swapper.running():
                self.running.policy.predict(batch)
            self.count += 1


def progress_bars(console: Console) -> Progress:
    return Progress(
        # LIBERO's task names are longer than a terminal is wide; the bar and the counts must stay.
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


class View:
    """Turns events of the run into progress bars and lines."""

    def __init__(self, progress: Progress, console: Console, config: SequenceConfig, expected: float) -> None:
        self.progress, self.console, self.config = progress, console, config
        training = len(config.tasks) * config.updates * config.groups * config.group_size
        stages, columns = len(config.tasks) + 1, len(config.tasks) + len(config.held_out)
        evaluation = stages * columns * config.evaluation_episodes
        self.left = estimate.Remaining(TRAINED * training + evaluation, expected)
        self.whole = progress.add_task("in all", total=int(self.left.total), note="")
        total = len(config.tasks) * config.updates
        self.bar = progress.add_task("learning", total=total, note="")
        self.episodes = progress.add_task("episodes", total=1, note="")

    def event(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "episode":
            self.progress.update(
                self.episodes, completed=facts["done"], total=facts["of"], description=facts["what"], note=""
            )
        elif kind == "update":
            done = (facts["stage"] - 1) * self.config.updates + facts["update"]
            self._advance(TRAINED * self.config.groups * self.config.group_size)
            if "skipped" in facts:
                note = f"{facts['task']} changed nothing: {facts['skipped']}"
            elif facts["episodes"]:
                rate = facts["successes"] / facts["episodes"]
                kl, entropy = facts.get("approx_kl", 0), facts.get("entropy", 0)
                note = f"{facts['task']} {rate:.0%}  KL {kl:.3f}  entropy {entropy:.2f}"
            else:
                note = f"{facts['task']} loss {facts['loss']:.3f}"
            self.progress.update(self.bar, completed=done, note=note)
            if not self.console.is_terminal:
                left = estimate.minutes(self.left.seconds())
                self.console.print(f"update {facts['update']:3d}  {note}  {facts['seconds']:.0f} s, about {left} left")
        elif kind == "evaluated":
            self._advance(facts["trials"])
            rate = facts["successes"] / facts["trials"]
            speed = f"{60 * facts['trials'] / facts['seconds']:5.0f} episodes/min" if facts["seconds"] else "known"
            self.console.print(
                f"stage {facts['stage']}  {facts['task']:28s} {facts['successes']:3d}/{facts['trials']} = {rate:4.0%}"
                f"   {speed}"
            )
        elif kind == "stage" and not facts["learned"]:
            self.console.print(f"nothing was learned on {facts['task']}: {facts['why']}", style="yellow", markup=False)
        elif kind == "stage":
            self.console.print(
                f"[bold]learned {facts['task']}[/]: adapter {facts['adapter_id'][:12]}, "
                f"changes the base by {facts['effect']:.2%}"
            )

    def _advance(self, weight: float) -> None:
        self.left.advance(weight)
        left = f"about {estimate.minutes(self.left.seconds())} left"
        self.progress.update(self.whole, completed=int(self.left.done), note=left)
