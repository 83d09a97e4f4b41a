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

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations, NoiseConfig, collect
from ratchet_vla.cli import common, display
from ratchet_vla.cli import demonstrations as files
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.contract import PolicySpec
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.auxiliary_localisation import LocalisationObjective
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer
from ratchet_vla.learner.supervised.training import Progress as Report
from ratchet_vla.policy import device, presets
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.discrete.action_tokens import Statistics
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.discrete.text import train_tokenizer
from ratchet_vla.policy.flow.policy import FlowPolicy
from ratchet_vla.policy.flow.statistics import small_statistics

ACTION_BINS = 256  # ids at the end of the vocabulary that stand for actions, as in OpenVLA


@dataclass
class Pretrain(ComputingOptions):
    """Train a small VLA from scratch: record expert demonstrations, train on them, save one folder.

    Commands to copy:

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --episodes 40 --out models/mine

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --localisation.steps 1500 --out models/mine

        ratchet pretrain --suite metaworld --tasks door-open faucet-open --head flow --out models/mine-flow

    A training that was stopped goes on when the same command is given again.
    """

    tasks: tuple[str, ...]
    """Names of the tasks to demonstrate."""
    out: Path
    """Folder of the new policy; demonstrations and checkpoints go to its subfolder `work`."""
    head: Literal["tokens", "flow"] = "tokens"
    """How the policy outputs actions: tokens as in OpenVLA-OFT, flow (matching) as in pi0."""
    suite: str = "metaworld"
    """Simulation suite of the tasks."""
    episodes: int = 40
    """Demonstrations per task, from states that are neither in the training nor in the evaluation set."""
    first_state: int = -1
    """Id of the demonstrations' first initial state; -1 takes the suite's own demonstration states."""
    start: Path | None = None
    """Folder of a policy whose weights, statistics and tokenizer are the starting point; random weights if absent."""
    demonstrations: Path | None = None
    """File of demonstrations to use instead of recording: `work/demonstrations.safetensors` of an earlier training."""
    stride: int = 2
    """Control steps between two training samples of a demonstration."""
    chunk: int = 5
    """Actions per chunk."""
    cameras: tuple[str, ...] = ()
    """Names of the contract's cameras that the policy sees; its first camera if absent."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    localisation: PretrainConfig = field(default_factory=lambda: PretrainConfig(steps=0, learning_rate=2e-3))
    """Auxiliary localisation before acting is trained: the vision tower alone learns the objects' positions from the
    simulator; for a head of tokens."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    processes: int = 2
    """Simulator processes that record demonstrations."""
    threads: int = 2
    """CPU threads for training."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        started_s = time.perf_counter()
        common.threads(self.threads)
        console = Console(stderr=self.json)
        contract = registry.contract_for(self.suite)
        common.find_tasks(self.suite, self.tasks)
        cameras = self.cameras or (contract.cameras[0].name,)
        state = tuple(field_spec.name for field_spec in contract.state)
        work = self.out / "work"
        work.mkdir(parents=True, exist_ok=True)
        path = self.demonstrations or work / files.FILE
        if self.demonstrations is not None:
            files.require_file(path)
        demonstrations = self._demonstrations(path, cameras, state, console)
        spec = presets.spec_for(contract, cameras=cameras, state=state, chunk=self.chunk, statistics_key=self.suite)
        if self.head == "flow":
            spec = replace(spec, bins=0)  # flow matching outputs numbers, no tokens
        policy = self._new_policy(spec, demonstrations) if self.start is None else self._starting_policy(spec)
        policy.network.to(device.choose())
        localisation_history = self._localise(policy, demonstrations, work, console)
        trainer = Pretrainer(policy, list(policy.network.parameters()), demonstrations, self.train, work)
        history = _train(trainer, "acting", console)
        checkpoint.save(policy, self.out)
        document = {
            "folder": str(self.out),
            "base_hash": policy.base_hash,
            "parameters": sum(weight.numel() for weight in policy.network.parameters()),
            "samples": len(demonstrations),
            "tasks": list(self.tasks),
            "command": common.command_line(),
            # The keys of every training.json so far.
            "eyes": asdict(self.localisation),
            "train": asdict(self.train),
            "noise": asdict(self.noise),
            "history_eyes": [asdict(report) for report in localisation_history],
            "history": [asdict(report) for report in history],
            "seconds": time.perf_counter() - started_s,
        }
        common.write_json(self.out / "training.json", document)
        if self.json:
            print(json.dumps(document))
        else:
            console.print(f"saved {self.out}: {document['parameters']} parameters, {document['seconds']:.0f} s")
        return 0

    def _starting_policy(self, spec: PolicySpec) -> checkpoint.AnyPolicy:
        """Load the policy that the training starts from.

        Raises:
            RatchetError: learn.changed_spec, where it takes other inputs or gives other actions.
        """
        assert self.start is not None
        policy = checkpoint.load(self.start, device.choose())
        if policy.spec != spec:
            raise RatchetError(
                "learn.changed_spec",
                "the starting policy was made for other cameras, state, actions or chunk",
                where=str(self.start),
                fix="give the same options as when it was made",
            )
        return policy

    def _new_policy(self, spec: PolicySpec, demonstrations: Demonstrations) -> checkpoint.AnyPolicy:
        """Make a policy with random weights, its statistics and tokenizer from the data."""
        texts = [info.instruction for info in registry.tasks(self.suite)]
        torch.manual_seed(self.train.seed)
        if self.head == "flow":
            flow = presets.small_flow(
                state=spec.state_size, actions=len(spec.action_names), chunk=spec.chunk, image_size=spec.image_size
            )
            statistics = small_statistics(demonstrations.actions, demonstrations.state, spec)
            return FlowPolicy(flow, spec, statistics, train_tokenizer(texts, flow.vocabulary))
        config = presets.small(image_size=spec.image_size)
        tokenizer = train_tokenizer(texts, config.vocabulary - ACTION_BINS)
        return PrismaticPolicy(config, spec, statistics_of(demonstrations, spec, self.suite), tokenizer)

    def _localise(
        self, policy: checkpoint.AnyPolicy, demonstrations: Demonstrations, work: Path, console: Console
    ) -> list[Report]:
        """Train the vision tower alone on the positions of objects, where that is asked for.

        Raises:
            RatchetError: learn.no_scene, for a head that has no auxiliary localisation.
        """
        if not self.localisation.steps:
            return []
        if not isinstance(policy, PrismaticPolicy):
            raise RatchetError(
                "learn.no_scene", "auxiliary localisation needs a head of tokens", fix="--localisation.steps 0"
            )
        objective = LocalisationObjective(policy, demonstrations.scene, demonstrations.task)
        # The folder's name of every training so far: one that was stopped goes on.
        folder = work / "eyes"
        trainer = Pretrainer(
            policy, objective.trained(), demonstrations, self.localisation, folder, objective=objective
        )
        return _train(trainer, "localising", console)

    def _demonstrations(
        self, path: Path, cameras: tuple[str, ...], state: tuple[str, ...], console: Console
    ) -> Demonstrations:
        if path.exists():
            return files.load_for(path, self.tasks, exactly=True)
        states = files.demonstration_states(self.suite, self.episodes, self.first_state)
        with display.make_progress(console, notes=True) as progress:
            bar = progress.add_task("recording", total=len(self.tasks), note="")

            def show(name: str, count: int) -> None:
                progress.update(bar, advance=1, note=f"{name}: {count} samples")
                if not console.is_terminal:
                    console.print(f"recorded {name}: {count} samples")

            demonstrations = collect(
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
        files.save_whole(demonstrations, path)
        return demonstrations


def _train(trainer: Pretrainer, description: str, console: Console) -> list[Report]:
    """Train to the end, with a bar under this description."""
    history: list[Report] = []
    with display.make_progress(console, notes=True, remaining=True) as progress:
        bar = progress.add_task(description, total=trainer.last, note="")

        def show(report: Report) -> None:
            history.append(report)
            note = (
                f"step {report.step} loss {report.loss:.2f} validation {report.validation_loss:.2f} "
                f"error {report.validation_error:.2f} ({report.samples_per_second:.0f} samples/s)"
            )
            progress.update(bar, completed=report.step, note=note)
            if not console.is_terminal:
                console.print(f"{description} {note}")

        trainer.run(show)
    return history


def statistics_of(demonstrations: Demonstrations, spec: PolicySpec, key: str) -> Statistics:
    """Compute statistics of the pretraining data, which then stay as they are.

    1st and 99th percentile of actions, mean and deviation of the state; the gripper passes unnormalised, as in the
    published models.

    Raises:
        RatchetError: learn.still_dimension, for an action dimension that cannot be normalised.
    """
    actions = demonstrations.actions.reshape(-1, demonstrations.actions.shape[-1])  # (samples * chunk, dimensions)
    q01 = np.quantile(actions, 0.01, axis=0)
    q99 = np.quantile(actions, 0.99, axis=0)
    mask = tuple(name != spec.gripper_dim for name in spec.action_names)
    for name, low, high, normalised in zip(spec.action_names, q01, q99, mask, strict=True):
        if normalised and not low < high:
            raise RatchetError(
                "learn.still_dimension",
                f"'{name}' never moves in the demonstrations, so it cannot be normalised",
                where=key,
                fix="demonstrate tasks that use every dimension",
            )
    # A state that never changes divides by this, not by zero.
    deviation = np.maximum(demonstrations.state.std(0), 1e-4)
    return Statistics(
        key=key,
        units=spec.action_units,
        q01=tuple(float(value) for value in q01),
        q99=tuple(float(value) for value in q99),
        mask=mask,
        state_mean=tuple(float(value) for value in demonstrations.state.mean(0)),
        state_std=tuple(float(value) for value in deviation),
    )
