"""`ratchet learner`: the remote learner as a long-running service."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ratchet_sim import registry
from ratchet_sim.base import TaskInfo
from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, display
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.recipes import DEMO
from ratchet_vla.cli.remote import options as remote
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.defaults import SERVICE
from ratchet_vla.learner.gate.decision import GateConfig, GateDecision
from ratchet_vla.learner.gate.keeper import Gatekeeper
from ratchet_vla.learner.service.config import CHANGES, ServiceConfig, real_robot
from ratchet_vla.learner.service.host import LearnerHost
from ratchet_vla.learner.service.learner import Gate
from ratchet_vla.learner.service.telemetry import Timeline
from ratchet_vla.learner.service.trainer import Trainer
from ratchet_vla.learner.update import ranks as distributed
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.link import keys as link_keys
from ratchet_vla.policy import device
from ratchet_vla.records import Episode

KEYS = Path("keys/learner/learner.key_secret")


@dataclass
class Learner(ComputingOptions):
    """Take episodes from robots, update one adapter, and promote what passes the gate. Runs until it is stopped.

    Commands to copy:

        ratchet learner --tasks button-press handle-press --out runs/learner --keys keys/learner/learner.key_secret

        ratchet learner --mode robot --tasks stack-cups --suite metaworld --batch 24

        ratchet learner --tasks button-press --address tcp://127.0.0.1:5544 --plain      (one machine, no keys)

        torchrun --nproc-per-node 4 -m ratchet_vla.cli.main learner --device cuda --tasks ...     (updates on four GPUs)

    Killed at any moment, the same command goes on where it was. Robots keep running meanwhile. A second terminal:
    `ratchet status --learner runs/learner`.
    """

    tasks: tuple[str, ...]
    """Names of the tasks, in the order in which they are learned."""
    suite: str = "metaworld"
    """Suite of the tasks: their instructions, and the simulator that the gate uses."""
    out: Path = Path("runs/learner")
    """Folder of the learner; one learner per folder."""
    address: str = "tcp://0.0.0.0:5544"
    """Address that robots connect to."""
    keys: Path = KEYS
    """File of the learner's secret key; the allow list is the folder `allowed` beside it."""
    plain: bool = False
    """Listen without keys and encryption; only with an address on 127.0.0.1."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    held_out: tuple[str, ...] = ()
    """Names of tasks that are never trained and that the gate compares."""
    mode: Literal["simulation", "robot"] = "simulation"
    """simulation: exact episodes are requested. robot: small-budget settings for an arm (see `--explain`)."""
    explain: bool = False
    """Print what the robot mode changes against the paper, and exit."""
    recipe: Literal["none", "demo"] = "none"
    """demo: use the measured recipe of `ratchet demo` for the suite, instead of the settings below."""
    updates: int = SERVICE.updates
    """Updates per task."""
    groups: int = SERVICE.groups
    """Initial states per update (simulation)."""
    group_size: int = SERVICE.group_size
    """Episodes from each initial state (simulation)."""
    batch: int = 24
    """How many verified on-policy episodes an update needs (robot)."""
    batch_when: Literal["full", "session"] = SERVICE.batch_when
    """When to update: full, as soon as there are so many; session, when a session ends with as many (robot)."""
    temperature: float = SERVICE.temperature
    """Sampling temperature of training episodes."""
    noise_correlation: float = SERVICE.noise_correlation
    """Correlation (0 to 1) of the sampling noise within a chunk; small policies explore better with 0.9."""
    attempts: int = 2
    """How often a task is tried before the learner goes on without it (simulation)."""
    keep_batches: int = 0
    """Batches whose files are kept after their update; 0 keeps all."""
    seed: int = 0
    """Root of all random numbers."""
    lora: common.LoraOptions = field(default_factory=common.LoraOptions)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    reserve_gib: float = 2.0
    """GiB of disk that stay free; where less is left, episodes are refused and wait on the robot."""
    workers: int = 2
    """Simulator processes of the gate. With 0 nothing is simulated: the gate holds, and a person decides."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    device: str = ""
    """Where the policy runs: cpu, cuda or auto; the value of RATCHET_DEVICE if absent. Of several processes each takes
    a GPU of its own."""
    shard: bool = False
    """With several processes: each keeps only a part of the frozen base in memory (FSDP)."""
    until_done: bool = False
    """End when all tasks are over, instead of waiting for robots."""
    verbose: bool = False
    """Log debug messages too."""

    def run(self) -> int:
        console = Console()
        if self.explain:
            print_changes(console)
            return 0
        common.threads(self.threads)
        ranks = distributed.join(device.choose(self.device).type)
        try:
            return self._run(console, ranks)
        finally:
            if ranks is not None:
                ranks.leave()

    def _run(self, console: Console, ranks: distributed.Ranks | None) -> int:
        remote.log_to_stderr(self.verbose)
        contract = registry.contract_for(self.suite)
        tasks = common.find_tasks(self.suite, [*self.tasks, *self.held_out])
        folder = common.policy_folder(self.suite, self.policy)
        config, lora = self.config()
        processor = device.choose(self.device) if ranks is None else ranks.device
        policy, adapter = common.open_policy(folder, contract, lora, processor)
        if ranks is not None and self.shard:
            ranks.shard(policy, adapter)
        trainer = Trainer(policy, adapter, config, ranks=ranks)
        if ranks is not None and not ranks.main:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # rank 0 finishes its step and says when to end
            trainer.assist()
            return 0
        try:
            self._serve(console, trainer, tasks, processor)
        except RatchetError:
            trainer.dismiss()
            raise
        trainer.dismiss()
        return 0

    def _serve(self, console: Console, trainer: Trainer, tasks: dict[str, TaskInfo], processor: torch.device) -> None:
        """Run the service to its end."""
        if trainer.config.mode == "robot":
            print_changes(console)
        pair = None if self.plain else link_keys.load(self.keys)
        with contextlib.ExitStack() as closing:

            def make_gate(store: FolderStore) -> Gate:
                gate = LateGate(lambda: self._gatekeeper(store, tasks, processor))
                closing.callback(gate.close)
                return gate

            host = LearnerHost(
                self.out,
                trainer.config,
                trainer,
                read_episode,
                make_gate,
                tasks,
                address=self.address,
                keys=pair,
                allow=None if self.plain else self.keys.parent,
                reserve=int(self.reserve_gib * 1024**3),
                on_step=TimelinePrinter(console).print_new,
            )
            remote.on_stop(host.stop)
            console.print(f"learner in {self.out}, policy {trainer.policy.base_hash[:12]}, listening on {self.address}")
            host.run(lambda: self.until_done and host.service.state.phase == "done" and host.all_robots_current())

    def _gatekeeper(
        self, store: FolderStore, tasks: dict[str, TaskInfo], processor: torch.device
    ) -> tuple[Gatekeeper, ChunkVectorEnv | None]:
        """A second policy and the gate's simulators; none of these where there are no workers: the gate then holds."""
        contract = registry.contract_for(self.suite)
        folder = common.policy_folder(self.suite, self.policy)
        running = common.open_running(folder, contract, self.config()[1], store, processor)
        env = None
        if self.workers:
            env = common.make_vector(running.policy, self.suite, contract, self.workers, self.slots)
        return Gatekeeper(running.serve, env, tasks, store, self.gate, self.out / "gate"), env

    def config(self) -> tuple[ServiceConfig, common.LoraOptions]:
        """The service's settings and the adapter's shape."""
        if self.mode == "robot":
            config = real_robot(
                self.tasks,
                held_out=self.held_out,
                batch=self.batch,
                batch_when=self.batch_when,
                updates=self.updates,
                temperature=self.temperature,
                seed=self.seed,
                keep_batches=self.keep_batches,
            )
            return config, self.lora
        shared: dict[str, Any] = {
            "tasks": self.tasks,
            "held_out": self.held_out,
            "attempts": self.attempts,
            "seed": self.seed,
            "keep_batches": self.keep_batches,
        }
        if self.recipe == "demo":
            recipe = DEMO[self.suite]
            settings = {"updates": recipe.updates, "groups": recipe.groups, "group_size": recipe.group_size}
            noise = {"temperature": recipe.temperature, "noise_correlation": recipe.noise_correlation}
            return ServiceConfig(**shared, **settings, **noise, update=recipe.update), recipe.lora  # type: ignore[arg-type]
        config = ServiceConfig(
            **shared,
            updates=self.updates,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            update=self.update,
        )
        return config, self.lora


