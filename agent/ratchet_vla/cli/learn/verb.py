"""`ratchet learn`: sequential fine-tuning by on-policy reinforcement learning, or a supervised warm start."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.computing import ComputingOptions
from ratchet_vla.cli.learn import retention, sequential, warmstart
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.defaults import LEARN
from ratchet_vla.learner.retention.regulariser import RetentionConfig
from ratchet_vla.learner.sequence import SequenceConfig
from ratchet_vla.learner.update import ranks as distributed
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy import device

NOTHING = (
    "nothing was learned, and no candidate was left: learning needs episodes of one start that end differently. "
    "Try a base that succeeds now and then, a higher --temperature, a larger --group-size, or demonstrations first"
)


@dataclass
class Learn(ComputingOptions):
    """Fine-tune one adapter on tasks, one after the other, evaluating all of them after each.

    With `--from demonstrations` the adapter is trained by cross-entropy on demonstrations instead, with replay of
    earlier tasks, and left as `candidate` for `ratchet adapters promote`.

    Commands to copy:

        ratchet learn --suite metaworld --tasks faucet-open window-open --out runs/two

        ratchet learn --suite libero_object --policy models/my-oft --tasks ... --update.algorithm grpo

        ratchet learn --from demonstrations --tasks window-close --warm.replay window-open --out runs/warm

        ratchet learn --start candidate --store runs/two/adapters --tasks door-open --out runs/third

        accelerate launch --num-processes 8 -m ratchet_vla.cli.main learn --device cuda --tasks ... --out runs/eight

    Exit 1 where nothing could be learned, as of episodes that all failed; no `candidate` is left then.

    Under `accelerate launch` or `torchrun` the processes share episodes and updates; see docs/scale.md. A run that was
    stopped goes on when the same command is given again.
    """

    tasks: tuple[str, ...]
    """Task names in the order in which they are learned."""
    source: Annotated[Literal["rollouts", "demonstrations"], tyro.conf.arg(name="from")] = "rollouts"
    """What is learned from: rollouts (on-policy reinforcement learning) or demonstrations (supervised)."""
    suite: str = "metaworld"
    """Simulation suite of the tasks."""
    held_out: tuple[str, ...] = ()
    """Names of tasks that are evaluated and never trained."""
    policy: Path | None = None
    """Folder of the base policy; the built-in one of the suite if absent."""
    start: str = ""
    """Adapter to go on from: id, id prefix or tag in --store; a new one if absent. It keeps its shape, whatever --lora
    says."""
    store: Path | None = None
    """Folder of the adapter store of --start; the run folder's own if absent."""
    out: Path = Path("runs/learn")
    """Run folder."""
    updates: int = LEARN.updates
    """Updates per task."""
    until: float = 0.0
    """A task ends early once this share (0 to 1) of an update's episodes succeeds; 0 makes all updates."""
    groups: int = LEARN.groups
    """Initial states per update."""
    group_size: int = LEARN.group_size
    """Episodes from each initial state."""
    temperature: float = LEARN.temperature
    """Sampling temperature of training episodes."""
    noise_correlation: float = LEARN.noise_correlation
    """Correlation (0 to 1) of the sampling noise within a chunk; small policies explore better with 0.9."""
    evaluation_episodes: int = 50
    """Episodes per task and evaluation; 0 evaluates nothing."""
    evaluation: Literal["greedy", "sampled"] = "greedy"
    """How evaluations choose actions: greedy takes the most likely one, sampled uses --temperature."""
    train_pool: int = 0
    """How many of a task's training states are used; 0 uses all."""
    horizon: int = 0
    """Longest episode in control steps; 0 takes each task's own."""
    seed: int = 0
    """Root of all random numbers."""
    reference: str = retention.BESIDE_THE_BASE
    """What holds the adapter to what it is not trained on: base (the reference set beside the base policy, if there is
    one), a file of `ratchet reference record`, or none, which is the published Seq. FT."""
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    lora: common.LoraOptions = field(default_factory=common.LoraOptions)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    warm: warmstart.Options = field(default_factory=warmstart.Options)
    rollouts: str = "local"
    """Where the simulators run: "local", "local-ray", or the address of a Ray cluster such as ray://head:10001."""
    workers: int = 2
    """Simulator processes."""
    slots: int = 12
    """Episodes at once in each simulator process."""
    threads: int = 1
    """CPU threads for the policy."""
    device: str = ""
    """Where the policy runs: cpu, cuda or auto; the value of RATCHET_DEVICE if absent. Of several processes each takes
    a GPU of its own."""
    shard: bool = False
    """With several processes: each keeps only a part of the frozen base in memory while it updates (FSDP). Makes no
    videos."""
    videos: bool = True
    """Write before/after GIFs."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        common.threads(self.threads)
        ranks = distributed.join(device.choose(self.device).type)
        try:
            return self._run(ranks)
        finally:
            if ranks is not None:
                ranks.leave()

    def _require_possible(self, ranks: distributed.Ranks | None) -> None:
        """Refuse options that exclude each other, before anything is opened.

        Raises:
            RatchetError: learn.one_process, learn.cannot_start.
        """
        supervised = self.source == "demonstrations"
        if supervised and ranks is not None:
            raise RatchetError(
                "learn.one_process", "a warm start runs in one process", fix="start it without accelerate or torchrun"
            )
        if self.shard and ranks is None:
            raise RatchetError(
                "learn.one_process",
                "--shard divides the base among processes, and there is one",
                fix="start it with accelerate launch or torchrun, or leave --shard out",
            )
        if supervised and self.start:
            raise RatchetError(
                "learn.cannot_start",
                "--start belongs to learning from rollouts",
                where=self.start,
                fix="for demonstrations: --warm.start and --warm.store",
            )

    def _learn_from_demonstrations(self, console: Console) -> int:
        plan = warmstart.WarmStartPlan(
            suite=self.suite,
            tasks=self.tasks,
            policy_folder=common.policy_folder(self.suite, self.policy),
            lora=self.lora,
            folder=self.out,
            options=self.warm,
        )
        document = warmstart.run(plan, console)
        if self.json:
            print(json.dumps(document))
        return 0 if any(stage["effect"] for stage in document["stages"]) else 1

    def _run(self, ranks: distributed.Ranks | None) -> int:
        console = Console(stderr=self.json, quiet=ranks is not None and not ranks.main)
        self._require_possible(ranks)
        if self.source == "demonstrations":
            return self._learn_from_demonstrations(console)
        retention.require_known(self.reference)
        config = SequenceConfig(
            tasks=self.tasks,
            held_out=self.held_out,
            updates=self.updates,
            until=self.until,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            evaluation_episodes=self.evaluation_episodes,
            evaluation_temperature=0.0 if self.evaluation == "greedy" else self.temperature,
            horizon=self.horizon,
            seed=self.seed,
            train_pool=self.train_pool,
            update=self.update,
        )
        result = sequential.run(
            sequential.RunPlan(
                title=f"Sequential fine-tuning on {self.suite}",
                suite=self.suite,
                policy_folder=common.policy_folder(self.suite, self.policy),
                config=config,
                lora=self.lora,
                folder=self.out,
                workers=self.workers,
                slots=self.slots,
                videos=self.videos,
                rollouts=self.rollouts,
                device=device.choose(self.device) if ranks is None else ranks.device,
                ranks=ranks,
                shard=self.shard,
                retention=retention.Choice(self.reference, self.retention),
                start=self.start,
                origin=FolderStore(self.store or self.out / "adapters") if self.start else None,
            ),
            console,
        )
        nothing = set(result.unlearned) == set(self.tasks)
        if ranks is not None and not ranks.main:
            return 1 if nothing else 0
        if self.json:
            print(json.dumps(result.as_dict()))
        else:
            console.print(f"report: {result.report}")
        if nothing:
            console.print(NOTHING, style="bold red")
        return 1 if nothing else 0
