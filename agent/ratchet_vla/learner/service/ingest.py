"""What arrived, looked at: an episode is ruled on, a label or the end of a session is taken in.

Knows files, the ledger and the rules of intake. Writes nothing: it gives what the journal's line will hold.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.admission import Ruling, Wanted, rule
from ratchet_vla.learner.service.config import ServiceConfig
from ratchet_vla.learner.service.events import Noted, Ruled
from ratchet_vla.learner.service.state import Arrival, Ledger, Unruled
from ratchet_vla.link.session_records import LABEL, SESSION
from ratchet_vla.records import Episode

log = logging.getLogger("ratchet.learner")
SMALL = 1 << 20  # bytes of a label or a session's manifest


def ruling_on(
    arrival: Arrival,
    path: Path,
    ledger: Ledger,
    config: ServiceConfig,
    instruction: str,
    read: Callable[[Path], Episode],
) -> Ruled:
    """The decision about one episode, and whose it is. instruction: of the task that is being learned."""
    adapter = source = compute_dtype = ""
    success: bool | None = None
    try:
        episode = read(path)
    except (RatchetError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
        ruling = Ruling("replay", "inbox.unreadable", str(error)[:200] or type(error).__name__)
    else:
        label = ledger.labels.get(arrival.sha)
        if label is not None:
            episode.success, episode.success_source = label
        ordered = config.mode == "simulation"
        order, slots = (ledger.order, config.slots) if ordered else ("", 0)
        other = next((a for a in ledger.accepted() if a.sha != arrival.sha), None)
        dtype = None if other is None else other.compute_dtype
        wanted = Wanted(ledger.task, ledger.training, config.temperature, instruction, order, slots, dtype)
        taken = {s for s, sha in ledger.filled.items() if sha != arrival.sha}
        ruling = rule(episode, wanted, taken)
        adapter = episode.adapter_id
        success = episode.success
        source = episode.success_source
        compute_dtype = next((step.chunk.compute_dtype for step in episode.steps), "")
    if ruling.decision == "replay":
        log.info("episode %s kept for replay: %s: %s", arrival.sha[:12], ruling.code, ruling.reason)
    return Ruled(
        sha=arrival.sha,
        decision=ruling.decision,
        code=ruling.code,
        reason=ruling.reason,
        slot=ruling.slot,
        adapter=adapter,
        success=success,
        source=source,
        compute_dtype=compute_dtype,
    )


def note_of(file: Unruled, path: Path) -> Noted:
    """What a file that is no episode says; nothing for kinds that this release ignores."""
    seen = Noted(file.type, file.sha)
    if file.type not in (LABEL, SESSION):
        return seen
    try:
        raw = json.loads(path.read_bytes()[:SMALL])
        if file.type == SESSION:
            return dataclasses.replace(seen, session=str(raw["session"]), ended=bool(raw.get("ended")))
        source = str(raw["source"])
        if not source.startswith("human:"):
            raise ValueError("a label must be a person's")
        if raw["success"] not in (True, False, None):
            raise ValueError("success is true, false or null")
        label = {"episode": str(raw["episode"]), "success": raw["success"], "source": source}
        return dataclasses.replace(seen, label=label)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return dataclasses.replace(seen, unreadable=str(error)[:200])
