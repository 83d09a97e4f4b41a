"""`ratchet learn --from demonstrations`: where the demonstrations come from, progress, and the candidate in the store.

Knows files, scripted experts and the store. The training itself is `ratchet_vla.learner.supervised.warmstart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations, NoiseConfig, collect
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.protocol import BASE, Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, display
from ratchet_vla.cli import demonstrations as files
from ratchet_vla.episodes.library import survey
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.training import Progress as Report
from ratchet_vla.learner.supervised.warmstart import WarmStartConfig, warm_start
from ratchet_vla.policy.checkpoints.own import AnyPolicy


@dataclass
class Options:
    """Supervised warm start."""

    files: tuple[Path, ...] = ()
    """Files of demonstrations; the scripted experts record some if absent."""
    episodes: int = 20
    """Demonstrations per task, where the experts record them."""
    stride: int = 2
    """Control steps between two training samples of a demonstration."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    start: str = ""
    """Adapter to go on from: id, id prefix or tag in `store`; a new one if absent."""
    store: Path | None = None
    """Folder of the adapter store; the run folder's own if absent."""
    replay: tuple[str, ...] = ()
    """Names of tasks to replay, besides those that the starting adapter learned; such as some that the base can do."""
    learner: WarmStartConfig = field(default_factory=WarmStartConfig)
    processes: int = 2
    """Simulator processes that record demonstrations."""


@dataclass(frozen=True)
class WarmStartPlan:
    """What is trained, from what, and where it is kept.

    Attributes:
        suite: Simulation suite of the tasks.
        tasks: Names of the tasks, in the order in which they are learned.
        policy_folder: Folder of the base policy.
        lora: The adapter's shape; a starting adapter keeps its own.
        folder: Run folder.
        options: The verb's options for a warm start.
    """

    suite: str
    tasks: tuple[str, ...]
    policy_folder: Path
    lora: common.LoraOptions
    folder: Path
    options: Options


class _WarmStart:
    """A warm start: policy, adapter and store in use.

    Attributes:
        parent: Id of the adapter that the next stage goes on from; None for the base.
        earlier: Names of the tasks that the next stage replays.
    """

    def __init__(self, plan: WarmStartPlan, console: Console) -> None:
        self.plan = plan
        self.console = console
        options = plan.options
        self.store = FolderStore(options.store or plan.folder / "adapters", create=True)
        parent = self.store.resolve(options.start) if options.start else BASE
        self.parent = None if parent == BASE else parent
        contract = registry.contract_for(plan.suite)
        if self.parent is None:
            self.policy, self.adapter = common.open_policy(plan.policy_folder, contract, plan.lora)
            learned: list[str] = []
        else:
            lora = common.lora_of(self.store, self.parent)
            made_for = common.made_for(self.store, self.parent)
            self.policy, self.adapter = common.open_policy(plan.policy_folder, contract, lora, made_for=made_for)
            stored = self.store.get(self.parent)
            self.adapter.load(stored.tensors, stored.config)
            lineage = [self.store.card(identity).provenance.task for identity in self.store.lineage(self.parent)]
            learned = [task for task in reversed(lineage) if task]
        self.earlier = list(dict.fromkeys([*learned, *options.replay]))
        needed = [*plan.tasks, *(self.earlier if options.learner.replay_share else [])]
        self.needed_tasks = list(dict.fromkeys(needed))
        common.find_tasks(plan.suite, self.needed_tasks)

    @property
    def first_stage(self) -> int:
        """Number of the first stage that is trained here."""
        return (0 if self.parent is None else self.store.card(self.parent).provenance.stage) + 1

    def learn(self, stage: int, task: str, samples: Demonstrations) -> dict[str, Any]:
        """Train one task, store and tag the result if it changes anything; returns the stage as plain data."""
        replayed = [name for name in self.earlier if name != task]
        self._train(stage, task, replayed, samples)
        effect = self.adapter.effect().overall
        learned = self.adapter.adapter(binding_of(self.policy))
        if learned.id == self.parent or not effect:
            self.console.print(f"nothing was learned on {task}: no adapter is left")
        else:
            notes = "supervised warm start from demonstrations"
            self.store.put(learned, Provenance(self.parent, task, stage, effect=effect, notes=notes))
            self.store.tag("candidate", learned.id, reason=f"warm start on {task}")
            self.console.print(
                f"candidate {learned.id[:12]}: {task}, replay of {len(replayed)} tasks, "
                f"changes the base by {effect:.2%}"
            )
        kept_id = learned.id if effect else ""
        result = {"task": task, "adapter_id": kept_id, "parent": self.parent, "replayed": replayed, "effect": effect}
        self.parent = kept_id or None
        self.earlier = [*replayed, task]
        return result

    def _train(self, stage: int, task: str, replayed: list[str], samples: Demonstrations) -> None:
        learner = self.plan.options.learner
        with display.make_progress(self.console, notes=True) as progress:
            bar = progress.add_task(task, total=learner.train.steps, note="")

            def show(report: Report) -> None:
                note = f"loss {report.loss:.2f} validation {report.validation_loss:.2f}"
                progress.update(bar, completed=report.step, note=note)

            folder = self.plan.folder / f"stage{stage}"
            warm_start(self.policy, self.adapter, samples, task, replayed, learner, folder, show)


