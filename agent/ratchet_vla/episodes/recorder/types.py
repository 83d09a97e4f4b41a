"""How recording is set up and how it is going: settings and status.

Knows words, defaults and bounds. Records nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ratchet_vla.episodes.file.format import LOSSLESS, Codec
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import Int64


@dataclass(frozen=True)
class RecorderConfig:
    """How episodes are recorded."""

    stream: Codec = "jpeg"
    """Codec of the camera streams."""
    decisions: Codec | None = "raw"
    """Codec of the frames that decisions were made on; None shares the stream's (lossy streams are then not exact)."""
    quality: int = 90
    """Of lossy codecs, 1..100."""
    memory_mb: int = 256
    """Frames that may wait for the disk, in MiB."""
    flush_seconds: float = 0.25
    """What a power cut may cost, in seconds of recording; at most 0.5."""
    min_free_gb: float = 2.0
    """Recording stops cleanly when the disk has less than this."""
    nice: int = 0
    """Politeness of the recorder process; it needs little, but beside a busy policy a polite one starves."""

    def check(self, location: str) -> None:
        """Raises RatchetError recorder.bad_config."""
        problem = ""
        if not 0 < self.flush_seconds <= 0.5:
            problem = f"flush_seconds is {self.flush_seconds}, at most 0.5 s may be lost"
        elif not 1 <= self.quality <= 100:
            problem = f"quality is {self.quality}, not in 1..100"
        elif self.memory_mb < 1 or self.min_free_gb < 0:
            problem = "memory_mb and min_free_gb must be positive"
        elif self.decisions is not None and self.decisions not in LOSSLESS:
            problem = f"decisions cannot be {self.decisions}: give raw, png, or None to share the stream's frames"
        if problem:
            raise RatchetError("recorder.bad_config", problem, where=location, fix="see RecorderConfig")


class Outcome(Protocol):
    """What became of a chunk, as `ratchet_vla.runtime.control.sink.ChunkOutcome` tells it."""

    @property
    def sequence(self) -> int:
        """Of the observation that the chunk answers."""
        ...

    @property
    def marks(self) -> Int64:
        """One `records.Mark` value per action."""
        ...


@dataclass(frozen=True)
class RecorderStatus:
    """How the recorder is doing.

    state: "idle", "recording", "disk_low", "failed" or "dead". error: why, in words.
    dropped: what was lost since the start -> how often. waiting: share of the frame memory in use, in [0, 1].
    rate: MB/s written during the last seconds. free_gb: on the disk. finished: ids of finished episodes, oldest first.
    """

    state: str
    error: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    waiting: float = 0.0
    written: int = 0
    rate: float = 0.0
    free_gb: float = 0.0
    finished: tuple[str, ...] = ()
