"""A reference set travels with its base for years: what comes out must be what went in, and wrong ones are refused.

Pinned: a file's round trip (images within JPEG's loss, all else exact), its id, and refusals of damage, of other files
and of another base, each with its code. Determinism: fixed seeds; damage is done on purpose.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.retention.decisions import joined
from ratchet_vla.learner.retention.reference_set import Origin, load, save
from tests.agent.learner.retention.samples import decisions
from tests.agent.learner.runs import tiny_policy
from tests.agent.policy import samples

ORIGIN = Origin("a" * 64, "metaworld", 6, 0.5, 1.0, 0.9, 77)


@pytest.mark.parametrize("policy", [tiny_policy(), samples.flow()], ids=["discrete", "flow"])
def test_what_is_written_is_read(policy: object, tmp_path: Path) -> None:
    written = decisions(policy)  # type: ignore[arg-type]
    flat = np.full_like(written.images, 128)
    flat[:, :, 20:60, 20:60] = (200, 40, 90)
    written = type(written)(**{**vars(written), "images": flat})
    stored = save(tmp_path / "reference.safetensors", written, ORIGIN)
    read = load(tmp_path / "reference.safetensors")
    assert read.id == stored.id
    assert read.origin == ORIGIN
    assert read.decisions.instructions == written.instructions
    assert read.decisions.tasks == written.tasks
    for name in ("state", "instruction", "sampled"):
        ours = getattr(read.decisions, name)
        theirs = getattr(written, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert np.abs(read.decisions.images.astype(int) - written.images).mean() < 2
    assert save(tmp_path / "again.safetensors", written, ORIGIN).id == stored.id


def test_another_base_is_refused(tmp_path: Path) -> None:
    stored = save(tmp_path / "r.safetensors", decisions(tiny_policy()), ORIGIN)
    stored.require_base("a" * 64, "here")
    with pytest.raises(RatchetError) as refused:
        stored.require_base("b" * 64, "here")
    assert refused.value.code == "reference.wrong_base"


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RatchetError) as refused:
        load(tmp_path / "none.safetensors")
    assert refused.value.code == "reference.missing"
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(safetensors.numpy.save({"weights": np.zeros(3, np.float32)}))
    with pytest.raises(RatchetError) as refused:
        load(foreign)
    assert refused.value.code == "reference.bad_file"


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_file_is_refused_or_has_another_id(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    stored = save(folder / "r.safetensors", decisions(tiny_policy(), 4), ORIGIN)
    content = bytearray((folder / "r.safetensors").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        content = content[:place]
    (folder / "r.safetensors").write_bytes(bytes(content))
    outcome = _outcome(folder / "r.safetensors")
    assert outcome != stored.id
    assert outcome == "reference.bad_file" or len(outcome) == 64


def _outcome(path: Path) -> str:
    """The id of what was read, or the code of the refusal."""
    try:
        return load(path).id
    except RatchetError as refused:
        return refused.code


def test_joined_decisions_keep_their_instructions_and_drop_by_task() -> None:
    policy = tiny_policy()
    both = joined([decisions(policy, 6, ("push", "pull")), decisions(policy, 4, ("door",), seed=1)])
    assert [both.tasks[i] for i in both.instruction] == ["push", "pull"] * 3 + ["door"] * 4
    assert both.without(["push"]).present_tasks == ("door", "pull")
    assert len(both.without(["push", "pull the block"])) == 4
