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
    """Put measured facts into a contract's file, replacing those of the same name.

    Everything else stays as it is, comments included. The file is exchanged at once or not at all.

    Raises:
        RatchetError: what `RobotContract.load` raises; contract.not_written.
    """
    contract = RobotContract.load(path)
    new_names = {fact.name for fact in facts}
    merged = [fact for fact in contract.verified if fact.name not in new_names] + list(facts)
    unchanged_lines = _without_verified(path.read_text())
    block = yaml.safe_dump({"verified": [dataclasses.asdict(fact) for fact in merged]}, sort_keys=False)
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_text("\n".join(unchanged_lines).rstrip() + "\n" + block)
        changed = RobotContract.load(scratch)
        # The id leaves measurements out: it differs only where this edit damaged something else.
        if changed.id != contract.id:
            raise RatchetError("contract.not_written", "the contract would have changed", where=str(path))
        scratch.rename(path)
    except OSError as error:
        raise RatchetError("contract.not_written", str(error), where=str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def _without_verified(text: str) -> list[str]:
    """Return the lines of a contract's file without the block `verified`, which is edited as text to keep comments."""
    remaining: list[str] = []
    inside_block = False
    for line in text.splitlines():
        continues_block = not line.strip() or line[:1] in (" ", "-", "#")
        inside_block = line.startswith("verified:") or (inside_block and continues_block)
        if not inside_block:
            remaining.append(line)
    return remaining
