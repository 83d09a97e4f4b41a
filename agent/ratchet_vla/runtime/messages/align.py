"""Frames and states that arrive one by one, put together into one observation of one moment, with the skew stated.

Knows stamps (seconds, one clock) and contract names. Knows no transport: a driver or a subscriber calls `add_…`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Float32, Observation, UInt8

T = TypeVar("T")


@dataclass(frozen=True)
class Aligned:
    """An observation and how far apart its parts are.

    observation: its stamp is the moment that all parts are nearest to: the oldest of the newest frames.
    skew: source name -> seconds, stamp of that part minus the observation's stamp. worst: largest of them, absolute.
    """

    observation: Observation
    skew: dict[str, float]

    @property
    def worst(self) -> float:
        return max((abs(s) for s in self.skew.values()), default=0.0)


class _Track(Generic[T]):
    """The last few samples of one source."""

    def __init__(self, keep: int) -> None:
        self.samples: deque[tuple[float, T]] = deque(maxlen=keep)

    def add(self, value: T, stamp: float) -> bool:
        if self.samples and stamp <= self.samples[-1][0]:
            return False
        self.samples.append((stamp, value))
        return True

    def nearest(self, moment: float) -> tuple[float, T]:
        return min(self.samples, key=lambda sample: abs(sample[0] - moment))


class Aligner:
    """Collects what drivers deliver and gives out observations. Thread-safe.

    cameras: those to wait for; all of the contract's if absent. max_skew: seconds that any part may be off.
    keep, keep_frames: samples remembered per state field and per camera.
    """

    def __init__(
        self,
        contract: RobotContract,
        *,
        max_skew: float,
        cameras: Iterable[str] | None = None,
        keep: int = 64,
        keep_frames: int = 8,
    ) -> None:
        names = [c.name for c in contract.cameras] if cameras is None else list(cameras)
        self._frames: dict[str, _Track[UInt8]] = {contract.camera(n).name: _Track(keep_frames) for n in names}
        self._states: dict[str, _Track[Float32]] = {s.name: _Track(keep) for s in contract.state}
        self._sizes = {s.name: s.size for s in contract.state}
        self.cameras = tuple(names)
        self._max_skew, self._lock = max_skew, threading.Lock()
        self.dropped = 0

    def add_frame(self, camera: str, image: UInt8, stamp: float) -> None:
        """image: (H, W, 3) uint8, upright, RGB; kept by reference. Repeated and older stamps are dropped."""
        self._add(self._frames, camera, image, stamp)

    def add_state(self, name: str, values: Float32, stamp: float) -> None:
        """values: (size,) of the contract's state field `name`.

        Raises:
            RatchetError: observation.bad_state for another size.
        """
        if name in self._sizes and np.shape(values) != (self._sizes[name],):
            text = f"{np.shape(values)} values, the contract says {self._sizes[name]}"
            raise RatchetError("observation.bad_state", text, where=name, fix="check driver and contract")
        self._add(self._states, name, np.asarray(values, np.float32), stamp)

    def frames_stamp(self) -> float:
        """Stamp of the oldest of the newest frames; -inf before every camera has delivered."""
        with self._lock:
            return self._moment()

    def state_stamp(self) -> float:
        """Stamp of the oldest of the newest states; -inf before every field has arrived."""
        with self._lock:
            return min((t.samples[-1][0] if t.samples else -np.inf for t in self._states.values()), default=-np.inf)

    def newest_state(self) -> tuple[dict[str, Float32], float]:
        """Every field's newest value and the oldest of their stamps.

        Raises:
            RatchetError: observation.missing.
        """
        with self._lock:
            self._require(self._states)
            parts = {name: track.samples[-1] for name, track in self._states.items()}
        return {n: v for n, (_, v) in parts.items()}, min(s for s, _ in parts.values())

    def observe(self, instruction: str, sequence: int) -> Aligned:
        """The newest moment that every camera has seen, with the frames and states nearest to it.

        Raises:
            RatchetError: observation.missing naming sources without data; observation.skew naming the worst part.
        """
        with self._lock:
            self._require(self._frames)
            self._require(self._states)
            moment = self._moment() if self._frames else min(t.samples[-1][0] for t in self._states.values())
            frames = {name: track.nearest(moment) for name, track in self._frames.items()}
            states = {name: track.nearest(moment) for name, track in self._states.items()}
        skew = {name: stamp - moment for name, (stamp, _) in [*frames.items(), *states.items()]}
        observation = Observation(
            images={n: image for n, (_, image) in frames.items()},
            state={n: values for n, (_, values) in states.items()},
            instruction=instruction,
            stamp=moment,
            sequence=sequence,
        )
        aligned = Aligned(observation, skew)
        if aligned.worst > self._max_skew:
            name = max(skew, key=lambda n: abs(skew[n]))
            raise RatchetError(
                "observation.skew",
                f"{skew[name] * 1e3:+.1f} ms beside the frames, allowed {self._max_skew * 1e3:.1f} ms",
                where=name,
                fix="check rate and clock of this source",
            )
        return aligned

    def _moment(self) -> float:
        return min((t.samples[-1][0] if t.samples else -np.inf for t in self._frames.values()), default=-np.inf)

    def _add(self, tracks: dict[str, _Track[T]], name: str, value: T, stamp: float) -> None:
        if name not in tracks:
            raise RatchetError("observation.unknown_source", f"nothing is called {name!r}", fix=", ".join(tracks))
        with self._lock:
            self.dropped += not tracks[name].add(value, stamp)

    def _require(self, tracks: dict[str, _Track[T]]) -> None:
        missing = [name for name, track in tracks.items() if not track.samples]
        if missing:
            text = f"nothing received yet from {', '.join(missing)}"
            raise RatchetError("observation.missing", text, fix="check that the drivers run and publish")
