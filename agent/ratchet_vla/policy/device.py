"""Which device a policy's tensors live on.

Knows torch's devices and one environment variable. Simulators, rollout buffers and losses stay on the processor, so
nothing else needs to know.
"""

from __future__ import annotations

import os

import torch

from ratchet_vla.errors import RatchetError

VARIABLE = "RATCHET_DEVICE"


def choose(wanted: str = "") -> torch.device:
    """The device for a policy.

    Args:
        wanted: "cpu", "cuda", "cuda:1" ..., or "auto" for the first CUDA device where there is one and the processor
            elsewhere. "" takes the environment variable RATCHET_DEVICE, and "auto" where that is not set.

    Raises:
        RatchetError: policy.no_device where the name means nothing, or the device is not there.
    """
    name = wanted or os.environ.get(VARIABLE, "") or "auto"
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RatchetError("policy.no_device", f"'{name}' is no device", fix='use "auto", "cpu", "cuda" or "cuda:N"')
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise RatchetError(
            "policy.no_device",
            f"'{name}' is asked for and this machine has {torch.cuda.device_count()} CUDA devices",
            where=VARIABLE,
            fix="install a CUDA build of torch, or use cpu",
        )
    return torch.device("cuda", device.index or 0)
