"""`ratchet pretrain`: train the small VLA from scratch on expert demonstrations."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations, NoiseConfig, collect
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.auxiliary_localisation import LocalisationObjective
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer
from ratchet_vla.learner.supervised.training import Progress as Report
from ratchet_vla.policy import device, presets
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.flow.policy import FlowPolicy, small_statistics


@dataclass
class Pretrain(ComputingOptions):
    """Make a small VLA: record expert demonstrations, train on them, save one folder.

    Commands to copy:

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --episodes 40 --out models/mine

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --localisation.steps 1500 --out models/mine

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --head flow --out models/mine-flow

    A training that was stopped goes on when the same command is given again.
    """

    tasks: tuple[str, ...]
    """Tasks to demonstrate."""
    out: Path
    """Folder of the new policy; demonstrations and checkpoints go to its subfolder `work`."""
    head: Literal["tokens", "flow"] = "tokens"
    """How actions are given: "tokens" as in OpenVLA-OFT, "flow" by flow matching as in pi0."""
    suite: str = "metaworld"
    """Suite of the tasks."""
    episodes: int = 40
    """Demonstrations per task, from states that are neither in the training nor in the evaluation set."""
    first_state: int = -1
    """First initial state of the demonstrations; -1 takes the suite's own demonstration states."""
    start: Path | None = None
    """Folder of a policy whose weights, statistics and tokenizer are the starting point; random weights if absent."""
    demonstrations: Path | None = None
    """File of demonstrations to use instead of recording: `work/demonstrations.safetensors` of an earlier training."""
    stride: int = 2
    """Control steps between samples."""
    chunk: int = 5
    """Actions per chunk."""
    cameras: tuple[str, ...] = ()
    """Contract cameras the policy sees; the first one if absent."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    localisation: PretrainConfig = field(default_factory=lambda: PretrainConfig(steps=0, learning_rate=2e-3))
    """Auxiliary localisation before acting is trained: the vision tower alone learns the objects' positions from the
    simulator; for a head of tokens."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    processes: int = 2
    """Processes that record demonstrations."""
    threads: int = 2
    """Threads for training."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        started = time.perf_counter()
        common.threads(self.threads)
        console = Console(stderr=self.json)
        contract = registry.contract_for(self.suite)
        common.find_tasks(self.suite, self.tasks)
        cameras = self.cameras or (contract.cameras[0].name,)
        state = tuple(s.name for s in contract.state)
        work = self.out / "work"
        work.mkdir(parents=True, exist_ok=True)
        file = self.demonstrations or work / "demonstrations.safetensors"
        if self.demonstrations is not None and not file.is_file():
            raise RatchetError(
                "learn.no_demonstrations", "no such file", where=str(file), fix="name the file, or record"
            )
        demonstrations = self._demonstrations(file, cameras, state, console)
        spec = presets.spec_for(contract, cameras=cameras, state=state, chunk=self.chunk, statistics_key=self.suite)
        if self.head == "flow":
            spec = replace(spec, bins=0)
        policy: checkpoint.AnyPolicy
        if self.start is not None:
            policy = checkpoint.load(self.start, device.choose())
            if policy.spec != spec:
                raise RatchetError(
                    "learn.changed_spec",
                    "the starting policy was made for other cameras, state, actions or chunk",
                    where=str(self.start),
                    fix="give the same options as when it was made",
                )
        else:
            texts = [info.instruction for info in registry.tasks(self.suite)]
            torch.manual_seed(self.train.seed)
            if self.head == "flow":
                flow = presets.small_flow(
                    state=spec.state_size, actions=len(spec.action_names), chunk=spec.chunk, image_size=spec.image_size
                )
                numbers = small_statistics(demonstrations.actions, demonstrations.state, spec)
                policy = FlowPolicy(flow, spec, numbers, train_tokenizer(texts, flow.vocabulary))
            else:
                config = presets.small(image_size=spec.image_size)
                tokenizer = train_tokenizer(texts, config.vocabulary - 256)
                policy = PrismaticPolicy(config, spec, statistics_of(demonstrations, spec, self.suite), tokenizer)
        policy.network.to(device.choose())
        localisation_history: list[Report] = []
        if self.localisation.steps:
            if not isinstance(policy, PrismaticPolicy):
                raise RatchetError(
                    "learn.no_scene",
                    "auxiliary localisation needs a head of tokens",
                    fix="--localisation.steps 0",
                )
            objective = LocalisationObjective(policy, demonstrations.scene, demonstrations.task)
            pretrainer = Pretrainer(
                policy, objective.trained(), demonstrations, self.localisation, work / "eyes", objective=objective
            )
            localisation_history = _train(pretrainer, "localising", console)
        trainer = Pretrainer(policy, list(policy.network.parameters()), demonstrations, self.train, work)
        history = _train(trainer, "acting", console)
        checkpoint.save(policy, self.out)
        result = {
            "folder": str(self.out),
            "base_hash": policy.base_hash,
            "parameters": sum(p.numel() for p in policy.network.parameters()),
            "samples": len(demonstrations),
            "tasks": list(self.tasks),
            "command": common.command_line(),
            # The keys of every training.json so far.
            "eyes": asdict(self.localisation),
            "train": asdict(self.train),
            "noise": asdict(self.noise),
            "history_eyes": [asdict(r) for r in localisation_history],
            "history": [asdict(r) for r in history],
            "seconds": time.perf_counter() - started,
        }
        common.write_json(self.out / "training.json", result)
        if self.json:
            print(json.dumps(result))
        else:
            console.print(f"saved {self.out}: {result['parameters']} parameters, {result['seconds']:.0f} s")
        return 0

    def _demonstrations(
        self, path: Path, cameras: tuple[str, ...], state: tuple[str, ...], console: Console
    ) -> Demonstrations:
        if path.exists():
            found = Demonstrations.load(path)
            if tuple(found.tasks) != self.tasks:
                raise RatchetError(
                    "learn.changed_run",
                    "the folder holds demonstrations of other tasks",
                    where=str(path),
                    fix="use a new folder",
                )
            return found
        states = demonstration_states(self.suite, self.episodes, self.first_state)
        columns = (TextColumn("recording"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(self.tasks), note="")

            def show(name: str, count: int) -> None:
                progress.update(bar, advance=1, note=f"{name}: {count} samples")
                if not console.is_terminal:
                    console.print(f"recorded {name}: {count} samples")

            found = collect(
                self.suite,
                self.tasks,
                states,
                cameras=cameras,
                state_fields=state,
                chunk=self.chunk,
                stride=self.stride,
                noise=self.noise,
                seed=self.train.seed,
                processes=self.processes,
                progress=show,
            )
        found.save(path)
        return found


def _train(trainer: Pretrainer, what: str, console: Console) -> list[Report]:
    """To the end, with a bar. what: in a word, for the person who waits."""
    history: list[Report] = []
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=trainer.last, note="")

        def show(report: Report) -> None:
            history.append(report)
            note = (
                f"step {report.step} loss {report.loss:.2f} validation {report.validation_loss:.2f} "
                f"error {report.validation_error:.2f} ({report.samples_per_second:.0f} samples/s)"
            )
            progress.update(bar, completed=report.step, note=note)
            if not console.is_terminal:
                console.print(f"{what} {note}")

        trainer.run(show)
    return history


def demonstration_states(suite: str, episodes: int, first: int) -> tuple[int, ...]:
    """Initial states for demonstrations, apart from the evaluation states; LIBERO's few are used in turn."""
    if first >= 0:
        return tuple(range(first, first + episodes))
    if suite == "metaworld":
        from ratchet_sim.metaworld.env import DEMONSTRATION_STATES

        return tuple(range(DEMONSTRATION_STATES[0], DEMONSTRATION_STATES[0] + episodes))
    states = registry.tasks(suite)[0].train_states
    return tuple(states[i % len(states)] for i in range(episodes))


