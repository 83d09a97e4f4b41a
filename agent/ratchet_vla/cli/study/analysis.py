"""`ratchet study analyse`: what the updates of a study look like, and how much of a new task's pull the base feels.

Knows stores, checkpoints, demonstrations and simulators. The measures are in `ratchet_vla.learner.study.analysis`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ratchet_sim import registry
from ratchet_sim.demonstrations import Demonstrations
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common, display
from ratchet_vla.cli import demonstrations as files
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods import variants
from ratchet_vla.learner.methods.base import require_discrete
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import training_specs
from ratchet_vla.learner.study.analysis import (
    LayerUpdate,
    adapter_update,
    demonstration_gradients,
    demonstration_losses,
    energy_in_top,
    fisher,
    fisher_energy,
    policy_gradient,
    weight_update,
)
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy.checkpoints import own as checkpoint


@dataclass(frozen=True)
class FisherOptions:
    """Energy of a new task's gradient in the base's Fisher information, over all weights of the network."""

    measure: bool = False
    """Measure the Fisher information; takes minutes."""
    methods: tuple[str, ...] = ("seq_ft", "small_cnn")
    """Methods whose starting networks are measured: the base for most, the control's own network for small_cnn."""
    gradient: Literal["episodes", "demonstrations"] = "episodes"
    """Where the new task's gradient comes from: on-policy episodes, as in training, or imitation of demonstrations."""
    samples: int = 256
    """How many demonstrated frames, of tasks other than the new one, the Fisher information is estimated from."""
    groups: int = 8
    """Initial states of the on-policy episodes."""
    group_size: int = 8
    """Episodes from each initial state."""
    top: float = 0.01
    """Share (0 to 1) of the weights, the most informative ones, in which the gradient's energy is counted."""
    workers: int = 2
    """Simulator processes."""
    slots: int = 8
    """Episodes at once in each simulator process."""


@dataclass
class Analyse:
    """Measure every update layer by layer: effective rank and norm.

    With --fisher.measure also how sensitive the base is to what was learned.

    Commands to copy:

        ratchet study analyse runs/study

        ratchet study analyse runs/study --fisher.measure --fisher.gradient demonstrations --json
    """

    out: Annotated[Path, tyro.conf.Positional] = Path("runs/study")
    """Study folder, run folder, or adapter store."""
    policy: Path | None = None
    """Folder of the base policy; the one that the trials name if absent."""
    layers: int = 0
    """How many layers of each update to print, the most changed first."""
    fisher: FisherOptions = field(default_factory=FisherOptions)
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        console = Console(width=100, stderr=self.json)
        rows = adapters_below(self.out) + whole_models_below(self.out, self.policy)
        if not rows:
            raise RatchetError("study.no_adapters", "no adapter store below this folder", where=str(self.out))
        energies = self._energies(console) if self.fisher.measure else []
        if self.json:
            print(json.dumps({"updates": rows, "fisher": energies}))
            return 0
        console.print(_updates(rows))
        for row in rows if self.layers else ():
            console.print(_layers(row, self.layers))
        if energies:
            console.print(_fisher(energies, self.fisher.top))
        return 0

    def _energies(self, console: Console) -> list[dict[str, Any]]:
        trial = _any_trial(self.out)
        suite = str(trial["suite"])
        config = trial["config"]["sequence"]
        tasks = tuple(config["tasks"])
        path = self.out / files.FILE
        if not path.is_file():
            raise RatchetError(
                "learn.no_demonstrations",
                "the Fisher information is measured on demonstrations",
                where=str(path),
                fix="run the study with a method that replays, or put a file of `ratchet pretrain` there",
            )
        data = Demonstrations.load(path)
        folder = self.policy or Path(trial["policy"])
        contract = registry.contract_for(suite)
        rows = []
        for label in self.fisher.methods:
            variant = variants.parse(label)
            base, lora = common.open_policy(folder, contract, common.LoraOptions(rank=1, alpha=1.0))
            method = variant.make(data)
            method.bind(base, lora, tasks, int(config["seed"]))
            method.start(int(config["seed"]))
            policy = require_discrete(method.policy)
            # The base's own weights, which are frozen otherwise; the adapter's are left out.
            of_adapter = {id(weight) for weight in lora.trainable()}
            weights = [weight for weight in policy.module.parameters() if id(weight) not in of_adapter]
            weights = [weight for weight in weights if weight.is_floating_point()]
            for weight in weights:
                weight.requires_grad_(True)
            for stage, task in enumerate(tasks):
                console.print(f"{label}: {task}")
                losses = demonstration_losses(policy, data, exclude=task, count=self.fisher.samples, seed=0)
                information = fisher(losses, weights)
                if self.fisher.gradient == "demonstrations":
                    gradient = demonstration_gradients(policy, weights, data, task, self.fisher.samples)
                else:
                    gradient = self._on_policy(policy, weights, suite, task, stage, trial)
                rows.append(
                    {
                        "method": label,
                        "task": task,
                        "weights": sum(weight.numel() for weight in weights),
                        "energy": fisher_energy(gradient, information),
                        "in_top": energy_in_top(gradient, information, self.fisher.top),
                        "gradient": self.fisher.gradient,
                    }
                )
        return rows

    def _on_policy(
        self, policy: Any, weights: list[torch.nn.Parameter], suite: str, task: str, stage: int, trial: dict[str, Any]
    ) -> list[torch.Tensor]:
        config = trial["config"]["sequence"]
        specs = training_specs(
            registry.task(suite, task),
            seed=int(config["seed"]),
            stage=stage,
            update=0,
            groups=self.fisher.groups,
            group_size=self.fisher.group_size,
            horizon=int(config["horizon"]),
        )
        contract = registry.contract_for(suite)
        env = common.make_vector(policy, suite, contract, self.fisher.workers, self.fisher.slots)
        try:
            _, batch = run_episodes(
                policy,
                env,
                specs,
                temperature=float(config["temperature"]),
                noise_correlation=float(config["noise_correlation"]),
            )
        finally:
            env.close()
        assert batch is not None
        return policy_gradient(policy, weights, batch, UpdateConfig(minibatches=1))


