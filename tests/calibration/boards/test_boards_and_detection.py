"""A board that prints at the wrong size, or corners that are found a tenth of a pixel beside, spoil every number after.

Pinned: the PDF has the page's true size and draws the board at it; corners are found within a tenth of a pixel where
they were drawn, for both kinds of board, seen straight, tilted and in part; a board survives its own YAML; blur in one
direction only is still blur. Determinism: images are drawn from seeds.
"""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_calibration.boards.board import PAPER, Board
from ratchet_calibration.boards.detection import detect, edge_width
from tests.calibration.scenes import BOARD, CAMERA, drawn, pose

CHESSBOARD = Board("chessboard", columns=9, rows=6, marker=0.0)


@pytest.mark.parametrize("board", [BOARD, CHESSBOARD], ids=["charuco", "chessboard"])
@pytest.mark.parametrize("turn", [(0.0, 0.0, 0.0), (0.4, 0.1, 0.2), (-0.2, 0.5, -0.3)])
def test_corners_are_found_where_they_are(board: Board, turn: tuple[float, float, float]) -> None:
    board_in_camera = pose(turn, (0.01, -0.01, 0.42))
    detection = detect(board, drawn(board, board_in_camera))
    truth = CAMERA.project(board.corners @ board_in_camera[:3, :3].T + board_in_camera[:3, 3])
    assert len(detection) == len(board.corners)
    assert np.sqrt(((detection.points - truth[detection.ids]) ** 2).sum(1).mean()) < 0.1
    assert (
        abs((detection.points - truth[detection.ids]).mean(0)).max() < 0.05
    )  # no common shift: half pixels hide there


def test_part_of_a_board_keeps_its_ids() -> None:
    board_in_camera = pose((0.2, 0.1, 0.0), (-0.12, 0.0, 0.42))
    detection = detect(BOARD, drawn(BOARD, board_in_camera))
    truth = CAMERA.project(BOARD.corners @ board_in_camera[:3, :3].T + board_in_camera[:3, 3])
    assert 8 <= len(detection) < len(BOARD.corners)
    assert np.abs(detection.points - truth[detection.ids]).max() < 0.25


def test_blur_along_one_direction_is_seen() -> None:
    image = drawn(BOARD, pose((0.0, 0.0, 0.0), (0.0, 0.0, 0.35)))
    detection = detect(BOARD, image)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    sharp = edge_width(grey, BOARD, detection.ids, detection.points)
    for size in ((7, 1), (1, 7)):
        assert edge_width(cv2.blur(grey, size), BOARD, detection.ids, detection.points) > 2.5 * sharp


@pytest.mark.parametrize("paper", ["a4", "a3", "a2"])
def test_the_page_has_its_true_size(paper: str) -> None:
    page = BOARD.pdf(paper)
    box = re.search(rb"/MediaBox \[ ?([\d. ]+) ?\]", page)
    assert box is not None
    _, _, width, height = (float(x) * 0.0254 / 72 for x in box.group(1).split())
    assert (width, height) == pytest.approx(PAPER[paper], abs=1e-4)


def test_the_printed_board_is_found_at_its_size() -> None:
    """The image that goes onto the page, looked at by the detector: squares as many pixels as they should have."""
    detection = detect(BOARD, BOARD.image(40, margin=40))
    assert detection.points[0] == pytest.approx([40 + 40 - 0.5, 40 + 40 - 0.5], abs=0.1)
    assert np.ptp(detection.points, axis=0) == pytest.approx([40 * (BOARD.columns - 2), 40 * (BOARD.rows - 2)], abs=0.1)


@settings(max_examples=25, deadline=None)
@given(columns=st.integers(3, 12), rows=st.integers(3, 9), square=st.floats(0.005, 0.2), share=st.floats(0.3, 0.9))
def test_a_board_survives_its_description(columns: int, rows: int, square: float, share: float) -> None:
    board = Board(columns=columns, rows=rows, square=square, marker=share * square, dictionary="5x5_250")
    assert Board.from_dict(board.to_dict()) == board
    assert board.corners.shape == ((columns - 1) * (rows - 1), 3)
    assert np.ptp(board.corners[:, 0]) == pytest.approx((columns - 2) * square)
