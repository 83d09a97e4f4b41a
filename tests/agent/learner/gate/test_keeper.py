"""A gate that measures the wrong adapter, or other episodes for the two, is worse than none.

Pinned: both adapters run the same episodes through the hot swap, the decision lies on the candidate's card, a gate
that was cut off goes on where it was and gives the same decision, and where there is nothing to run on it holds.
Determinism: fixed policy and seeds, sampled actions with noise from those seeds, a fake simulator.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ratchet_sim.workers.vector import ChunkVectorEnv
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.adapters.swap.hotswap import HotSwapper
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.gate.decision import GateConfig
from ratchet_vla.learner.gate.keeper import Gatekeeper, earlier_tasks
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import episode_keys, evaluation_specs
from ratchet_vla.policy.protocol import Policy
from tests.agent.learner.runs import TASKS, fake_env, tiny_with_adapter

CONFIG = GateConfig(episodes=6, min_episodes=6, temperature=1.0)


@pytest.fixture(scope="module")
def env() -> Iterator[ChunkVectorEnv]:
    made = fake_env()
    yield made
    made.close()


@dataclasses.dataclass
class World:
    """A store with two adapters in a line, and a policy in use."""

    store: FolderStore
    first: str
    second: str
    swapper: HotSwapper
    policy: Policy
    served: list[str]

    def serve(self, adapter_id: str) -> Policy:
        self.served.append(adapter_id)
        wanted = adapter_id or self.swapper.base_id
        if self.swapper.current_id != wanted:
            self.swapper.swap(wanted)
        return self.policy


@pytest.fixture
def world(tmp_path: Path) -> World:
    store = FolderStore(tmp_path / "store", create=True)
    policy, lora = tiny_with_adapter()
    ids: list[str] = []
    for seed, task in ((1, "door-open"), (2, "faucet-open")):
        generator = torch.Generator().manual_seed(seed)
        lora.load({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in lora.export().items()})
        card = store.put(lora.adapter(binding_of(policy)), Provenance(ids[-1] if ids else None, task, seed))
        ids.append(card.id)
    running, running_lora = tiny_with_adapter()
    first, second = ids
    return World(store, first, second, HotSwapper(running, running_lora, store=store), running, [])


def keeper(world: World, env: ChunkVectorEnv | None, folder: Path, **options: Any) -> Gatekeeper:
    return Gatekeeper(world.serve, env, TASKS, world.store, CONFIG, folder, **options)


def test_the_verdict_lies_on_the_card(world: World, env: ChunkVectorEnv, tmp_path: Path) -> None:
    decided = keeper(world, env, tmp_path).run(world.second, world.first, held_out=("push",))
    assert [(c.task, c.role) for c in decided.comparisons] == [
        ("faucet-open", "new"),
        ("door-open", "earlier"),
        ("push", "held_out"),
    ]
    assert world.served == [world.first] * 3 + [world.second] * 3
    assert all(c.active.episodes.keys() == c.candidate.episodes.keys() for c in decided.comparisons)
    card = world.store.card(world.second)
    assert card.provenance.gate["decision"] == decided.decision
    assert card.provenance.gate["active"] == world.first
    assert card.provenance.metrics["gate/door-open"] == decided.comparisons[1].candidate.rate.estimate
    assert world.store.verify() == []


def test_an_interrupted_gate_goes_on_and_agrees(world: World, env: ChunkVectorEnv, tmp_path: Path) -> None:
    whole = keeper(world, env, tmp_path / "whole").run(world.second, world.first)

    class Cut(Exception):
        pass

    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "evaluated"
        if seen == 3:
            raise Cut

    with pytest.raises(Cut):
        keeper(world, env, tmp_path / "cut", on_event=stop).run(world.second, world.first)
    world.served.clear()
    resumed = keeper(world, env, tmp_path / "cut").run(world.second, world.first)
    assert world.served == [world.second] * 2  # the third was not written down; two of four were
    assert resumed == whole


def test_the_base_is_the_rival_where_nothing_is_active(world: World, env: ChunkVectorEnv, tmp_path: Path) -> None:
    decided = keeper(world, env, tmp_path).run(world.first, "")
    assert world.served == ["", world.first]
    assert decided.active == ""
    assert earlier_tasks(world.store, world.first, "") == []
    assert earlier_tasks(world.store, world.second, world.first) == ["door-open"]


def test_a_horizon_cuts_every_episode(
    world: World, env: ChunkVectorEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        outcomes, batch = run_episodes(*args, **options)
        steps.extend(outcomes.steps.tolist())
        return outcomes, batch

    monkeypatch.setattr("ratchet_vla.learner.gate.keeper.run_episodes", counted)
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, horizon=4))
    keeper(world, env, tmp_path).run(world.first, "")
    assert len(steps) == 12
    assert max(steps) == 4
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, horizon=0))
    keeper(world, env, tmp_path).run(world.first, "")
    assert max(steps[12:]) > 4, "outcomes of another horizon were taken for these"


def test_without_a_simulator_it_holds(world: World, tmp_path: Path) -> None:
    decided = keeper(world, None, tmp_path).run(world.second, world.first)
    assert decided.decision == "hold"
    assert [r.code for r in decided.reasons] == ["gate.cannot_evaluate"]
    assert world.store.card(world.second).provenance.gate["decision"] == "hold"


def test_a_failing_simulator_makes_it_hold(
    world: World, env: ChunkVectorEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RatchetError("sim.worker_lost", "the simulator died again and again")

    monkeypatch.setattr("ratchet_vla.learner.gate.keeper.run_episodes", fail)
    decided = keeper(world, env, tmp_path).run(world.second, world.first)
    assert decided.decision == "hold"
    assert "sim.worker_lost" in decided.reasons[0].text


def test_refusals(world: World, env: ChunkVectorEnv, tmp_path: Path) -> None:
    gate = keeper(world, env, tmp_path)
    with pytest.raises(RatchetError) as refused:
        gate.run(world.first, world.first)
    assert refused.value.code == "gate.same"
    policy, lora = tiny_with_adapter()
    nameless = world.store.put(lora.adapter(binding_of(policy))).id
    with pytest.raises(RatchetError) as refused:
        gate.run(nameless, world.first)
    assert refused.value.code == "gate.no_task"


def test_several_draws_start_from_the_same_states_with_other_noise(
    world: World, env: ChunkVectorEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["door-open"]
    one = evaluation_specs(task, 6, CONFIG.seed, purpose="gate")
    three = evaluation_specs(task, 6, CONFIG.seed, purpose="gate", draws=3)
    assert three[:6] == one, "the first draw is the one of a gate with a single draw"
    assert [s.initial_state for s in three] == [s.initial_state for s in one] * 3
    assert len({s.seed for s in three}) == 18

    single = keeper(world, env, tmp_path).run(world.first, "").comparisons[0]
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, draws=3))
    drawn = keeper(world, env, tmp_path).run(world.first, "").comparisons[0]
    assert list(drawn.candidate.episodes) == episode_keys(three)
    assert drawn.candidate.trials == 18
    assert dict(list(drawn.active.episodes.items())[:6]) == dict(single.active.episodes)
