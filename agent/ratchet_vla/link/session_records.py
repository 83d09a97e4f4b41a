"""Records sent through the outbox beside episodes: the end of a session, an annotator's label.

Knows their form. They are files, not messages, so that they are as durable as episodes and keep their place among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ratchet_vla.errors import RatchetError

SESSION = "session"
LABEL = "label"
EPISODE = "episode"


def session_record(
    session: str, ended: bool, manifest: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]
) -> bytes:
    """Encode a session for the learner: its manifest and its episodes (key and SHA-256 each)."""
    session_fields = {
        "session": session,
        "ended": ended,
        "manifest": dict(manifest),
        "episodes": [dict(episode) for episode in episodes],
    }
    return (json.dumps(session_fields) + "\n").encode()


def label_record(episode: str, success: bool | None, annotator: str, note: str = "") -> bytes:
    """Encode an annotator's label for the learner.

    Args:
        episode: SHA-256 of the episode's file.
        success: what the annotator saw; None withdraws an earlier label, as when annotators disagree.
        annotator: name, not empty.

    Raises:
        RatchetError: link.no_annotator without a name: an unnamed label is none.
    """
    if not annotator.strip():
        raise RatchetError("link.no_annotator", "a label needs its annotator's name", fix="say who watched the episode")
    source = f"human:{annotator.strip()}"
    return (json.dumps({"episode": episode, "success": success, "source": source, "note": note}) + "\n").encode()
