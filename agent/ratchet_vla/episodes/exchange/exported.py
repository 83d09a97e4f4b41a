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


def episode_of(details: dict[str, Any], rate: Rate, rows: Iterable[Row], origin: str) -> Episode:
    """An exported episode as a recording again.

    The label comes along as what the export claims, under a source of its own: whoever has the store decides anew.
    Tokens and log-probabilities are in no export, so that nothing here can enter a policy gradient.
    """
    try:
        adapter_id = details["adapter_id"]
        instruction = details["instruction"]
        steps: list[Step] = []
        ticks: list[ControlTick] = []
        for position, row in enumerate(rows):
            observation = Observation(row.images, row.state, instruction, row.stamp, position)
            actions = row.action[None] if row.chunk is None else row.chunk
            executed = np.array([row.executed]) if row.flags is None else row.flags
            chunk = ActionChunk(actions.copy(), None, None, "" if row.human else adapter_id, 0.0, row.stamp, position)
            steps.append(Step(observation, chunk, executed, row.reward, row.done, row.ran))
            if rate == "control":
                marks = Mark(row.marks)
                ticks.append(
                    ControlTick(
                        row.stamp,
                        row.stamp,
                        position,
                        None,
                        row.action.copy(),
                        marks,
                        position,
                        0,
                        adapter_id,
                        row.state,
                    )
                )
        claimed_success = details["success"]
        return Episode(
            task=details["task"],
            instruction=instruction,
            steps=steps,
            success=claimed_success,
            success_source="" if claimed_success is None else f"export:{details['success_source']}",
            initial_state=int(details["initial_state"]),
            seed=int(details["seed"]),
            adapter_id=adapter_id,
            meta={**details["meta"], "imported_from": origin, "exported": _kept(details)},
            ticks=ticks,
            termination=details["termination"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RatchetError(
            "import.damaged", f"what the export says of an episode is unreadable: {error!r}", where=origin
        ) from None


def contract_of(contract_data: Any, location: str, named_contract: RobotContract | None) -> RobotContract:
    """The contract in force when the episodes were recorded.

    named_contract: what the user named; it may differ in limits only.

    Raises:
        RatchetError: import.other_contract, and what `RobotContract.from_dict` raises.
    """
    exported_contract = RobotContract.from_dict(
        json.loads(contract_data) if isinstance(contract_data, str) else contract_data, location, rules=False
    )
    if named_contract is None or named_contract.id == exported_contract.id:
        return exported_contract
    exported_meaning = _meaning(exported_contract)
    named_meaning = _meaning(named_contract)
    differing = [name for name in exported_meaning if exported_meaning[name] != named_meaning[name]]
    if differing:
        aspects = ", another ".join(differing)
        raise RatchetError(
            "import.other_contract",
            f"exported from robot '{exported_contract.name}', which has another {aspects} than '{named_contract.name}'",
            where=location,
            fix="leave --contract out: the export has its own",
        )
    return exported_contract


def _meaning(contract: RobotContract) -> dict[str, Any]:
    """What makes the numbers of an episode mean what they mean; limits and topics do not."""
    return {
        "control rate": contract.control_hz,
        "action space": contract.action,
        "state": [(state.name, state.size, state.unit, state.frame) for state in contract.state],
        "cameras": [(camera.name, camera.width, camera.height) for camera in contract.cameras],
    }


def _kept(details: dict[str, Any]) -> dict[str, Any]:
    return {name: details[name] for name in ("id", "mode", "verification")}
