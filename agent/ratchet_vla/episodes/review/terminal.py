"""Episodes in a terminal: frames as coloured half blocks, and what there is to say about an episode in lines.

Knows characters and colours. Knows no keys and no label.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from ratchet_vla.episodes.library.store import Card, EpisodeStore
from ratchet_vla.episodes.review.preview_cache import group_of
from ratchet_vla.records import UInt8


def as_text(image: UInt8, columns: int) -> str:
    """An image as lines of half blocks, two rows of pixels per line, with 24-bit colours. image: (H, W, 3) RGB."""
    height, width = image.shape[:2]
    rows = max(2, round(columns * height / width / 2) * 2)
    resized = np.asarray(cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA))
    lines = []
    for upper, lower in zip(resized[::2], resized[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{upper_rgb[0]};{upper_rgb[1]};{upper_rgb[2]};48;2;{lower_rgb[0]};{lower_rgb[1]};{lower_rgb[2]}m▀"
            for upper_rgb, lower_rgb in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def side_by_side(images: list[UInt8], columns: int) -> str:
    """Several images of one moment in one row, `columns` wide together."""
    image_columns = max(8, (columns - 2 * (len(images) - 1)) // max(len(images), 1))
    blocks = [as_text(image, image_columns).split("\n") for image in images]
    tallest = max((len(block) for block in blocks), default=0)
    blank = " " * image_columns
    padded = [block + [blank] * (tallest - len(block)) for block in blocks]
    return "\n".join("  ".join(row_parts) for row_parts in zip(*padded, strict=True))


def moments(store: EpisodeStore, card: Card, fps: float) -> Iterator[tuple[float, list[UInt8]]]:
    """(seconds from the first frame, the newest frame of every camera), at most `fps` per second."""
    reader = store.open(card.id)
    ending = reader.ending()
    counts = ending.frames if ending else {}
    tracks = {camera: list(reader.frames(camera, group_of(reader, counts, camera))) for camera in card.cameras}
    stamps_s = sorted({stamp for track in tracks.values() for stamp, _ in track})
    last_s = -np.inf
    positions = dict.fromkeys(tracks, 0)
    for stamp in stamps_s:
        if stamp - last_s < 0.9 / fps:
            continue
        last_s = stamp
        images = []
        for camera, track in tracks.items():
            while positions[camera] + 1 < len(track) and track[positions[camera] + 1][0] <= stamp:
                positions[camera] += 1
            if track:
                images.append(track[positions[camera]][1])
        yield stamp - stamps_s[0], images
