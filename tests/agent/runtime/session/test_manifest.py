"""A session's manifest answers, months later, which robot, calibration, base and adapters an episode was made with.

Pinned: its content, that every change is on disk at once and whole, and that a wrong calibration starts no session.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ratchet_vla.contract import RobotContract
from ratchet_vla.errors import RatchetError
from ratchet_vla.runtime.session.manifest import FILE, Session
from ratchet_vla.testing.fake_contract import arm


def calibrated() -> RobotContract:
    raw = arm().to_dict()
    raw["cameras"][0]["calibration_id"] = "cal-1"
    return RobotContract.from_dict(raw)


def test_a_session_tells_what_it_ran_with(tmp_path: Path) -> None:
    contract = calibrated()
    with Session.start(
        tmp_path, contract, base_hash="b", adapter_id="a0", calibrations={"front": "cal-1"}, notes={"operator": "Ada"}
    ) as session:
        session.adapter("a0")
        session.adapter("a1")
        on_disk = Session.read(session.folder)
        assert [i for _, i in on_disk.adapters] == ["a0", "a1"]
        assert on_disk.ended == ""  # as after a power cut
    done = Session.read(session.folder)
    assert (done.reason, done.contract_id, done.base_hash) == ("done", contract.id, "b")
    assert RobotContract.from_dict(done.contract).id == contract.id
    assert done.notes == {"operator": "Ada"}
    session.stop("again")
    assert Session.read(session.folder).reason == "done"


def test_an_error_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spilled"), Session.start(tmp_path, arm(), base_hash="b", adapter_id="b"):
        raise ValueError("spilled")
    (folder,) = tmp_path.iterdir()
    assert Session.read(folder).reason == "ValueError: spilled"


@pytest.mark.parametrize("given", [{}, {"front": "cal-0"}])
def test_another_calibration_starts_no_session(tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(RatchetError, match=r"session\.calibration.*cal-1.*front"):
        Session.start(tmp_path, calibrated(), base_hash="b", adapter_id="b", calibrations=given)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", json.dumps({"adapters": []})):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(RatchetError, match=r"session\.unreadable"):
            Session.read(tmp_path)
