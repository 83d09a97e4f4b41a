"""Where a policy runs.

It matters because a GPU that is silently not used costs hours, and one that is not there must be named before a run
begins. Pinned: auto, the variable, explicit names, refusals. CUDA is a stand-in here.
"""

from __future__ import annotations

import pytest
import torch

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy import device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    assert device.choose() == torch.device("cpu")
    gpus(monkeypatch, 2)
    assert device.choose() == torch.device("cuda:0")
    assert device.choose("cpu") == torch.device("cpu")
    assert device.choose("cuda:1") == torch.device("cuda:1")


def test_the_variable_decides_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert device.choose() == torch.device("cpu")
    assert device.choose("cuda") == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "tpu", "meta", "gpu:0"])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpus(monkeypatch, 2 if name == "cuda:2" else 0)
    with pytest.raises(RatchetError) as refused:
        device.choose(name)
    assert refused.value.code == "policy.no_device"
