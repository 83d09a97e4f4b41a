"""Ingest of received files: an episode is admitted or rejected, a label or the end of a session is taken in.

Knows files, the learner's state and the rules of admission. Writes nothing: it gives what the journal's line holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.admission import Admission, AdmissionCriteria, admission_of
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.events import AdmissionDecided, RecordIngested
from ratchet_vla.learner.service.state import Arrival, LearnerState, PendingFile
from ratchet_vla.link.session_records import LABEL, SESSION
from ratchet_vla.records import Episode

log = logging.getLogger("ratchet.learner")
SMALL = 1 << 20  # bytes of a label or a session's manifest


def decide_admission(
    arrival: Arrival,
    path: Path,
    state: LearnerState,
    config: ServiceConfig,
    instruction: str,
    read: Callable[[Path], Episode],
) -> AdmissionDecided:
    """Decide whether one episode is admitted. instruction: of the task that is being learned."""
    adapter = source = compute_dtype = ""
    success: bool | None = None
    try:
        episode = read(path)
    except (RatchetError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
        admission = Admission("replay", "inbox.unreadable", str(error)[:200] or type(error).__name__)
    else:
        label = state.labels.get(arrival.sha)
        if label is not None:
            episode.success, episode.success_source = label
        request_id = state.order if config.mode == "simulation" else ""
        slots = config.slots if config.mode == "simulation" else 0
        accepted_arrival = next(
            (candidate_arrival for candidate_arrival in state.accepted() if candidate_arrival.sha != arrival.sha), None
        )
        dtype = None if accepted_arrival is None else accepted_arrival.compute_dtype
        criteria = AdmissionCriteria(
            state.task, state.training, config.temperature, instruction, request_id, slots, dtype
        )
        filled_slots = {slot for slot, sha in state.filled.items() if sha != arrival.sha}
        admission = admission_of(episode, criteria, filled_slots)
        adapter = episode.adapter_id
        success = episode.success
        source = episode.success_source
        compute_dtype = next((step.chunk.compute_dtype for step in episode.steps), "")
    if admission.decision == "replay":
        log.info("episode %s kept for replay: %s: %s", arrival.sha[:12], admission.code, admission.reason)
    return AdmissionDecided(
        sha=arrival.sha,
        decision=admission.decision,
        code=admission.code,
        reason=admission.reason,
        slot=admission.slot,
        adapter=adapter,
        success=success,
        source=source,
        compute_dtype=compute_dtype,
    )


def ingest_record(file: PendingFile, path: Path) -> RecordIngested:
    """Read a file that is no episode; nothing for kinds that this release ignores."""
    record = RecordIngested(file.type, file.sha)
    if file.type not in (LABEL, SESSION):
        return record
    try:
        raw = json.loads(path.read_bytes()[:SMALL])
        if file.type == SESSION:
            return dataclasses.replace(record, session=str(raw["session"]), ended=bool(raw.get("ended")))
        source = str(raw["source"])
        if not source.startswith("human:"):
            raise ValueError("a label must be a person's")
        if raw["success"] not in (True, False, None):
            raise ValueError("success is true, false or null")
        label = {"episode": str(raw["episode"]), "success": raw["success"], "source": source}
        return dataclasses.replace(record, label=label)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return dataclasses.replace(record, unreadable=str(error)[:200])
