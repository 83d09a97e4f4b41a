"""Prompts: the words are the task, so a shifted, cut or lost token makes the robot do something else.

Pinned: padding directly after the first token, fixed length, lower case, the last token, what is refused, and that any
word can be encoded by a tokenizer trained on a handful.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.policy.discrete.text import OPENVLA_PROMPT, Prompt, load_tokenizer, train_tokenizer
from tests.agent.policy.samples import TOKENIZER, WORDS


def prompt(**changes: Any) -> Prompt:
    options = {"bos": 1, "pad": 0, "end_token": -1, "length": 12, **changes}
    return Prompt(TOKENIZER, options.pop("template", "{instruction}"), **options)


def test_padding_comes_directly_after_the_first_token() -> None:
    ids, mask = prompt()(["open the drawer", "press the button from the top"])
    assert ids.shape == mask.shape == (2, 12)
    for row, seen in zip(ids, mask, strict=True):
        count = int(seen.sum())
        assert row[0] == 1
        assert seen.tolist() == [True] + [False] * (12 - count) + [True] * (count - 1)
        assert (row[~seen] == 0).all()
    words = TOKENIZER.encode("open the drawer", add_special_tokens=False).ids
    assert ids[0, -len(words) :].tolist() == words


def test_length_zero_pads_to_the_longest() -> None:
    short, long = "open", "press the button from the top"
    ids, mask = prompt(length=0)([short, long])
    assert bool(mask[1].all())
    assert not bool(mask[0].all())
    assert prompt(length=0)([short])[0].shape[1] < ids.shape[1]


def test_case_and_space_around_do_not_matter() -> None:
    assert prompt()(["  Open THE drawer \n"])[0].equal(prompt()(["open the drawer"])[0])


def test_the_end_token_is_there_once() -> None:
    assert prompt(end_token=77)(["open the drawer"])[0][0, -1] == 77
    last = int(prompt()(["open the drawer"])[0][0, -1])
    ended, _ = prompt(end_token=last)(["open the drawer"])
    assert ended.equal(prompt()(["open the drawer"])[0])


def test_the_published_template_surrounds_the_instruction() -> None:
    ids, mask = prompt(template=OPENVLA_PROMPT, length=0)(["Open the {drawer}"])
    said = TOKENIZER.decode(ids[0, 1:].tolist())
    assert said.strip() == "In: What action should the robot take to open the {drawer}?\nOut:"
    assert bool(mask.all())


@pytest.mark.parametrize("instruction", ["", "   ", "\n", "open the drawer " * 20])
def test_instructions_that_are_refused(instruction: str) -> None:
    with pytest.raises(RatchetError) as refused:
        prompt()(["open the drawer", instruction])
    assert refused.value.code == "policy.bad_instruction"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip))
def test_words_never_seen_are_encoded_without_loss(instruction: str) -> None:
    ids, _ = prompt(length=0)([instruction])
    assert TOKENIZER.decode(ids[0, 1:].tolist()).strip() == instruction.strip().lower().strip()
    assert int(ids.max()) < 300


def test_training_repeats_itself_whatever_the_order() -> None:
    again = train_tokenizer(list(reversed(WORDS)), 300)
    assert again.to_str() == TOKENIZER.to_str()
    assert (again.token_to_id("<pad>"), again.token_to_id("<bos>")) == (0, 1)


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    for content in (None, "", "{}", TOKENIZER.to_str()[:500]):
        if content is not None:
            broken.write_text(content)
        with pytest.raises(RatchetError) as refused:
            load_tokenizer(broken)
        assert refused.value.code == "policy.bad_checkpoint"
