"""What the learner shows: metrics as JSON lines and in TensorBoard, one status file, alerts, and the timeline in words.

Knows the figures of the learner's state and how to present them. Knows no socket and decides nothing. All of it can be
made again from the journal; a crash leaves no line twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ratchet_vla.learner.service.state import LearnerState
from ratchet_vla.storage.journal import Event

RECENT = 50  # episodes that the on-policy share looks back over
LEAST_RECENT = 10  # with fewer a share says nothing


@dataclass(frozen=True)
class Limits:
    """When an alert line appears.

    on_policy: least share of recent episodes that could enter an update. success_drop: largest fall of an update's
    success below the mean of the three before. sync: seconds without a message from any robot while episodes are
    wanted. free: bytes of disk.
    """

    on_policy: float = 0.5
    success_drop: float = 0.25
    sync: float = 60.0
    free: int = 5 * 1024**3


@dataclass(frozen=True)
class Alert:
    """One thing that a person should look at. code: stable."""

    code: str
    text: str


class Rates:
    """What came in over the last minutes. Times are of a monotonic clock, which no setting of the clock moves."""

    def __init__(self, window: float = 600.0) -> None:
        self._window = window
        self._counts: deque[tuple[float, int, int]] = deque()

    def at(self, now: float, episodes: int, received: int) -> dict[str, float]:
        """now: seconds. episodes, received: numbers so far, the second in bytes."""
        self._counts.append((now, episodes, received))
        while len(self._counts) > 2 and self._counts[1][0] <= now - self._window:
            self._counts.popleft()
        first_s, first_episodes, first_bytes = self._counts[0]
        span = now - first_s
        per_second = 1.0 / span if span > 0 else 0.0
        return {
            "seconds": span,
            "episodes_per_hour": 3600.0 * (episodes - first_episodes) * per_second,
            "bytes_per_second": (received - first_bytes) * per_second,
        }


def alerts(state: LearnerState, sync_age: float, free: int, limits: Limits) -> list[Alert]:
    """What is wrong at the moment. sync_age: seconds since the last message of any robot, inf for none yet."""
    found = [
        *_on_policy_alerts(state, limits),
        *_success_alerts(state, limits),
        *_collecting_alerts(state, sync_age, limits),
    ]
    if state.updates:
        last_figures = state.updates[-1]["facts"]
        code = last_figures.get("code")
        if code in ("learner.policy_mismatch", "learner.not_finite"):
            found.append(Alert(code, str(last_figures["skipped"])))
    if state.phase == "waiting":
        found.append(Alert("learner.held", f"the gate held {state.candidate[:12]}; promote or decline it"))
    if free < limits.free:
        found.append(Alert("learner.disk", f"{free / 1024**3:.1f} GiB of disk are left"))
    return found


def _on_policy_alerts(state: LearnerState, limits: Limits) -> list[Alert]:
    decided = [arrival for arrival in state.arrivals.values() if arrival.decision]
    recent = sorted(decided, key=lambda arrival: arrival.number)[-RECENT:]
    if len(recent) < LEAST_RECENT:
        return []
    # What was used or still could be; an episode that came in time but was not needed is no sign of trouble.
    share = sum(arrival.used or arrival.decision != "replay" for arrival in recent) / len(recent)
    if share >= limits.on_policy:
        return []
    codes = sorted({arrival.code for arrival in recent if arrival.decision == "replay"})
    text = f"{share:.0%} of the last {len(recent)} episodes are on-policy: {', '.join(codes)}"
    return [Alert("learner.on_policy", text)]


def _success_alerts(state: LearnerState, limits: Limits) -> list[Alert]:
    updates = [update for update in state.updates if update["episodes"] and update["stage"] == state.stage]
    rates = [update["successes"] / len(update["episodes"]) for update in updates]
    alerts = []
    if len(rates) >= 4:
        before = sum(rates[-4:-1]) / 3
        if rates[-1] < before - limits.success_drop:
            alerts.append(Alert("learner.success", f"success fell to {rates[-1]:.0%}, was {before:.0%}"))
    if len(rates) >= 2 and rates[-1] == rates[-2] == 0.0:
        text = "two updates without a single success: there is nothing to learn from"
        alerts.append(Alert("learner.success", text))
    return alerts


def _collecting_alerts(state: LearnerState, sync_age: float, limits: Limits) -> list[Alert]:
    if state.phase != "collecting":
        return []
    alerts = []
    if sync_age > limits.sync:
        age = "never" if math.isinf(sync_age) else f"{sync_age:.0f} s ago"
        alerts.append(Alert("learner.sync", f"episodes are wanted and the last message of a robot came {age}"))
    # States from before the run's settings were written down hold none.
    waits_for_session = state.config.get("mode") == "robot" and state.config.get("batch_when") == "session"
    if waits_for_session and not state.session_ended:
        have = len(state.accepted())
        batch = int(state.config["batch"])
        if have >= batch:
            text = f"the batch is full ({have} of {batch}) and waits for the end of a session: `ratchet session stop`"
            alerts.append(Alert("learner.session", text))
    return alerts


def status(
    state: LearnerState,
    tasks: Iterable[str],
    peers: list[dict[str, Any]],
    counts: Mapping[str, int],
    free: int,
    limits: Limits,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that `ratchet status` shows, as plain data.

    peers: name, age (seconds since the last message), report. rates: as `Rates.at` gives them.
    """
    sync_age = min((peer["age"] for peer in peers), default=math.inf)
    last_update = state.updates[-1] if state.updates else None
    return {
        "phase": state.phase,
        "stage": state.stage + 1,
        "queue": [_queue_line(state, stage, task) for stage, task in enumerate(tasks)],
        "order": state.order,
        "training": state.training,
        "active": state.active,
        "episodes": state.counts(),
        "kept_out": state.reasons(),
        "last_update": _figures_of(last_update),
        "last_update_episodes": len(last_update["episodes"]) if last_update else 0,
        "last_gate": state.gates[-1] if state.gates else None,
        "robots": peers,
        "link": dict(counts),
        "rates": dict(rates),
        "sync_age": None if math.isinf(sync_age) else sync_age,
        "free_bytes": free,
        "alerts": [asdict(a) for a in alerts(state, sync_age, free, limits)],
        "written": time.time(),
    }


