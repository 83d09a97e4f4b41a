"""In which dtype a device computes: a property of the run, not of the checkpoint.

Knows what torch says of a device, a measurement of a second where torch says nothing, a small file that remembers it,
and one environment variable. Knows no model. A checkpoint declares `compute_dtype`, which is part of its base's id; a
device without such instructions emulates it many times slower, so products may run in another dtype there. Ids,
stored adapters and optimiser state are the same either way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ratchet_vla.errors import RatchetError

VARIABLE = "RATCHET_DTYPE"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MEASURED_FOR = 0.3  # s per dtype
# The declared dtype stays unless another one is faster by more than the measurement's own spread: it needs less memory.
_CLEARLY_FASTER = 0.9


@dataclass(frozen=True)
class Choice:
    """dtype: of matrix products and convolutions. reason: why this one, in words for `ratchet doctor`."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return NAMES[self.dtype]


def named(name: str, where: str = "dtype") -> torch.dtype:
    """The dtype called so.

    Raises:
        RatchetError: policy.no_dtype.
    """
    if name not in DTYPES:
        raise RatchetError("policy.no_dtype", f"'{name}' is no dtype to compute in", where=where, fix=", ".join(DTYPES))
    return DTYPES[name]


def name_of(policy: object) -> str:
    """The dtype that a policy's products are computed in; "" for one that does not tell."""
    dtype = getattr(policy, "compute_dtype", None)
    return NAMES.get(dtype, "") if isinstance(dtype, torch.dtype) else ""


@contextlib.contextmanager
def computing_as(policy: object, name: str) -> Iterator[None]:
    """For a while a policy computes in the dtype that somebody else's decisions were computed in.

    name: that dtype; "" where nobody recorded it, which leaves the policy as it is.

    Raises:
        RatchetError: policy.other_dtype where the policy cannot change, policy.no_dtype, policy.no_memory.
    """
    own = name_of(policy)
    if not name or name == own:
        yield
    elif isinstance(policy, Computing):
        with policy.computing_in(name):
            yield
    else:
        raise RatchetError(
            "policy.other_dtype",
            f"the decisions were computed in {name}, this policy computes in {own or 'an untold dtype'} alone",
            fix="let both compute in one dtype: --dtype, or RATCHET_DTYPE",
        )


def choose(device: torch.device, declared: str, wanted: str = "") -> Choice:
    """What to compute in on a device.

    Args:
        declared: what the checkpoint declares, "float32" or "bfloat16".
        wanted: "float32", "bfloat16" or "float16" to insist on one, "auto" to let the device decide; "" takes the
            environment variable RATCHET_DTYPE, and "auto" where that is not set.

    Raises:
        RatchetError: policy.no_dtype.
    """
    name = wanted or os.environ.get(VARIABLE, "") or "auto"
    if name != "auto":
        return Choice(named(name, VARIABLE), f"{VARIABLE} or --dtype says so")
    return _by_device(str(device), declared, torch.get_num_threads())


@functools.cache
def _by_device(device: str, declared: str, threads: int) -> Choice:
    if declared == "float32":
        return Choice(torch.float32, "the checkpoint declares it")
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice(torch.bfloat16, "the checkpoint declares it and the card has the instructions")
        return _measured(device, threads, (torch.float32, torch.float16))
    if kind != "cpu":
        return Choice(DTYPES[declared], f"the checkpoint declares it, and nothing is known of {kind}")
    if _bfloat16_instructions() is False:
        return Choice(torch.float32, "torch finds no bfloat16 instructions in this processor and would emulate them")
    # AVX-512 alone passes for bfloat16 support in torch and is slower than float32, and a build without oneDNN, as some
    # for aarch64, cannot tell: only a clock can.
    return _measured(device, threads, (DTYPES[declared], torch.float32))


def _bfloat16_instructions() -> bool | None:
    """What torch says of this processor; None where its build has nobody to ask."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return None if ask is None else bool(ask())


def _measured(device: str, threads: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Choice:
    """The faster of two dtypes, the first where they are about equal; remembered between processes."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    key = f"{hardware}, torch {torch.__version__}, {threads} threads"
    rates = _remembered().get(key)
    if not isinstance(rates, dict) or {NAMES[d] for d in dtypes} - rates.keys():
        rates = {NAMES[dtype]: round(_speed_or_none(torch.device(device), dtype), 1) for dtype in dtypes}
        _remember(key, rates)
    first, second = dtypes
    chosen = second if rates[NAMES[first]] < _CLEARLY_FASTER * rates[NAMES[second]] else first
    told = ", ".join(f"{name} {rate:g} GFLOP/s" for name, rate in rates.items())
    return Choice(chosen, f"measured on {hardware}, {threads} threads: {told}")


