"""What a person said of an episode, as an entry of the store's index: who, what, having seen how much, and where.

Knows the entry's form and what a person's name looks like. What follows from the entries is `annotations`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ratchet_vla.episodes.file.format import EpisodeEnding
from ratchet_vla.errors import RatchetError

Verdict = Literal["success", "failure", "discard"]
VERDICTS: tuple[Verdict, ...] = ("success", "failure", "discard")
HUMAN = "human:"  # what a person's source begins with; the name follows
LONGEST_NAME, LONGEST_NOTE = 60, 2000


@dataclass(frozen=True)
class Seen:
    """What somebody saw before judging. share: of the episode's frames, in [0, 1]; seconds: time spent.

    via: "page", "terminal", "ros", "operator" (buttons, while the attempt ran or at its end) or the name of a program.
    """

    share: float
    seconds: float
    cameras: tuple[str, ...] = ()
    via: str = ""


BESIDE_THE_ARM = Seen(1.0, 0.0, (), "operator")  # who ends an attempt has watched it


@dataclass(frozen=True)
class Label:
    """One judgement. number, time: of its entry in the index. settles: given to end a dispute."""

    number: int
    time: str
    episode: str
    verdict: Verdict
    person: str
    note: str
    seen: Seen
    settles: bool = False

    @classmethod
    def of(cls, number: int, time: str, body: Mapping[str, Any]) -> Label:
        """The label that an entry's body holds."""
        seen = Seen(**{**body["seen"], "cameras": tuple(body["seen"]["cameras"])})
        return cls(
            number=number,
            time=time,
            episode=body["episode"],
            verdict=body["verdict"],
            person=body["person"],
            note=body["note"],
            seen=seen,
            settles=body["settles"],
        )


def body_of(
    episode: str, verdict: str, person: str, *, note: str = "", seen: Seen | None = None, settles: bool = False
) -> dict[str, Any]:
    """The body of a label's entry. episode: the full id. seen: nothing, where nobody knows.

    Raises:
        RatchetError: episode.bad_verdict, episode.no_person.
    """
    if verdict not in VERDICTS:
        raise RatchetError("episode.bad_verdict", f"{verdict!r} is no verdict", fix=f"one of {', '.join(VERDICTS)}")
    return {
        "episode": episode,
        "verdict": verdict,
        "person": named(person),
        "note": note.strip()[:LONGEST_NOTE],
        "seen": dataclasses.asdict(seen or Seen(0.0, 0.0)),
        "settles": settles,
    }


def named(person: str) -> str:
    """A person's name as it is stored. Raises RatchetError episode.no_person."""
    name = " ".join(person.split())
    if not name or ":" in name or len(name) > LONGEST_NAME:
        raise RatchetError(
            "episode.no_person",
            "a judgement needs a person's name",
            fix=f"give a name without ':', up to {LONGEST_NAME} letters",
        )
    return name


def recorded(episode: str, ending: EpisodeEnding) -> list[tuple[str, dict[str, Any]]]:
    """What a person said while the episode was recorded, as entries for the index: the buttons beside the arm."""
    if ending.success is None or not ending.success_source.startswith(HUMAN):
        return []
    verdict = "success" if ending.success else "failure"
    entries = []
    for person in ending.success_source.removeprefix(HUMAN).split("+"):
        with suppress(RatchetError):  # a name that is none: the episode is kept, and nobody has judged it
            entries.append(("label", body_of(episode, verdict, person, seen=BESIDE_THE_ARM)))
    return entries
