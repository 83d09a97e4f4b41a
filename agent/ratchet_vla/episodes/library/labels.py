"""An annotator's label on an episode, as an entry of the store's index: who, what, having viewed how much, and where.

Knows the entry's form and what an annotator's name looks like. What follows from the entries is `annotations`'s.
Entries on disk keep the keys that they have always had: "verdict", "person", "seen".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ratchet_vla.episodes.file.format import EpisodeEnding
from ratchet_vla.errors import RatchetError

LabelValue = Literal["success", "failure", "discard"]
LABEL_VALUES: tuple[LabelValue, ...] = ("success", "failure", "discard")
HUMAN = "human:"  # what an annotator's source begins with; the name follows
LONGEST_NAME = 60
LONGEST_NOTE = 2000


@dataclass(frozen=True)
class Viewed:
    """What an annotator watched before labelling. share: of the episode's frames, in [0, 1]; seconds: time spent.

    via: "page", "terminal", "ros", "operator" (buttons, while the attempt ran or at its end) or the name of a program.
    """

    share: float
    seconds: float
    cameras: tuple[str, ...] = ()
    via: str = ""


BESIDE_THE_ARM = Viewed(1.0, 0.0, (), "operator")  # who ends an attempt has watched it


@dataclass(frozen=True)
class Label:
    """One annotator's word on one episode.

    number, time: of its entry in the index. settles: given to end a dispute.
    """

    number: int
    time: str
    episode: str
    value: LabelValue
    annotator: str
    note: str
    viewed: Viewed
    settles: bool = False

    @classmethod
    def of(cls, number: int, time: str, body: Mapping[str, Any]) -> Label:
        """The label that an entry's body holds."""
        viewed = Viewed(**{**body["seen"], "cameras": tuple(body["seen"]["cameras"])})
        return cls(
            number=number,
            time=time,
            episode=body["episode"],
            value=body["verdict"],
            annotator=body["person"],
            note=body["note"],
            viewed=viewed,
            settles=body["settles"],
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data under the keys of the index's entries, for JSON."""
        return {
            "number": self.number,
            "time": self.time,
            "episode": self.episode,
            "verdict": self.value,
            "person": self.annotator,
            "note": self.note,
            "seen": dataclasses.asdict(self.viewed),
            "settles": self.settles,
        }


def body_of(
    episode: str, value: str, annotator: str, *, note: str = "", viewed: Viewed | None = None, settles: bool = False
) -> dict[str, Any]:
    """The body of a label's entry. episode: the full id. viewed: nothing, where nobody knows.

    Raises:
        RatchetError: episode.unknown_label, episode.no_annotator.
    """
    if value not in LABEL_VALUES:
        raise RatchetError("episode.unknown_label", f"{value!r} is no label", fix=f"one of {', '.join(LABEL_VALUES)}")
    return {
        "episode": episode,
        "verdict": value,
        "person": annotator_name(annotator),
        "note": note.strip()[:LONGEST_NOTE],
        "seen": dataclasses.asdict(viewed or Viewed(0.0, 0.0)),
        "settles": settles,
    }


def annotator_name(typed: str) -> str:
    """An annotator's name as it is stored. Raises RatchetError episode.no_annotator."""
    clean_name = " ".join(typed.split())
    if not clean_name or ":" in clean_name or len(clean_name) > LONGEST_NAME:
        raise RatchetError(
            "episode.no_annotator",
            "a label needs its annotator's name",
            fix=f"give a name without ':', up to {LONGEST_NAME} letters",
        )
    return clean_name


def recorded(episode: str, ending: EpisodeEnding) -> list[tuple[str, dict[str, Any]]]:
    """Labels given while the episode was recorded, as entries for the index: the buttons beside the arm."""
    if ending.success is None or not ending.success_source.startswith(HUMAN):
        return []
    value = "success" if ending.success else "failure"
    entries = []
    for annotator in ending.success_source.removeprefix(HUMAN).split("+"):
        with suppress(RatchetError):  # a name that is none: the episode is kept, without a label
            entries.append(("label", body_of(episode, value, annotator, viewed=BESIDE_THE_ARM)))
    return entries
