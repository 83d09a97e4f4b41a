"""Recipes as data: what `ratchet demo` runs, per suite.

Knows tasks, sizes and budgets that were measured; the measurements are in LOG.md and benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.cli.common import LoraOptions
from agent.learner.grpo import GrpoConfig
from agent.learner.ppo import PpoConfig
from agent.learner.sequence import SequenceConfig
from agent.learner.update import UpdateConfig


@dataclass(frozen=True)
class Recipe:
    """One demo: tasks in order, held-out tasks and the learner's settings.

    minutes: what it took on the machine of `estimate.REFERENCE_PRODUCTS`; 0 where nobody measured it.
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

    def sequence(self, seed: int) -> SequenceConfig:
        return SequenceConfig(
            tasks=self.tasks,
            held_out=self.held_out,
            updates=self.updates,
            groups=self.groups,
            group_size=self.group_size,
            temperature=self.temperature,
            noise_correlation=self.noise_correlation,
            evaluation_episodes=self.evaluation_episodes,
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
        minutes=6.0,
    ),
    "libero_object": Recipe(
        tasks=(
            "pick_up_the_tomato_sauce_and_place_it_in_the_basket",
            "pick_up_the_cream_cheese_and_place_it_in_the_basket",
        ),
        held_out=("pick_up_the_chocolate_pudding_and_place_it_in_the_basket",),
        updates=12,
        groups=16,
        group_size=8,
        temperature=1.0,
        noise_correlation=0.9,
        evaluation_episodes=20,
        update=UpdateConfig(algorithm="ppo", learning_rate=6e-3, minibatches=2, warmup_steps=4, ppo=PpoConfig(lam=0.9)),
        lora=LoraOptions(rank=4, alpha=4.0),
        slots=4,
        horizon=200,
    ),
}

# What fits into a few minutes on two cores: the same loop in LIBERO, too short to show a gain.
SHORT: dict[str, Recipe] = {
    "libero_object": replace(
        DEMO["libero_object"],
        tasks=DEMO["libero_object"].tasks[:1],
        updates=1,
        groups=8,
        group_size=4,
        evaluation_episodes=10,
        minutes=3.0,
    ),
}
