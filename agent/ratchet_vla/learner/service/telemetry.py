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


@dataclass(frozen=True)
class Limits:
    """When an alert line appears. on_policy: least share of recent episodes that could enter an update. success_drop:
    largest fall of an update's success below the mean of the three before. sync: seconds without a message from any
    robot while episodes are wanted. free: bytes of disk."""

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
        self._seen: deque[tuple[float, int, int]] = deque()

    def at(self, now: float, episodes: int, received: int) -> dict[str, float]:
        """now: seconds. episodes, received: numbers so far, the second in bytes."""
        self._seen.append((now, episodes, received))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()
        then, before, bytes_before = self._seen[0]
        span = now - then
        share = 1.0 / span if span > 0 else 0.0
        return {
            "seconds": span,
            "episodes_per_hour": 3600.0 * (episodes - before) * share,
            "bytes_per_second": (received - bytes_before) * share,
        }


def alerts(state: LearnerState, sync_age: float, free: int, limits: Limits) -> list[Alert]:
    """What is wrong at the moment. sync_age: seconds since the last message of any robot, inf for none yet."""
    found = []
    decided = sorted((a for a in state.arrivals.values() if a.decision), key=lambda a: a.number)[-RECENT:]
    if len(decided) >= 10:
        # What was used or still could be; an episode that came in time but was not needed is no sign of trouble.
        share = sum(a.used or a.decision != "replay" for a in decided) / len(decided)
        if share < limits.on_policy:
            reasons = sorted({a.code for a in decided if a.decision == "replay"})
            text = f"{share:.0%} of the last {len(decided)} episodes are on-policy: {', '.join(reasons)}"
            found.append(Alert("learner.on_policy", text))
    rates = [u["successes"] / len(u["episodes"]) for u in state.updates if u["episodes"] and u["stage"] == state.stage]
    if len(rates) >= 4 and rates[-1] < sum(rates[-4:-1]) / 3 - limits.success_drop:
        before = sum(rates[-4:-1]) / 3
        found.append(Alert("learner.success", f"success fell to {rates[-1]:.0%}, was {before:.0%}"))
    if len(rates) >= 2 and rates[-1] == rates[-2] == 0.0:
        found.append(Alert("learner.success", "two updates without a single success: there is nothing to learn from"))
    if state.phase == "collecting" and sync_age > limits.sync:
        age = "never" if math.isinf(sync_age) else f"{sync_age:.0f} s ago"
        found.append(Alert("learner.sync", f"episodes are wanted and the last message of a robot came {age}"))
    if state.phase == "collecting" and state.config.get("batch_when") == "session" and not state.session_ended:
        have, batch = len(state.accepted()), int(state.config["batch"])
        if state.config.get("mode") == "robot" and have >= batch:
            text = f"the batch is full ({have} of {batch}) and waits for the end of a session: `ratchet session stop`"
            found.append(Alert("learner.session", text))
    if state.updates and state.updates[-1]["facts"].get("code") in ("learner.policy_mismatch", "learner.not_finite"):
        found.append(Alert(state.updates[-1]["facts"]["code"], str(state.updates[-1]["facts"]["skipped"])))
    if state.phase == "waiting":
        found.append(Alert("learner.held", f"the gate held {state.candidate[:12]}; promote or decline it"))
    if free < limits.free:
        found.append(Alert("learner.disk", f"{free / 1024**3:.1f} GiB of disk are left"))
    return found


def status(
    state: LearnerState,
    tasks: Iterable[str],
    peers: list[dict[str, Any]],
    counts: Mapping[str, int],
    free: int,
    limits: Limits,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that `ratchet status` shows, as plain data. peers: name, age (seconds since the last message), report.
    rates: as `Rates.at` gives them."""
    age = min((p["age"] for p in peers), default=math.inf)
    last = state.updates[-1] if state.updates else None
    return {
        "phase": state.phase,
        "stage": state.stage + 1,
        "queue": [
            {"task": t, "state": _task_state(state, i), "updates": sum(u["stage"] == i for u in state.updates)}
            for i, t in enumerate(tasks)
        ],
        "order": state.order,
        "training": state.training,
        "active": state.active,
        "episodes": state.counts(),
        "kept_out": state.reasons(),
        "last_update": last and {k: last[k] for k in ("task", "update", "adapter", "successes", "facts")},
        "last_update_episodes": len(last["episodes"]) if last else 0,
        "last_gate": state.gates[-1] if state.gates else None,
        "robots": peers,
        "link": dict(counts),
        "rates": dict(rates),
        "sync_age": None if math.isinf(age) else age,
        "free_bytes": free,
        "alerts": [asdict(a) for a in alerts(state, age, free, limits)],
        "written": time.time(),
    }


def _task_state(state: LearnerState, stage: int) -> str:
    over = [s for s in state.stages if s["stage"] == stage]
    if over:
        return "learned" if over[-1]["learned"] else "given up"
    return "learning" if stage == state.stage and state.phase not in ("new", "done") else "waiting"


def update_line(event: Event) -> dict[str, Any]:
    """One `updated` event as a flat line of metrics."""
    data = event.data
    share = data["successes"] / max(len(data["episodes"]), 1)
    flat = {k: data[k] for k in ("order", "task", "stage", "update", "attempt", "adapter", "successes")}
    return {"n": event.n, **flat, "episodes": len(data["episodes"]), "success": share, **data["facts"]}


class Recorder:
    """Writes metrics.jsonl and TensorBoard's files beside the journal, as far as they are behind it."""

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self._path = folder / "metrics.jsonl"
        self._board = folder / "tensorboard" if tensorboard else None
        self._writer: Any = None
        self._last = self._mend()
        self._updates = self._seen = 0

    def take(self, events: Sequence[Event]) -> None:
        """All events so far, oldest first; only `updated` ones that are not in the files yet are written."""
        fresh = []
        while self._seen < len(events):
            event = events[self._seen]
            self._seen += 1
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
        good, last = [], 0
        for line in self._path.read_text().splitlines():
            try:
                last = int(json.loads(line)["n"])
            except (ValueError, KeyError, TypeError):
                break
            good.append(line)
        self._path.write_text("".join(line + "\n" for line in good))
        return last


def timeline(events: Iterable[Event]) -> list[str]:
    """The journal in words, one line per event that a person cares for."""
    words = Timeline()
    return [line for event in events if (line := words.line(event))]


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
            counts = ", ".join(f"{n} {k}" for k, n in sorted(Counter(self._arrived.values()).items()))
            self._arrived = {}
            rate = f"{data['successes']}/{len(data['episodes'])}"
            end = f"skipped: {data['facts']['skipped']}" if "skipped" in data["facts"] else f"-> {data['adapter'][:12]}"
            return f"update {data['update'] + 1} of {data['task']}: success {rate} ({counts}), {end}"
        elif kind == "gated":
            reasons = "; ".join(f"{r['task']} {r['text']}".strip() for r in data["reasons"])
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