class LateGate:
    """A gate that is built when it is first asked, not while robots only collect."""

    def __init__(self, build: Callable[[], tuple[Gatekeeper, ChunkVectorEnv | None]]) -> None:
        self._build = build
        self._keeper: Gatekeeper | None = None
        self._env: ChunkVectorEnv | None = None

    def __call__(self, candidate: str, active: str, held_out: tuple[str, ...]) -> GateDecision:
        """Run the gate, which is built first if need be."""
        if self._keeper is None:
            self._keeper, self._env = self._build()
        return self._keeper.run(candidate, active, held_out)

    def close(self) -> None:
        """End the simulators, if there are any."""
        if self._env is not None:
            self._env.close()


class TimelinePrinter:
    """Prints what happened since the last look, in words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._timeline = Timeline()
        self._printed = 0

    def print_new(self, host: LearnerHost) -> None:
        """Print the events since the last call."""
        events = host.journal.events
        for event in events[self._printed :]:
            if line := self._timeline.line(event):
                self._console.print(line, highlight=False, soft_wrap=True)
        self._printed = len(events)


def read_episode(path: Path) -> Episode:
    """An episode's file as records. Raises RatchetError episode.damaged and others."""
    return EpisodeReader(path).episode()


def print_changes(console: Console) -> None:
    """Print what learning on a real robot changes against the paper."""
    title = "robot mode against the paper (arXiv 2603.11653)"
    table = display.make_table(("what", "paper", "here", "why"), title=title, framed=False)
    for row in CHANGES:
        table.add_row(*row)
    console.print(table)
