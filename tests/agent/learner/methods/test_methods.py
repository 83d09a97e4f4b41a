"""A comparison is worth what its baselines are worth: each method must be the method, not Seq. FT under another name.

Pinned: what defines each method against values computed by hand, and for all of them that a sequence of two tasks
runs and that a run which was stopped goes on to the same numbers. Determinism: fixed policy and seeds, a fake
simulator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ratchet_sim.demonstrations import Demonstrations
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.adapters.lora.layers import scaling_of, split_name
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.measures.metrics import measures
from ratchet_vla.learner.methods.cnn import SmallCNN
from ratchet_vla.learner.methods.ewc import EWC
from ratchet_vla.learner.methods.full import FullFineTuning
from ratchet_vla.learner.methods.oracle import Oracle
from ratchet_vla.learner.methods.registry import METHODS, method_named
from ratchet_vla.learner.methods.replay import DarkReplay, ExpertReplay
from ratchet_vla.learner.methods.retain import Retain, joined
from ratchet_vla.learner.methods.slca import SLCA, component
from ratchet_vla.learner.methods.supervised import Supervised
from ratchet_vla.learner.sequence import SequentialRun, Stop
from ratchet_vla.learner.update.step import UpdateConfig
from ratchet_vla.policy.protocol import PolicyInput
from tests.agent.learner.runs import CONFIG, start, tiny_with_adapter
from tests.agent.learner.supervised.test_warmstart import samples
from tests.agent.learner.test_sequence import TIMES, quiet

TASKS = CONFIG.tasks


@pytest.fixture(scope="module")
def demonstrations() -> Demonstrations:
    return samples({"push": 40, TASKS[0]: 40, TASKS[1]: 40})


def made(name: str, data: Demonstrations) -> Any:
    method = METHODS[name]
    if name == "small_cnn":
        return SmallCNN(data, width=32, warm_steps=4, warm_batch=8)
    return method(data) if method.needs_demonstrations else method()


def outcome(folder: Path, run: SequentialRun) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "state" / "updates.jsonl").read_text().splitlines()]
    return {
        "matrix": json.loads((folder / "state" / "matrix.json").read_text()),
        "updates": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "ids": run.adapter_ids,
    }


@pytest.fixture(scope="module")
def finished(
    demonstrations: Demonstrations, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], SequentialRun]]:
    cache: dict[str, tuple[dict[str, Any], SequentialRun]] = {}

    def run(name: str) -> tuple[dict[str, Any], SequentialRun]:
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            sequence = start(folder, quiet, method=made(name, demonstrations))
            cache[name] = outcome(folder, sequence), sequence
        return cache[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_gives_the_same_numbers(
    name: str, finished: Callable[..., Any], demonstrations: Demonstrations, tmp_path: Path
) -> None:
    expected, _ = finished(name)
    assert len(expected["ids"]) == 3
    assert len(set(expected["ids"])) == 3
    seen = 0

    def stop(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += kind == "update"
        if seen == 3:  # in the middle of the second task, where every method has something to remember
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop, method=made(name, demonstrations))
    assert outcome(tmp_path, start(tmp_path, quiet, method=made(name, demonstrations))) == expected


def test_a_run_of_another_method_is_not_continued(demonstrations: Demonstrations, tmp_path: Path) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "update":
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    with pytest.raises(RatchetError) as refused:
        start(tmp_path, quiet, method=EWC())
    assert refused.value.code == "learn.changed_run"


def test_names_and_needs(demonstrations: Demonstrations) -> None:
    with pytest.raises(RatchetError) as refused:
        method_named("ewk")
    assert refused.value.code == "learn.unknown_method"
    with pytest.raises(RatchetError) as refused:
        ExpertReplay()
    assert refused.value.code == "learn.no_demonstrations"


def bound(method: Any) -> Any:
    policy, lora = tiny_with_adapter()
    method.bind(policy, lora, TASKS, 0)
    method.start(1)
    return method


def test_ewc_penalty_by_hand() -> None:
    method = bound(EWC(strength=10.0, clamp=0.5))
    assert method.extra_loss(torch.Generator()) is None
    method.begin_update()
    gradients = ([2.0, 0.1], [0.0, 0.3])  # two optimiser steps, two different values per tensor
    for step in gradients:
        for p in method.parameters():
            p.grad = torch.full_like(p, step[0])
            p.grad.view(-1)[0] = step[1]
        method.on_gradient()
    method.end_task(0)
    fisher_rest, fisher_first = 0.5, (0.1**2 + 0.3**2) / 2  # (4 + 0) / 2 = 2, clamped to 0.5
    moved = 0.01
    with torch.no_grad():
        for p in method.parameters():
            p.add_(moved)
    count = sum(p.numel() for p in method.parameters())
    tensors = len(method.parameters())
    expected = 10.0 / 2 * moved**2 * (fisher_rest * (count - tensors) + fisher_first * tensors)
    assert float(method.extra_loss(torch.Generator()).detach()) == pytest.approx(expected, rel=1e-4)


def test_ewc_sums_the_fisher_over_tasks() -> None:
    method = bound(EWC(clamp=100.0))
    for stage, value in enumerate((1.0, 2.0)):
        method.begin_update()
        for p in method.parameters():
            p.grad = torch.full_like(p, value)
        method.on_gradient()
        method.end_task(stage)
    assert all(torch.allclose(f, torch.full_like(f, 5.0)) for f in method.fisher)


def test_ewc_keeps_the_last_update_that_taught_anything() -> None:
    method = bound(EWC(clamp=100.0))
    method.begin_task(0, 0)
    for value in (1.0, 3.0):
        method.begin_update()
        for p in method.parameters():
            p.grad = torch.full_like(p, value)
        method.on_gradient()
    method.begin_update()  # an update in which every group was unanimous: no gradient follows
    method.end_task(0)
    assert all(torch.allclose(f, torch.full_like(f, 9.0)) for f in method.fisher)
    method.begin_task(1, 0)  # a task that teaches nothing adds nothing
    method.begin_update()
    method.end_task(1)
    assert all(torch.allclose(f, torch.full_like(f, 9.0)) for f in method.fisher)


def test_replay_draws_from_other_tasks_only(demonstrations: Demonstrations) -> None:
    method = bound(ExpertReplay(demonstrations))
    method.begin_task(0, 0)
    assert {demonstrations.tasks[t] for t in demonstrations.task[method._rows]} == {"push"}
    method.begin_task(1, 0)
    assert {demonstrations.tasks[t] for t in demonstrations.task[method._rows]} == {"push", TASKS[0]}
    none = bound(ExpertReplay(samples({TASKS[0]: 5, TASKS[1]: 5})))
    with pytest.raises(RatchetError) as refused:
        none.begin_task(0, 0)
    assert refused.value.code == "learn.no_replay"


def test_replay_terms_by_hand(demonstrations: Demonstrations) -> None:
    expert, dark = bound(ExpertReplay(demonstrations, weight=0.5, batch=8)), bound(DarkReplay(demonstrations, batch=8))
    for method in (expert, dark):
        method.begin_task(1, 0)
    assert float(dark.extra_loss(torch.Generator().manual_seed(0)).detach()) == 0.0  # an empty adapter is the base
    picks = torch.randint(0, len(expert._rows), (8,), generator=torch.Generator().manual_seed(0)).numpy()
    rows = expert._rows[picks]
    frames = PolicyInput(
        demonstrations.images[rows],
        torch.from_numpy(demonstrations.state[rows]),
        [demonstrations.instructions[t] for t in demonstrations.task[rows]],
    )
    tokens = expert.policy.tokens_of(torch.from_numpy(demonstrations.actions[rows]))
    log_prob = expert.policy.logits(frames).float().log_softmax(-1)
    expected = -0.5 * float(log_prob.gather(-1, tokens[..., None]).mean())
    assert float(expert.extra_loss(torch.Generator().manual_seed(0)).detach()) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        for p in dark.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert float(dark.extra_loss(torch.Generator().manual_seed(0)).detach()) > 0


def test_merging_equals_the_sum() -> None:
    method = bound(Retain(coefficient=0.6))
    deltas = []
    for stage in range(3):
        method.begin_task(stage, 7 + stage)
        with torch.no_grad():
            for i, p in enumerate(method.parameters()):
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * stage + i)))
        deltas.append(written_out(method.lora.adapter(binding_of(method.policy))))
    whole = written_out(method.adapter())
    for layer, w in whole.items():
        expected = 0.6 * (deltas[0][layer] + deltas[1][layer]) + deltas[2][layer]
        torch.testing.assert_close(w, expected, rtol=1e-4, atol=1e-6)
    # A policy that loads the published adapter acts as the one that was trained.
    other, other_lora = tiny_with_adapter(rank=12)
    published = method.adapter()
    other_lora.load(published.tensors, published.config)
    data = samples({"push": 4})
    frames = PolicyInput(data.images, torch.from_numpy(data.state), [data.instructions[0]] * 4)
    torch.testing.assert_close(other.logits(frames), method.policy.logits(frames), rtol=1e-3, atol=1e-4)


def written_out(adapter: Any) -> dict[str, torch.Tensor]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        layer, half = split_name(name)
        halves.setdefault(layer, {})[half] = tensor.flatten(1)
    return {n: scaling_of(adapter.config, n) * h["lora_B"] @ h["lora_A"] for n, h in halves.items()}


def test_joining_one_adapter_changes_nothing() -> None:
    policy, lora = tiny_with_adapter()
    lora.reset(3)
    with torch.no_grad():
        for parameter in lora.trainable():
            parameter.add_(0.1)
    adapter = lora.adapter(binding_of(policy))
    once = joined([(1.0, dict(adapter.tensors))], adapter)
    for layer, w in written_out(once).items():
        torch.testing.assert_close(w, written_out(adapter)[layer])


def test_slca_gives_components_their_rates() -> None:
    method = bound(SLCA(vision=0.1, language=0.5, head=2.0))
    groups = method.parameter_groups(1e-2)
    assert sorted(g["lr"] for g in groups) == pytest.approx([1e-3, 5e-3, 2e-2])
    grouped = {id(p) for g in groups for p in g["params"]}
    assert grouped == {id(p) for p in method.parameters()}
    updater = method.make_updater(UpdateConfig(learning_rate=1e-2), torch.Generator())
    assert sorted(g["lr"] for g in updater.optimizer.param_groups) == pytest.approx([1e-3, 5e-3, 2e-2])
    assert component("language_model.lm_head.lora_A.x") == "head"


def test_expansion_cannot_forget_nor_transfer(finished: Callable[..., Any]) -> None:
    _, run = finished("expansion")
    found = measures(run.matrix)
    assert found.nbt is not None
    assert found.fwt is not None
    assert found.nbt.estimate == 0.0
    assert found.fwt.estimate == 0.0


def test_the_oracle_learns_all_tasks_at_every_stage(finished: Callable[..., Any]) -> None:
    assert bound(Oracle()).tasks_of(0) == TASKS
    _, run = finished("oracle")
    run.stage = run.update = 0
    specs = run._training_specs()
    assert {s.task for s in specs} == set(TASKS)
    assert len(specs) == CONFIG.groups * CONFIG.group_size
    assert len({s.group for s in specs}) == CONFIG.groups
    assert [s for s in run.matrix.stages if run.matrix.get(s, TASKS[0])] == [0, len(TASKS)], "stages mean nothing to it"


def test_full_fine_tuning_moves_the_base_and_no_adapter(finished: Callable[..., Any]) -> None:
    _, run = finished("full_ft")
    fresh, _ = tiny_with_adapter()
    moved = [
        name
        for (name, now), before in zip(
            run.policy.module.named_parameters(), dict(fresh.module.named_parameters()).values(), strict=True
        )
        if "lora_" not in name and not torch.equal(now, before)
    ]
    assert len(moved) > 20
    assert run.lora.effect().overall == 0.0
    assert isinstance(run.method, FullFineTuning)


def test_the_cnn_is_a_network_of_its_own_with_a_supervised_start(demonstrations: Demonstrations) -> None:
    fresh, warm = (bound(SmallCNN(demonstrations, width=32, warm_steps=n, warm_batch=16)) for n in (0, 60))
    assert not any("language_model" in name for name, _ in warm.policy.module.named_parameters())
    assert not any(p.requires_grad for p in warm.lora.trainable())
    rows = slice(0, 40)
    frames = PolicyInput(
        demonstrations.images[rows],
        torch.from_numpy(demonstrations.state[rows]),
        [demonstrations.instructions[t] for t in demonstrations.task[rows]],
    )
    tokens = warm.policy.tokens_of(torch.from_numpy(demonstrations.actions[rows]))
    before, after = (float(m.policy.log_prob(frames, tokens, 1.0)[0].detach().mean()) for m in (fresh, warm))
    assert after > before + 0.5
    with torch.no_grad():
        sampled = warm.policy.sample(frames, 1.0, torch.full(tokens.shape, 0.5))
        again, _ = warm.policy.log_prob(frames, sampled.tokens, 1.0)
    torch.testing.assert_close(sampled.log_prob, again, rtol=1e-4, atol=1e-5)


def test_settings_are_part_of_a_run(demonstrations: Demonstrations, tmp_path: Path) -> None:
    assert EWC().settings == {}
    assert EWC(strength=5.0).settings == {"strength": 5.0}
    assert DarkReplay(demonstrations, batch=8).settings == {"batch": 8}

    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "update":
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop, method=EWC())
    with pytest.raises(RatchetError) as refused:
        start(tmp_path, quiet, method=EWC(strength=5.0))
    assert refused.value.code == "learn.changed_run"


def test_supervised_imitates_and_runs_no_episodes(finished: Callable[..., Any], demonstrations: Demonstrations) -> None:
    result, run = finished("supervised")
    assert [u["episodes"] for u in result["updates"]] == [0] * 4
    assert isinstance(run.method, Supervised)
    losses = [u["loss"] for u in result["updates"]]
    assert losses[1] < losses[0]
    with pytest.raises(RatchetError) as refused:
        bound(Supervised(samples({"push": 4}))).begin_task(0, 0)
    assert refused.value.code == "learn.no_samples_of_task"


def test_seq_ft_is_what_a_run_does_without_a_method(finished: Callable[..., Any], tmp_path: Path) -> None:
    expected, _ = finished("seq_ft")
    assert outcome(tmp_path, start(tmp_path, quiet)) == expected
