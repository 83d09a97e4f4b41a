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
    small = np.asarray(cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA))
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def side_by_side(images: list[UInt8], columns: int) -> str:
    """Several images of one moment in one row, `columns` wide together."""
    each = max(8, (columns - 2 * (len(images) - 1)) // max(len(images), 1))
    blocks = [as_text(image, each).split("\n") for image in images]
    tallest = max((len(b) for b in blocks), default=0)
    blank = " " * each
    padded = [b + [blank] * (tallest - len(b)) for b in blocks]
    return "\n".join("  ".join(parts) for parts in zip(*padded, strict=True))


def moments(store: EpisodeStore, card: Card, fps: float) -> Iterator[tuple[float, list[UInt8]]]:
    """(seconds from the first frame, the newest frame of every camera), at most `fps` per second."""
    reader = store.open(card.id)
    ending = reader.ending()
    counts = ending.frames if ending else {}
    tracks = {c: list(reader.frames(c, group_of(reader, counts, c))) for c in card.cameras}
    stamps = sorted({stamp for track in tracks.values() for stamp, _ in track})
    last = -np.inf
    at = dict.fromkeys(tracks, 0)
    for stamp in stamps:
        if stamp - last < 0.9 / fps:
            continue
        last = stamp
        images = []
        for camera, track in tracks.items():
            while at[camera] + 1 < len(track) and track[at[camera] + 1][0] <= stamp:
                at[camera] += 1
            if track:
                images.append(track[at[camera]][1])
        yield stamp - stamps[0], images
