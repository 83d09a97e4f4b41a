"""What arrived, looked at: an episode is ruled on, a label or the end of a session is taken in.

Knows files, the ledger and the rules of intake. Writes nothing: it gives the facts that the journal's line will hold.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.errors import RatchetError
from agent.learner.intake import Ruling, Wanted, rule
from agent.learner.ledger import Arrival, Ledger
from agent.learner.service_config import ServiceConfig
from agent.link.parcels import LABEL, SESSION
from agent.records import Episode

log = logging.getLogger("ratchet.learner")
SMALL = 1 << 20  # bytes of a label or a session's manifest


def ruling_on(
    arrival: Arrival,
    path: Path,
    ledger: Ledger,
    config: ServiceConfig,
    instruction: str,
    read: Callable[[Path], Episode],
) -> dict[str, Any]:
    """Facts of the event `ruled`: the decision about one episode, and whose it is. instruction: of the task that is
    being learned."""
    facts: dict[str, Any] = {"adapter": "", "success": None, "source": ""}
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
        facts = {
            "adapter": episode.adapter_id,
            "success": episode.success,
            "source": episode.success_source,
            "compute_dtype": next((step.chunk.compute_dtype for step in episode.steps), ""),
        }
    if ruling.decision == "replay":
        log.info("episode %s kept for replay: %s: %s", arrival.sha[:12], ruling.code, ruling.reason)
    return {**dataclasses.asdict(ruling), **facts}


def note_of(type: str, path: Path) -> dict[str, Any]:
    """Facts of the event `noted`: what a file that is no episode says; nothing for kinds that this release ignores."""
    if type not in (LABEL, SESSION):
        return {}
    try:
        raw = json.loads(path.read_bytes()[:SMALL])
        if type == SESSION:
            return {"session": str(raw["session"]), "ended": bool(raw.get("ended"))}
        source = str(raw["source"])
        if not source.startswith("human:"):
            raise ValueError("a label must be a person's")
        if raw["success"] not in (True, False, None):
            raise ValueError("success is true, false or null")
        return {"label": {"episode": str(raw["episode"]), "success": raw["success"], "source": source}}
    except (ValueError, KeyError, TypeError, OSError) as error:
        return {"unreadable": str(error)[:200]}
