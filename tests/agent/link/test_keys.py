"""Keys decide who may talk to a learner: they are private, never replaced silently, and lists change at once.

Pinned: file modes, refusal to overwrite, names, damaged and public-only files, allow, revoke. Files only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ratchet_vla.errors import RatchetError
from ratchet_vla.link import keys


def test_a_pair_is_private_and_can_be_read(tmp_path: Path) -> None:
    pair = keys.make(tmp_path / "k", "robot-1")
    secret = tmp_path / "k" / "robot-1.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert keys.load(secret) == pair
    assert keys.load_public(tmp_path / "k" / "robot-1.key") == pair.public
    assert pair.secret.decode() not in repr(pair)
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == ["robot-1.key", "robot-1.key_secret"]


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    pair = keys.make(tmp_path, "robot-1")
    with pytest.raises(RatchetError, match=r"link\.key_exists"):
        keys.make(tmp_path, "robot-1")
    assert keys.load(tmp_path / "robot-1.key_secret") == pair


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65, ".hidden"])
def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RatchetError, match=r"link\.bad_name"):
        keys.make(tmp_path, name)


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    keys.make(tmp_path, "robot-1")
    public = tmp_path / "robot-1.key"
    secret = tmp_path / "robot-1.key_secret"
    with pytest.raises(RatchetError, match=r"link\.no_key"):
        keys.load(tmp_path / "nothing")
    with pytest.raises(RatchetError, match=r"link\.bad_key"):
        keys.load(public)
    secret.chmod(0o644)
    with pytest.raises(RatchetError, match=r"link\.open_key"):
        keys.load(secret)
    for text in ("", "garbage", 'curve\n    public-key = "short"\n', "\x00\xff"):
        public.write_text(text)
        with pytest.raises(RatchetError, match=r"link\.bad_key"):
            keys.load_public(public)


def test_the_list_changes_at_once(tmp_path: Path) -> None:
    learner = tmp_path / "learner"
    robots = tmp_path / "robots"
    first = keys.make(robots, "one")
    second = keys.make(robots, "two")
    listed = keys.AllowList(learner)
    assert listed.name_of(first.public) is None
    keys.allow(learner, robots / "one.key")
    keys.allow(learner, robots / "one.key")
    assert listed.name_of(first.public) == "one"
    assert listed.callback("ratchet", first.public)
    assert not listed.callback("ratchet", second.public)
    with pytest.raises(RatchetError, match=r"link\.name_taken"):
        keys.allow(learner, robots / "two.key", "one")
    keys.allow(learner, robots / "two.key", "second")
    assert keys.allowed(learner) == {first.public: "one", second.public: "second"}
    (learner / keys.ALLOWED / "broken.key").write_text("broken")
    assert listed.name_of(second.public) == "second"
    keys.revoke(learner, "one")
    assert listed.name_of(first.public) is None
    with pytest.raises(RatchetError, match=r"link\.not_allowed"):
        keys.revoke(learner, "one")
