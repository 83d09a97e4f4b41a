"""Camera images as each published model saw them in training: JPEG, resampling, crop, padding.

Knows pixels and the few ways in which published code resamples them. Knows no tower, no camera and no robot.
Sources: OpenVLA-OFT's evaluation code (JPEG round trip, Lanczos-3, crop of 0.9 of the area), the continual-RL code
(bicubic), LeRobot's SmolVLA (padded in the corner) and openpi (padded around the centre).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional

from ratchet_vla.errors import RatchetError

Resize = Literal["exact", "lanczos3", "bicubic", "pad_corner", "pad_centre"]


@dataclass(frozen=True)
class Preparation:
    """How a camera's image becomes the square that a model takes.

    resize: "exact" takes images of the right size only; "lanczos3" as TensorFlow with antialiasing, "bicubic" with
        antialiasing, both without keeping proportions; "pad_corner" and "pad_centre" keep them, bilinear, black bars.
    jpeg: encode and decode at quality 95 first, as the training data were stored.
    crop: share of the area that is kept around the centre and resampled (bilinear) to the same size; 1 keeps all.

    Raises:
        RatchetError: policy.bad_config.
    """

    resize: Resize = "exact"
    jpeg: bool = False
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise RatchetError("policy.bad_config", f"images: resize = {self.resize!r} is not known", where="model")
        if not 0 < self.crop <= 1:
            raise RatchetError("policy.bad_config", f"images: crop = {self.crop!r} is not a share", where="model")

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Preparation:
        """Raises RatchetError policy.bad_config for an unknown field."""
        try:
            return cls(**data)
        except TypeError as error:
            raise RatchetError("policy.bad_config", f"images: {error}", where="model") from None

    def any_size(self) -> bool:
        """True where images of any size are taken."""
        return self.resize != "exact"


# Evaluation code of OpenVLA and OpenVLA-OFT; of the paper's learner; of LeRobot's SmolVLA; of openpi.
OPENVLA = Preparation("lanczos3", jpeg=True, crop=0.9)
PLAIN_BICUBIC = Preparation("bicubic")
SMOLVLA = Preparation("pad_corner")
OPENPI = Preparation("pad_centre")


def prepare(images: Tensor, size: int, how: Preparation) -> Tensor:
    """(B, V, H, W, 3) uint8 RGB -> (B, V, 3, size, size) float32 in [0, 1].

    The resampling of "lanczos3" and "bicubic" rounds to whole grey levels as published; padding does not.
    """
    batch, views, height, width, _ = images.shape
    # The published code does both only to images that do not have the size already.
    if how.jpeg and (height, width) != (size, size):
        images = _jpeg(images)
    x = images.flatten(0, 1).permute(0, 3, 1, 2)
    if (height, width) == (size, size):
        x = x.float()
    elif how.resize == "lanczos3":
        x = lanczos3(x.float(), size).round().clamp(0, 255)
    elif how.resize == "bicubic":
        x = functional.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    elif how.resize in ("pad_corner", "pad_centre"):
        x = _padded(x.float(), size, centre=how.resize == "pad_centre")
    else:
        raise RatchetError(
            "policy.bad_input",
            f"images are {height} x {width}, this model takes {size} x {size} only",
            fix="set the camera's size in the contract",
        )
    if how.crop < 1:
        x = (central(x / 255, how.crop) * 255.5).floor().clamp(0, 255)  # TensorFlow's saturating conversion
    return (x / 255).reshape(batch, views, 3, size, size)


def lanczos3(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size): tf.image.resize(method="lanczos3", antialias=True)."""
    rows = _lanczos_weights(x.shape[2], size).to(x.device)
    columns = _lanczos_weights(x.shape[3], size).to(x.device)
    return torch.einsum("oh,nchw,pw->ncop", rows, x, columns)


def central(x: Tensor, share: float) -> Tensor:
    """(N, C, H, W) -> the same shape: the central `share` of the area, bilinear with aligned corners.

    tf.image.crop_and_resize on the box [(1 - s) / 2, (1 + s) / 2] with s = sqrt(share): output pixel i samples
    low (n - 1) + i (high - low) (n - 1) / (n - 1).
    """
    n = x.shape[-1]
    side = np.float32(math.sqrt(share))
    low = (np.float32(1) - side) / np.float32(2)
    at = torch.from_numpy(low * np.float32(n - 1) + np.arange(n, dtype=np.float32) * side).to(x.device)
    below = at.floor().long().clamp(0, n - 1)
    above = at.ceil().long().clamp(0, n - 1)
    part = at - below
    x = x[:, :, below] * (1 - part)[:, None] + x[:, :, above] * part[:, None]
    return x[..., below] * (1 - part) + x[..., above] * part


@lru_cache(maxsize=64)
def _lanczos_weights(given: int, wanted: int) -> Tensor:
    """(wanted, given) float32: weights of every input pixel for every output pixel, rows summing to 1."""
    scale = given / wanted
    wide = max(scale, 1.0)  # antialiasing: the kernel widens where the image shrinks
    centre = (np.arange(wanted) + 0.5) * scale
    distance = (np.arange(given)[None] + 0.5 - centre[:, None]) / wide
    weight = np.sinc(distance) * np.sinc(distance / 3) * (np.abs(distance) < 3)
    return torch.from_numpy((weight / weight.sum(1, keepdims=True)).astype(np.float32))


def _padded(x: Tensor, size: int, centre: bool) -> Tensor:
    height, width = x.shape[2:]
    ratio = max(width / size, height / size)
    inner = (int(height / ratio), int(width / ratio))
    x = functional.interpolate(x, inner, mode="bilinear", align_corners=False)
    rest_h = size - inner[0]
    rest_w = size - inner[1]
    top, left = (rest_h // 2, rest_w // 2) if centre else (rest_h, rest_w)
    return functional.pad(x, (left, rest_w - left, top, rest_h - top))


def _jpeg(images: Tensor) -> Tensor:
    """Through JPEG as TensorFlow does it: quality 95, chroma at half size, decoded with the fast integer transform.

    The transform matters: the accurate one, which most libraries take, differs by up to 8 grey levels.
    """
    out = np.empty(tuple(images.shape), np.uint8)
    for index in np.ndindex(*images.shape[:2]):
        bgr = images[index].cpu().numpy()[..., ::-1]
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])
        if not done:
            raise RatchetError("policy.bad_input", "an image could not be encoded", fix="give uint8 RGB images")
        out[index] = simplejpeg.decode_jpeg(data.tobytes(), colorspace="RGB", fastdct=True, fastupsample=False)
    return torch.from_numpy(out).to(images.device)
