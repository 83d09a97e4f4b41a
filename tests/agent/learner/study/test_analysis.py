"""The analysis explains forgetting; an effective rank off by a factor would explain it wrongly.

Pinned: ranks and norms against those of the written-out product and of matrices whose rank is known, Fisher energy at
its two ends. Determinism: seeded matrices.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ratchet_vla.learner.study.analysis import adapter_update, effective_rank, fisher, fisher_energy, weight_update
from ratchet_vla.testing.tiny_policy import made
from tests.agent.adapters.test_difference import written_out


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(4)) == 0.0


def test_an_adapters_update_equals_the_product_written_out() -> None:
    adapter = made(1)
    whole = written_out(adapter)
    found = {u.layer: u for u in adapter_update(adapter)}
    assert found.keys() == whole.keys()
    for layer, w in whole.items():
        assert found[layer].norm == pytest.approx(float(w.norm()), rel=1e-6)
        assert found[layer].effective_rank == pytest.approx(effective_rank(torch.linalg.svdvals(w)), rel=1e-5)


def test_a_weight_update_of_rank_two() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"w": torch.randn(8, 6, generator=generator), "bias": torch.zeros(8)}
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:, :2]
    p = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q[:, :2]
    (only,) = weight_update(before, {"w": before["w"] + q @ p.T, "bias": torch.ones(8)})
    assert only.effective_rank == pytest.approx(2.0, rel=1e-3)
    assert only.norm == pytest.approx(2.0**0.5, rel=1e-4)


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    (information,) = fisher([lambda: 3.0 * w[0], lambda: w[0] + 2.0 * w[1]], [w])
    assert information.tolist() == pytest.approx([(9 + 1) / 2, 4 / 2])


def test_fisher_energy_at_its_ends() -> None:
    information = [torch.tensor([4.0, 0.0])]
    assert fisher_energy([torch.tensor([1.0, 0.0])], information) == pytest.approx(1.0)
    assert fisher_energy([torch.tensor([0.0, 1.0])], information) == 0.0
    assert fisher_energy([torch.tensor([1.0, 1.0])], information) == pytest.approx(0.5)
    assert fisher_energy([torch.zeros(2)], information) == 0.0