def statistics_of(demonstrations: Demonstrations, spec: object, key: str) -> Statistics:
    """Frozen statistics of the pretraining data: 1st and 99th percentile of actions, mean and deviation of the state.

    The gripper passes unnormalised, as in the published models.
    """
    from ratchet_vla.contract import PolicySpec

    assert isinstance(spec, PolicySpec)
    flat = demonstrations.actions.reshape(-1, demonstrations.actions.shape[-1])
    q01, q99 = np.quantile(flat, 0.01, axis=0), np.quantile(flat, 0.99, axis=0)
    mask = tuple(name != spec.gripper_dim for name in spec.action_names)
    for name, low, high, normalised in zip(spec.action_names, q01, q99, mask, strict=True):
        if normalised and not low < high:
            raise RatchetError(
                "learn.still_dimension",
                f"'{name}' never moves in the demonstrations, so it cannot be normalised",
                where=key,
                fix="demonstrate tasks that use every dimension",
            )
    deviation = np.maximum(demonstrations.state.std(0), 1e-4)
    return Statistics(
        key=key,
        units=spec.action_units,
        q01=tuple(float(v) for v in q01),
        q99=tuple(float(v) for v in q99),
        mask=mask,
        state_mean=tuple(float(v) for v in demonstrations.state.mean(0)),
        state_std=tuple(float(v) for v in deviation),
    )
