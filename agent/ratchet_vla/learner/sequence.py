"""Sequential fine-tuning: one adapter through a list of tasks, evaluated on all of them after each stage.

Knows stages, updates, evaluation, checkpoints and resuming. Knows no simulator (environments are an argument) and no
update rule. Every random number is derived from (seed, what it is for), so a run that was killed and resumed gives the
numbers of a run that was not. A rollout that was cut off is run again from its first episode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ratchet_vla.adapters.lora.layers import Lora
from ratchet_vla.adapters.protocol import AdapterStore, Provenance
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.defaults import PAPER
from ratchet_vla.learner.measures.metrics import Cell, SuccessMatrix
from ratchet_vla.learner.methods.base import SeqFT, TaskUpdater
from ratchet_vla.learner.retention.regulariser import Retention
from ratchet_vla.learner.rollouts.batch import RolloutBatch
from ratchet_vla.learner.rollouts.collection import ChunkEnv
from ratchet_vla.learner.rollouts.evaluations import KnownEvaluations, key_of
from ratchet_vla.learner.rollouts.specs import EpisodeSpec, Task, evaluated, evaluation_specs, training_specs
from ratchet_vla.learner.update.ranks import Ranks, share_episodes
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy.noise import derive_seed
from ratchet_vla.policy.protocol import Policy
from ratchet_vla.storage.documents import append_line, replacing, write_text

__all__ = ["SequenceConfig", "SequentialRun", "Stop"]


@dataclass(frozen=True)
class SequenceConfig:
    """A sequential run. Defaults follow the published recipe where they do not depend on the size of the model."""

    tasks: tuple[str, ...]
    """Learned in this order."""
    held_out: tuple[str, ...] = ()
    """Never trained on; evaluated for zero-shot success and forgetting."""
    updates: int = PAPER.updates
    """Updates per task."""
    groups: int = PAPER.groups
    """Initial states per update."""
    group_size: int = PAPER.group_size
    """Episodes from each initial state."""
    temperature: float = PAPER.temperature
    """Sampling temperature of training episodes."""
    noise_correlation: float = PAPER.noise_correlation
    """Correlation of the sampling noise within a chunk, in [0, 1); see `policy.noise.chunk_noise`."""
    evaluation_episodes: int = 50
    """Episodes per task and evaluation, at most one per evaluation state; 0 evaluates nothing."""
    evaluation_temperature: float = 0.0
    """0 evaluates greedily; the published code evaluates at its sampling temperature."""
    seed: int = 0
    """Root of every random number of the run."""
    horizon: int = 0
    """Longest episode in control steps, in training and evaluation; 0 takes each task's own. A shorter one saves the
    time that lost episodes take, and makes success harder than the benchmark's."""
    until: float = 0.0
    """A task is over after an update in whose episodes this share succeeded, in (0, 1]; 0 makes all updates. On a
    solved task the signal is gone and steps of full size go on, at the cost of robot hours and of the other tasks."""
    train_pool: int = 0
    """Use only the first so many training states; 0 uses all."""
    update: UpdateConfig = field(default_factory=UpdateConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise RatchetError("learn.bad_setting", f"until {self.until} is no share of episodes", fix="0 to 1")


class Stop(Exception):
    """Raised inside an event handler to end a run early, as a kill would; resume continues it."""


Event = Callable[[str, dict[str, Any]], None]


class SequentialRun:
    """One run in one folder. Call `run`; call it again after a crash to go on.

    Args:
        policy: the learner's policy, its module carrying `lora`.
        env: where episodes run.
        tasks: by name, at least those of the configuration.
        store: receives one adapter per stage that has changed the base.
        serve: given an adapter id (or "" for the base), returns the policy that runs it; this is where the caller hot
            swaps, and what is evaluated is what it returns.
        on_event: called with ("evaluated" | "update" | "stage", facts).
        method: Seq. FT if absent; see `methods`.
        known: evaluations that need not be made again; None makes all. Not for several ranks.
        ranks: the processes that run this together, all with the same arguments but `env`; rank 0 writes the folder,
            which all of them see. None for one process.
        origin: the command that this run was started with; stands on the card of every adapter that it makes.
        start: id of a stored adapter that the run goes on from; a fresh one if absent.
        retention: what holds the adapter near what it could do before; None for plain Seq. FT.

    Raises:
        RatchetError: learn.unknown_task, learn.cannot_start, learn.cannot_retain.
    """

    def __init__(
        self,
        policy: Policy,
        lora: Lora,
        env: ChunkEnv,
        tasks: Mapping[str, Task],
        store: AdapterStore,
        serve: Callable[[str], Policy],
        config: SequenceConfig,
        folder: Path,
        on_event: Event = lambda kind, facts: None,
        method: SeqFT | None = None,
        ranks: Ranks | None = None,
        known: KnownEvaluations | None = None,
        origin: str = "",
        start: str = "",
        retention: Retention | None = None,
    ) -> None:
        for name in (*config.tasks, *config.held_out):
            if name not in tasks:
                raise RatchetError("learn.unknown_task", f"no task '{name}'", fix=f"tasks: {', '.join(sorted(tasks))}")
        self.policy = policy
        self.lora = lora
        self.env = env
        self.tasks = tasks
        self.store = store
        self.serve = serve
        self.config = config
        self.folder = folder
        self.on_event = on_event
        self.origin = origin
        self.known = known if ranks is None else None
        self.ranks = ranks
        self._writes = ranks is None or ranks.main
        self.method = method or SeqFT()
        if start and type(self.method) is not SeqFT:
            raise RatchetError(
                "learn.cannot_start",
                f"method {self.method.name} has more state than an adapter holds",
                where=start[:12],
                fix="go on from an adapter with seq_ft, or start anew",
            )
        self.start = start
        self._stages_before = store.card(start).provenance.stage if start else 0
        self._base_hash = policy.base_hash  # of the base as it came: a method may change the weights
        self.method.bind(policy, lora, config.tasks, config.seed)
        self.policy = self.method.policy  # a control may train a network of its own
        if retention is not None and not self.method.can_retain:
            raise RatchetError(
                "learn.cannot_retain",
                f"method {self.method.name} has no base beside it that a reference set could hold it to",
                where=self.method.name,
                fix="--reference none",
            )
        self.retention = retention
        self.method.retention = retention
        if retention is not None:
            retention.bind(self.policy, lora, config.seed)
        self.matrix = SuccessMatrix(tuple(config.tasks), tuple(config.held_out))
        self.stage = 0  # tasks finished
        self.update = 0  # updates finished in the current stage
        self.solved = False  # whether the current stage needs no more of them
        self.moved = False  # whether one of them has changed anything
        self.skipped = ""  # why the last one that changed nothing did not
        self.unlearned: dict[str, str] = {}  # task -> why nothing could be learned on it
        self.adapter_ids: list[str] = [start]  # by stage, "" for the base
        self.updater: TaskUpdater | None = None

    @property
    def checkpoint_path(self) -> Path:
        """Where the run's state is kept after each update and evaluation."""
        return self.folder / "checkpoint.pt"

    def run(self) -> SuccessMatrix:
        """Go from wherever the folder is to the end of the list."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = self.checkpoint_path.exists()
        if resumed:
            self._resume()
        else:
            self.method.start(derive_seed(self.config.seed, "lora"))
            if self.start:
                origin = self.store.get(self.start)
                self.lora.load(origin.tensors, origin.config)
        if self.ranks is not None:
            # Before anything is written: a rank with another command, release or folder would learn something else.
            self.ranks.agree("the run", [self._fingerprint(), resumed, self.stage, self.update, self.adapter_ids])
        self._evaluate_stage()
        while self.stage < len(self.config.tasks):
            self._learn(self.config.tasks[self.stage])
            self._finish_stage()
            self._evaluate_stage()
        return self.matrix

    def _learn(self, task_name: str) -> None:
        if self.updater is None:
            self.method.begin_task(self.stage, derive_seed(self.config.seed, "lora", self.stage))
            if self.retention is not None:
                self.retention.begin_task()
            self.updater = self._new_updater()
        while self.update < self.config.updates and not self.solved:
            started_s = time.perf_counter()
            self.method.begin_update()
            if self.method.needs_rollouts:
                batch, figures = self._rollout(task_name)
            else:
                batch = None
                figures = self._facts(task_name)
            try:
                figures |= self.updater.update(batch)
                self.moved = True
            except RatchetError as error:
                if error.code != "learner.no_samples":
                    raise
                # Every group was unanimous: nothing to learn, nothing changed, and the update counts as made.
                figures |= {"skipped": error.what}
                self.skipped = error.what
            if self.retention is not None:
                self.retention.after_update(batch, task_name)
            self.update += 1
            self.solved = 0 < self.config.until <= figures["successes"] / max(figures["episodes"], 1)
            figures["seconds"] = time.perf_counter() - started_s
            self._log(figures)
            self._save()
            self.on_event("update", figures)

    def _facts(self, task_name: str) -> dict[str, Any]:
        return {
            "task": task_name,
            "stage": self.stage + 1,
            "update": self.update + 1,
            "episodes": 0,
            "successes": 0,
            "adapter_id": self.method.identity(),
            "seconds_rollout": 0.0,
            "decisions": 0,
        }

    def _rollout(self, task_name: str) -> tuple[RolloutBatch, dict[str, Any]]:
        figures = self._facts(task_name)
        specs = self._training_specs()
        outcomes, batch = share_episodes(
            self.ranks,
            self.policy,
            self.env,
            specs,
            temperature=self.config.temperature,
            noise_correlation=self.config.noise_correlation,
            adapter_id=figures["adapter_id"],
            progress=self._watch(f"{task_name} episodes", len(specs)),
        )
        assert batch is not None
        if batch.adapter_id != self.method.identity():
            raise RatchetError("learn.off_policy", "episodes of another adapter", where=batch.adapter_id)
        figures |= {
            "episodes": len(specs),
            "successes": int(outcomes.success.sum()),
            "seconds_rollout": outcomes.seconds,
            "decisions": len(batch.tokens),
        }
        return batch, figures

    def _finish_stage(self) -> None:
        task = self.config.tasks[self.stage]
        parent = self.adapter_ids[-1] or None
        self.method.end_task(self.stage)
        if self.retention is not None:
            self.retention.end_task(task)
        effect = self.lora.effect().overall
        notes = f"{self.method.name}: {self.origin}" if self.origin else self.method.name
        stage = self._stages_before + self.stage + 1
        provenance = Provenance(parent=parent, task=task, stage=stage, effect=effect, notes=notes)
        # An adapter without effect acts as the base does, under another name: nothing that a store should hold.
        keeps = effect > 0.0 or self.method.whole_model
        adapter_id = self.method.publish(self.store, provenance) if self._writes and keeps else ""
        if self.ranks is not None:
            # The others wait here until the adapter is in the store, from which they serve it.
            adapter_id = self.ranks.broadcast(adapter_id.encode()).decode()
        learned = self.moved and keeps and adapter_id != parent
        if not learned:
            self.unlearned[task] = self.skipped or "no update changed a weight"
        elif self._writes and not self.method.whole_model:
            self.store.tag("candidate", adapter_id, reason=f"after {task}")
        self.adapter_ids.append(adapter_id)
        self.stage += 1
        self.update = 0
        self.solved = False
        self.moved = False
        self.skipped = ""
        self.updater = None
        self._save()
        summary = {"task": task, "stage": self.stage, "adapter_id": adapter_id, "effect": effect, "learned": learned}
        if not learned:
            summary["why"] = self.unlearned[task]
        self.on_event("stage", summary)

    def _evaluate_stage(self) -> None:
        if not self.config.evaluation_episodes:
            return
        if not self.method.sequential and 0 < self.stage < len(self.config.tasks):
            return  # stages mean nothing to it
        for task_name in (*self.config.tasks, *self.config.held_out):
            if self.matrix.get(self.stage, task_name) is not None:
                continue
            specs = evaluation_specs(
                self.tasks[task_name], self.config.evaluation_episodes, self.config.seed, self.config.horizon
            )
            cell, seconds = self._evaluate(task_name, specs)
            self.matrix.record(self.stage, task_name, cell)
            if self._writes:
                self.matrix.save(self.folder / "matrix.json")
            self._save()
            self.on_event(
                "evaluated",
                {
                    "stage": self.stage,
                    "task": task_name,
                    "successes": cell.successes,
                    "trials": cell.trials,
                    "seconds": seconds,
                },
            )

    def _evaluate(self, task_name: str, specs: Sequence[EpisodeSpec]) -> tuple[Cell, float]:
        """Outcomes and the seconds that they took, 0 where they were known."""
        temperature = self.config.evaluation_temperature
        acting = self.method.acting(self.adapter_ids, self.stage, task_name)
        evaluation_key = key_of(self._base_hash, acting, self.env.contract.id, specs, temperature)
        cell = self.known.get(evaluation_key) if self.known is not None else None
        if cell is not None:
            return cell, 0.0
        outcomes, _ = share_episodes(
            self.ranks,
            self.method.serve(self.serve, self.adapter_ids, self.stage, task_name),
            self.env,
            specs,
            temperature=temperature,
            keep=False,
            progress=self._watch(f"evaluating {task_name}", len(specs)),
        )
        cell = evaluated(specs, outcomes.success)
        if self.known is not None:
            self.known.put(evaluation_key, cell)
        return cell, outcomes.seconds

    def _watch(self, activity: str, total: int) -> Callable[[int, bool], None]:
        own_total = total if self.ranks is None else len(range(total)[self.ranks.own(total)])

        def progress(done: int, success: bool) -> None:
            self.on_event("episode", {"done": done, "of": own_total, "success": success, "what": activity})

        return progress

    def _training_specs(self) -> list[EpisodeSpec]:
        """The update's episodes, spread evenly over the stage's tasks."""
        config = self.config
        specs = []
        task_names = self.method.tasks_of(self.stage)
        for task_index, task_name in enumerate(task_names):
            task_specs = training_specs(
                self.tasks[task_name],
                seed=config.seed if len(task_names) == 1 else derive_seed(config.seed, task_name),
                stage=self.stage,
                update=self.update,
                groups=len(range(task_index, config.groups, len(task_names))),
                group_size=config.group_size,
                horizon=config.horizon,
                pool=config.train_pool,
            )
            # Group numbers interleave the tasks, so that no two of them share a comparison group.
            specs += [dataclasses.replace(spec, group=spec.group * len(task_names) + task_index) for spec in task_specs]
        return specs

    def _new_updater(self) -> TaskUpdater:
        seed = derive_seed(self.config.seed, "shuffle", self.stage)
        return self.method.make_updater(self.config.update, torch.Generator().manual_seed(seed), self.ranks)

    def _log(self, figures: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        append_line(self.folder / "updates.jsonl", json.dumps(figures))

    def _fingerprint(self) -> str:
        """What must not change between the start of a run and its resumption."""
        config = dataclasses.asdict(self.config)
        if not self.config.until:
            del config["until"]  # so that runs from before there was such a setting go on
        identity = {"config": config, "base": self._base_hash, "method": self.method.name}
        if self.method.settings:
            identity["settings"] = self.method.settings
        if self.start:
            identity["start"] = self.start
        if self.retention is not None:
            identity["retention"] = self.retention.settings
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _save(self) -> None:
        if not self._writes:
            return
        state = {
            "fingerprint": self._fingerprint(),
            "stage": self.stage,
            "update": self.update,
            "solved": self.solved,
            "moved": self.moved,
            "skipped": self.skipped,
            "unlearned": self.unlearned,
            "adapter_ids": self.adapter_ids,
            "lora": self.lora.export(),
            "method": self.method.state_dict(),
            "retention": self.retention.state_dict() if self.retention is not None else None,
            "updater": self.updater.state_dict() if self.updater else None,
            "matrix": self.matrix.to_dict(),
        }
        with replacing(self.checkpoint_path) as file:
            torch.save(state, file)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self._fingerprint():
            raise RatchetError(
                "learn.changed_run",
                "this folder holds a run with another configuration or base model",
                where=str(self.folder),
                fix="use a new folder, or the same options as before",
            )
        self.stage = state["stage"]
        self.update = state["update"]
        self.solved = bool(state.get("solved", False))
        self.moved = bool(state.get("moved", self.update > 0))
        self.skipped = str(state.get("skipped", ""))
        self.unlearned = dict(state.get("unlearned", {}))
        self.adapter_ids = list(state["adapter_ids"])
        self.method.load_state_dict(state["method"])
        if self.retention is not None:
            self.retention.load_state_dict(state["retention"])
        self.lora.load(state["lora"])
        self.matrix = SuccessMatrix.from_dict(state["matrix"])
        if state["updater"] is not None:
            self.updater = self._new_updater()
            self.updater.load_state_dict(state["updater"])
        if self._writes:
            self._drop_log_lines_after_checkpoint()

    def _drop_log_lines_after_checkpoint(self) -> None:
        """An update that was logged but not checkpointed is run again and must not stand twice."""
        path = self.folder / "updates.jsonl"
        if not path.exists():
            return
        # Lines count stages from 1: the stage under way is logged as one more than those that are finished.
        last_stage = self.stage if self.updater is None else self.stage + 1
        last_kept = (last_stage, self.update)
        kept_lines = []
        for line in path.read_text().splitlines():
            try:
                figures = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by the kill
            if figures["stage"] <= self.stage or (figures["stage"], figures["update"]) <= last_kept:
                kept_lines.append(line)
        write_text(path, "".join(line + "\n" for line in kept_lines))
