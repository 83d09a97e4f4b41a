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
    """Make the bars of a run: description, bar, counts, a note (the field `note`) and the time so far."""
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
        self.progress = progress
        self.console = console
        self.config = config
        training = len(config.tasks) * config.updates * config.groups * config.group_size
        stages = len(config.tasks) + 1  # the base is evaluated, too
        columns = len(config.tasks) + len(config.held_out)
        evaluation = stages * columns * config.evaluation_episodes
        self.remaining = estimate.Remaining(TRAINED * training + evaluation, expected)
        self.total_bar = progress.add_task("in all", total=int(self.remaining.total), note="")
        total = len(config.tasks) * config.updates
        self.update_bar = progress.add_task("learning", total=total, note="")
        self.episode_bar = progress.add_task("episodes", total=1, note="")

    def event(self, kind: str, event: dict[str, Any]) -> None:
        """Show one event of the run; kinds that are not known here are passed over."""
        if kind == "episode":
            count = {"completed": event["done"], "total": event["of"]}
            self.progress.update(self.episode_bar, **count, description=event["what"], note="")
        elif kind == "update":
            self._show_update(event)
        elif kind == "evaluated":
            self._show_evaluation(event)
        elif kind == "stage":
            self._show_stage(event)

    def _show_update(self, event: dict[str, Any]) -> None:
        done = (event["stage"] - 1) * self.config.updates + event["update"]
        self._advance(TRAINED * self.config.groups * self.config.group_size)
        if "skipped" in event:
            note = f"{event['task']} changed nothing: {event['skipped']}"
        elif event["episodes"]:
            rate = event["successes"] / event["episodes"]
            kl = event.get("approx_kl", 0)
            note = f"{event['task']} {rate:.0%}  KL {kl:.3f}  entropy {event.get('entropy', 0):.2f}"
        else:
            note = f"{event['task']} loss {event['loss']:.3f}"
        self.progress.update(self.update_bar, completed=done, note=note)
        if not self.console.is_terminal:
            remaining = estimate.minutes(self.remaining.seconds())
            line = f"update {event['update']:3d}  {note}  {event['seconds']:.0f} s, about {remaining} left"
            self.console.print(line)

    def _show_evaluation(self, event: dict[str, Any]) -> None:
        self._advance(event["trials"])
        rate = event["successes"] / event["trials"]
        speed = f"{60 * event['trials'] / event['seconds']:5.0f} episodes/min" if event["seconds"] else "known"
        self.console.print(
            f"stage {event['stage']}  {event['task']:28s} {event['successes']:3d}/{event['trials']} = {rate:4.0%}"
            f"   {speed}"
        )

    def _show_stage(self, event: dict[str, Any]) -> None:
        if not event["learned"]:
            self.console.print(f"nothing was learned on {event['task']}: {event['why']}", style="yellow", markup=False)
            return
        self.console.print(
            f"[bold]learned {event['task']}[/]: adapter {event['adapter_id'][:12]}, "
            f"changes the base by {event['effect']:.2%}"
        )

    def _advance(self, weight: float) -> None:
        self.remaining.advance(weight)
        note = f"about {estimate.minutes(self.remaining.seconds())} left"
        self.progress.update(self.total_bar, completed=int(self.remaining.done), note=note)
