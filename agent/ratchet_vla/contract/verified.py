"""Facts that were measured on a robot, written into its contract's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from ratchet_vla.contract.robot import RobotContract
from ratchet_vla.contract.specs import VerifiedFact
from ratchet_vla.errors import RatchetError


def write_verified(path: Path, facts: Sequence[VerifiedFact]) -> None:
    """Put measured facts into a contract's file; those of the same name are replaced, everything else stays as it is,
    comments included. The file is exchanged at once or not at all.

    Raises:
        RatchetError: what `RobotContract.load` raises; contract.not_written.
    """
    contract = RobotContract.load(path)
    fresh = {f.name for f in facts}
    merged = [f for f in contract.verified if f.name not in fresh] + list(facts)
    kept: list[str] = []
    inside = False
    for line in path.read_text().splitlines():
        inside = line.startswith("verified:") or (inside and (not line.strip() or line[:1] in (" ", "-", "#")))
        if not inside:
            kept.append(line)
    block = yaml.safe_dump({"verified": [dataclasses.asdict(f) for f in merged]}, sort_keys=False)
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text("\n".join(kept).rstrip() + "\n" + block)
        changed = RobotContract.load(scratch)
        if changed.id != contract.id:
            raise RatchetError("contract.not_written", "the contract would have changed", where=str(path))
        scratch.rename(path)
    except OSError as error:
        raise RatchetError("contract.not_written", str(error), where=str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)
