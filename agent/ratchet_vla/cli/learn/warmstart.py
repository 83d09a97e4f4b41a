"""`ratchet learn --from demonstrations`: where the demonstrations come from, progress, and the candidate in the store.

Knows files, scripted experts and the store. The training itself is `ratchet_vla.learner.supervised.warmstart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations, NoiseConfig, collect
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.protocol import BASE, Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.episodes.library import survey
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.training import Progress as Report
from ratchet_vla.learner.supervised.warmstart import WarmStartConfig, warm_start
from ratchet_vla.policy.checkpoints.own import AnyPolicy


@dataclass
class Options:
    """Supervised warm start."""

    files: tuple[Path, ...] = ()
    """Demonstration files; the scripted experts record them if absent."""
    episodes: int = 20
    """Demonstrations per task where the experts record them."""
    stride: int = 2
    """Control steps between their samples."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    start: str = ""
    """Adapter to go on from: id, id prefix or tag in `store`; an empty one if absent."""
    store: Path | None = None
    """Adapter store; the run folder's own if absent."""
    replay: tuple[str, ...] = ()
    """Tasks to replay beside those in the starting adapter's lineage, such as some that the base can do."""
    learner: WarmStartConfig = field(default_factory=WarmStartConfig)
    processes: int = 2
    """Processes that record demonstrations."""


def run(
    *,
    suite: str,
    tasks: Sequence[str],
    policy_folder: Path,
    lora: common.LoraOptions,
    folder: Path,
    options: Options,
    console: Console,
) -> dict[str, Any]:
    """Train through the tasks in order; each result is stored, the last one is tagged `candidate`."""
    contract = registry.contract_for(suite)
    store = FolderStore(options.store or folder / "adapters", create=True)
    parent = store.resolve(options.start) if options.start else None
    parent = None if parent == BASE else parent
    made_for = None
    if parent is not None:
        lora, made_for = common.lora_of(store, parent), common.made_for(store, parent)
    policy, adapter = common.open_policy(policy_folder, contract, lora, made_for=made_for)
    learned = [t for t in (store.card(i).provenance.task for i in store.lineage(parent)) if t] if parent else []
    earlier = list(dict.fromkeys([*reversed(learned), *options.replay]))
    if parent is not None:
        stored = store.get(parent)
        adapter.load(stored.tensors, stored.config)
    wanted = list(dict.fromkeys([*tasks, *(earlier if options.learner.replay_share else [])]))
    common.find_tasks(suite, wanted)
    samples = _demonstrations(suite, wanted, policy, folder / "demonstrations.safetensors", options, console)
    first_stage = store.card(parent).provenance.stage if parent else 0
    results: list[dict[str, Any]] = []
    for stage, task in enumerate(tasks, first_stage + 1):
        history: list[Report] = []
        columns = (TextColumn(task), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=options.learner.train.steps, note="")

            def show(report: Report, progress: Progress = progress, bar: Any = bar, to: list[Report] = history) -> None:
                to.append(report)
                note = f"loss {report.loss:.2f} validation {report.validation_loss:.2f}"
                progress.update(bar, completed=report.step, note=note)

            others = [t for t in earlier if t != task]
            warm_start(policy, adapter, samples, task, others, options.learner, folder / f"stage{stage}", show)
        effect = adapter.effect().overall
        made = adapter.adapter(binding_of(policy))
        if made.id == parent or not effect:
            console.print(f"nothing was learned on {task}: no adapter is left")
        else:
            notes = "supervised warm start from demonstrations"
            store.put(made, Provenance(parent, task, stage, effect=effect, notes=notes))
            store.tag("candidate", made.id, reason=f"warm start on {task}")
            text = f"candidate {made.id[:12]}: {task}, replay of {len(others)} tasks, changes the base by {effect:.2%}"
            console.print(text)
        kept = made.id if effect else ""
        results.append({"task": task, "adapter_id": kept, "parent": parent, "replayed": others, "effect": effect})
        parent, earlier = kept or None, [*others, task]
    facts = {
        "command": common.command_line(),
        "suite": suite,
        "base_hash": policy.base_hash,
        "samples": len(samples),
        "stages": results,
        "learner": asdict(options.learner),
    }
    common.write_json(folder / "warmstart.json", facts)
    return facts


def _demonstrations(
    suite: str, tasks: Sequence[str], policy: AnyPolicy, path: Path, options: Options, console: Console
) -> Demonstrations:
    if options.files:
        parts = [_loaded(file, policy) for file in options.files]
        return Demonstrations.concatenate(parts)
    if path.exists():
        found = Demonstrations.load(path)
        if set(tasks) <= set(found.tasks):
            return found
        raise RatchetError(
            "learn.changed_run", "the folder holds demonstrations of other tasks", where=str(path), fix="new folder"
        )
    from ratchet_vla.cli.learn.pretrain import demonstration_states

    with Progress(
        TextColumn("recording"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=console
    ) as progress:
        bar = progress.add_task("", total=len(tasks), note="")
        found = collect(
            suite,
            tasks,
            demonstration_states(suite, options.episodes, -1),
            cameras=policy.spec.cameras,
            state_fields=policy.spec.state,
            chunk=policy.spec.chunk,
            stride=options.stride,
            noise=options.noise,
            seed=options.learner.train.seed,
            processes=options.processes,
            progress=lambda name, count: progress.update(bar, advance=1, note=f"{name}: {count} samples"),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    found.save(scratch)
    scratch.rename(path)
    return found


def _loaded(path: Path, policy: AnyPolicy) -> Demonstrations:
    """A file of demonstrations that were made for this policy's inputs and chunk.

    Raises:
        RatchetError: learn.no_demonstrations, learn.not_demonstrations, which tells what is there instead,
            learn.other_demonstrations.
    """
    if not path.exists():
        raise RatchetError("learn.no_demonstrations", "no such file", where=str(path), fix="name a file, or record")
    own = "a demonstrations.safetensors that `ratchet pretrain` or `learn --from demonstrations` wrote"
    other = ""
    if path.is_dir():
        other = "; ".join(f.what for f in survey.look(path)) or "a folder"
        other = "a store of episodes" if (path / survey.INDEX).is_file() else other
    elif path.suffix in (".hdf5", ".h5"):
        other = "an HDF5 file"
    if other:
        raise RatchetError(
            "learn.not_demonstrations",
            f"it is {other}: this verb takes no recorded episodes yet",
            where=str(path),
            fix=f"name {own}; `ratchet episodes import` brings such data into a store",
        )
    found = Demonstrations.load(path)
    spec = policy.spec
    wanted = (len(spec.cameras), spec.state_size if spec.state else 0, spec.chunk, len(spec.action_names))
    have = (found.images.shape[1], found.state.shape[1], *found.actions.shape[1:])
    if have != wanted:
        raise RatchetError(
            "learn.other_demonstrations",
            f"cameras, state values, chunk and action values are {have}, the policy has {wanted}",
            where=str(path),
            fix="record some for this policy: leave --warm.files out",
        )
    return found