def run(plan: WarmStartPlan, console: Console) -> dict[str, Any]:
    """Train through the tasks in order; each result is stored, the last one is tagged `candidate`."""
    training = _WarmStart(plan, console)
    samples = _demonstrations(plan, training.needed_tasks, training.policy, console)
    stages = []
    for stage, task in enumerate(plan.tasks, training.first_stage):
        stages.append(training.learn(stage, task, samples))
    document = {
        "command": common.command_line(),
        "suite": plan.suite,
        "base_hash": training.policy.base_hash,
        "samples": len(samples),
        "stages": stages,
        "learner": asdict(plan.options.learner),
    }
    common.write_json(plan.folder / "warmstart.json", document)
    return document


def _demonstrations(plan: WarmStartPlan, tasks: Sequence[str], policy: AnyPolicy, console: Console) -> Demonstrations:
    """The user's files, what the run folder has already, or else new recordings of the scripted experts."""
    options = plan.options
    if options.files:
        return Demonstrations.concatenate([_loaded(file, policy) for file in options.files])
    path = plan.folder / files.FILE
    if path.exists():
        return files.load_for(path, tasks, exactly=False)
    with display.make_progress(console, notes=True) as progress:
        bar = progress.add_task("recording", total=len(tasks), note="")
        demonstrations = collect(
            plan.suite,
            tasks,
            files.demonstration_states(plan.suite, options.episodes, -1),
            cameras=policy.spec.cameras,
            state_fields=policy.spec.state,
            chunk=policy.spec.chunk,
            stride=options.stride,
            noise=options.noise,
            seed=options.learner.train.seed,
            processes=options.processes,
            progress=lambda name, count: progress.update(bar, advance=1, note=f"{name}: {count} samples"),
        )
    files.save_whole(demonstrations, path)
    return demonstrations


def _loaded(path: Path, policy: AnyPolicy) -> Demonstrations:
    """Read a file of demonstrations that were made for this policy's inputs and chunk.

    Raises:
        RatchetError: learn.no_demonstrations; learn.not_demonstrations, which names what is there instead;
            learn.other_demonstrations.
    """
    if not path.exists():
        raise RatchetError("learn.no_demonstrations", "no such file", where=str(path), fix="name a file, or record")
    kind = _other_kind(path)
    if kind:
        raise RatchetError(
            "learn.not_demonstrations",
            f"it is {kind}: this verb takes no recorded episodes yet",
            where=str(path),
            fix=f"name a {files.FILE} that `ratchet pretrain` or `learn --from demonstrations` wrote; "
            "`ratchet episodes import` brings such data into a store",
        )
    demonstrations = Demonstrations.load(path)
    spec = policy.spec
    # The file's shapes: images N x cameras x H x W x 3, state N x values, actions N x chunk x values.
    shape_of_policy = (len(spec.cameras), spec.state_size if spec.state else 0, spec.chunk, len(spec.action_names))
    shape_of_file = (demonstrations.images.shape[1], demonstrations.state.shape[1], *demonstrations.actions.shape[1:])
    if shape_of_file != shape_of_policy:
        raise RatchetError(
            "learn.other_demonstrations",
            f"cameras, state values, chunk and action values are {shape_of_file}, the policy has {shape_of_policy}",
            where=str(path),
            fix="record some for this policy: leave --warm.files out",
        )
    return demonstrations


def _other_kind(path: Path) -> str:
    """What a path is, where it is known to be no file of demonstrations; else an empty text."""
    if path.is_dir():
        if (path / survey.INDEX).is_file():
            return "a store of episodes"
        return "; ".join(finding.what for finding in survey.look(path)) or "a folder"
    return "an HDF5 file" if path.suffix in (".hdf5", ".h5") else ""
