"""Frames to bytes and back: raw, PNG, JPEG, and H.264 with one access unit per frame.

Knows (H, W, 3) uint8 RGB images and codecs. Knows no file and no camera.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import cv2
import numpy as np

from ratchet_vla.episodes.file.format import Codec
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import UInt8

KEYFRAME_SECONDS = 1.0


class Encoder:
    """One camera's frames, in order. quality: JPEG 1..100; for H.264 it gives the constant rate factor.

    rate: frames per second that the H.264 rate control reckons with.
    """

    def __init__(self, codec: Codec, quality: int = 90, rate: float = 30.0) -> None:
        self.codec = codec
        self._quality = quality
        self._rate = rate
        self._video: Any = None
        self._count = 0

    def encode(self, image: UInt8) -> bytes:
        """image: (H, W, 3) uint8 RGB. For H.264, one Annex B access unit; the first decodes by itself."""
        if self.codec == "raw":
            return image.tobytes()
        if self.codec == "h264":
            return self._h264(image)
        image_bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if self.codec == "png":
            encoded, data = cv2.imencode(".png", image_bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        else:
            encoded, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
        if not encoded:
            raise RatchetError("episode.bad_frame", f"{self.codec} cannot hold an image of shape {image.shape}")
        return bytes(data.tobytes())

    def _h264(self, image: UInt8) -> bytes:
        import av  # loads FFmpeg, which only H.264 needs

        height, width = image.shape[:2]
        if self._video is None:
            if height % 2 or width % 2:
                raise RatchetError(
                    "episode.bad_frame", f"H.264 needs even sizes, not {width}x{height}", fix="record JPEG instead"
                )
            video: Any = av.CodecContext.create("libx264", "w")
            video.width = width
            video.height = height
            video.pix_fmt = "yuv420p"
            video.framerate = Fraction(self._rate).limit_denominator(1000)
            video.time_base = 1 / video.framerate
            rate_factor = round(51 - self._quality * 0.37)  # 90 -> 18, visually lossless; 50 -> 32
            video.options = {
                "preset": "ultrafast",
                "tune": "zerolatency",
                "crf": str(rate_factor),
                "g": str(max(1, round(self._rate * KEYFRAME_SECONDS))),
                "x264-params": "repeat-headers=1:annexb=1",
            }
            video.thread_count = 1
            self._video = video
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = self._count
        self._count += 1
        return b"".join(bytes(packet) for packet in self._video.encode(frame))


class Decoder:
    """The other direction; frames must come in the order in which they were written."""

    def __init__(self, codec: Codec, location: str = "") -> None:
        self.codec = codec
        self._location = location
        self._video: Any = None

    def decode(self, data: bytes, height: int = 0, width: int = 0) -> UInt8:
        """(H, W, 3) uint8 RGB, writable. height, width: needed for raw frames only.

        Raises:
            RatchetError: episode.bad_frame.
        """
        if self.codec == "raw":
            if len(data) != height * width * 3:
                raise self._bad(f"{len(data)} bytes are not {width}x{height} pixels")
            return np.frombuffer(data, np.uint8).reshape(height, width, 3).copy()
        if self.codec == "h264":
            return self._h264(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise self._bad("the image cannot be decoded")
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)

    def _h264(self, data: bytes) -> UInt8:
        import av

        if self._video is None:
            self._video = av.CodecContext.create("h264", "r")
            self._video.flags |= av.codec.context.Flags.low_delay
            self._video.thread_count = 1
        frames = list(self._video.decode(av.Packet(data)))
        if len(frames) != 1:
            raise self._bad(f"an access unit gave {len(frames)} frames")
        return np.asarray(frames[0].to_ndarray(format="rgb24"), np.uint8)

    def _bad(self, problem: str) -> RatchetError:
        return RatchetError("episode.bad_frame", problem, where=self._location, fix="the file is damaged: verify it")
