"""What an export of ours says of each episode beside its format, and the episode that comes of it when it returns.

Knows facts and rows. Knows no file of any format: `lerobot_export`, `hdf5` and `returning` do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ratchet_vla.contract import RobotContract
from ratchet_vla.episodes.exchange.rows import Rate, Row
from ratchet_vla.episodes.file.reader import EpisodeReader
from ratchet_vla.episodes.library.annotations import LabelStatus
from ratchet_vla.episodes.library.store import Card
from ratchet_vla.errors import RatchetError
from ratchet_vla.records import ActionChunk, ControlTick, Episode, Mark, Observation, Step

FORMAT = 1


def facts_of(card: Card, status: LabelStatus, reader: EpisodeReader) -> dict[str, Any]:
    """Everything about an episode that its rows do not hold, as JSON data."""
    info = reader.info
    return {
        "id": card.id,
        "task": card.task,
        "instruction": card.instruction,
        "adapter_id": card.adapter_id,
        "session": card.session,
        "mode": card.mode,
        "created": card.created,
        "clock_offset": info.clock_offset,
        "seed": info.seed,
        "initial_state": info.initial_state,
        "calibrations": info.calibrations,
        "termination": card.reason,
        "meta": card.meta,
        "success": status.success if status.state == "verified" else card.success,
        "success_source": status.source or card.source,
        "verification": dataclasses.asdict(status),
    }


def episode_of(facts: dict[str, Any], rate: Rate, found: Iterable[Row], came_from: str) -> Episode:
    """An exported episode as a recording again.

    The label comes along as what the export claims, under a source of its own: whoever has the store decides anew.
    Tokens and log-probabilities are in no export, so that nothing here can enter a policy gradient.
    """
    try:
        adapter = facts["adapter_id"]
        instruction = facts["instruction"]
        steps: list[Step] = []
        ticks: list[ControlTick] = []
        for i, row in enumerate(found):
            seen = Observation(row.images, row.state, instruction, row.stamp, i)
            actions = row.action[None] if row.chunk is None else row.chunk
            flags = np.array([row.executed]) if row.flags is None else row.flags
            chunk = ActionChunk(actions.copy(), None, None, "" if row.human else adapter, 0.0, row.stamp, i)
            steps.append(Step(seen, chunk, flags, row.reward, row.done, row.ran))
            if rate == "control":
                marks = Mark(row.marks)
                ticks.append(
                    ControlTick(row.stamp, row.stamp, i, None, row.action.copy(), marks, i, 0, adapter, row.state)
                )
        claimed = facts["success"]
        return Episode(
            task=facts["task"],
            instruction=instruction,
            steps=steps,
            success=claimed,
            success_source="" if claimed is None else f"export:{facts['success_source']}",
            initial_state=int(facts["initial_state"]),
            seed=int(facts["seed"]),
            adapter_id=adapter,
            meta={**facts["meta"], "imported_from": came_from, "exported": _kept(facts)},
            ticks=ticks,
            termination=facts["termination"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RatchetError(
            "import.damaged", f"what the export says of an episode is unreadable: {error!r}", where=came_from
        ) from None


def contract_of(raw: Any, where: str, given: RobotContract | None) -> RobotContract:
    """The contract in force when the episodes were recorded. given: what the user named; may differ in limits only.

    Raises:
        RatchetError: import.other_contract, and what `RobotContract.from_dict` raises.
    """
    own = RobotContract.from_dict(json.loads(raw) if isinstance(raw, str) else raw, where, rules=False)
    if given is None or given.id == own.id:
        return own
    mine = _meaning(own)
    theirs = _meaning(given)
    other = [name for name in mine if mine[name] != theirs[name]]
    if other:
        raise RatchetError(
            "import.other_contract",
            f"exported from robot '{own.name}', which has another {', another '.join(other)} than '{given.name}'",
            where=where,
            fix="leave --contract out: the export has its own",
        )
    return own


def _meaning(contract: RobotContract) -> dict[str, Any]:
    """What makes the numbers of an episode mean what they mean; limits and topics do not."""
    return {
        "control rate": contract.control_hz,
        "action space": contract.action,
        "state": [(s.name, s.size, s.unit, s.frame) for s in contract.state],
        "cameras": [(c.name, c.width, c.height) for c in contract.cameras],
    }


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("id", "mode", "verification")}