def _figures_of(update: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if update is None:
        return None
    return {key: update[key] for key in ("task", "update", "adapter", "successes", "facts")}


def _queue_line(state: LearnerState, stage: int, task: str) -> dict[str, Any]:
    updates = sum(update["stage"] == stage for update in state.updates)
    return {"task": task, "state": _task_state(state, stage), "updates": updates}


def _task_state(state: LearnerState, stage: int) -> str:
    finished_lines = [stage_line for stage_line in state.stages if stage_line["stage"] == stage]
    if finished_lines:
        return "learned" if finished_lines[-1]["learned"] else "given up"
    return "learning" if stage == state.stage and state.phase not in ("new", "done") else "waiting"


def update_line(event: Event) -> dict[str, Any]:
    """One `updated` event as a flat line of metrics."""
    data = event.data
    success_share = data["successes"] / max(len(data["episodes"]), 1)
    flat = {key: data[key] for key in ("order", "task", "stage", "update", "attempt", "adapter", "successes")}
    return {"n": event.n, **flat, "episodes": len(data["episodes"]), "success": success_share, **data["facts"]}


class Recorder:
    """Writes metrics.jsonl and TensorBoard's files beside the journal, as far as they are behind it."""

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self._path = folder / "metrics.jsonl"
        self._board = folder / "tensorboard" if tensorboard else None
        self._writer: Any = None
        self._last = self._mend()
        self._updates = 0
        self._read = 0  # events looked at so far

    def take(self, events: Sequence[Event]) -> None:
        """All events so far, oldest first; only `updated` ones that are not in the files yet are written."""
        fresh = []
        while self._read < len(events):
            event = events[self._read]
            self._read += 1
            if event.kind == "updated":
                self._updates += 1
                if event.n > self._last:
                    fresh.append((self._updates, event))
        if not fresh:
            return
        with self._path.open("a") as file:
            for _, event in fresh:
                file.write(json.dumps(update_line(event)) + "\n")
        self._scalars(fresh)
        self._last = fresh[-1][1].n

    def close(self) -> None:
        """Close TensorBoard's file; the next update opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, fresh: list[tuple[int, Event]]) -> None:
        if self._board is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed before the first update

            self._writer = SummaryWriter(str(self._board), purge_step=fresh[0][0])
        for step, event in fresh:
            line = update_line(event)
            for name, value in line.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("n", "stage"):
                    self._writer.add_scalar(f"learner/{name}", value, step, event.time)
        self._writer.flush()

    def _mend(self) -> int:
        """The last event in the file; a torn last line is cut off."""
        if not self._path.exists():
            return 0
        whole_lines = []
        last_event = 0
        for line in self._path.read_text().splitlines():
            try:
                last_event = int(json.loads(line)["n"])
            except (ValueError, KeyError, TypeError):
                break
            whole_lines.append(line)
        self._path.write_text("".join(line + "\n" for line in whole_lines))
        return last_event


def timeline(events: Iterable[Event]) -> list[str]:
    """The journal in words, one line per event that a person cares for."""
    wording = Timeline()
    return [line for event in events if (line := wording.line(event))]


class Timeline:
    """Words for one event after the other."""

    def __init__(self) -> None:
        self._arrived: dict[str, str] = {}  # episode -> what was last decided about it, since the update before

    def line(self, event: Event) -> str:
        """A line, or nothing where nobody would care."""
        text = self._words(event.kind, event.data)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
        return f"{event.n:6d}  {stamp}  {text}" if text else ""

    def _words(self, kind: str, data: dict[str, Any]) -> str:
        if kind == "ruled":
            self._arrived[data["sha"]] = data["code"] or data["decision"]
        elif kind == "run":
            names = ", ".join(data["config"]["tasks"])
            return f"run {data['fingerprint'][:12]} on base {data['base'][:12]}, tasks {names}"
        elif kind == "ordered":
            return f"collecting {data['task']} under {data['adapter'][:12]} (update {data['update'] + 1})"
        elif kind == "updated":
            counts = ", ".join(f"{count} {code}" for code, count in sorted(Counter(self._arrived.values()).items()))
            self._arrived = {}
            rate = f"{data['successes']}/{len(data['episodes'])}"
            end = f"skipped: {data['facts']['skipped']}" if "skipped" in data["facts"] else f"-> {data['adapter'][:12]}"
            return f"update {data['update'] + 1} of {data['task']}: success {rate} ({counts}), {end}"
        elif kind == "gated":
            reasons = "; ".join(f"{reason['task']} {reason['text']}".strip() for reason in data["reasons"])
            return f"gate on {data['candidate'][:12]}: {data['decision']}: {reasons}"
        elif kind == "promoted":
            return f"{data['adapter'][:12]} is active, by {data['by']}"
        elif kind == "finished":
            how = "learned" if data["learned"] else "given up"
            return f"{data['task']} {how}, active {data['adapter'][:12] or 'base'}"
        elif kind == "moved":
            return f"active was set to {data['adapter'][:12] or 'the base'} by {data['by']}"
        elif kind == "started":
            return f"the learner started (process {data['pid']})"
        plain = {"waits": "waiting for a person", "declined": "a person declined it", "done": "all tasks are over"}
        return plain.get(kind, "")
