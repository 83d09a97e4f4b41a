"""Episodes made of random numbers, for the tests of this folder: shapes are a contract's, contents mean nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Mark, Observation, SafetyEvent, Step

ROOT = Path(__file__).resolve().parents[3]


def small_contract(size: int = 16) -> RobotContract:
    """LIBERO's contract with small frames."""
    contract = RobotContract.load(ROOT / "robots/libero.yaml")
    cameras = tuple(dataclasses.replace(c, width=size, height=size) for c in contract.cameras)
    return dataclasses.replace(contract, cameras=cameras)


def random_image(contract: RobotContract, camera: str, rng: np.random.Generator, *, smooth: bool = False) -> Any:
    spec = contract.camera(camera)
    if not smooth:
        return rng.integers(0, 256, (spec.height, spec.width, 3), np.uint8)
    y, x = np.mgrid[: spec.height, : spec.width]
    phase, tilt = rng.uniform(0, 6), rng.uniform(-1, 1)
    wave = 127 + 100 * np.sin(phase + (x + tilt * y) * 6 / spec.width)
    return np.stack([wave, wave[::-1], 255 - wave], -1).astype(np.uint8)


def state(contract: RobotContract, rng: np.random.Generator) -> dict[str, Any]:
    return {s.name: rng.normal(size=s.size).astype(np.float32) for s in contract.state}


def observation(
    contract: RobotContract, rng: np.random.Generator, index: int, stamp: float, *, smooth: bool = False
) -> Observation:
    images = {c.name: random_image(contract, c.name, rng, smooth=smooth) for c in contract.cameras}
    return Observation(images, state(contract, rng), "put the bowl away", stamp, index)


def chunk(contract: RobotContract, rng: np.random.Generator, seen: Observation, length: int = 4) -> ActionChunk:
    shape = (length, contract.action.size)
    return ActionChunk(
        actions=(rng.uniform(-0.01, 0.01, shape)).astype(np.float32),
        tokens=rng.integers(0, 256, shape),
        log_prob=-rng.random(shape, np.float32),
        adapter_id="ab" * 32,
        temperature=1.6,
        observation_stamp=seen.stamp,
        observation_sequence=seen.sequence,
    )


def tick(contract: RobotContract, rng: np.random.Generator, index: int, **facts: Any) -> ControlTick:
    action = rng.uniform(-0.01, 0.01, contract.action.size).astype(np.float32)
    given: dict[str, Any] = {
        "stamp": index / contract.control_hz + 1e-4,
        "deadline": index / contract.control_hz,
        "index": index,
        "sampled": action,
        "command": action,
        "marks": Mark.NONE,
        "chunk_sequence": index // 4,
        "chunk_offset": index % 4,
        "adapter_id": "ab" * 32,
        "state": state(contract, rng),
    }
    return ControlTick(**{**given, **facts})


def episode(
    contract: RobotContract,
    *,
    steps: int = 5,
    seed: int = 0,
    ticks: bool = True,
    smooth: bool = False,
    task: str = "bowl",
    success: bool | None = True,
) -> Episode:
    rng = np.random.default_rng(seed)
    made: list[Step] = []
    for i in range(steps):
        seen = observation(contract, rng, i, i * 4 / contract.control_hz, smooth=smooth)
        last = i == steps - 1
        executed = rng.random(4) > 0.2
        made.append(Step(seen, chunk(contract, rng, seen), executed, float(last), last, 4))
    marks = [Mark.NONE, Mark.CLIPPED, Mark.HUMAN, Mark.HELD]
    return Episode(
        task=task,
        instruction="put the bowl away",
        steps=made,
        success=success,
        success_source="simulator" if success is not None else "",
        initial_state=3,
        seed=seed,
        adapter_id="ab" * 32,
        meta={"note": "made up", "numbers": [1, 2.5, None]},
        ticks=[
            tick(
                contract,
                rng,
                i,
                marks=marks[i % 4],
                command=None if i % 4 == 3 else rng.normal(size=7).astype(np.float32),
                sampled=None if i % 4 == 2 else rng.normal(size=7).astype(np.float32),
            )
            for i in range(4 * steps)
        ]
        if ticks
        else [],
        events=[SafetyEvent(0.123456789, "safety.velocity", "dx cut", "dx", 2.0, 1.0)] if ticks else [],
    )


def same(a: Any, b: Any) -> bool:
    """Equal down to the bit: dtypes, shapes, NaN payloads and the sign of zero included."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
        )
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
