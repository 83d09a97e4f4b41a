"""From actions to bins and back: an error here scales or mirrors every motion of the robot, and trains on it.

Pinned: the published formula (numpy.digitize over 256 edges, 255 centres, reversed ids), round trips, the ends of the
range, and which statistics are refused. Determinism: hypothesis with derandomised examples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.action_tokens import BINS, Statistics, centres, decode, encode, normalise, unnormalise

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

VOCABULARY = 32000
EDGES = np.linspace(-1, 1, 256)
FIELDS: dict[str, Any] = {
    "key": "k",
    "units": ("m", "m"),
    "q01": (-0.5, 0.0),
    "q99": (0.25, 1.0),
    "mask": (True, False),
}
values = st.floats(-1.5, 1.5, allow_nan=False)


def published_token(value: float) -> int:
    """The published tokenizer's id of one normalised action."""
    return int(VOCABULARY - np.digitize(np.clip(value, -1, 1), EDGES))


def published_action(token: int) -> float:
    """The published tokenizer's normalised action of one id."""
    found: float = ((EDGES[:-1] + EDGES[1:]) / 2)[np.clip(VOCABULARY - token - 1, 0, 254)]
    return found


@given(st.lists(values, min_size=1, max_size=50))
def test_encode_is_numpys_digitize(numbers: list[float]) -> None:
    bins = encode(torch.tensor(numbers, dtype=torch.float64))
    assert [int(b) + VOCABULARY - BINS for b in bins] == [published_token(v) for v in numbers]


def test_encode_is_numpys_digitize_at_every_edge_and_beside_it() -> None:
    numbers = [f(e) for e in EDGES for f in (lambda v: v, lambda v: np.nextafter(v, 2), lambda v: np.nextafter(v, -2))]
    bins = encode(torch.tensor(numbers, dtype=torch.float64))
    assert [int(b) + VOCABULARY - BINS for b in bins] == [published_token(v) for v in numbers]


def test_decode_is_the_published_centre_for_every_bin() -> None:
    actions = decode(torch.arange(BINS))
    assert actions.numpy() == pytest.approx([published_action(b + VOCABULARY - BINS) for b in range(BINS)], abs=1e-15)
    assert actions[0] == actions[1] == centres()[-1]  # two ids for the highest action, as published
    assert bool((actions[1:].diff() < 0).all())


@given(st.integers(0, BINS - 1))
def test_a_bin_survives_decoding_and_encoding(bin_: int) -> None:
    again = int(encode(decode(torch.tensor([bin_]))))
    assert again == max(bin_, 1)  # bin 0 means what bin 1 means


@given(values)
def test_an_action_moves_by_half_a_bin_at_most(value: float) -> None:
    clipped = min(max(value, -1.0), 1.0)
    back = float(decode(encode(torch.tensor([value], dtype=torch.float64))))
    assert abs(back - clipped) <= 1 / 255 + 1e-12


def test_values_beyond_the_range_take_the_outermost_bins() -> None:
    bins = encode(torch.tensor([1.0, 7.0, math.inf, -1.0, -7.0, -math.inf]))
    assert bins.tolist() == [0, 0, 0, 255, 255, 255]


def test_nan_is_no_action() -> None:
    with pytest.raises(RatchetError) as refused:
        encode(torch.tensor([0.0, math.nan]))
    assert refused.value.code == "policy.bad_input"


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_unnormalise_inverts_normalise_and_leaves_the_unmasked_alone(numbers: list[float]) -> None:
    statistics = Statistics(**FIELDS)
    actions = torch.tensor(numbers, dtype=torch.float64)
    normalised = normalise(actions, statistics)
    assert normalised[1] == actions[1]
    assert unnormalise(normalised, statistics).numpy() == pytest.approx(actions.numpy(), abs=1e-9)


def test_the_percentiles_are_the_ends_of_the_normalised_range() -> None:
    statistics = Statistics(**FIELDS)
    assert float(normalise(torch.tensor([-0.5, 0.0]), statistics)[0]) == pytest.approx(-1.0)
    assert float(normalise(torch.tensor([0.25, 0.0]), statistics)[0]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"units": ("m",)},
        {"q01": (-0.5,)},
        {"mask": (True,)},
        {"units": (), "q01": (), "q99": (), "mask": ()},
        {"q99": (-0.5, 1.0)},  # no range
        {"q01": (0.3, 0.0)},  # upside down
        {"q01": (math.nan, 0.0)},
        {"q99": (math.inf, 1.0)},
        {"q01": (-0.5, math.nan)},  # also where it is not used
        {"q01": ("-0.5", "0"), "q99": ("1", "1")},
        {"state_mean": (0.0,)},
        {"state_mean": (0.0,), "state_std": (0.0,)},
        {"state_mean": (0.0,), "state_std": (-1.0,)},
        {"state_mean": (math.nan,), "state_std": (1.0,)},
        {"state_mean": (0.0,), "state_std": (math.inf,)},
    ],
)
def test_statistics_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RatchetError) as refused:
        Statistics(**{**FIELDS, **change})
    assert refused.value.code == "policy.missing_statistics"


def test_statistics_survive_their_dictionary() -> None:
    statistics = Statistics(**FIELDS, state_mean=(0.1, 0.2), state_std=(1.0, 2.0))
    assert Statistics.from_dict(statistics.as_dict(), "here") == statistics


@pytest.mark.parametrize("data", [None, {}, {"key": "k"}, {**FIELDS, "colour": "red"}, [1, 2], {**FIELDS, "q01": 3}])
def test_dictionaries_that_are_refused(data: Any) -> None:
    with pytest.raises(RatchetError) as refused:
        Statistics.from_dict(data, "config.json")
    assert refused.value.code == "policy.missing_statistics"
