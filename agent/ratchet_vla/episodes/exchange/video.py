"""MP4 files with one frame per step: writing, and reading back frame by frame.

Knows FFmpeg's encoders. Knows no episode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8

VideoCodec = Literal["av1", "h264"]
_ENCODERS = {"av1": "libsvtav1", "h264": "libx264"}
_OPTIONS = {"av1": {"preset": "12", "svtav1-params": "lp=1"}, "h264": {"preset": "veryfast"}}
KEYFRAME_INTERVAL = 2  # frames between key frames: a trainer reads single frames at random


class VideoFile:
    """One MP4 being written. crf: quality, lower is better."""

    def __init__(self, path: Path, height: int, width: int, fps: int, codec: VideoCodec, crf: int) -> None:
        """Raises RatchetError export.bad_frame_size, export.no_encoder."""
        import av

        smallest = 64 if codec == "av1" else 2
        if height % 2 or width % 2 or min(height, width) < smallest:
            raise RatchetError(
                "export.bad_frame_size",
                f"{codec} cannot hold frames of {width}x{height}",
                fix="sizes must be even; AV1 needs at least 64x64, H.264 has no such limit",
            )
        os.environ.setdefault("SVT_LOG", "1")  # errors only
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        try:
            stream: Any = self._container.add_stream(_ENCODERS[codec], rate=fps)
        except (ValueError, av.error.FFmpegError) as error:
            raise RatchetError("export.no_encoder", str(error), where=codec, fix="choose the other codec") from error
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": str(KEYFRAME_INTERVAL), "crf": str(crf), **_OPTIONS[codec]}
        if codec == "h264":
            stream.codec_context.thread_count = 1
        self._stream = stream
        self.frames = 0

    def add(self, image: UInt8) -> None:
        """image: (H, W, 3) uint8 RGB."""
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = self.frames
        self.frames += 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder still holds, and end the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()


def read_video(path: Path) -> Iterator[UInt8]:
    """(H, W, 3) uint8 RGB, in order.

    Raises:
        RatchetError: export.bad_video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except av.error.FFmpegError as error:
        raise RatchetError("export.bad_video", str(error), where=str(path), fix="the file is damaged") from error
