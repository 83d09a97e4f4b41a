"""The learner as a service: takes episodes in, updates, asks the gate, promotes, and says what it wants next.

Knows the order of steps; each is written to the journal before or after it happens, so that a kill between any two
changes nothing but time. Knows no simulator, no robot and no socket: reading episodes, the gate and telling robots are
arguments. `step` does one thing; whoever runs the service calls it until it returns False.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.adapters.files import Files
from agent.adapters.protocol import Provenance
from agent.adapters.store import FolderStore
from agent.errors import RatchetError
from agent.learner.gate import Verdict
from agent.learner.intake import Ruling, Wanted, rule
from agent.learner.ledger import Arrival, Ledger
from agent.learner.sequence import Task
from agent.learner.service_config import ServiceConfig
from agent.learner.trainer import Trainer
from agent.link.disk import disk_errors
from agent.link.journal import Event, Journal
from agent.records import Episode

log = logging.getLogger("ratchet.learner")
Gate = Callable[[str, str, tuple[str, ...]], Verdict]
SMALL = 1 << 20  # bytes of a label or a session's manifest


class LearnerService:
    """One line of learning in one folder.

    Args:
        path_of: where the inbox keeps the file with this hash.
        read: reads an episode's file.
        gate: given (candidate, active or "", held-out tasks), the verdict; it also keeps it on the card.
        tasks: by name, at least those of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        config: ServiceConfig,
        trainer: Trainer,
        store: FolderStore,
        journal: Journal,
        path_of: Callable[[str], Path],
        read: Callable[[Path], Episode],
        gate: Gate,
        tasks: Mapping[str, Task],
        *,
        files: Files | None = None,
    ) -> None:
        for name in (*config.tasks, *config.held_out):
            if name not in tasks:
                raise RatchetError("learn.unknown_task", f"no task '{name}'", fix=f"tasks: {', '.join(sorted(tasks))}")
        self.folder, self.config, self.trainer, self.store = folder, config, trainer, store
        self._journal, self._path_of, self._read, self._gate, self._tasks = journal, path_of, read, gate, tasks
        self._files = files or Files()
        self.ledger = Ledger()
        self._folded = 0
        self._loaded: tuple[str, ...] = ()  # which state the trainer holds
        self._fold()
        if not self.ledger.fingerprint:
            self._write("run", fingerprint=self._fingerprint(), base=trainer.policy.base_hash, config=self._plain())
        elif self.ledger.fingerprint != self._fingerprint():
            raise RatchetError(
                "learn.changed_run",
                "this folder holds a run with another configuration or base model",
                where=str(folder),
                fix="use a new folder, or the same options as before",
            )
        active = store.tags().get("active", "")
        if not self.ledger.adapters and active:
            self._write("moved", adapter=active, by="the store at the start")

    # -- what robots are told ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The state to publish: small plain data."""
        ledger, config = self.ledger, self.config
        tags = {name: self.store.tags().get(name, "") for name in ("active", "previous")}
        order: dict[str, Any] | None = None
        if ledger.order and ledger.phase == "collecting":
            task = self._tasks[ledger.task]
            order = {
                "id": ledger.order,
                "task": ledger.task,
                "instruction": task.instruction,
                "adapter": ledger.training,
                "temperature": config.temperature,
                "noise_correlation": config.noise_correlation,
                "stage": ledger.stage,
                "update": ledger.update + ledger.attempt * config.updates,
                "groups": config.groups if config.slots else config.batch,
                "group_size": config.group_size if config.slots else 1,
                "horizon": config.horizon or task.horizon,
                "seed": config.seed,
                "slots": config.slots,
            }
        wanted = [tags["previous"], tags["active"], ledger.training if order else ""]
        return {
            "run": ledger.fingerprint[:12],
            "mode": config.mode,
            "phase": ledger.phase,
            "base": self.trainer.policy.base_hash,
            "tags": tags,
            "adapters": [a for a in dict.fromkeys(wanted) if a],
            "order": order,
        }

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next thing, if there is one. False: nothing to do until something arrives.

        Raises:
            RatchetError: link.disk_full, adapter.disk_full and other refusals; the same step is tried again next time.
        """
        self._fold()
        ledger = self.ledger
        if ledger.unruled:
            self._look(*ledger.unruled[0].split(" ", 1))
        elif self._moved():
            pass
        elif ledger.phase == "new":
            self._first()
        elif ledger.phase == "collecting":
            return self._complete()
        elif ledger.phase == "updating":
            self._update()
        elif ledger.phase == "gating":
            self._ask()
        elif ledger.phase == "deciding":
            self._decide()
        elif ledger.phase == "waiting":
            return self._person()
        else:
            return False
        return True

    def _look(self, type: str, sha: str) -> None:
        """Rule on an episode, or take in another file."""
        if type == "episode":
            arrival = self.ledger.arrivals[sha]
            self._rule(arrival)
            return
        facts: dict[str, Any] = {}
        if type in ("label", "session"):
            try:
                raw = json.loads(self._path_of(sha).read_bytes()[:SMALL])
                if type == "label":
                    label: dict[str, Any] = {
                        "episode": str(raw["episode"]),
                        "success": bool(raw["success"]),
                        "source": str(raw["source"]),
                    }
                    if not label["source"].startswith("human:"):
                        raise ValueError("not a person's")
                    facts = {"label": label}
                else:
                    facts = {"session": str(raw["session"]), "ended": bool(raw.get("ended"))}
            except (ValueError, KeyError, TypeError) as error:
                facts = {"unreadable": str(error)[:200]}
        self._write("noted", sha=sha, type=type, **facts)

    def _rule(self, arrival: Arrival) -> None:
        facts: dict[str, Any] = {"adapter": "", "success": None, "source": ""}
        if arrival.used:
            self._write("noted", sha=arrival.sha, type="episode")
            return
        try:
            episode = self._read(self._path_of(arrival.sha))
        except (RatchetError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
            ruling = Ruling("replay", "inbox.unreadable", str(error)[:200] or type(error).__name__)
        else:
            label = self.ledger.labels.get(arrival.sha)
            if label is not None:
                episode.success, episode.success_source = label
            wanted = Wanted(
                self.ledger.task, self.ledger.training, self.config.temperature, self.ledger.order, self.config.slots
            )
            if self.config.mode == "robot":
                wanted = dataclasses.replace(wanted, order="", slots=0)
            taken = {s for s, sha in self.ledger.filled.items() if sha != arrival.sha}
            ruling = rule(episode, wanted, taken)
            facts = {"adapter": episode.adapter_id, "success": episode.success, "source": episode.success_source}
        if ruling.decision == "replay":
            log.info("episode %s kept for replay: %s: %s", arrival.sha[:12], ruling.code, ruling.reason)
        self._write("ruled", sha=arrival.sha, **dataclasses.asdict(ruling), **facts)

    def _first(self) -> None:
        self._order(stage=0, update=0, attempt=0, fresh=True)

    def _order(self, *, stage: int, update: int, attempt: int, fresh: bool) -> None:
        """Say what is collected next. fresh: from the task's start adapter with a new optimiser."""
        ledger = self.ledger
        if stage >= len(self.config.tasks):
            self._write("done", active=ledger.active)
            return
        start, adapter = ledger.start, ledger.training
        checkpoint: dict[str, str] | None = None
        if fresh:
            if not start:
                first = self.trainer.initial()
                self._loaded = ()
                self.store.put(first, Provenance(effect=0.0, notes="empty: acts as the base"))
                start = first.id
            adapter, checkpoint = start, {}
        self._write(
            "ordered",
            order=f"{ledger.fingerprint[:12]}/{stage + 1}/{attempt + 1}/{update + 1}/{ledger.serial + 1}",
            serial=ledger.serial + 1,
            stage=stage,
            update=update,
            attempt=attempt,
            task=self.config.tasks[stage],
            adapter=adapter,
            start=start,
            checkpoint=checkpoint,
        )

    def _complete(self) -> bool:
        """Fix the batch once it is complete, before anything is computed from it."""
        ledger, config = self.ledger, self.config
        accepted = ledger.accepted()
        if config.mode == "simulation":
            ready = len(accepted) == config.slots
        elif config.batch_when == "full":
            ready = len(accepted) >= config.batch
            accepted = accepted[: config.batch]
        else:
            ready = ledger.session_ended and len(accepted) >= config.batch
        if ready:
            self._write("batch", order=ledger.order, episodes=[a.sha for a in accepted])
        return ready

    def _update(self) -> None:
        ledger = self.ledger
        started = time.perf_counter()
        self._load()
        arrivals = [ledger.arrivals[sha] for sha in ledger.batch]
        episodes = self._episodes(arrivals)
        self._files.step("phase", self.folder / "update")
        self._loaded = ()  # until the update is written down, what the trainer holds is nobody's
        try:
            facts = self.trainer.train(episodes, self._groups(arrivals, episodes))
        except RatchetError as error:
            if error.code not in ("learner.not_finite", "learner.bad_episode"):
                raise
            facts = {"skipped": error.what, "code": error.code}
        skipped = "skipped" in facts
        self._files.step("phase", self.folder / "updated")
        if skipped:
            self._load()
        path = self.folder / "checkpoints" / f"{ledger.serial}.pt"
        checkpoint = {"file": path.name, "sha": self.trainer.save(path)}
        adapter = self.trainer.adapter()
        if not skipped:
            effect = self.trainer.lora.effect().overall
            provenance = Provenance(parent=ledger.start, task=ledger.task, stage=ledger.stage + 1, effect=effect)
            self.store.put(adapter, provenance)
            self.store.tag("training", adapter.id, reason=ledger.order)
        last = ledger.update + 1 >= self.config.updates
        changed = adapter.id != ledger.start
        gate = changed and (last or (self.config.gate_each == "update" and not skipped))
        successes = sum(bool(a.success) for a in arrivals)
        self._write(
            "updated",
            order=ledger.order,
            stage=ledger.stage,
            task=ledger.task,
            update=ledger.update,
            attempt=ledger.attempt,
            episodes=list(ledger.batch),
            successes=successes,
            before=ledger.training,
            began=ledger.checkpoint,
            adapter=adapter.id,
            checkpoint=checkpoint,
            gate=gate,
            facts={**_finite(facts), "seconds": time.perf_counter() - started},
        )
        self._loaded = self._key()
        self._prune()

    def _episodes(self, arrivals: list[Arrival]) -> list[Episode]:
        """The files of a batch, with the success that was ruled on."""
        episodes = []
        for arrival in arrivals:
            episode = self._read(self._path_of(arrival.sha))
            episode.success, episode.success_source = arrival.success, arrival.source
            episodes.append(episode)
        return episodes

    def _groups(self, arrivals: list[Arrival], episodes: list[Episode]) -> list[int]:
        """Comparison groups: one initial state in simulation; on a robot the whole task, where no state can be
        repeated."""
        if self.config.mode == "simulation":
            return [a.slot // self.config.group_size for a in arrivals]
        repeated = Counter(e.initial_state for e in episodes if e.initial_state >= 0)
        return [e.initial_state if repeated[e.initial_state] > 1 else -1 for e in episodes]

    def _ask(self) -> None:
        """The gate. It keeps its own measurements, so one that was cut off goes on."""
        ledger = self.ledger
        candidate = ledger.training
        self.store.tag("candidate", candidate, reason=f"after {ledger.task}")
        self._files.step("phase", self.folder / "gate")
        verdict = self._gate(candidate, ledger.active, self.config.held_out)
        self._files.step("phase", self.folder / "gated")
        self._write(
            "gated",
            candidate=candidate,
            active=ledger.active,
            task=ledger.task,
            decision=verdict.decision,
            reasons=[{"code": r.code, "task": r.task, "text": r.text} for r in verdict.reasons],
            rows=json.loads(json.dumps(verdict.rows())),
        )

    def _decide(self) -> None:
        """What follows from the gate's verdict, or from there being none."""
        ledger, config = self.ledger, self.config
        verdict, over = ledger.verdict, ledger.update >= config.updates
        again = {"stage": ledger.stage, "attempt": ledger.attempt}
        if verdict == "promote" and not ledger.promoted:
            if self.store.tags().get("active") != ledger.candidate:
                self.store.promote(ledger.candidate, f"passed the gate after {ledger.task}")
            self._files.step("phase", self.folder / "promoted")
            self._write("promoted", adapter=ledger.candidate, by="the gate")
        elif verdict == "promote":
            if over or config.gate_each == "task":
                self._write("finished", task=ledger.task, stage=ledger.stage, learned=True, adapter=ledger.active)
            else:
                self._order(**again, update=ledger.update, fresh=False)
        elif verdict == "hold" and config.on_hold == "wait" and not ledger.waited:
            self._write("waits", candidate=ledger.candidate)
        elif verdict in ("hold", "reject"):
            if config.gate_each == "update" and not over:
                self._order(**again, update=ledger.update, fresh=True)
            elif config.gate_each == "task" and ledger.attempt + 1 < config.attempts:
                self._order(stage=ledger.stage, attempt=ledger.attempt + 1, update=0, fresh=verdict == "reject")
            else:
                self._write("finished", task=ledger.task, stage=ledger.stage, learned=False, adapter=ledger.active)
        elif verdict in ("finished", "moved"):
            self._order(**again, update=0, fresh=True)
        elif over:
            # Every update was skipped: nothing was learned that could be measured.
            self._write("finished", task=ledger.task, stage=ledger.stage, learned=False, adapter=ledger.active)
        else:
            self._order(**again, update=ledger.update, fresh=False)

    def _moved(self) -> bool:
        """Whether a person moved `active` in the store; then the current task begins again from there."""
        active = self.store.tags().get("active", "")
        ledger = self.ledger
        deciding = ledger.verdict == "promote" and not ledger.promoted
        if active == ledger.active or not active or (deciding and active == ledger.candidate):
            return False
        if ledger.phase == "waiting" and active == ledger.candidate:
            return False  # `_person` takes it as the promotion that was waited for
        self._write("moved", adapter=active, by="a person")
        return True

    def _person(self) -> bool:
        """A held candidate waits for a person: promoted with a reason, or tagged `declined`."""
        tags, candidate = self.store.tags(), self.ledger.candidate
        if tags.get("active") == candidate:
            self._write("promoted", adapter=candidate, by="a person")
        elif tags.get("declined") == candidate:
            self._write("declined", adapter=candidate)
        else:
            return False
        return True

    # -- inside --------------------------------------------------------------------------------------------------

    def _key(self) -> tuple[str, ...]:
        ledger = self.ledger
        return (ledger.training, ledger.checkpoint.get("sha", ""), str(ledger.stage), str(ledger.attempt))

    def _load(self) -> None:
        """Bring the trainer to where the journal says it was."""
        if self._loaded == self._key():
            return
        ledger = self.ledger
        self._load_from(ledger.training, ledger.checkpoint, ledger.stage, ledger.attempt)
        if self.trainer.adapter().id != ledger.training:
            raise RatchetError(
                "learner.bad_checkpoint",
                f"it holds {self.trainer.adapter().id[:12]}, the journal says {ledger.training[:12]}",
                where=str(self.folder),
                fix="restore the folder from a copy",
            )
        self._loaded = self._key()

    def _load_from(self, adapter: str, checkpoint: Mapping[str, str], stage: int, attempt: int) -> None:
        """The trainer's state behind an adapter. A damaged checkpoint is computed again from the one before and the
        same episodes, which is exact: the journal holds the batch."""
        if not checkpoint:
            self.trainer.begin(self.store.get(adapter), stage, attempt)
            return
        try:
            self.trainer.restore(self.folder / "checkpoints" / checkpoint["file"], checkpoint["sha"], stage, attempt)
        except RatchetError as error:
            made = [u for u in self.ledger.updates if u["checkpoint"] == checkpoint]
            if error.code != "learner.bad_checkpoint" or not made:
                raise
            log.warning("%s", error)
            update = made[-1]
            self._load_from(update["before"], update["began"], stage, attempt)
            if update["adapter"] != update["before"]:
                arrivals = [self.ledger.arrivals[sha] for sha in update["episodes"]]
                episodes = self._episodes(arrivals)
                self.trainer.train(episodes, self._groups(arrivals, episodes))

    def _prune(self) -> None:
        """Remove what nothing can need any more: old checkpoints, intermediate adapters and used batches."""
        ledger, config = self.ledger, self.config
        with disk_errors(self.folder):
            for path in (self.folder / "checkpoints").glob("*.pt"):
                if path.stem.isdigit() and int(path.stem) < ledger.serial - 1:
                    self._files.remove(path)
            if config.keep_batches:
                for shas in ledger.retired[: -config.keep_batches]:
                    for sha in shas:
                        self._files.remove(self._path_of(sha))
        kept = {g["candidate"] for g in ledger.gates} | set(self.store.tags().values()) | {ledger.start}
        stored = set(self.store.ids())
        for adapter in ledger.adapters[: -config.keep_updates]:
            if adapter in stored and adapter not in kept and adapter != ledger.adapters[0]:
                self.store.remove(adapter)

    def _fold(self) -> None:
        """Take in events that another thread wrote (`received`)."""
        events = self._journal.events
        while self._folded < len(events):
            self.ledger.apply(events[self._folded])
            self._folded += 1

    def _write(self, kind: str, **data: Any) -> Event:
        event = self._journal.append(kind, **data)
        self._fold()
        return event

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return plain

    def _fingerprint(self) -> str:
        facts = {"config": self._plain(), "base": self.trainer.policy.base_hash}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finite(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as the journal can hold them: a figure that is not finite becomes text."""
    return {k: v if not isinstance(v, float) or v - v == 0 else str(v) for k, v in facts.items()}