def adapters_below(root: Path) -> list[dict[str, Any]]:
    """Measure every stored adapter below a folder: a row each, in order of trial and stage."""
    rows = []
    folders = [path.parent for path in root.rglob("objects") if (path.parent / "tags").is_dir()]
    for folder in sorted(folders):
        store = FolderStore(folder)
        for name in store.ids():
            origin = store.card(name).provenance
            trial = str(folder.parent.relative_to(root)) if folder != root else "."
            rows.append(_row(trial, name, origin.task, origin.stage, adapter_update(store.get(name))))
    return sorted(rows, key=lambda row: (row["trial"], row["stage"]))


def whole_models_below(root: Path, policy: Path | None) -> list[dict[str, Any]]:
    """Measure every trial that trained all weights of the base, after its last task: a row each."""
    rows = []
    for path in sorted(root.rglob("state/checkpoint.pt")):
        folder = path.parent.parent
        trial = json.loads((folder / "run.json").read_text())
        if not str(trial.get("method", "")).startswith("full_ft"):
            continue
        base = checkpoint.load_discrete(policy or Path(trial["policy"])).base_tensors()
        state = torch.load(path, weights_only=True)
        after = dict(zip(state["method"]["names"], state["method"]["weights"], strict=True))
        before = {name: base[name] for name in after}
        tasks = trial["config"]["sequence"]["tasks"]
        last = max(int(state["stage"]), 1)
        rows.append(_row(str(folder.relative_to(root)), "", tasks[last - 1], last, weight_update(before, after)))
    return rows


def _row(trial: str, adapter: str, task: str, stage: int, layers: Sequence[LayerUpdate]) -> dict[str, Any]:
    ranks = [layer.effective_rank for layer in layers]
    mean = sum(ranks) / len(ranks)
    return {
        "trial": trial,
        "adapter": adapter,
        "task": task,
        "stage": stage,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "mean_effective_rank": mean,
        "spread_effective_rank": (sum((rank - mean) ** 2 for rank in ranks) / len(ranks)) ** 0.5,
        "norm": sum(layer.norm**2 for layer in layers) ** 0.5,
    }


def _any_trial(root: Path) -> dict[str, Any]:
    for path in sorted(root.rglob("run.json")):
        trial: dict[str, Any] = json.loads(path.read_text())
        if "config" in trial:
            return trial
    raise RatchetError("study.nothing_finished", "no trial", where=str(root), fix="run the study first")


def _updates(rows: list[dict[str, Any]]) -> Table:
    columns = ("trial", "stage", "task", "norm", "effective rank per layer")
    table = display.make_table(columns, title="updates: the change of weights since the base", folds=True)
    for row in rows:
        rank = f"{row['mean_effective_rank']:.2f} (spread {row['spread_effective_rank']:.2f})"
        table.add_row(row["trial"], str(row["stage"]), row["task"], f"{row['norm']:.3g}", rank)
    return table


def _layers(row: dict[str, Any], count: int) -> Table:
    title = f"{row['trial']}, stage {row['stage']}: most changed layers"
    table = display.make_table(("layer", "shape", "norm", "effective rank"), title=title, folds=True)
    for layer in sorted(row["layers"], key=lambda layer: -float(layer["norm"]))[:count]:
        shape = " x ".join(map(str, layer["shape"]))
        table.add_row(layer["layer"], shape, f"{layer['norm']:.3g}", f"{layer['effective_rank']:.2f}")
    return table


def _fisher(rows: list[dict[str, Any]], top: float) -> Table:
    columns = ("network", "task", "weights", "weighted by Fisher", f"in the top {top:.0%} of weights")
    title = "energy of the new task's gradient where the base is sensitive"
    table = display.make_table(columns, title=title, folds=True)
    for row in rows:
        table.add_row(
            row["method"],
            row["task"],
            f"{row['weights'] / 1e6:.1f} M",
            f"{row['energy']:.2e}",
            f"{row['in_top']:.3f}",
        )
    return table
