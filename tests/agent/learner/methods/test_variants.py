"""A row of the grid says in its own name what differs in it; read wrongly, a study would compare a thing with itself.

Pinned: every key reaches its place with its type, orders, what a rank alone keeps, and refusals before hours are spent.
"""

from __future__ import annotations

import pytest

from ratchet_vla.cli.study.verb import Run
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.methods.replay import ExpertReplay
from ratchet_vla.learner.methods.variants import COMMON, SEQUENCE, parse

TASKS = ("a", "b", "c", "d", "e")


def test_a_plain_method_changes_nothing() -> None:
    plain = parse("seq_ft")
    assert (plain.label, plain.settings, plain.sequence) == ("seq_ft", {}, {})
    assert plain.lora(4, 4.0) == (4, 4.0)
    assert plain.arranged(TASKS) == TASKS


def test_every_common_key_reaches_the_trial() -> None:
    values = {"rank": 16, "alpha": 8.0, "learning_rate": 3e-3, "order": "reversed"}
    sequence = {"updates": 4, "groups": 48, "until": 0.9, "temperature": 1.6}
    held = {"reference": "wide", "reference_weight": 0.3, "own_weight": 0.0}
    assert values.keys() | sequence.keys() | held.keys() == COMMON.keys(), "a key without a test"
    row = parse("seq_ft:" + ",".join(f"{k}={v}" for k, v in (values | sequence | held).items()))
    assert row.reference == "wide"
    assert (row.retention().reference_weight, row.retention().own_weight) == (0.3, 0.0)
    assert {key: getattr(row, key) for key in values} == values
    assert row.sequence == sequence
    assert all(type(row.sequence[key]) is kind for key, kind in SEQUENCE.items())

    study = Run(tasks=TASKS)
    config, common = study._config(row, (), 0), study._config(parse("seq_ft"), (), 0)
    assert config.tasks == TASKS[::-1]
    assert config.update.learning_rate == 3e-3
    for key, value in sequence.items():
        assert getattr(config, key) == value
        assert getattr(common, key) != value, f"{key} is the study's own here, and proves nothing"


def test_a_rank_alone_keeps_the_scale() -> None:
    assert parse("seq_ft:rank=16").lora(4, 2.0) == (16, 8.0)
    assert parse("seq_ft:rank=16,alpha=1").lora(4, 2.0) == (16, 1.0)


def test_orders_hold_every_task_once() -> None:
    shuffled = parse("seq_ft:order=3").arranged(TASKS)
    assert shuffled == parse("seq_ft:order=3").arranged(TASKS)
    assert shuffled != TASKS
    assert sorted(shuffled) == sorted(TASKS)


def test_a_methods_own_parameter_goes_to_the_method() -> None:
    row = parse("expert_replay:weight=0.25,groups=8")
    assert row.kind is ExpertReplay
    assert row.settings == {"weight": 0.25}
    assert row.sequence == {"groups": 8}
    assert row.make_settings() == {"weight": 0.25}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("seq", "learn.unknown_method"),
        ("seq_ft:strength=1", "learn.unknown_setting"),
        ("seq_ft:rank", "learn.bad_setting"),
        ("seq_ft:rank=4.5", "learn.bad_setting"),
        ("seq_ft:rank=0", "learn.bad_setting"),
        ("seq_ft:updates=-1", "learn.bad_setting"),
        ("seq_ft:temperature=nan", "learn.bad_setting"),
        ("seq_ft:learning_rate=0", "learn.bad_setting"),
        ("seq_ft:order=backwards", "learn.bad_setting"),
        ("seq_ft:own_weight=1", "learn.bad_setting"),
        ("seq_ft:reference=base,own_weight=-1", "learn.bad_setting"),
        ("full_ft:reference=base", "learn.bad_setting"),
    ],
)
def test_refusals(text: str, code: str) -> None:
    with pytest.raises(RatchetError) as refused:
        parse(text)
    assert refused.value.code == code


def test_a_share_of_episodes_is_refused_where_the_trial_is_planned() -> None:
    with pytest.raises(RatchetError, match=r"learn\.bad_setting"):
        Run(tasks=TASKS)._config(parse("seq_ft:until=2"), (), 0)
