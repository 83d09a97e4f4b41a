"""Supervised training forgets: the replay that prevents it must really be there, and only the adapter may change.

Pinned: the mixture's shares, the refusals where demonstrations are missing, the new task learned and the base
untouched, a killed training resumes to the same adapter. Determinism: made-up samples, order of samples from (seed,
step).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ratchet_sim.demonstrations import Demonstrations
from ratchet_vla.adapters.identity import binding_of
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.supervised.training import PretrainConfig, Pretrainer, Progress
from ratchet_vla.learner.supervised.warmstart import WarmStartConfig, mixture, warm_start
from tests.agent.learner.runs import tiny_with_adapter

CONFIG = WarmStartConfig(
    PretrainConfig(steps=30, batch=16, learning_rate=2e-2, smoothing=4.0, shift=1, save_every=10), replay_share=0.5
)


def samples(counts: dict[str, int]) -> Demonstrations:
    """Black frames of which the first task always wants +x, the second -x, the third +y."""
    generator = np.random.default_rng(0)
    total = sum(counts.values())
    task = np.repeat(np.arange(len(counts)), list(counts.values()))
    actions = np.zeros((total, 4, 4), np.float32)
    for index, (dim, value) in enumerate([(0, 0.05), (0, -0.015), (1, 0.035)][: len(counts)]):
        actions[task == index, :, dim] = value
    return Demonstrations(
        images=np.zeros((total, 1, 96, 96, 3), np.uint8),
        state=generator.normal(0, 0.1, (total, 4)).astype(np.float32),
        actions=actions,
        task=task.astype(np.int64),
        start=np.arange(total) % 10,
        tasks=list(counts),
        instructions=[f"do the {name}" for name in counts],
    )


def test_shares_of_the_batches() -> None:
    made = samples({"new": 30, "old": 10, "older": 60})
    weights = mixture(made, "new", ["older", "old"], 0.4)
    assert weights[made.task == 0].sum() == pytest.approx(0.6)
    assert weights[made.task == 1].sum() == pytest.approx(0.2)
    assert weights[made.task == 2].sum() == pytest.approx(0.2)
    off = mixture(made, "new", ["older", "old"], 0.0)
    assert off[made.task == 0].sum() == pytest.approx(1.0)
    assert not off[made.task != 0].any()


@pytest.mark.parametrize(
    ("new", "earlier", "code"),
    [("unknown", [], "learn.no_samples_of_task"), ("new", ["old", "never shown"], "learn.no_replay")],
)
def test_missing_demonstrations_are_refused(new: str, earlier: list[str], code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        mixture(samples({"new": 3, "old": 3}), new, earlier, 0.5)
    assert refused.value.code == code
    mixture(samples({"new": 3, "old": 3}), "new", ["never shown"], 0.0)


def test_learns_the_new_task_and_leaves_the_base_alone() -> None:
    policy, lora = tiny_with_adapter()
    made = samples({"new": 60, "old": 60})
    before = {n: p.clone() for n, p in policy.module.named_parameters() if "lora_" not in n}
    heard: list[Progress] = []
    warm_start(policy, lora, made, "new", ["old"], CONFIG, on_progress=heard.append, every=5)
    assert heard[-1].step == CONFIG.train.steps
    for name, parameter in policy.module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    assert heard[-1].validation_loss < heard[0].validation_loss - 0.2
    assert lora.effect().overall > 0


def test_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    made = samples({"new": 40, "old": 40})

    def trained(folder: Path, stop_at: int = 0) -> str:
        policy, lora = tiny_with_adapter()

        def watch(progress: Progress) -> None:
            if progress.step == stop_at:
                raise KeyboardInterrupt

        trainer = Pretrainer(
            policy, lora.trainable(), made, CONFIG.train, folder, mixture(made, "new", ["old"], CONFIG.replay_share)
        )
        trainer.run(watch, every=5)
        return lora.adapter(binding_of(policy)).id

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop_at=15)
    assert trained(tmp_path / "cut") == whole