def _speed_or_none(device: torch.device, dtype: torch.dtype) -> float:
    """`speed`, or 0 where the device refuses: oneDNN has forward products in bfloat16 but no backward ones for some."""
    try:
        return speed(device, dtype)
    except RuntimeError:
        return 0.0


def speed(device: torch.device, dtype: torch.dtype, seconds: float = MEASURED_FOR) -> float:
    """GFLOP/s, forward and backward, of products and convolutions of a small policy's sizes.

    device: where. dtype: under autocast, with weights in float32, as the policies run.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    rows = 1024
    width = 256
    channels = 32
    side = 32
    x = random(rows, width).requires_grad_()
    weight = random(4 * width, width)
    image = random(8, channels, side, side).requires_grad_()
    kernel = random(channels, channels, 3, 3)
    flop = 3 * 2 * (rows * 4 * width * width + 8 * side * side * channels * channels * 9) * 2 / 3

    def once() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = functional.linear(x, weight).sum() + functional.conv2d(image, kernel, padding=1).sum()
        out.backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        once()
        fastest = min(fastest, time.perf_counter() - started)
    return flop / fastest / 1e9


def processor() -> str:
    """The processor's model, as the machine tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def memory_file() -> Path:
    """Where measurements are remembered."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "ratchet" / "computing.json"


def _remembered() -> dict[str, Any]:
    try:
        data = json.loads(memory_file().read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(key: str, rates: dict[str, float]) -> None:
    """Best effort: where the file cannot be written, the next process measures again."""
    path = memory_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({**_remembered(), key: rates}, indent=1))
        scratch.replace(path)


class Computing:
    """What both kinds of policies inherit: the dtype of their products, and its change for a while.

    A subclass has `config.compute_dtype`, which the checkpoint declares, `module` and `device`.
    """

    config: Any
    _inside: torch.dtype | None = None  # asked for by `computing_in`
    _kept: Choice | None = None  # what memory left no choice about
    _settled: torch.dtype | None = None  # what the weights in memory are fit for
    _stored: Mapping[str, torch.dtype] = MappingProxyType({})  # of tensors that were widened

    @property
    def module(self) -> nn.Module:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def choice(self) -> Choice:
        """What products are computed in at present, and why."""
        if self._inside is not None:
            return Choice(self._inside, "asked for by the caller")
        return self._kept or choose(self.device, self.config.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matrix products and convolutions."""
        return self.choice.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """What every forward runs under."""
        dtype = self.compute_dtype
        if dtype != self._settled:
            self.settle()
            dtype = self.compute_dtype
        reduced = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if reduced else torch.bfloat16, enabled=reduced)

    @contextlib.contextmanager
    def computing_in(self, name: str) -> Iterator[None]:
        """For a while: products in the dtype of this name; "" changes nothing. For one thread at a time.

        Raises:
            RatchetError: policy.no_dtype, policy.no_memory.
        """
        before = self._inside
        if name:
            self._inside = named(name)
        try:
            self.settle()
            yield
        finally:
            self._inside = before

    def settle(self) -> None:
        """Bring weights in memory into a dtype that products can be computed with; the first forward does so at last.

        Weights that were stored in bfloat16 become float32 where products are computed in anything else. That is
        exact, and the base's id still counts what was stored. Where the memory does not suffice, bfloat16 is kept.

        Raises:
            RatchetError: policy.no_memory where another dtype was insisted on.
        """
        wanted = self.compute_dtype
        if wanted == torch.bfloat16:
            self._settled = wanted
            return
        narrow = {n: t for n, t in _tensors(self.module) if t.dtype == torch.bfloat16}
        needed = 2 * sum(t.numel() for t in narrow.values())
        free = _free_bytes(self.device)
        if needed > free:
            text = f"{needed / 1e9:.1f} GB more are needed to hold its weights in float32, {free / 1e9:.1f} GB are free"
            if self._inside is not None or os.environ.get(VARIABLE, "auto") not in ("", "auto"):
                raise RatchetError(
                    "policy.no_memory", text, where=self.choice.name, fix="compute in bfloat16, or on another machine"
                )
            self._kept = Choice(torch.bfloat16, text)
            self._settled = torch.bfloat16
            return
        self._stored = {**self._stored, **{n.replace(".base_layer.", "."): t.dtype for n, t in narrow.items()}}
        for tensor in narrow.values():
            tensor.data = tensor.data.float()
        self._settled = wanted

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A base tensor in the dtype that its checkpoint has it in."""
        return tensor.to(self._stored.get(name, tensor.dtype))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own parameters and buffers."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if ".lora_" not in name:
            yield name, tensor


def _free_bytes(device: torch.device) -> int:
    """Memory that could still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62  # nothing is known: let the allocator decide
