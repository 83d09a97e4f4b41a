"""Recipes as data: what `ratchet demo` runs, per suite, and what the adapters beside the built-in bases came from.

Knows tasks, sizes and budgets that were measured; the measurements are in LOG.md and benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ratchet_vla.cli.common import LoraOptions
from ratchet_vla.learner.gate.decision import GateConfig
from ratchet_vla.learner.sequence import SequenceConfig
from ratchet_vla.learner.update.grpo import GrpoConfig
from ratchet_vla.learner.update.ppo import PpoConfig
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.paths import MODELS


@dataclass(frozen=True)
class Recipe:
    """One demo: tasks in order, held-out tasks and the learner's settings.

    Attributes:
        tasks: Names of the tasks, in the order in which they are learned.
        held_out: Names of tasks that are evaluated and never trained.
        updates: Updates per task.
        groups: Initial states per update.
        group_size: Episodes from each initial state.
        temperature: Sampling temperature of training episodes.
        noise_correlation: Correlation of the sampling noise within a chunk, 0 to 1.
        evaluation_episodes: Episodes per task and evaluation.
        update: How one update is made.
        lora: The adapter's shape.
        slots: Episodes at once in each simulator process.
        horizon: Longest episode in control steps; 0 takes each task's own.
        minutes: What it took on the machine of `estimate.REFERENCE_PRODUCTS`; 0 where nobody measured it.
        evaluation_temperature: Sampling temperature of evaluations; 0 acts greedily.
    """

    tasks: tuple[str, ...]
    held_out: tuple[str, ...]
    updates: int
    groups: int
    group_size: int
    temperature: float
    noise_correlation: float
    evaluation_episodes: int
    update: UpdateConfig
    lora: LoraOptions
    slots: int = 12
    horizon: int = 0
    minutes: float = 0.0
    evaluation_temperature: float = 0.0

    def sequence(self, seed: int) -> SequenceConfig:
        """Make the learner's settings for one seed."""
        return SequenceConfig(
            tasks=self.tasks,
            held_out=self.held_out,
            updates=self.updates,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            evaluation_episodes=self.evaluation_episodes,
            evaluation_temperature=self.evaluation_temperature,
            horizon=self.horizon,
            seed=seed,
            update=self.update,
        )


DEMO: dict[str, Recipe] = {
    "metaworld": Recipe(
        tasks=("handle-press", "coffee-button"),
        held_out=("button-press", "faucet-open"),
        updates=8,
        groups=24,
        group_size=8,
        temperature=1.0,
        noise_correlation=0.9,
        evaluation_episodes=100,
        update=UpdateConfig(
            algorithm="ppo",
            learning_rate=6e-3,
            minibatches=2,
            warmup_steps=4,
            grpo=GrpoConfig(horizon=40),
            ppo=PpoConfig(lam=0.9),
        ),
        lora=LoraOptions(rank=4, alpha=4.0),
        minutes=7.0,
    ),
    # 480 episodes per task. After its first task it left what is in models/small-libero-object/adapters.
    "libero_object": Recipe(
        tasks=(
            "pick_up_the_tomato_sauce_and_place_it_in_the_basket",
            "pick_up_the_cream_cheese_and_place_it_in_the_basket",
        ),
        held_out=(
            "pick_up_the_chocolate_pudding_and_place_it_in_the_basket",
            "pick_up_the_alphabet_soup_and_place_it_in_the_basket",
        ),
        updates=5,
        groups=24,
        group_size=4,
        temperature=1.0,
        noise_correlation=0.9,
        evaluation_episodes=20,
        evaluation_temperature=1.0,
        update=UpdateConfig(algorithm="ppo", learning_rate=6e-3, minibatches=2, warmup_steps=4, ppo=PpoConfig(lam=0.9)),
        lora=LoraOptions(rank=4, alpha=4.0),
        slots=4,
        horizon=200,
    ),
}


@dataclass(frozen=True)
class Shipped:
    """An adapter that a long run made, measured against its base in minutes, and one more update from it.

    Attributes:
        store: Its `active` is the adapter, made by `ratchet demo --suite`, promoted by `ratchet adapters promote`.
        gate: How both are measured on the tasks that it learned.
        held_out: Tasks that its card has measurements of besides.
        update: One task that the adapter never learned, with too few episodes for a gain.
        minutes: What all of it took on the machine that `estimate` compares with.
    """

    store: Path
    gate: GateConfig
    held_out: tuple[str, ...]
    update: Recipe
    minutes: float


SHIPPED: dict[str, Shipped] = {
    "libero_object": Shipped(
        store=MODELS / "small-libero-object" / "adapters",
        gate=GateConfig(episodes=20, draws=3, temperature=1.0, horizon=200),
        held_out=(DEMO["libero_object"].tasks[1], *DEMO["libero_object"].held_out),
        update=replace(
            DEMO["libero_object"],
            tasks=DEMO["libero_object"].tasks[1:],
            held_out=(),
            updates=1,
            groups=4,
            group_size=4,
            evaluation_episodes=0,
        ),
        minutes=7.8,
    ),
}
